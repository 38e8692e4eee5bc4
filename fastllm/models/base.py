"""What the language models share: logits, losses and generation from hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm.backends import use_backend
from fastllm.models import sampling
from fastllm.operations.checks import is_placed


class LanguageModel(nn.Module):
    """Hidden states of each position, which a subclass computes, and a linear layer from them to the vocabulary.

    Parameters
    ----------
    sizes : dict of str to int
        The constructor's sizes, ``vocab_size`` and ``context_length`` among them.
    dropout : float
        Probability of dropping.
    backend : str, optional
        Backend of the operations; None: the one that is set.

    Raises
    ------
    ValueError
        A size below 1, or ``dropout`` outside ``[0, 1)``.
    """

    def __init__(self, sizes: dict[str, int], dropout: float, backend: str | None) -> None:
        super().__init__()
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {size}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{type(self).__name__}: dropout must be in [0, 1), got {dropout}")
        self.config = {**sizes, "dropout": dropout}
        self.context_length = sizes["context_length"]
        self.dropout = dropout
        self.backend = backend

    def _hidden_states(self, ids: Tensor) -> Tensor:
        """``(*, T)`` ids to ``(*, T, features)``."""
        raise NotImplementedError

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layer from hidden states to logits."""
        raise NotImplementedError

    def _predictor(self) -> Callable[[Tensor], Tensor]:
        """Maps ``(B, T)`` ids to the logits ``(B, vocab_size)`` after the last of them. Made anew for each generation
        and called with one word more each time, so it may keep what it computed."""
        raise NotImplementedError

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self._head()
        if is_placed(weight):  # cut over processes: logits are of the whole vocabulary
            placed: Any = (weight, bias)
            weight, bias = placed[0].full_tensor(), None if bias is None else placed[1].full_tensor()
        return nn.functional.linear(hidden, weight, bias)

    def _on(self, backend: str | None) -> contextlib.AbstractContextManager:
        name = backend if backend is not None else self.backend
        return contextlib.nullcontext() if name is None else use_backend(name)

    def forward(self, ids: Tensor, *, backend: str | None = None) -> Tensor:
        """Logits of the next word.

        Parameters
        ----------
        ids : Tensor
            ``(B, T)`` or ``(T,)`` int64 or int32, each in ``[0, vocab_size)``.

        Returns
        -------
        Tensor
            ``(B, T, vocab_size)`` or ``(T, vocab_size)``.
        """
        if backend is None and self.backend is None:
            return self._logits(self._hidden_states(ids))
        with self._on(backend):
            return self._logits(self._hidden_states(ids))

    def loss(self, ids: Tensor, targets: Tensor, kind: str = "cross_entropy", *, backend: str | None = None) -> Tensor:
        """Mean loss over positions.

        Parameters
        ----------
        ids : Tensor
            ``(B, T)`` or ``(T,)``.
        targets : Tensor
            The words to predict, of ids' shape; -100 does not count. For ``"mse"`` also a floating-point tensor of the
            logits' shape.
        kind : str
            ``"cross_entropy"``: computed without holding the logits. ``"mse"``: mean squared error between logits and
            one-hot targets (an all-zero row for -100).

        Returns
        -------
        Tensor
            0-dim.

        Raises
        ------
        ValueError
            Another ``kind``, or ``targets`` of another shape.
        """
        if backend is None and self.backend is None:
            return self._loss(ids, targets, kind)
        with self._on(backend):
            return self._loss(ids, targets, kind)

    def _loss(self, ids: Tensor, targets: Tensor, kind: str) -> Tensor:
        if kind not in ("cross_entropy", "mse"):
            raise ValueError(f"loss: kind must be 'cross_entropy' or 'mse', got {kind!r}")
        dense = kind == "mse" and targets.is_floating_point()
        expected = (*ids.shape, self.config["vocab_size"]) if dense else ids.shape
        if targets.shape != expected:
            raise ValueError(
                f"loss: targets must be of shape {tuple(expected)} for ids of shape {tuple(ids.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        hidden = self._hidden_states(ids)
        if kind == "cross_entropy":
            if hidden.dim() > 2:
                hidden = hidden.flatten(0, -2)
                targets = targets.flatten()
            weight, bias = self._head()
            return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias)
        logits = self._logits(hidden)
        if not dense:
            counted = targets != -100
            one_hot = nn.functional.one_hot(torch.where(counted, targets, 0).long(), logits.shape[-1])
            targets = (one_hot * counted.unsqueeze(-1)).to(logits.dtype)
        return F.mse_loss(logits, targets)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        *,
        stop_id: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Continue ``ids``; see :func:`fastllm.models.sampling.generate`."""
        self._check_stop_id(stop_id)
        with sampling.evaluation_mode(self), self._on(backend):
            return sampling.generate(
                self._predictor(), ids, max_new_tokens, temperature, top_k, top_p, generator, stop_id
            )

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        *,
        stop_id: int | None = None,
        backend: str | None = None,
    ) -> Iterator[int]:
        """The words that :meth:`generate` appends to one prompt ``(T,)``, one at a time as they are drawn."""
        self._check_stop_id(stop_id)
        sampling.check_arguments(ids, max_new_tokens, temperature, top_k, top_p)
        if ids.dim() != 1:
            raise ValueError(f"stream: ids must be of shape (T,), got {tuple(ids.shape)}")
        drawn = sampling.draw(
            self._predictor(), ids[None], max_new_tokens, temperature, top_k, top_p, generator, stop_id
        )
        return self._stream(drawn, backend)

    def _stream(self, drawn: Iterator[Tensor], backend: str | None) -> Iterator[int]:
        while True:
            # The caller runs between two words: nothing stays switched while it does.
            with torch.no_grad(), sampling.evaluation_mode(self), self._on(backend):
                word = next(drawn, None)
            if word is None:
                return
            yield int(word)

    def _check_stop_id(self, stop_id: int | None) -> None:
        if stop_id is not None and not 0 <= stop_id < self.config["vocab_size"]:
            raise ValueError(f"generate: stop_id must be in [0, {self.config['vocab_size']}), got {stop_id}")
