"""What the autograd nodes in Python share: gradients that were formed in forward, second derivatives, the backend."""

from __future__ import annotations

import contextlib
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


def graph_is_kept() -> bool:
    """Whether the backward that runs was asked to keep the graph for another."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_one(grad_output: Tensor) -> bool:
    """Whether an incoming gradient is known to be 1; that of a device is not waited for."""
    return grad_output.is_cpu and is_concrete(grad_output) and grad_output.item() == 1.0


# --- gradients formed in forward, for an incoming gradient of 1 ------------------------------------------------------
#
# They lie beside the saved tensors, so that backward finds them without unpacking these, whose change in place is then no
# error: nothing reads them. PyTorch frees saved tensors after backward, but not these: backward takes or drops them.


def keep_formed(ctx: Any, *gradients: Tensor | None) -> None:
    ctx.formed = gradients


def has_formed(ctx: Any) -> bool:
    return any(gradient is not None for gradient in ctx.formed)


def take_formed(ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients, or copies of them if the graph is kept for another backward."""
    formed = ctx.formed
    if graph_is_kept():
        return tuple(None if gradient is None else gradient.clone() for gradient in formed)
    ctx.formed = ()
    return formed


def drop_formed(ctx: Any) -> None:
    """At the end of a backward that did not take them."""
    if not graph_is_kept():
        ctx.formed = ()


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


# --- the backend of a forward pass: backward runs in threads of the autograd engine -----------------------------------

_get_backend: Callable[[], str] | None = None
_use_backend: Callable[[str], contextlib.AbstractContextManager] | None = None


def know_backends(get: Callable[[], str], use: Callable[[str], contextlib.AbstractContextManager]) -> None:
    """``fastllm.backends`` gives its functions ``get_backend`` and ``use_backend``."""
    global _get_backend, _use_backend
    _get_backend, _use_backend = get, use


def chosen_backend() -> str | None:
    """The backend chosen in this thread, for :func:`same_backend`. None: traced code, which chooses when it runs."""
    return None if torch.compiler.is_compiling() else _get_backend()


def same_backend(name: str) -> contextlib.AbstractContextManager:
    return _use_backend(name)
