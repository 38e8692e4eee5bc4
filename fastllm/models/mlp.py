"""A feed-forward language model: the next word from the embeddings of the last few."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm.models.base import LanguageModel
from fastllm.nn import Embedding, LinearReLU


class MLPLanguageModel(LanguageModel):
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
        sizes = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "context_length": context_length,
            "num_hidden_layers": num_hidden_layers,
        }
        super().__init__(sizes, dropout, backend)
        self.embedding = Embedding(vocab_size, embedding_dim)
        widths = [context_length * embedding_dim] + [hidden_dim] * num_hidden_layers
        layers = [LinearReLU(a, b) for a, b in itertools.pairwise(widths)]
        self.hidden = nn.ModuleList(layers)
        self.output = nn.Linear(hidden_dim, vocab_size)
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def _hidden_states(self, ids: Tensor) -> Tensor:
        """``(*, T)`` ids to ``(*, T, hidden_dim)``."""
        x = F.embedding(ids, self.embedding.weight)
        if self.context_length > 1:
            # Position t beside its n - 1 predecessors, the oldest first; zeros before the start.
            length = ids.shape[-1]
            padded = nn.functional.pad(x, (0, 0, self.context_length - 1, 0))
            x = torch.cat([padded[..., k : k + length, :] for k in range(self.context_length)], dim=-1)
        for layer in cast("Sequence[LinearReLU]", self.hidden):
            x = F.linear_relu(x, layer.weight, layer.bias)
            if self.dropout > 0.0 and self.training:
                x = nn.functional.dropout(x, self.dropout)
        return x

    def _head(self) -> tuple[Tensor, Tensor | None]:
        return self.output.weight, self.output.bias

    def _predictor(self) -> Callable[[Tensor], Tensor]:
        return lambda ids: self._logits(self._hidden_states(ids[:, -self.context_length :])[:, -1])
