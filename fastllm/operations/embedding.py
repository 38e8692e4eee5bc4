"""embedding: ``weight[input]``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.operations.checks import check_device, check_given
from fastllm.operations.declaration import DTYPES, Kernel, Operation
from fastllm.operations.node import needs_grad


def _forward_fake(weight, input):
    return weight.new_empty(*input.shape, weight.shape[1])


def _backward_fake(grad_output, input, rows, padding_idx, scale_grad_by_freq):
    return grad_output.new_empty(rows, grad_output.shape[-1])


class Embedding(torch.autograd.Function):
    """Keeps the ids. A sparse gradient, and one that is differentiated again, is PyTorch's own."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool) -> Tensor:
        ctx.save_for_backward(input)
        ctx.options = weight.shape[0], padding_idx, scale_grad_by_freq, sparse
        return torch.ops.fastllm.embedding_forward(weight, input)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (ids,) = ctx.saved_tensors
        rows, padding_idx, by_frequency, sparse = ctx.options
        if sparse and by_frequency:
            raise RuntimeError("embedding: scale_grad_by_freq is not supported for a sparse gradient")
        if torch.is_grad_enabled() or sparse:
            if by_frequency:
                # PyTorch's second derivative forgets the division by the frequency, which is therefore made before.
                flat = ids.reshape(-1)
                counts = torch.bincount(flat)[flat].to(grad_output.dtype)
                grad_output = grad_output / counts.reshape(ids.shape).unsqueeze(-1)
            grad = torch.ops.aten.embedding_backward(grad_output, ids, rows, padding_idx, False, sparse)
        else:
            grad = torch.ops.fastllm.embedding_backward(grad_output, ids, rows, padding_idx, by_frequency)
        return None, grad, None, None, None


def embedding(input: Tensor, weight: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool) -> Tensor:
    op = "embedding"
    check_given(op, input=input, weight=weight)
    if weight.dim() != 2:
        raise RuntimeError(f"{op}: weight must be 2-D (rows, features), got {weight.dim()}-D {list(weight.shape)}")
    if input.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{op}: input must be int64 or int32 ids, got {input.dtype}")
    check_device(op, "input", input, "weight", weight.device)
    if weight.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if needs_grad(weight):
        return Embedding.apply(input, weight, padding_idx, scale_grad_by_freq, sparse)
    return torch.ops.fastllm.embedding_forward(weight, input)


OPERATION = Operation(
    "embedding",
    "(Tensor input, Tensor weight, int padding_idx, bool scale_grad_by_freq, bool sparse) -> Tensor",
    embedding,
    (
        Kernel("embedding_forward", "(Tensor weight, Tensor input) -> Tensor", _forward_fake),
        Kernel(
            "embedding_backward",
            "(Tensor grad_output, Tensor input, SymInt rows, int padding_idx, bool scale_grad_by_freq) -> Tensor",
            _backward_fake,
        ),
    ),
)
