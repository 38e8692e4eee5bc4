"""The operations, with the signatures of ``torch.nn.functional``: changing the import is the whole migration.

Every function accepts float32, float64, bfloat16 and float16 tensors of any layout, keeps its sums in float32
(float64 for float64), rounds a result once, and gives the same bits when called again. Derivatives of any order,
``torch.compile``, autocast, activation checkpointing and PyTorch's function transforms work as for PyTorch's own
functions.

Which backend computes a call: ``fastllm.backends``.
"""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from fastllm import eager
from fastllm.backends import _PLAIN, has_kernels, holds_numbers, native
from fastllm.operations import log_probs as _log_probs
from fastllm.operations.checks import check_linear, is_placed
from fastllm.operations.declaration import DTYPES, REDUCTIONS, accumulator, autocast_to
from fastllm.operations.log_probs import LogProbs

__all__ = [
    "cross_entropy",
    "embedding",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_relu",
    "log_probs",
    "mse_loss",
    "relu_mlp",
]

_REDUCTIONS = {name: number for number, name in enumerate(REDUCTIONS)}
_REDUCTION_NAMES = REDUCTIONS  # `in` compares: a reduction that has no hash is another value, not an error
_ALL_IGNORED = ("nan", "zero")
_ACCEPTED: dict[type, tuple[type, ...]] = {  # by PyTorch, for an argument of that type
    bool: (bool, torch.SymBool),
    float: (numbers.Real, torch.SymInt, torch.SymFloat, Tensor),
}


