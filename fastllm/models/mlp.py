"""A feed-forward language model: the next word from the embeddings of the last few."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm.backends import use_backend
from fastllm.models import sampling
from fastllm.nn import Embedding, LinearReLU


class MLPLanguageModel(nn.Module):
    r"""Embeddings of the last :math:`n` words, concatenated; ReLU layers; a linear layer to the vocabulary.

    .. math:: h_t = \mathrm{relu}(W_1 [e_{x_{t-n+1}}; \ldots; e_{x_t}] + b_1), \quad z_t = W_o h_t + b_o

    (Bengio et al., 2003, with ReLU). Before the start of a sequence the embeddings are zero.

    Parameters
    ----------
    vocab_size, embedding_dim, hidden_dim : int
        Sizes of the vocabulary, of an embedding and of the hidden layers.
    context_length : int
        n, the number of words that the prediction sees, the current one included.
    num_hidden_layers : int
        Number of ReLU layers.
    dropout : float
        Probability of dropping a hidden activation in training.
    backend : str, optional
        Backend of this model's operations, as in ``fastllm.use_backend``; ``"eager"`` runs the same parameters in plain
        PyTorch. None: the one that is set. Every method takes another for one call.

    Raises
    ------
    ValueError
        A size below 1, or ``dropout`` outside ``[0, 1)``.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        context_length: int = 1,
        num_hidden_layers: int = 1,
        dropout: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "context_length": context_length,
            "num_hidden_layers": num_hidden_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"MLPLanguageModel: {name} must be at least 1, got {size}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"MLPLanguageModel: dropout must be in [0, 1), got {dropout}")
        self.config = {**sizes, "dropout": dropout}
        self.context_length = context_length
        self.dropout = dropout
        self.backend = backend
        self.embedding = Embedding(vocab_size, embedding_dim)
        widths = [context_length * embedding_dim] + [hidden_dim] * num_hidden_layers
        self.hidden = nn.ModuleList(LinearReLU(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.output = nn.Linear(hidden_dim, vocab_size)
        for layer in self.hidden:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def _on(self, backend: str | None) -> contextlib.AbstractContextManager:
        name = backend if backend is not None else self.backend
        return contextlib.nullcontext() if name is None else use_backend(name)

    def _hidden_states(self, ids: Tensor) -> Tensor:
        """``(*, T)`` ids to ``(*, T, hidden_dim)``."""
        x = F.embedding(ids, self.embedding.weight)
        if self.context_length > 1:
            # Position t beside its n - 1 predecessors, the oldest first; zeros before the start.
            length = ids.shape[-1]
            padded = nn.functional.pad(x, (0, 0, self.context_length - 1, 0))
            x = torch.cat([padded[..., k : k + length, :] for k in range(self.context_length)], dim=-1)
        for layer in self.hidden:
            x = F.linear_relu(x, layer.weight, layer.bias)
            if self.dropout > 0.0 and self.training:
                x = nn.functional.dropout(x, self.dropout)
        return x

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
            return self.output(self._hidden_states(ids))
        with self._on(backend):
            return self.output(self._hidden_states(ids))

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
        output, dense = self.output, kind == "mse" and targets.is_floating_point()
        expected = (*ids.shape, output.out_features) if dense else ids.shape
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
            return F.linear_cross_entropy(hidden, output.weight, targets, linear_bias=output.bias)
        logits = output(hidden)
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
        backend: str | None = None,
    ) -> Tensor:
        """Continue ``ids``; see :func:`fastllm.models.sampling.generate`."""
        with sampling.evaluation_mode(self), self._on(backend):
            return sampling.generate(self._next_logits, ids, max_new_tokens, temperature, top_k, top_p, generator)

    def _next_logits(self, ids: Tensor) -> Tensor:
        """``(B, T)`` ids to the logits ``(B, vocab_size)`` after the last of them."""
        hidden = self._hidden_states(ids[:, -self.context_length :])
        return self.output(hidden[:, -1])
