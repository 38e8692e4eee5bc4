"""What the autograd nodes in Python share: gradients that were formed in forward, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call is differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_concrete(*tensors: Tensor) -> bool:
    """Whether tensors hold numbers: nothing traces, records or transforms the call.

    Only then may a node form a gradient in forward and hand it over in backward.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(t) in _PLAIN for t in tensors)
    )


def save_formed(ctx: Any, **gradients: Tensor | None) -> None:
    """Keep gradients that forward has formed for an incoming gradient of 1."""
    ctx.formed = gradients


def take_formed(ctx: Any) -> dict[str, Tensor | None]:
    """The gradients that forward has formed, none if this backward is itself differentiated.

    They are copies if the graph is kept for another backward; else the node drops them. The caller has read
    ``ctx.saved_tensors`` before, which refuses a second backward through a freed graph.
    """
    formed = ctx.formed
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if not kept:
        ctx.formed = {}
    if torch.is_grad_enabled():
        return {}
    return {name: None if t is None else t.clone() for name, t in formed.items()} if kept else formed


def differentiate(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated (``create_graph=True``).

    ``definition`` is run on ``inputs`` in PyTorch's differentiable operations and differentiated. An input that needs
    no gradient gets None.
    """
    with torch.enable_grad():
        wanted = [need and t is not None and t.requires_grad for t, need in zip(inputs, needed, strict=True)]
        # An alias that is not a leaf: first derivatives stop at it, second ones pass through it to the caller's graph.
        arguments = [t.view_as(t) if want else t for t, want in zip(inputs, wanted, strict=True)]
        leaves = [t for t, want in zip(arguments, wanted, strict=True) if want]
        if not leaves:
            return [None] * len(inputs)
        output = definition(*arguments)
        found = iter(torch.autograd.grad(output, leaves, grad_output, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
