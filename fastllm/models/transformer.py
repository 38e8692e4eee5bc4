"""A decoder-only transformer with ReLU feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastllm.models.base import LanguageModel
from fastllm.nn import Embedding, ReLUMLP


class TransformerLanguageModel(LanguageModel):
    r"""Embeddings, blocks of causal attention and feed-forward, a normalisation, a linear layer to the vocabulary.

    .. math:: a = x + \mathrm{attention}(\mathrm{norm}_1(x)), \quad
              y = a + W_2\, \mathrm{relu}(W_1\, \mathrm{norm}_2(a) + b_1) + b_2

    (Vaswani et al., 2017; layers are normalised before each part, Xiong et al., 2020.) Attention has no bias.

    Positions are rotary (Su et al., arXiv:2104.09864): queries and keys are turned by an angle that grows with the
    position, so a score depends on the distance of two words alone. Learned positions would be a table more, with rows
    that a training on shorter sequences never touches, and a window that moves on in generation would change them all.

    Parameters
    ----------
    vocab_size, embedding_dim : int
        Sizes of the vocabulary and of a hidden state.
    num_layers, num_heads : int
        Number of blocks, and of heads in each. ``embedding_dim`` is a multiple of ``2 * num_heads``.
    hidden_dim : int, optional
        Size of the feed-forward's hidden activation; ``4 * embedding_dim`` if not given.
    context_length : int
        The longest sequence. Generation goes beyond it: once the words outgrow it, the prediction sees a window that
        starts at a multiple of half of it (rounded up), the first that leaves at most ``context_length`` words.
    dropout : float
        Probability of dropping, in training, an embedding's entry or one that a block's part adds. Weights of the
        attention are not dropped: the fast kernels for it would not serve.
    tie_weights : bool
        Whether the output layer's weight is the embedding's (Press and Wolf, 2017). The output layer has no bias.
    backend : str, optional
        Backend of this model's operations, as in ``fastllm.use_backend``; ``"eager"`` runs the same parameters in plain
        PyTorch. None: the one that is set. Every method takes another for one call.

    Raises
    ------
    ValueError
        A size below 1, ``dropout`` outside ``[0, 1)``, or ``num_heads`` that do not divide ``embedding_dim`` into heads
        of an even size. In a call: ids of no dimension or more than ``context_length`` words.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int | None = None,
        context_length: int = 256,
        dropout: float = 0.0,
        tie_weights: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "hidden_dim": 4 * embedding_dim if hidden_dim is None else hidden_dim,
            "context_length": context_length,
        }
        super().__init__(sizes, dropout, backend)
        if embedding_dim % (2 * num_heads):
            raise ValueError(
                f"TransformerLanguageModel: num_heads must divide embedding_dim into heads of an even size, "
                f"got num_heads {num_heads} and embedding_dim {embedding_dim}"
            )
        self.config["tie_weights"] = bool(tie_weights)
        self.head_dim = embedding_dim // num_heads
        self.embedding = Embedding(vocab_size, embedding_dim)
        self.blocks = nn.ModuleList(
            _Block(embedding_dim, num_heads, sizes["hidden_dim"], dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim)
        self.output = None if tie_weights else nn.Linear(embedding_dim, vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights of 0.02; those that add to the residual are smaller by the root of their number, so that its
        variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
                nn.init.normal_(parameter, std=0.02 * (2 * len(self.blocks)) ** -0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "feed_forward" in name:
                nn.init.zeros_(parameter)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        return self.embedding.weight if self.output is None else self.output.weight, None

    def _hidden_states(self, ids: Tensor, cache: _Cache | None = None) -> Tensor:
        if ids.dim() == 0:
            raise ValueError("TransformerLanguageModel: ids must be of shape (B, T) or (T,), got ()")
        first, length = 0 if cache is None else cache.length, ids.shape[-1]
        if first + length > self.context_length:
            raise ValueError(
                f"TransformerLanguageModel: ids must hold at most context_length = {self.context_length} words "
                f"a sequence, got {first + length}"
            )
        x = self.embedding(ids if ids.dim() == 2 else ids[None].flatten(0, -2))
        if self.dropout > 0.0 and self.training:
            x = nn.functional.dropout(x, self.dropout)
        rotation = _rotation(x, first, self.head_dim)
        for number, block in enumerate(self.blocks):
            x = block(x, rotation, None if cache is None else cache.layer(number))
        x = self.norm(x)
        return x if ids.dim() == 2 else x.view(*ids.shape, x.shape[-1])

    def _predictor(self) -> Callable[[Tensor], Tensor]:
        cache = _Cache()

        def next_logits(ids: Tensor) -> Tensor:
            start = _window_start(ids.shape[-1], self.context_length)
            if start != cache.start:
                cache.clear(start)
            hidden = self._hidden_states(ids[:, start + cache.length :], cache)
            return self._logits(hidden[:, -1])

        return next_logits


class _Block(nn.Module):
    """Attention and feed-forward, each added to what it reads."""

    def __init__(self, embedding_dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(embedding_dim)
        self.attention = _Attention(embedding_dim, num_heads)
        self.feed_forward_norm = nn.LayerNorm(embedding_dim)
        self.feed_forward = ReLUMLP(embedding_dim, hidden_dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cached: _LayerCache | None) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), rotation, cached))
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.dropout > 0.0 and self.training else x


class _Attention(nn.Module):
    """Causal attention over ``(B, T, D)``. With a cache: of the new words over those before them too."""

    def __init__(self, embedding_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.input = nn.Linear(embedding_dim, 3 * embedding_dim, bias=False)
        self.output = nn.Linear(embedding_dim, embedding_dim, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cached: _LayerCache | None) -> Tensor:
        heads = self.input(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (query, key), value = _rotate(heads[:2], rotation), heads[2]
        if cached is not None:
            key, value = cached.append(key, value)
        # A single word sees all of the keys; several are the first ones.
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[-2] > 1)
        return self.output(attended.transpose(1, 2).flatten(2))


def _rotation(x: Tensor, first: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, ``(T, head_dim / 2)``, of the angles of the positions from ``first`` on.

    Computed in each call: buffers would lose digits when the model's dtype changes.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(first, first + x.shape[-2], dtype=dtype, device=x.device)
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=x.device) / head_dim
    angles = torch.outer(positions, 10000.0**-exponents)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair ``(x[i], x[i + head_dim / 2])`` by its angle."""
    cosine, sine = (table.to(x.dtype) for table in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def _window_start(length: int, context_length: int) -> int:
    """Where the window starts that a prediction after ``length`` words sees.

    It moves by half of the context at once: the words kept stand at other positions, see fewer words before them, and
    are computed anew, once in ``context_length / 2`` words.
    """
    step = (context_length + 1) // 2
    return max(0, -((context_length - length) // step) * step)


class _LayerCache:
    """Keys and values, ``(B, heads, words, head_dim)``, of the words that one layer has seen."""

    def __init__(self) -> None:
        self.words: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.words is not None:
            key, value = (torch.cat(both, dim=-2) for both in zip(self.words, (key, value), strict=True))
        self.words = key, value
        return self.words

    def __len__(self) -> int:
        return 0 if self.words is None else self.words[0].shape[-2]


class _Cache:
    """The layers' caches of one window, which starts at word ``start``."""

    def __init__(self) -> None:
        self.clear(0)

    def clear(self, start: int) -> None:
        self.start = start
        self.layers: dict[int, _LayerCache] = {}

    @property
    def length(self) -> int:
        """Words in the cache; in the middle of a pass the layers differ."""
        return len(self.layers[0]) if self.layers else 0

    def layer(self, number: int) -> _LayerCache:
        return self.layers.setdefault(number, _LayerCache())
