"""The definition of every operation in plain PyTorch: what the kernels are tested against, and the fallback where no
kernel serves a tensor. Differentiable any number of times, and by PyTorch's transforms.

``inplace_backward`` has no counterpart here: it permits the kernels to overwrite the logits, which are checked for it
under every backend (``functional``), and this backend leaves them as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm.invariance import linear


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``weight[input]``."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``max(input @ weight.T + bias, 0)``."""
    return torch.relu(linear(input, weight, bias))


def relu_mlp(input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """``max(input @ weight1.T + bias1, 0) @ weight2.T + bias2``."""
    return linear(torch.relu(linear(input, weight1, bias1)), weight2, bias2)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """``reduction(weight * (input - target)**2)``; ``mean`` divides by the sum of the weights where they are given."""
    if weight is None:
        expanded_input, expanded_target = torch.broadcast_tensors(input, target)
        return F.mse_loss(expanded_input, expanded_target, reduction=reduction)
    if weight.size() != input.size():
        raise ValueError(f"mse_loss: weight must have input's size {tuple(input.shape)}, got {tuple(weight.shape)}")
    return weighted(input, target, reduction, weight)


def weighted(input: Tensor, target: Tensor, reduction: str, weight: Tensor) -> Tensor:
    """:func:`mse_loss` with ``weight``, which may be of a size that ``input`` was broadcast from."""
    squares = torch.square(input - target) * weight
    if reduction == "none":
        return squares
    if reduction == "sum":
        return squares.sum()
    if reduction == "mean":
        return squares.sum() / weight.sum()
    raise ValueError(f"mse_loss: reduction must be one of 'none', 'mean', 'sum', got {reduction!r}")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Cross-entropy of capped logits plus the z-loss.

    With :math:`z = x`, or :math:`z = c\tanh(x / c)` under ``softcap`` c, and s = ``lse_square_scale``:

    .. math::
        \ell_i = \mathrm{CE}(z_i, y_i) + s\,[y_i \ne \text{ignore\_index}]\,\Bigl(\log\sum_c e^{z_{ic}}\Bigr)^2

    ``CE`` is :func:`torch.nn.functional.cross_entropy` with class weights and label smoothing; the z-loss (PaLM,
    arXiv:2204.02311) is neither weighted nor smoothed. ``mean`` divides the sum of both by what PyTorch divides by:
    the class weights of the counted targets, or their number without ``weight``; for class probabilities, where every
    row counts, the number of rows. The z-loss is squared and summed in float32 (float64 for float64).
    """
    logits = input if softcap is None else softcap * torch.tanh(input / softcap)
    probabilities = target.shape == input.shape
    if not probabilities and target.dtype in (torch.int32, torch.uint8):
        target = target.long()
    loss = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if lse_square_scale == 0.0:
        return loss
    class_dim = 0 if input.dim() == 1 else 1
    wide = logits if logits.dtype == torch.float64 else logits.float()
    squares = lse_square_scale * torch.logsumexp(wide, class_dim).square()
    if probabilities:
        divisor = squares.numel() or 1
    else:
        counted = target != ignore_index
        squares = torch.where(counted, squares, 0.0)
        if weight is None:
            divisor = counted.sum()
        else:
            divisor = torch.where(counted, weight.to(wide.dtype)[torch.where(counted, target, 0)], 0.0).sum()
    if reduction != "none":
        squares = squares.sum() if reduction == "sum" else squares.sum() / divisor
    return (loss + squares).to(loss.dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """``cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``."""
    logits = linear(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, lse_square_scale, softcap)


def log_probs(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = ("log_prob",),
    top_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """The fields of :func:`fastllm.functional.log_probs` that ``outputs`` names, in float32 (float64 for float64)."""
    counted = target != ignore_index
    rows = counted[..., None]
    x = torch.where(rows, input if input.dtype == torch.float64 else input.float(), 0.0)
    if x.shape[-1] == 0:
        x = F.pad(x, (0, 1))  # every row is ignored
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    z = z / (
        torch.where(counted, temperature, 1.0).to(z.dtype)[..., None]
        if isinstance(temperature, Tensor)
        else temperature
    )
    # Relative to the largest, whose own 1 is left to log1p: a sum of both would round small tails off.
    argmax = z.argmax(-1, keepdim=True)
    largest = z.gather(-1, argmax)
    below = (z - largest).scatter(-1, argmax, 0.0)
    largest = largest[..., 0]
    below = below + torch.where(largest.isfinite(), 0.0, torch.nan)[..., None]
    others = below.exp().scatter(-1, argmax, 0.0)
    tail = others.sum(-1).log1p()
    log_p = below - tail[..., None]
    formulas = {
        "log_prob": lambda: log_p.gather(-1, torch.where(counted, target, 0).long()[..., None])[..., 0],
        "entropy": lambda: -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1),
        "lse": lambda: torch.where(largest.isinf(), largest, largest + tail),
        "argmax": lambda: argmax[..., 0],
        "mean_logit": lambda: z.mean(-1),
        "log_sum_sq_probs": lambda: others.square().sum(-1).log1p() - 2 * tail,
        "top_log_prob": lambda: log_p.gather(-1, torch.where(rows, top_ids, 0)),
    }
    found = {}
    for name in outputs:
        value = formulas[name]()
        of_rows = rows if name == "top_log_prob" else counted
        value = torch.where(of_rows, value, -1 if name == "argmax" else 0.0)
        found[name] = value.detach() if name in ("mean_logit", "log_sum_sq_probs") else value
    return found


def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, ignore_index: int, *options
) -> dict[str, Tensor]:
    """``log_probs(F.linear(input, linear_weight, linear_bias), target, ...)``; rows of ignored targets are not read."""
    x = torch.where((target != ignore_index)[..., None], input, 0.0)
    return log_probs(linear(x, linear_weight, linear_bias), target, ignore_index, *options)
