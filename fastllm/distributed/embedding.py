"""``embedding`` of a table whose rows are cut over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm import functional as F
from fastllm.backends import native
from fastllm.distributed import shard as shard_module
from fastllm.distributed.shard import Shard, refuse_second_derivative
from fastllm.operations.checks import check_device, check_given
from fastllm.operations.declaration import DTYPES


class _Embedding(torch.autograd.Function):
    """Every process looks its rows up, and the sum over processes is the table's: the others add zeros.

    The incoming gradient is the same in every process, so that backward needs no collective.
    """

    @staticmethod
    def forward(
        ctx, weight: Tensor, ids: Tensor, padding_idx, by_frequency: bool, sparse: bool, shard: Shard
    ) -> Tensor:
        mine, place = shard.here(ids)
        skipped = ~mine if padding_idx is None else ~mine | (ids == padding_idx)
        ctx.save_for_backward(place.masked_fill(skipped, shard.size))
        ctx.options, ctx.shard = (by_frequency, sparse), shard
        if shard.size == 0:
            output = weight.new_zeros((*ids.shape, weight.shape[1]))
        else:
            output = F.embedding(place, weight.detach()).masked_fill_(~mine.unsqueeze(-1), 0)
        return shard.sum_(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        refuse_second_derivative(ctx.shard.op)
        # One row more, which takes what is not this process's and what is padding, and is dropped.
        (places,) = ctx.saved_tensors
        rows, (by_frequency, sparse) = ctx.shard.size, ctx.options
        if sparse:
            grad = torch.ops.aten.embedding_backward(grad_output, places, rows + 1, rows, False, True)
            shape = (rows, grad_output.shape[-1])
            grad = torch.sparse_coo_tensor(grad._indices(), grad._values(), shape, check_invariants=False)
        elif native("embedding", grad_output, places) is None:
            grad = torch.ops.aten.embedding_dense_backward(grad_output, places, rows + 1, rows, by_frequency)[:rows]
        else:
            grad = torch.ops.fastllm.embedding_backward(grad_output, places, rows + 1, rows, by_frequency)[:rows]
        return grad, None, None, None, None, None


@torch.compiler.disable
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`fastllm.functional.embedding` of a table whose rows are cut over processes.

    Two collectives forward, none backward.

    Parameters
    ----------
    input : Tensor
        ``(*)`` ids of the whole vocabulary, the same in every process.
    weight : Tensor
        ``(V_local, D)``: this process's rows.
    padding_idx : int, optional
        A row of the whole vocabulary whose gradient is zero; a negative one counts from the end of the whole.
    vocab_start : int
        The first row that this process holds. The parts are of any size, also of none, and together the whole.
    group : ProcessGroup, optional
        The processes; all of them if not given.
    max_norm, norm_type, scale_grad_by_freq, sparse
        As for :func:`fastllm.functional.embedding`, and the same in every process.

    Returns
    -------
    Tensor
        ``(*, D)``, the same bits in every process. The gradient that comes in must be the same in every process, too.

    Raises
    ------
    IndexError
        An id outside the vocabulary: in every process.
    RuntimeError
        No process group, or one without this process; shapes, dtypes and devices as in the plain function; a second
        derivative.
    ValueError
        On the CPU, parts with gaps or overlaps.
    AssertionError
        ``padding_idx`` outside ``[-V, V)``.
    An error that one process alone finds leaves the others waiting for it.
    """
    op = "embedding"
    check_given(op, input=input, weight=weight)
    if padding_idx is not None:
        padding_idx = F._integer(op, "padding_idx", padding_idx)
    F._check_type(op, "scale_grad_by_freq", scale_grad_by_freq, bool)
    F._check_type(op, "sparse", sparse, bool)
    if weight.dim() != 2:
        raise RuntimeError(f"{op}: weight must be 2-D (rows, features), got {weight.dim()}-D {list(weight.shape)}")
    if input.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{op}: input must be int64 or int32 ids, got {input.dtype}")
    check_device(op, "input", input, "weight", weight.device)
    if weight.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if sparse and scale_grad_by_freq:
        raise RuntimeError(f"{op}: scale_grad_by_freq is not supported for a sparse gradient")
    shard = Shard.of(op, vocab_start, weight.shape[0], group, weight.device)
    if padding_idx is not None:
        if shard_module.may_look(input.device):
            total = int(shard.total)
            if not -total <= padding_idx < max(total, 1):
                raise AssertionError(f"{op}: padding_idx must be in [{-total}, {total}), got {padding_idx}")
        if padding_idx < 0:
            padding_idx = padding_idx + shard.total  # a tensor: a GPU is not waited for
    shard.check_ids("input", input)
    if max_norm is not None and shard.size:
        mine, place = shard.here(input)
        # Rows that are looked up and no others: what is not here stands for a row that is, or for none.
        place = place[mine]
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), place, max_norm, norm_type)
    return _Embedding.apply(weight, input, padding_idx, scale_grad_by_freq, sparse, shard)
