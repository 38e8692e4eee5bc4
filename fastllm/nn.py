"""Drop-in layers: PyTorch's constructors and ``state_dict`` keys, fastllm's operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm import functional as F

__all__ = [
    "CrossEntropyLoss",
    "Embedding",
    "LinearCrossEntropyLoss",
    "LinearLogProbs",
    "LinearReLU",
    "MSELoss",
    "ReLUMLP",
]


class Embedding(nn.Embedding):
    """A table of ``num_embeddings`` rows of ``embedding_dim`` numbers, looked up by id.

    Constructor and state of :class:`torch.nn.Embedding`; see :func:`fastllm.functional.embedding`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class LinearReLU(nn.Linear):
    """``relu(input @ weight.T + bias)``.

    Constructor and state of the :class:`torch.nn.Linear` that it replaces; see :func:`fastllm.functional.linear_relu`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)


class ReLUMLP(nn.Module):
    """``down(relu(up(input)))``, computed as one operation: :func:`fastllm.functional.relu_mlp`.

    Parameters
    ----------
    in_features, hidden_features : int
        Sizes of the input and of the hidden activation.
    out_features : int, optional
        Size of the output; ``in_features`` if not given.
    bias : bool
        Whether both layers have a bias.
    device, dtype
        Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        self.up = nn.Linear(in_features, hidden_features, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_mlp(input, self.up.weight, self.up.bias, self.down.weight, self.down.bias)


class MSELoss(nn.MSELoss):
    """Constructor of :class:`torch.nn.MSELoss`; see :func:`fastllm.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Constructor of :class:`torch.nn.CrossEntropyLoss` with the additions of
    :func:`fastllm.functional.cross_entropy`."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        num_items: float | Tensor | None = None,
        all_ignored: str = "nan",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.num_items = num_items
        self.all_ignored = all_ignored
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            num_items=self.num_items,
            all_ignored=self.all_ignored,
            inplace_backward=self.inplace_backward,
        )


class LinearCrossEntropyLoss(nn.Module):
    """A classifier layer and its cross-entropy, without logits: :func:`fastllm.functional.linear_cross_entropy`.

    The child ``linear`` holds the weight, ``(num_classes, in_features)``, and the bias.

    Parameters
    ----------
    in_features, num_classes : int
        Sizes of the input and of the vocabulary.
    bias : bool
        Whether the layer has a bias.
    device, dtype
        Of the parameters.
    reduction, weight, ignore_index, label_smoothing, lse_square_scale, softcap, num_items, all_ignored, shift
        As for :func:`fastllm.functional.linear_cross_entropy`.

    Raises
    ------
    RuntimeError
        ``weight`` of another shape than ``(num_classes,)``, or ``label_smoothing`` outside ``[0, 1]``.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        num_items: float | Tensor | None = None,
        all_ignored: str = "nan",
        shift: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: weight must be of shape ({num_classes},), got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"LinearCrossEntropyLoss: label_smoothing must be in [0, 1], got {label_smoothing}")
        super().__init__()
        self.num_classes = num_classes
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.num_items = num_items
        self.all_ignored = all_ignored
        self.shift = shift

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            num_items=self.num_items,
            all_ignored=self.all_ignored,
            shift=self.shift,
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
        if self.lse_square_scale != 0:
            text += f", lse_square_scale={self.lse_square_scale}"
        if self.softcap is not None:
            text += f", softcap={self.softcap}"
        if self.num_items is not None:
            text += f", num_items={self.num_items}"
        if self.all_ignored != "nan":
            text += f", all_ignored={self.all_ignored}"
        return f"{text}, shift=True" if self.shift else text


class LinearLogProbs(nn.Module):
    """A classifier layer and per-token statistics of its logits, without these: :func:`fastllm.functional.linear_log_probs`.

    The child ``linear`` holds the weight, ``(num_classes, in_features)``, and the bias.

    Parameters
    ----------
    in_features, num_classes : int
        Sizes of the input and of the vocabulary.
    bias : bool
        Whether the layer has a bias.
    device, dtype
        Of the parameters.
    ignore_index, temperature, softcap, outputs
        As for :func:`fastllm.functional.linear_log_probs`; ``temperature`` is a number, for which a call may give another
        or a tensor.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        outputs: tuple[str, ...] = ("log_prob",),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.softcap = softcap
        self.outputs = outputs

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        temperature: float | Tensor | None = None,
        top_ids: Tensor | None = None,
    ) -> F.LogProbs:
        return F.linear_log_probs(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            ignore_index=self.ignore_index,
            temperature=self.temperature if temperature is None else temperature,
            softcap=self.softcap,
            outputs=self.outputs,
            top_ids=top_ids,
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"bias={self.linear.bias is not None}, ignore_index={self.ignore_index}, outputs={self.outputs}"
        )
        if self.temperature != 1:
            text += f", temperature={self.temperature}"
        return text if self.softcap is None else f"{text}, softcap={self.softcap}"
