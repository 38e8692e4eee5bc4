"""What a matrix product costs, and how ``torch.utils.flop_counter`` learns it.

As PyTorch's own formulas, these count matrix products alone: a product of ``(M, K)`` and ``(K, N)`` is ``2 M K N``. A
product that backward computes again (the logits of ``linear_cross_entropy`` under ``reduction="none"`` and in float16)
counts again.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from math import prod

import torch

COUNTER = "torch.utils.flop_counter"


def layer_flops(input: torch.Size, weight: torch.Size) -> int:
    """FLOPs of ``input (*, K)`` times ``weight (N, K)`` transposed; each gradient of that product costs the same."""
    return 2 * prod(input[:-1]) * prod(weight)


def _register(formulas: dict[str, Callable[..., int]]) -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in formulas.items():
        operation = getattr(torch.ops.fastllm, name)
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)


class _CounterImport(MetaPathFinder):
    """Registers the formulas once PyTorch's counter is imported: it imports Triton, a third of a second."""

    def __init__(self, formulas: dict[str, Callable[..., int]]) -> None:
        self.formulas = formulas

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register(self.formulas)

            spec.loader.exec_module = execute_and_register
        return spec


def register(formulas: dict[str, Callable[..., int]]) -> None:
    """Let ``FlopCounterMode`` count operations, now if it is imported, else when it is."""
    if COUNTER in sys.modules:
        _register(formulas)
    else:
        sys.meta_path.insert(0, _CounterImport(formulas))