def _reduction_name(op: str, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> str:
    """One of ``_REDUCTIONS``, from that or from the names and flags that PyTorch has deprecated, with its warnings."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction == "elementwise_mean":
        _reduction.get_enum(reduction)
        return "mean"
    if reduction not in _REDUCTION_NAMES:
        raise ValueError(f"{op}: reduction must be one of 'none', 'mean', 'sum', got {reduction!r}")
    return reduction


def _check_type(op: str, name: str, value: object, kind: type) -> None:
    if not isinstance(value, _ACCEPTED[kind]):
        raise TypeError(f"{op}: {name} must be {kind.__name__}, got {value!r} of type {type(value).__name__}")


def _integer(op: str, name: str, value: Any) -> Any:
    """An integer as PyTorch accepts one, or an object with ``__index__``, such as NumPy's integers and 0-dim arrays."""
    if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and torch.compiler.is_compiling()):
        return value  # the compiled operation takes it: its value would end the trace
    if not isinstance(value, bool) and not (isinstance(value, Tensor) and value.dtype is torch.bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{op}: {name} must be int, got {value!r} of type {type(value).__name__}")


def _check_overwritable(input: Tensor) -> None:
    """What PyTorch asks of a tensor that an operation changes in place, and its reasons: parameters keep their numbers.

    Traced code overwrites nothing, and does not know views: there a leaf alone is found.
    """
    if not torch.is_grad_enabled() or not input.requires_grad:
        return
    wrong = None
    if input.is_leaf:
        wrong = "a leaf that requires a gradient"
    elif not torch.compiler.is_compiling() and input._is_view():
        if input._base is not None and input._base.is_leaf:
            wrong = "a view of a leaf that requires a gradient"
        elif torch._C._autograd._get_creation_meta(input) != torch._C._autograd.CreationMeta.DEFAULT:
            wrong = "one of several views made at once, or one made without gradients"
    if wrong is not None:
        raise RuntimeError(
            f"cross_entropy: input must be logits of your own for inplace_backward=True, which overwrites them with "
            f"their gradient, got {wrong}"
        )


def _check_numbers(op: str, label_smoothing: float, lse_square_scale: float, softcap: float | None) -> None:
    """The loss's options: their types, and the range of softcap, which PyTorch does not know."""
    if type(label_smoothing) is not float:
        _check_type(op, "label_smoothing", label_smoothing, float)
    if type(lse_square_scale) is not float:
        _check_type(op, "lse_square_scale", lse_square_scale, float)
    if softcap is None:
        return
    if type(softcap) is not float:
        _check_type(op, "softcap", softcap, float)
    if not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")


def _divided(
    op: str,
    loss: Callable[[str], Tensor],
    input: Tensor,
    target: Tensor,
    probabilities: bool,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: float | Tensor | None,
    all_ignored: str,
) -> Tensor:
    """``loss(reduction)``, its mean divided by ``num_items`` if given, and 0 for a divisor of 0 if ``all_ignored`` says so."""
    if all_ignored not in _ALL_IGNORED:
        raise ValueError(f"{op}: all_ignored must be 'nan' or 'zero', got {all_ignored!r}")
    if num_items is not None:
        _check_num_items(op, num_items, reduction, input.device)
    zero = all_ignored == "zero"
    if reduction != "mean" or (num_items is None and not zero):
        return loss(reduction)
    if num_items is None and probabilities:  # every row counts
        return loss("mean" if target.numel() > 0 else "sum")
    if num_items is None and weight is None:
        mean = loss("mean")  # NaN if no row counts, but its gradient in an ignored row is 0
        return mean.masked_fill((target == ignore_index).all(), 0.0)
    if input.dtype == torch.float16:
        total = loss("none")
        dtype, total = total.dtype, total.sum(dtype=torch.float32)
    else:
        total = loss("sum")
        dtype, total = total.dtype, total.to(accumulator(total.dtype))
    if num_items is None:
        assert weight is not None  # without, the mean was taken above
        counted = target != ignore_index
        classes = torch.where(counted, target, 0).long()
        num_items = torch.where(counted, weight.detach()[classes].to(total.dtype), 0.0).sum()
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(total.dtype)
    if zero:  # a sum divided by infinity is 0, and so are its gradients
        if isinstance(num_items, Tensor):
            num_items = torch.where(num_items == 0, math.inf, num_items)
        elif num_items == 0:
            num_items = math.inf
    return (total / num_items).to(dtype)


def _check_num_items(op: str, num_items: float | Tensor, reduction: str, device: torch.device) -> None:
    _check_type(op, "num_items", num_items, float)
    if reduction != "mean":
        raise ValueError(f"{op}: num_items must be None for another reduction than 'mean', got {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"{op}: num_items must be a number or a 0-dim tensor, got shape {tuple(num_items.shape)}")
        if num_items.device != device and num_items.device.type != "cpu":
            raise RuntimeError(f"{op}: num_items must be on {device}, as input, or on the CPU, got {num_items.device}")


def _check_shift(input: Tensor, linear_weight: Tensor, target: Tensor) -> None:
    op = "linear_cross_entropy"
    if linear_weight.dim() != 2:
        raise RuntimeError(f"{op}: linear_weight must be 2-D with shift=True, got shape {tuple(linear_weight.shape)}")
    if input.dim() not in (2, 3):
        raise RuntimeError(f"{op}: input must be 2-D or 3-D with shift=True, got shape {tuple(input.shape)}")
    if target.shape != input.shape[:-1]:
        raise RuntimeError(
            f"{op}: target must hold class indices of shape {tuple(input.shape[:-1])} with shift=True, "
            f"got shape {tuple(target.shape)}"
        )


def _next_targets(target: Tensor, ignore_index: int) -> Tensor:
    """The target of position t + 1 at position t; nothing at the last."""
    if target.dtype in (torch.int32, torch.uint8):  # which may not hold ignore_index
        target = target.long()
    following = target.roll(-1, -1)
    following[..., -1:] = ignore_index
    return following


def _check_ids(input: Tensor, rows: int) -> None:
    """An id outside the table is found before ``max_norm`` rescales any row in place."""
    outside = ((input < 0) | (input >= rows)).flatten()
    if outside.any():
        position = int(outside.nonzero()[0])
        raise IndexError(
            f"embedding: input must hold ids in [0, {rows}), the rows of weight, "
            f"got {int(input.flatten()[position])} at position {position}"
        )


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    r"""Look rows of a table up: :math:`y_{i,:} = W_{x_i,:}`.

    The gradient of a row is the sum of the incoming gradients of its positions, in float32 (float64 for float64) and
    in the order of positions, rounded once.

    Parameters
    ----------
    input : Tensor
        ``(*)`` ids, int64 or int32, each in ``[0, V)``.
    weight : Tensor
        ``(V, D)`` table.
    padding_idx : int, optional
        A row whose gradient is zero.
    max_norm, norm_type : float, optional
        Rows that are looked up and whose ``norm_type``-norm exceeds ``max_norm`` are rescaled to it first, in place.
    scale_grad_by_freq : bool
        Divide a row's gradient by the number of its positions.
    sparse : bool
        Make the gradient of ``weight`` a sparse COO tensor.

    Returns
    -------
    Tensor
        ``(*, D)``, of ``weight``'s dtype.

    Raises
    ------
    IndexError
        An id outside ``[0, V)``; the message names the id and its position.
    RuntimeError
        ``input`` of another dtype, ``weight`` not 2-D, or tensors on different devices.
    AssertionError
        ``padding_idx`` outside ``[-V, V)``.

    Notes
    -----
    Signature and semantics of :func:`torch.nn.functional.embedding`.
    """
    if type(weight) not in _PLAIN and (is_placed(weight) or is_placed(input)):
        from fastllm.distributed import dtensor

        return dtensor.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is not None and type(padding_idx) is not int:
        padding_idx = _integer("embedding", "padding_idx", padding_idx)
    if type(scale_grad_by_freq) is not bool or type(sparse) is not bool:
        _check_type("embedding", "scale_grad_by_freq", scale_grad_by_freq, bool)
        _check_type("embedding", "sparse", sparse, bool)
    ids = max_norm is not None and holds_numbers(input, weight) and input.dtype in (torch.int64, torch.int32)
    if ids and weight.dim() == 2:
        _check_ids(input, weight.size(0))
    operation = native("embedding", weight, input)
    if operation is None:
        return eager.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        padding_idx = -1
    else:
        rows = weight.size(0)
        if padding_idx < -rows or 0 < padding_idx >= rows:  # as PyTorch: 0 also for a table of no rows
            raise AssertionError(f"embedding: padding_idx must be in [{-rows}, {rows}), got {padding_idx}")
        if padding_idx < 0:
            padding_idx += rows
    if max_norm is not None:
        input = input.contiguous()
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    return operation(input, weight, padding_idx, scale_grad_by_freq, sparse)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Linear layer and ReLU: :math:`y = \max(x W^\top + b, 0)`.

    Bias and ReLU are applied to the sums before the only rounding; backward masks the incoming gradient and sums the
    bias's gradient in one pass. ``relu(NaN)`` is NaN.

    Parameters
    ----------
    input : Tensor
        ``(*, K)``.
    weight : Tensor
        ``(N, K)``, of ``input``'s dtype.
    bias : Tensor, optional
        ``(N,)``, of ``input``'s dtype.

    Returns
    -------
    Tensor
        ``(*, N)``.

    Raises
    ------
    RuntimeError
        Shapes, dtypes or devices that do not match.

    Notes
    -----
    ``torch.relu(torch.nn.functional.linear(input, weight, bias))``.
    """
    operation = native("linear_relu", input, weight, bias)
    if operation is None:
        return eager.linear_relu(input, weight, bias)
    return operation(input, weight, bias)


def relu_mlp(input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    r"""Two linear layers with a ReLU between: :math:`y = \max(x W_1^\top + b_1, 0)\, W_2^\top + b_2`.

    One autograd node; only the hidden activation is kept for backward.

    Parameters
    ----------
    input : Tensor
        ``(*, K)``.
    weight1, bias1 : Tensor, Tensor or None
        ``(H, K)`` and ``(H,)``.
    weight2, bias2 : Tensor, Tensor or None
        ``(N, H)`` and ``(N,)``.

    Returns
    -------
    Tensor
        ``(*, N)``.

    Raises
    ------
    RuntimeError
        Shapes, dtypes or devices that do not match.
    """
    operation = native("relu_mlp", input, weight1, bias1, weight2, bias2)
    if operation is None:
        return eager.relu_mlp(input, weight1, bias1, weight2, bias2)
    return operation(input, weight1, bias1, weight2, bias2)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error: :math:`\ell_i = w_i (x_i - t_i)^2`.

    Differences and sums are float32 for bfloat16 and float16, so float16 does not overflow where the loss is finite.

    Parameters
    ----------
    input, target : Tensor
        Broadcast against each other, with a warning if their sizes differ.
    size_average, reduce : bool, optional
        Deprecated, as in PyTorch.
    reduction : str
        ``"none"``, ``"sum"``, or ``"mean"``: divided by the number of elements, or by the sum of ``weight``.
    weight : Tensor, optional
        One factor for each element, of ``input``'s size.

    Returns
    -------
    Tensor
        0-dim, or the broadcast shape for ``"none"``.

    Raises
    ------
    ValueError
        Another ``reduction``, or ``weight`` of another size.
    RuntimeError
        Sizes that do not broadcast.

    Notes
    -----
    Signature and semantics of :func:`torch.nn.functional.mse_loss`.
    """
    if target.size() != input.size() and not torch.compiler.is_compiling():  # a warning would end the trace
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
    if size_average is not None or reduce is not None or reduction not in _REDUCTION_NAMES:
        if weight is not None and reduction == "elementwise_mean" and size_average is None and reduce is None:
            raise ValueError(
                "mse_loss: reduction must be one of 'none', 'mean', 'sum' with weight, got 'elementwise_mean'"
            )
        reduction = _reduction_name("mse_loss", reduction, size_average, reduce)
    operation = native("mse_loss", input, target, weight)
    if operation is None:
        return eager.mse_loss(input, target, reduction, weight)
    return operation(input, target, weight, _REDUCTIONS[reduction])


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: float | Tensor | None = None,
    all_ignored: str = "nan",
    inplace_backward: bool = False,
) -> Tensor:
    r"""Cross-entropy of logits :math:`x` and class :math:`y`: :math:`\ell = w_y(\log\sum_c e^{z_c} - z_y)`, with
    :math:`z = x`, or :math:`z = s\tanh(x/s)` under ``softcap`` s.

    Parameters
    ----------
    input : Tensor
        ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)`` logits.
    target : Tensor
        Class indices, int64 or int32, of input's shape without C, each in ``[0, C)`` or ``ignore_index``; or class
        probabilities of input's shape.
    weight : Tensor, optional
        ``(C,)`` weights of the classes.
    size_average, reduce : bool, optional
        Deprecated, as in PyTorch.
    ignore_index : int
        Targets that count neither in the loss nor in the mean's divisor; their logits are not read.
    reduction : str
        ``"none"``, ``"sum"``, or ``"mean"``: divided by the sum of the counted targets' weights (by the number of
        rows for class probabilities).
    label_smoothing : float
        Share in ``[0, 1]`` of the target that is spread evenly over the classes.
    lse_square_scale : float
        s adds ``s * logsumexp(z)**2`` to the loss of each counted row (the z-loss of PaLM, arXiv:2204.02311).
    softcap : float, optional
        Caps the logits (Gemma 2, arXiv:2408.00118).
    num_items : float or 0-dim Tensor, optional
        Under ``"mean"``, divide the sum of the losses by this instead of what it divides by itself: the number of
        counted targets of all micro-batches of a step, when gradients are accumulated over unequal ones. A tensor is on
        the input's device or the CPU, and is not read by the host.
    all_ignored : str
        A mean over nothing, whose divisor is 0: ``"nan"``, as in PyTorch, or ``"zero"``, a loss of 0 whose gradients are
        0.
    inplace_backward : bool
        Let backward write the gradient over the logits' storage, which must be an intermediate result: a leaf that
        requires a gradient, or a view of one, is a RuntimeError, as for PyTorch's operations in place. The logits keep
        their values until backward; a second backward through them is a RuntimeError. Logits whose rows are not
        contiguous in memory are copied first. The eager backend and compiled graphs overwrite nothing.

    Returns
    -------
    Tensor
        0-dim, or of the class indices' shape for ``"none"``; of input's dtype.

    Raises
    ------
    IndexError
        A class index outside ``[0, C)`` that is not ``ignore_index``.
    ValueError
        Another ``reduction`` or ``all_ignored``, batch sizes that do not match, ``softcap <= 0``, ``num_items`` of one
        dimension or more or with another reduction than ``"mean"``.
    RuntimeError
        Other shapes, dtypes or devices that do not match; ``label_smoothing`` outside ``[0, 1]``;
        ``inplace_backward`` for a leaf that requires a gradient, or a view of one.

    Notes
    -----
    Signature and semantics of :func:`torch.nn.functional.cross_entropy`. The softmax is taken online, block by block
    (arXiv:1805.02867), and under ``"mean"`` and ``"sum"`` the gradient is formed in the same visit of a row.

    ``num_items``, and ``all_ignored="zero"`` with ``weight``, divide the sum in float32 (float64 for float64) and round
    the quotient once more. The sum of float16 input is taken over rows rounded to float16, because it may itself be
    beyond that dtype's range; backward then forms the gradient from the saved logits.
    """
    if size_average is not None or reduce is not None or reduction not in _REDUCTION_NAMES:
        reduction = _reduction_name("cross_entropy", reduction, size_average, reduce)
    if type(ignore_index) is not int:
        ignore_index = _integer("cross_entropy", "ignore_index", ignore_index)
    _check_numbers("cross_entropy", label_smoothing, lse_square_scale, softcap)
    if type(input) not in _PLAIN and is_placed(input):
        from fastllm.distributed import dtensor

        return dtensor.cross_entropy(
            input,
            target,
            weight,
            reduction,
            num_items,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            softcap=softcap,
            all_ignored=all_ignored,
            inplace_backward=inplace_backward,
        )
    if num_items is not None or all_ignored != "nan":

        def loss(reduction: str) -> Tensor:
            return cross_entropy(
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                lse_square_scale=lse_square_scale,
                softcap=softcap,
                inplace_backward=inplace_backward,
            )

        probabilities = target.shape == input.shape
        return _divided(
            "cross_entropy", loss, input, target, probabilities, weight, ignore_index, reduction, num_items, all_ignored
        )
    operation = native("cross_entropy", input, target, weight)
    if inplace_backward:
        _check_overwritable(input)
    if operation is None:
        return eager.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing, lse_square_scale, softcap
        )
    return operation(
        input,
        target,
        weight,
        _REDUCTIONS[reduction],
        ignore_index,
        label_smoothing,
        lse_square_scale,
        softcap,
        inplace_backward,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: float | Tensor | None = None,
    all_ignored: str = "nan",
    shift: bool = False,
) -> Tensor:
    r"""``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without the N x V logits.

    Logits exist for a chunk of rows at a time: at most 80 MiB of them, 2 GiB on a GPU, unless the environment variable
    ``FASTLLM_LOSS_WORKSPACE`` gives another number of bytes, and never fewer than 64 rows. In bfloat16 and float16
    chunks are taken only where they need less memory than all logits at once, because several chunks add the gradient
    of ``linear_weight`` up in float32.

    Parameters
    ----------
    input : Tensor
        ``(N, D)`` or ``(D,)``; under ``shift``, ``(B, T, D)`` or ``(T, D)``.
    linear_weight : Tensor
        ``(V, D)``, or ``(V, d1, ..., D)`` for a K-dimensional loss; the latter holds its logits.
    target : Tensor
        ``(N,)`` class indices, int64 or int32, or ``(N, V)`` class probabilities; without N for ``(D,)`` input. Under ``shift``,
        ``(B, T)`` or ``(T,)`` class indices.
    linear_bias : Tensor, optional
        ``(V,)``, or ``(V, d1, ...)``.
    weight, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, num_items, all_ignored
        As for :func:`cross_entropy`; ``ignore_index=None`` means -100.
    shift : bool
        Score position t against target t + 1, and the last position, whose loss is 0, against nothing: the loss of a
        causal language model, for ids and their hidden states. Input whose rows are not evenly spaced is copied, other
        input is not.

    Returns
    -------
    Tensor
        0-dim, or of the class indices' shape for ``"none"``; of input's dtype.

    Raises
    ------
    As :func:`cross_entropy`, and RuntimeError for ``input`` that is neither 1-D nor 2-D (2-D nor 3-D under ``shift``),
    for ``linear_weight`` or ``linear_bias`` of a shape that does not match, for an ``ignore_index`` with class
    probabilities, and for class probabilities or a K-dimensional loss under ``shift``.

    Notes
    -----
    Signature of PyTorch 2.13's ``torch.nn.functional.linear_cross_entropy``, whose ``ignore_index`` is None unless
    given; here -100 counts as not given.
    """
    op = "linear_cross_entropy"
    if type(linear_weight) not in _PLAIN and (is_placed(linear_weight) or is_placed(input)):
        from fastllm.distributed import dtensor

        return dtensor.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            _reduction_name(op, reduction),
            num_items,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            softcap=softcap,
            all_ignored=all_ignored,
            shift=shift,
        )
    if linear_weight.dim() != 2:
        _check_linear(input, linear_weight, linear_bias)  # else the compiled operation checks, or eager after this
    if reduction not in _REDUCTION_NAMES:
        reduction = _reduction_name(op, reduction)
    if ignore_index is None:
        ignore_index = -100
    elif type(ignore_index) is not int:
        ignore_index = _integer(op, "ignore_index", ignore_index)
    _check_numbers(op, label_smoothing, lse_square_scale, softcap)
    if ignore_index != -100 and target.shape == (*input.shape[:-1], *linear_weight.shape[:-1]):
        raise RuntimeError(f"{op}: ignore_index must be None for class probabilities, got {ignore_index}")
    if shift is not False or num_items is not None or all_ignored != "nan":
        _check_type(op, "shift", shift, bool)
        shape = target.shape
        if shift:
            _check_shift(input, linear_weight, target)
            input, target = input.flatten(0, -2), _next_targets(target, ignore_index).flatten()

        def loss(reduction: str) -> Tensor:
            return linear_cross_entropy(
                input,
                linear_weight,
                target,
                linear_bias=linear_bias,
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                lse_square_scale=lse_square_scale,
                softcap=softcap,
            )

        probabilities = target.shape == (*input.shape[:-1], *linear_weight.shape[:-1])
        output = _divided(
            op, loss, input, target, probabilities, weight, ignore_index, reduction, num_items, all_ignored
        )
        return output.view(shape) if shift and reduction == "none" else output
    if linear_weight.dim() > 2:
        logits = _spatial_logits(input, linear_weight, linear_bias)
        return cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            softcap=softcap,
        )
    operation = native(op, input, linear_weight, target, linear_bias, weight)
    if operation is None:
        _check_linear(input, linear_weight, linear_bias)
        return eager.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
            lse_square_scale,
            softcap,
        )
    return operation(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        _REDUCTIONS[reduction],
        ignore_index,
        label_smoothing,
        lse_square_scale,
        softcap,
        False,
    )


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """The checks that PyTorch's linear_cross_entropy makes in Python, with its exception type."""
    op, size = "linear_cross_entropy", linear_weight.shape
    if input.dim() < 1 or input.dim() > 2:
        raise RuntimeError(f"{op}: input must be 1-D or 2-D, got shape {tuple(input.shape)}")
    if len(size) < 2:
        raise RuntimeError(f"{op}: linear_weight must be at least 2-D, got shape {tuple(size)}")
    if input.shape[-1] != size[-1]:
        raise RuntimeError(
            f"{op}: input must be of shape (*, {size[-1]}) for linear_weight {tuple(size)}, got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != size[:-1]:
        raise RuntimeError(f"{op}: linear_bias must be of shape {tuple(size[:-1])}, got {tuple(linear_bias.shape)}")
    if len(size) > 2 and input.dim() == 1:
        raise RuntimeError(f"{op}: input must be 2-D for linear_weight {tuple(size)}, got shape {tuple(input.shape)}")


def _spatial_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """Logits ``(N, V, d1, ...)`` of a K-dimensional loss."""
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
    return logits.unflatten(1, linear_weight.shape[:-1])


def log_probs(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = ("log_prob",),
    top_ids: Tensor | None = None,
) -> LogProbs:
    r"""Per-token statistics of logits x: of :math:`z = x / T`, or :math:`z = s\tanh(x/s) / T` under ``softcap`` s.

    With :math:`p = \mathrm{softmax}(z)`, the fields of the result are

    - ``log_prob``, :math:`\log p_y` of the target y;
    - ``entropy``, :math:`-\sum_c p_c \log p_c`, where :math:`0 \log 0` is 0;
    - ``lse``, :math:`\log\sum_c e^{z_c}`;
    - ``top_log_prob``, :math:`\log p_c` of the classes c that ``top_ids`` names;
    - ``argmax``, the lowest index of the largest z;
    - ``mean_logit``, the mean of z over the classes, and ``log_sum_sq_probs``, :math:`\log\sum_c p_c^2`.

    The first four are differentiable, for any incoming gradients of any of them. A row is read once in forward, whatever is
    asked for, and once in backward; nothing else of the logits' size is held but their gradient.

    Parameters
    ----------
    input : Tensor
        ``(*, V)`` logits.
    target : Tensor
        ``(*)`` class indices, int64 or int32, each in ``[0, V)`` or ``ignore_index``.
    ignore_index : int
        Targets whose rows are not read: their numbers are 0, their argmax is -1, their gradients are 0.
    temperature : float or Tensor
        T, positive: a number, or a tensor of target's shape with one for each token, which gets no gradient.
    softcap : float, optional
        Caps the logits (Gemma 2, arXiv:2408.00118).
    outputs : tuple of str
        The fields that are wanted; the others are None.
    top_ids : Tensor, optional
        ``(*, K)`` class indices, int64, K at most 1024; with them ``top_log_prob`` is returned.

    Returns
    -------
    LogProbs
        A named tuple. Fields are of target's shape (``top_log_prob`` of ``top_ids``'), float32, or float64 for float64
        input; ``argmax`` is int64.

    Raises
    ------
    IndexError
        A class index outside ``[0, V)`` that is not ``ignore_index``.
    ValueError
        A batch size that does not match, ``softcap <= 0``, ``temperature <= 0``, a name in ``outputs`` that is no
        field, too many ``top_ids``.
    RuntimeError
        Other shapes, dtypes or devices that do not match; a ``temperature`` that requires a gradient; a backend asked
        for by name that cannot serve the call.
    """
    op = "log_probs"
    ignore_index, temperature = _check_log_probs(op, ignore_index, temperature, softcap, input, target)
    if input.dim() < 1:
        raise IndexError(f"{op}: input must have at least 1 dimension, got 0")
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    kernels = has_kernels(op, input, target, *map(_tensor_or_none, (top_ids, temperature)))
    return _log_probs.apply(
        kernels, op, input, None, None, target, ignore_index, temperature, softcap, outputs, top_ids
    )


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = ("log_prob",),
    top_ids: Tensor | None = None,
) -> LogProbs:
    """``log_probs(linear(input, linear_weight, linear_bias), target, ...)`` without the N x V logits.

    Logits exist for a chunk of rows at a time, in forward and, computed again, in backward: at most 80 MiB of them,
    unless the environment variable ``FASTLLM_LOSS_WORKSPACE`` gives another number of bytes, and never
    fewer than 64 rows. Backward multiplies once more than that of
    :func:`linear_cross_entropy`, which knows its incoming gradient in forward.

    Parameters
    ----------
    input : Tensor
        ``(*, D)``.
    linear_weight : Tensor
        ``(V, D)``, of ``input``'s dtype.
    target : Tensor
        ``(*)`` class indices, int64 or int32, each in ``[0, V)`` or ``ignore_index``.
    linear_bias : Tensor, optional
        ``(V,)``, of ``input``'s dtype.
    ignore_index, temperature, softcap, outputs, top_ids
        As for :func:`log_probs`.

    Returns
    -------
    LogProbs
        As for :func:`log_probs`. Under autocast the products are taken in its dtype; the fields are float32.

    Raises
    ------
    As :func:`log_probs`, and RuntimeError for ``linear_weight`` or ``linear_bias`` of a shape, dtype or device that does
    not match.
    """
    op = "linear_log_probs"
    if type(linear_weight) not in _PLAIN and (is_placed(linear_weight) or is_placed(input)):
        from fastllm.distributed import dtensor

        return dtensor.linear_log_probs(
            input,
            linear_weight,
            target,
            linear_bias,
            temperature,
            top_ids,
            ignore_index=ignore_index,
            softcap=softcap,
            outputs=outputs,
        )
    ignore_index, temperature = _check_log_probs(op, ignore_index, temperature, softcap, input, linear_weight, target)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, linear_weight, linear_bias = (autocast_to(t, dtype, kind) for t in (input, linear_weight, linear_bias))
    check_linear(op, "input", input, "linear_weight", linear_weight, "linear_bias", linear_bias)
    kernels = has_kernels(op, input, linear_weight, target, linear_bias, *map(_tensor_or_none, (top_ids, temperature)))
    return _log_probs.apply(
        kernels, op, input, linear_weight, linear_bias, target, ignore_index, temperature, softcap, outputs, top_ids
    )


def _tensor_or_none(value: object) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _check_log_probs(
    op: str, ignore_index: int, temperature: float | Tensor, softcap: float | None, *tensors: Tensor
) -> tuple[int, float | Tensor]:
    """The options, and that the arguments are tensors; ``ignore_index`` and a temperature as plain numbers."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: arguments must be tensors, got one of type {type(tensor).__name__}")
    if type(ignore_index) is not int:
        ignore_index = _integer(op, "ignore_index", ignore_index)
    _check_numbers(op, 0.0, 0.0, softcap)
    if not isinstance(temperature, Tensor):
        _check_type(op, "temperature", temperature, float)
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be positive, got {temperature}")
        if isinstance(temperature, numbers.Real):
            temperature = float(temperature)
    return ignore_index, temperature


for _name in __all__:
    torch.fx.wrap(_name)  # one call in a symbolically traced graph, as PyTorch's own functions are
