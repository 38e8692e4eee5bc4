"""relu_mlp: ``linear(relu(linear(input, weight1, bias1)), weight2, bias2)``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm import eager, invariance
from fastllm.operations.checks import as_rows, broadcasts_bias, check_given, check_linear
from fastllm.operations.declaration import Autocast, Kernel, Operation
from fastllm.operations.flops import layer_flops
from fastllm.operations.node import needs_grad


def _forward_fake(input, weight1, bias1, weight2, bias2):
    return input.new_empty(input.shape[0], weight2.shape[0]), input.new_empty(input.shape[0], weight1.shape[0])


def _backward_fake(grad_output, hidden, input, weight1, weight2, need_input, need_weight1, need_bias1, need_weight2,
                   need_bias2):  # fmt: skip
    rows, outer = grad_output.shape
    return (
        grad_output.new_empty((rows, weight1.shape[1]) if need_input else 0),
        grad_output.new_empty((hidden.shape[1], input.shape[1]) if need_weight1 else 0),
        grad_output.new_empty(hidden.shape[1] if need_bias1 else 0),
        grad_output.new_empty((outer, hidden.shape[1]) if need_weight2 else 0),
        grad_output.new_empty(outer if need_bias2 else 0),
    )


def _flops(input, weight1, bias1, weight2, bias2, **_) -> int:
    hidden = (*input[:-1], weight1[0])
    return layer_flops(input, weight1) + layer_flops(hidden, weight2)


def _backward_flops(grad_output, hidden, input, weight1, weight2, need_input, need_weight1, need_bias1, need_weight2,
                    need_bias2, **_) -> int:  # fmt: skip
    need_hidden = need_input or need_weight1 or need_bias1
    if not (need_hidden or need_weight2):
        return 0
    features = weight1[1] if need_input else input[1] if need_weight1 else 0
    first, second = layer_flops(hidden, (features, hidden[1])), layer_flops(hidden, (grad_output[1], hidden[1]))
    return (need_input + need_weight1) * first + (need_hidden + need_weight2) * second


class ReLUMLP(torch.autograd.Function):
    """Keeps the hidden activation, which is the mask and a factor of the second weight's gradient.

    The activation is a second output: a second derivative reaches the first layer through it.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None):
        output, hidden = torch.ops.fastllm.relu_mlp_forward(input, weight1, bias1, weight2, bias2)
        need_input, need_weight1, need_bias1, need_weight2, _ = ctx.needs_input_grad
        need_hidden = need_input or need_weight1 or need_bias1
        ctx.set_materialize_grads(False)
        ctx.invariant = invariance.active()
        ctx.save_for_backward(
            hidden if need_hidden or need_weight2 else None,
            input if need_weight1 else None,
            weight1 if need_input else None,
            weight2 if need_hidden else None,
        )
        return output, hidden

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_hidden: Tensor | None):
        hidden, input, weight1, weight2 = ctx.saved_tensors
        need_input, need_weight1, need_bias1, need_weight2, need_bias2 = needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or grad_hidden is not None:
            grad = grad_hidden
            if grad_output is not None and (need_input or need_weight1 or need_bias1):
                inner = invariance.linear(grad_output, weight2.t())
                grad = inner if grad is None else grad + inner
            # The ReLU has no second derivative: the mask is a constant.
            masked = None if grad is None else torch.where(hidden.detach() <= 0, 0, grad)
            first, second = masked is not None, grad_output is not None
            return (
                invariance.linear(masked, weight1.t()) if first and need_input else None,
                masked.t() @ input if first and need_weight1 else None,
                masked.sum(0) if first and need_bias1 else None,
                grad_output.t() @ hidden if second and need_weight2 else None,
                grad_output.sum(0) if second and need_bias2 else None,
            )
        if grad_output is None:
            return (None,) * 5
        with invariance.mode_of(ctx.invariant):
            grads = torch.ops.fastllm.relu_mlp_backward(grad_output, hidden, input, weight1, weight2, *needs)
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def relu_mlp(input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    op = "relu_mlp"
    check_given(op, weight2=weight2)
    expands = broadcasts_bias(input, weight1, bias1)
    check_linear(op, "input", input, "weight1", weight1, "bias1", None if expands else bias1)
    # One feature without a dimension, or a bias to be expanded: PyTorch's.
    if expands or weight2.dim() == 1 or broadcasts_bias(input, weight2, bias2):
        return eager.relu_mlp(input, weight1, bias1, weight2, bias2)
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        raise RuntimeError(
            f"{op}: weight2 must be of shape (*, {weight1.shape[0]}) for weight1 {list(weight1.shape)}, "
            f"got {list(weight2.shape)}"
        )
    check_linear(op, "weight1.t()", weight1.t(), "weight2", weight2, "bias2", bias2)
    rows = as_rows(input)
    if needs_grad(rows, weight1, bias1, weight2, bias2):
        output = ReLUMLP.apply(rows, weight1, bias1, weight2, bias2)[0]
    else:
        output = torch.ops.fastllm.relu_mlp_forward(rows, weight1, bias1, weight2, bias2)[0]
    return output if input.dim() == 2 else output.view(*input.shape[:-1], weight2.shape[0])


_ARGUMENTS = "Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
OPERATION = Operation(
    "relu_mlp",
    f"({_ARGUMENTS}) -> Tensor",
    relu_mlp,
    (
        Kernel("relu_mlp_forward", f"({_ARGUMENTS}) -> (Tensor output, Tensor hidden)", _forward_fake, _flops),
        Kernel(
            "relu_mlp_backward",
            "(Tensor grad_output, Tensor? hidden, Tensor? input, Tensor? weight1, Tensor? weight2, bool need_input, "
            "bool need_weight1, bool need_bias1, bool need_weight2, bool need_bias2) -> (Tensor grad_input, "
            "Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2)",
            _backward_fake,
            _backward_flops,
        ),
    ),
    Autocast(lower_precision=True),
    _flops,
)
