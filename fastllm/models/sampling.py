"""Sampling from a language model, one word at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode; afterwards each of its modules has the mode that it had before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Put ``-inf`` where a word is not to be drawn.

    Parameters
    ----------
    logits : Tensor
        ``(B, V)``.
    top_k : int, optional
        Keep the k most probable words (more where the k-th is tied).
    top_p : float, optional
        Keep the fewest most probable words whose probabilities sum to at least p, one at least (nucleus sampling,
        arXiv:1904.09751).
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def draw(
    next_logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
) -> Iterator[Tensor]:
    """The words that :func:`generate` appends to ``ids`` ``(B, T)``, ``(B, 1)`` at a time, as they are drawn."""
    stopped = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = next_logits(ids).float()
        if temperature < torch.finfo(torch.float32).tiny:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            # The largest is subtracted first: it stays 0 where a small temperature sends the others to -inf.
            scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
            kept = filter_logits(scaled, top_k, top_p)
            drawn = torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)
        if stop_id is not None:
            drawn = drawn.masked_fill(stopped, stop_id)
            stopped = drawn == stop_id
        drawn = drawn.to(ids.dtype)
        yield drawn
        if stop_id is not None and stopped.all():
            return
        ids = torch.cat([ids, drawn], dim=1)


def check_arguments(
    ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Errors of :func:`generate`."""
    if ids.dim() not in (1, 2) or ids.shape[-1] < 1:
        raise ValueError(f"generate: ids must be of shape (B, T) or (T,) with T >= 1, got {tuple(ids.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    if not temperature >= 0.0:  # NaN neither
        raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")


def generate(
    next_logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
) -> Tensor:
    """Append up to ``max_new_tokens`` drawn words to ``ids``.

    Parameters
    ----------
    next_logits
        Maps ``(B, T)`` ids to ``(B, V)`` logits of the next word.
    ids : Tensor
        ``(B, T)`` or ``(T,)``, T at least 1.
    temperature : float
        Divides the logits; 0, and a temperature that float32 cannot tell from 0, takes the most probable word.
    top_k, top_p
        See :func:`filter_logits`.
    generator : torch.Generator, optional
        Source of randomness; the same state gives the same words.
    stop_id : int, optional
        A row in which this word was drawn is filled with it; generation ends early where all rows are.

    Returns
    -------
    Tensor
        ``(B, T + max_new_tokens)`` or ``(T + max_new_tokens,)``; fewer words if all rows stopped before.

    Raises
    ------
    ValueError
        An empty ``ids``, a negative number, a ``temperature`` of NaN, ``top_k < 1`` or ``top_p`` outside ``(0, 1]``.
    """
    check_arguments(ids, max_new_tokens, temperature, top_k, top_p)
    batch = ids.unsqueeze(0) if ids.dim() == 1 else ids
    drawn = draw(next_logits, batch, max_new_tokens, temperature, top_k, top_p, generator, stop_id)
    batch = torch.cat([batch, *drawn], dim=1)
    return batch[0] if ids.dim() == 1 else batch
