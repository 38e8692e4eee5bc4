"""Processes with a gloo group between them, which run function after function for the tests."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

SECONDS = 60  # that a function may take


class Processes:
    """``size`` processes. They are forked from one that has imported torch, and end with the ``with`` block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "fastllm", "fastllm.distributed"])
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (there, rank, self.size, store, sys.path)
            self.processes.append(context.Process(target=_work, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(here)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def run(self, function: Callable, *arguments: object) -> list:
        """What ``function(rank, size, *arguments)`` returns in each process. It is found by its module and name.

        Raises
        ------
        AssertionError
            One of them failed, or took too long: all are ended, and the next call starts others.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        end, results, failed = time.monotonic() + SECONDS, [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self.__exit__()
                raise AssertionError(f"rank {rank} did not answer in {SECONDS} s; {failed or 'no other failed'}")
            good, value = pipe.recv()
            results.append(value)
            if not good:
                failed.append(f"rank {rank}: {value}")
        if failed:
            self.__exit__()
            raise AssertionError("\n".join(failed))
        return results


def _work(pipe, rank: int, size: int, store: str, path: list[str]) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    sys.path[:] = path
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS / 6)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        module, name, arguments = pipe.recv()
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send((True, function(rank, size, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
