"""The processes of a run, as ``torchrun`` starts them: who they are, and what they tell each other."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

# A process that ends closes its connections, which ends the others at once. A machine that is gone is noticed after this.
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among ``size``; one that is alone needs no process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: np.ndarray) -> tuple[np.ndarray, int]:
        """This process's part, and its length. One that gets nothing takes one item, which counts 0 times: every process
        computes as often as the others."""
        part = np.array_split(items, self.size)[self.rank]
        return (part, len(part)) if len(part) else (items[:1], 0)

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the processes."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values)
        return values.tolist()

    def of_first(self, function: Callable[[], object]) -> object:
        """What ``function()`` returns in the first process, which alone calls it. Its error is everyone's."""
        if self.size == 1:
            return function()
        told: list = [None, None]
        failed = None
        if self.is_first:
            try:
                told[0] = function()
            except (ValueError, OSError) as error:
                failed, told[1] = (
                    error,
                    (type(error) if type(error) in (ValueError, OSError) else ValueError, str(error)),
                )
        dist.broadcast_object_list(told, src=0)
        if failed is not None:
            raise failed
        if told[1] is not None:
            kind, message = told[1]
            raise kind(message)
        return told[0]


ALONE = Processes()


def start(on_gpu: bool) -> Processes:
    """Join the processes that ``torchrun`` has started; without it there is one."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return ALONE
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    found = Processes(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank())
    if found.size == 1:
        dist.destroy_process_group()
        return ALONE
    return found


def end(processes: Processes) -> None:
    """After a run that has ended well. After an error nobody waits: the connections end with the process."""
    if processes.size > 1:
        dist.barrier()
        dist.destroy_process_group()
