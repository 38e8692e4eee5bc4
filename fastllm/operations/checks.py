"""Checks of arguments that several operations share, with PyTorch's exception types."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastllm.operations.declaration import DTYPES
from fastllm.operations.node import needs_grad


def check_given(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"{op}: {name} must be a tensor, got None")


def is_placed(tensor: object) -> bool:
    """Whether it is a ``DTensor``, of which processes hold parts or copies."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def check_device(op: str, name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise RuntimeError(f"{op}: {name} must be on {other}'s device {device}, got {tensor.device}")


def check_linear(op: str, input_name: str, input: Tensor, weight_name: str, weight: Tensor, bias_name: str,
                 bias: Tensor | None) -> None:  # fmt: skip
    """What PyTorch's linear checks: ``input (*, K)``, ``weight (N, K)``, ``bias (N,)`` or None, of one dtype and device."""
    check_given(op, **{input_name: input, weight_name: weight})
    if input.dim() < 1:
        raise RuntimeError(f"{op}: {input_name} must have at least 1 dimension, got 0")
    if weight.dim() != 2:
        raise RuntimeError(
            f"{op}: {weight_name} must be 2-D (out_features, in_features), got {weight.dim()}-D {list(weight.shape)}"
        )
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{op}: {input_name} must be of shape (*, {weight.shape[1]}) for {weight_name} {list(weight.shape)}, "
            f"got {list(input.shape)}"
        )
    if input.dtype != weight.dtype:
        raise RuntimeError(f"{op}: {weight_name} must have {input_name}'s dtype {input.dtype}, got {weight.dtype}")
    check_device(op, weight_name, weight, input_name, input.device)
    if input.dtype not in DTYPES:
        raise RuntimeError(f"{op}: {input_name} must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise RuntimeError(f"{op}: {bias_name} must be of shape ({weight.shape[0]},), got {list(bias.shape)}")
    if bias.dtype != input.dtype:
        raise RuntimeError(f"{op}: {bias_name} must have {input_name}'s dtype {input.dtype}, got {bias.dtype}")
    check_device(op, bias_name, bias, input_name, input.device)


def broadcasts_bias(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's linear would expand the bias to its output: any other shape than one number for each feature."""
    if bias is None or input is None or weight is None or weight.dim() != 2 or input.dim() == 0:
        return False
    if bias.dim() == 1 and bias.shape[0] == weight.shape[0]:
        return False
    output = (*input.shape[:-1], weight.shape[0])
    if bias.dim() > len(output):
        return False
    return all(b in (1, o) for b, o in zip(reversed(bias.shape), reversed(output), strict=False))


def as_rows(input: Tensor) -> Tensor:
    """``(*, K)`` as ``(rows, K)``: a view if its layout allows one."""
    if input.dim() == 2:
        return input
    rows = 1
    for size in input.shape[:-1]:
        rows = rows * size
    return input.reshape(rows, input.shape[-1])


def check_loss_options(op: str, reduction: int, label_smoothing: float, softcap: float | None) -> None:
    if not 0 <= reduction <= 2:
        raise ValueError(f"{op}: reduction must be 0 (none), 1 (mean) or 2 (sum), got {reduction}")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{op}: label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")


def checked_indices(op: str, target: Tensor) -> Tensor:
    """Class indices of a kind that the kernels read: int64 or int32, contiguous."""
    if target.dtype in (torch.int64, torch.int32):
        return target.contiguous()
    if target.dtype == torch.uint8:
        return target.long()
    raise RuntimeError(f"{op}: target must be int64 or int32 class indices, got {target.dtype}")


def check_class_weight(op: str, weight: Tensor | None, like: Tensor, classes: int, probabilities: bool) -> None:
    """One number for each class; PyTorch differentiates by them for class probabilities alone."""
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"{op}: weight must be of shape ({classes},), one number for each class, got {list(weight.shape)}"
        )
    if weight.dtype != like.dtype:
        raise RuntimeError(f"{op}: weight must have input's dtype {like.dtype}, got {weight.dtype}")
    check_device(op, "weight", weight, "input", like.device)
    if not probabilities and needs_grad(weight):
        raise RuntimeError(f"{op}: weight must not require a gradient (pass weight.detach()), got one that does")


def probability_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of a loss with class probabilities: PyTorch multiplies logits, probabilities and weights, and promotes."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None and weight.is_floating_point():
        dtype = torch.promote_types(dtype, weight.dtype)
    return dtype
