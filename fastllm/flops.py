"""How many floating-point operations each compiled operation does, for ``torch.utils.flop_counter.FlopCounterMode``.

As PyTorch's own formulas, these count matrix products alone: a product of ``(M, K)`` and ``(K, N)`` is ``2 M K N``. A
lookup, MSE and cross-entropy count 0. A product that backward computes again (the logits of ``linear_cross_entropy``
under ``reduction="none"`` and in float16) counts again.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from math import prod

import torch

COUNTER = "torch.utils.flop_counter"


def _rows(size: torch.Size) -> int:
    return prod(size[:-1])


def _layer(input: torch.Size, weight: torch.Size) -> int:
    """FLOPs of ``input (*, K)`` times ``weight (N, K)`` transposed; each gradient of that product costs the same."""
    return 2 * _rows(input) * prod(weight)


def _nothing(*_, **__) -> int:
    return 0


def _linear_relu(input, weight, bias=None, **_) -> int:
    return _layer(input, weight)


def _linear_relu_backward(
    grad_output, output, input, weight, need_input: bool, need_weight: bool, need_bias: bool, **_
) -> int:
    return (need_input + need_weight) * _layer(input, weight)


def _relu_mlp(input, weight1, bias1, weight2, bias2, **_) -> int:
    return _layer(input, weight1) + 2 * _rows(input) * prod(weight2)


def _relu_mlp_backward(
    grad_output,
    hidden,
    input,
    weight1,
    weight2,
    need_input: bool,
    need_weight1: bool,
    need_bias1: bool,
    need_weight2: bool,
    need_bias2: bool,
    **_,
) -> int:
    need_hidden = need_input or need_weight1 or need_bias1
    first, second = _layer(input, weight1), _layer(hidden, weight2)
    return (need_input + need_weight1) * first + (need_hidden + need_weight2) * second


def _linear_cross_entropy(input, linear_weight, *_, **__) -> int:
    return _layer(input, linear_weight)


def _linear_cross_entropy_forward(input, linear_weight, *options, **_) -> int:
    need_input, need_weight, _need_bias = options[-3:]
    return (1 + need_input + need_weight) * _layer(input, linear_weight)


def _linear_cross_entropy_backward(grad_output, *arguments, **_) -> int:
    return _linear_cross_entropy_forward(*arguments)


FORMULAS: dict[str, Callable[..., int]] = {
    "embedding": _nothing,
    "embedding_forward": _nothing,
    "embedding_backward": _nothing,
    "linear_relu": _linear_relu,
    "linear_relu_forward": _linear_relu,
    "linear_relu_backward": _linear_relu_backward,
    "relu_mlp": _relu_mlp,
    "relu_mlp_forward": _relu_mlp,
    "relu_mlp_backward": _relu_mlp_backward,
    "mse_loss": _nothing,
    "mse_loss_forward": _nothing,
    "mse_loss_backward": _nothing,
    "mse_loss_correct_": _nothing,
    "cross_entropy": _nothing,
    "cross_entropy_forward": _nothing,
    "cross_entropy_backward": _nothing,
    "cross_entropy_backward_": _nothing,
    "cross_entropy_correct_": _nothing,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_forward": _linear_cross_entropy_forward,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "linear_cross_entropy_scale_": _nothing,
}


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        operation = getattr(torch.ops.fastllm, name)
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)


class _CounterImport(MetaPathFinder):
    """Registers the formulas once PyTorch's counter is imported: it imports Triton, a third of a second."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Let ``FlopCounterMode`` count the compiled operations, now if it is imported, else when it is."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _CounterImport())
