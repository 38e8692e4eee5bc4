"""A vocabulary cut over the processes of a group: who holds which rows, and the collectives over it."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def checked_group(op: str, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group; None: that of all processes.

    Raises
    ------
    RuntimeError
        There is none yet, or this process is not in it.
    TypeError
        ``group`` is something else.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{op}: group must be initialised: call torch.distributed.init_process_group first")
    if group is None:
        return dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(f"{op}: group must hold this process, rank {dist.get_rank()}, got a group without it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group


def may_look(device: torch.device) -> bool:
    """Whether the host may read numbers: it would have to wait for those of a GPU."""
    return device.type == "cpu"


def sum_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all processes, in place."""
    if tensor.numel() > 0:
        dist.all_reduce(tensor, group=group)
    return tensor


@dataclass
class Shard:
    """The rows ``[start, start + size)`` of a vocabulary, which this process holds."""

    op: str
    start: int
    size: int
    group: dist.ProcessGroup
    total: Tensor  # 0-dim int64: the rows of all processes

    @classmethod
    def of(cls, op: str, vocab_start: int, size: int, group: dist.ProcessGroup | None, device: torch.device) -> Shard:
        """Tell the others what this process holds: one collective, of two numbers.

        Raises
        ------
        TypeError, ValueError
            ``vocab_start`` is no number of a row. On the CPU, also gaps and overlaps: all processes raise.
        """
        group = checked_group(op, group)
        if isinstance(vocab_start, bool):
            raise TypeError(f"{op}: vocab_start must be int, got {vocab_start!r}")
        try:
            start = operator.index(vocab_start)
        except TypeError:
            raise TypeError(
                f"{op}: vocab_start must be int, got {vocab_start!r} of type {type(vocab_start).__name__}"
            ) from None
        if start < 0:
            raise ValueError(f"{op}: vocab_start must be at least 0, got {start}")
        shard = cls(op, start, size, group, torch.empty(0))
        own = torch.full((2,), size, dtype=torch.int64, device=device)
        own[0].fill_(start)  # numbers that a GPU fills in: a copy from the host would be waited for
        held = shard.gather(own)
        shard.total = held[:, 1].sum()
        if may_look(device):
            _check_cover(op, held.tolist())
        return shard

    def gather(self, tensor: Tensor) -> Tensor:
        """``(processes, *)``: the tensors of all processes, in the order of their ranks."""
        parts = tensor.new_empty((self.group.size(), *tensor.shape))
        if tensor.numel() > 0:  # of the same size in every process
            dist.all_gather(list(parts.unbind(0)), tensor.contiguous(), group=self.group)
        return parts

    def sum_(self, tensor: Tensor) -> Tensor:
        return sum_(tensor, self.group)

    def here(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids are rows of this process, and their places in it (0 for the others)."""
        places = ids.long() - self.start
        mine = (places >= 0) & (places < self.size)
        return mine, places.masked_fill(~mine, 0)

    def check_ids(self, name: str, ids: Tensor, counted: Tensor | None = None) -> None:
        """IndexError for an id outside the vocabulary; on a GPU an assertion there, for the host does not wait to look."""
        outside = (ids < 0) | (ids >= self.total)
        if counted is not None:
            outside = outside & counted
        if not may_look(ids.device):
            torch._assert_async(~outside.any(), f"{self.op}: {name} holds an id outside the vocabulary")
        elif outside.any():
            position = int(outside.flatten().nonzero()[0])
            raise IndexError(
                f"{self.op}: {name} must be in [0, {int(self.total)}), the rows of all processes, "
                f"got {int(ids.flatten()[position])} at position {position}"
            )


def _check_cover(op: str, held: list[list[int]]) -> None:
    end = 0
    for start, size in sorted((start, size) for start, size in held if size > 0):
        if start != end:
            told = ", ".join(f"[{start}, {start + size})" for start, size in held)
            raise ValueError(
                f"{op}: vocab_start and the sizes of the shards must cover the vocabulary without gaps and overlaps, "
                f"got the rows {told} of the ranks 0 to {len(held) - 1}"
            )
        end = start + size


def refuse_second_derivative(op: str) -> None:
    """In a backward pass: RuntimeError under ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: second derivatives (create_graph=True) are not implemented over several processes")
