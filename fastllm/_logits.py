"""The loss of a Hugging Face language model without its logits.

The output layer returns ``DeferredLogits`` while its model computes a loss. Between that layer and the loss, models
scale logits, cap them, add a bias, cast, reshape and shift them; the record of this turns the call of
``torch.nn.functional.cross_entropy`` into one of ``linear_cross_entropy``. The model's own ``forward`` runs unchanged,
whatever the architecture.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm._deferred import Deferred, all_calls_are_hooked, autocast, autocast_dtype, has_hooks, is_plain, plain

_LOW = (torch.bfloat16, torch.float16)


class DeferredLogits(Deferred):
    """``cap(scale * hidden @ weight.T + bias)`` in ``dtype``, with ``cap(z) = softcap * tanh(z / softcap)``.

    ``made_by`` says how the model would have got here: None for the output layer itself, else the logits before, and
    the name and arguments of the method that was called on them.
    """

    def __init__(
        self, family, hidden, weight, bias, *, scale=1.0, squashed=False, softcap=None, dtype=None, made_by=None
    ):
        super().__init__(hidden, family)
        self.hidden = hidden  # (*, D)
        self.weight = weight  # (V, D)
        self.bias = bias  # (V,) or None
        self.scale = scale
        self.squashed = squashed  # by tanh, and the factor of the cap has not come yet
        self.softcap = softcap
        self.made_by = made_by
        self.dtype = dtype or self.autocast_dtype or hidden.dtype

    def _derived(self, name: str, args: tuple, **changes) -> DeferredLogits:
        recipe = {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": self.bias,
            "scale": self.scale,
            "squashed": self.squashed,
            "softcap": self.softcap,
            "dtype": self.dtype,
        }
        recipe.update(changes)
        return DeferredLogits(self._family, made_by=(self, name, args), **recipe)

    def compute(self) -> Tensor:
        if self.made_by is None:
            return nn.functional.linear(self.hidden, self.weight, self.bias)
        before, name, args = self.made_by
        return getattr(before.value(), name)(*args)

    # --- what a tensor says about itself

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    # --- what models do to logits before the loss

    def _times(self, name: str, number: float, factor: float):
        if self.squashed:  # factor * tanh(z) caps factor * z
            if not factor > 0:
                return getattr(self.value(), name)(number)
            scale = self.scale * factor
            bias = None if self.bias is None else self.bias * factor
            if abs(scale - 1) < 1e-12:  # (1 / cap) * cap
                scale = 1.0
            return self._derived(name, (number,), scale=scale, bias=bias, squashed=False, softcap=float(factor))
        bias = None if self.bias is None else getattr(self.bias, name)(number)
        return self._derived(name, (number,), scale=self.scale * factor, bias=bias)

    def _can_scale_by(self, other) -> bool:
        return self.is_open() and type(other) in (int, float) and other != 0 and self.softcap is None

    def __mul__(self, other):
        return self._times("__mul__", other, other) if self._can_scale_by(other) else self.value() * plain(other)

    __rmul__ = __mul__

    def mul(self, other):
        return self * other

    def __truediv__(self, other):
        return (
            self._times("__truediv__", other, 1 / other) if self._can_scale_by(other) else self.value() / plain(other)
        )

    def div(self, other, **options):
        return self.value().div(plain(other), **options) if options else self / other

    def tanh(self):
        if not self.is_open() or self.squashed or self.softcap is not None:
            return self.value().tanh()
        return self._derived("tanh", (), squashed=True)

    def __add__(self, other):
        classes = self.weight.shape[0]
        is_bias = (
            self.is_open()
            and not self.squashed
            and self.softcap is None
            and isinstance(other, Tensor)
            and 0 < other.dim() <= self.dim()
            and other.shape[-1] == classes
            and other.numel() == classes
            and other.device == self.device
            and (other.dtype == self.hidden.dtype or self.autocast_dtype is not None)
        )
        if not is_bias:
            return self.value() + plain(other)
        row = other.reshape(classes)
        bias = row if self.bias is None else self.bias + row
        return self._derived("__add__", (other,), bias=bias, dtype=torch.promote_types(self.dtype, other.dtype))

    __radd__ = __add__

    def add(self, other, **options):
        return self.value().add(plain(other), **options) if options else self + other

    def contiguous(self, **options):
        return self if self.is_open() and not options else self.value().contiguous(**options)

    def float(self):
        return self.to(torch.float32)

    def to(self, *args, **options):
        target = args[0] if len(args) == 1 and not options and self.is_open() else None
        if isinstance(target, torch.dtype) and target.is_floating_point:
            return self if target == self.dtype else self._derived("to", (target,), dtype=target)
        if isinstance(target, torch.device) and target == self.device:
            return self
        return self.value().to(*plain(args), **plain(options))

    def reshape(self, *shape):
        return self._reshaped("reshape", shape)

    def view(self, *shape):
        return self._reshaped("view", shape)

    def _reshaped(self, name: str, shape: tuple):
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        keeps_classes = len(sizes) > 1 and all(isinstance(size, (int, torch.SymInt)) for size in sizes)
        if not self.is_open() or not keeps_classes or sizes[-1] != self.weight.shape[0]:
            return getattr(self.value(), name)(*shape)
        # Hidden states may need a copy where the logits, always contiguous, allow a view.
        hidden = self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1])
        return self._derived("reshape", tuple(sizes), hidden=hidden)

    def flatten(self, start_dim: int = 0, end_dim: int = -1):
        end = end_dim % self.dim()
        if not self.is_open() or end == self.dim() - 1:
            return self.value().flatten(start_dim, end_dim)
        return self._derived("flatten", (start_dim, end), hidden=self.hidden.flatten(start_dim, end))

    def __getitem__(self, index):
        rows = self._rows_of(index) if self.is_open() else None
        if rows is None:
            return self.value()[plain(index)]
        return self._derived("__getitem__", (index,), hidden=self.hidden[rows])

    def _rows_of(self, index) -> tuple | None:
        """The part of ``index`` that chooses rows, where it keeps every class; else None."""
        if isinstance(index, Tensor):
            dims = index.dim() if index.dtype == torch.bool else 1
            return (index,) if index.dtype in (torch.bool, torch.int64) and 0 < dims < self.dim() else None
        items = index if type(index) is tuple else (index,)
        if not all(item is Ellipsis or type(item) in (slice, int) for item in items):
            return None
        dots = [place for place, item in enumerate(items) if item is Ellipsis]
        if len(dots) == 1:
            missing = self.dim() - len(items) + 1
            items = (*items[: dots[0]], *[slice(None)] * missing, *items[dots[0] + 1 :])
        if len(dots) > 1 or len(items) > self.dim():
            return None
        if len(items) < self.dim():
            return items
        return items[:-1] if items[-1] == slice(None) else None

    # --- the loss

    def handle(self, func, args, kwargs):
        if func is nn.functional.cross_entropy:
            return self._cross_entropy(*args[1:], **kwargs)
        if func in (torch.tanh, nn.functional.tanh) and len(args) == 1 and not kwargs:
            return self.tanh()
        return NotImplemented

    def _cross_entropy(
        self,
        target,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
    ):
        is_known = (
            isinstance(target, Tensor)
            and not target.is_floating_point()
            and self.dim() == 2
            and target.shape == self.hidden.shape[:1]
            and weight is None
            and size_average is None
            and reduce is None
            and not self.squashed
        )
        if not is_known:
            return NotImplemented
        self.check_source()
        # Scaling hidden states takes D numbers a row where logits have V.
        hidden = self.hidden if self.scale == 1 else self.hidden * self.scale
        dtype = self.autocast_dtype
        if hidden.dtype in _LOW and dtype is None:  # keeps the loss, and its sum over tokens, in float32
            dtype = hidden.dtype
        is_autocast = autocast_dtype(hidden) is not None
        with autocast(hidden, dtype):
            loss = F.linear_cross_entropy(
                hidden,
                self.weight,
                target,
                linear_bias=self.bias,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                softcap=self.softcap,
            )
        return loss.to(torch.promote_types(self.dtype, torch.float32) if is_autocast else self.dtype)


class LanguageModelHead(nn.Linear):
    """An output layer that defers its logits while its model computes a loss; otherwise :class:`torch.nn.Linear`."""

    deferring: list | None = None  # the family of the logits, while the model computes a loss

    def forward(self, input: Tensor) -> Tensor | DeferredLogits:
        if self.deferring is not None and torch.amp.is_autocast_available(input.device.type):  # not on the meta device
            return DeferredLogits(self.deferring, input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias)


class Accelerated:
    """Mixed into the class of one model, whose ``forward`` then lets the head defer its logits."""

    _fastllm_head: tuple[str, ...] | None = None  # the head's qualified name; None in instances of other origin

    def __reduce_ex__(self, protocol):
        rebuild, args, *state = super().__reduce_ex__(protocol)
        kind = type(self)
        if "_fastllm_base" in kind.__dict__ and args and args[0] is kind:  # made at run time: rebuilt, not imported
            return (_rebuild, (rebuild, kind._fastllm_base, *args[1:]), *state)
        return (rebuild, args, *state)


def _rebuild(rebuild, base: type, *args):
    return rebuild(accelerated_class(base), *args)


def _ready_head(model: Accelerated) -> LanguageModelHead | None:
    """The head, if nothing on the way from it to the loss would look at logits."""
    module = model
    for name in getattr(model, "_fastllm_head", None) or ():  # absent after undo, when a wrapper kept this forward
        if module is None or (module is not model and has_hooks(module)):
            return None
        module = module._modules.get(name)
    return module if is_plain(module, LanguageModelHead) and not all_calls_are_hooked() else None


def _without_logits(output):
    """The model's output with None for logits that were deferred; with the logits where there is no loss."""
    if isinstance(output, dict):
        items = dict(output.items())
    elif type(output) is tuple:
        items = dict(enumerate(output))
    else:
        return output
    if not any(isinstance(item, Deferred) for item in items.values()):
        return output
    has_loss = items.get(0 if type(output) is tuple else "loss") is not None
    has_loss = has_loss and not (type(output) is tuple and isinstance(output[0], Deferred))
    for key, item in items.items():
        if isinstance(item, Deferred):
            items[key] = None if has_loss else item.value()
    if type(output) is tuple:
        return tuple(items.values())
    return items if type(output) is dict else type(output)(**items)


def labels_position(kind: type) -> int | None:
    """Where ``forward`` takes labels, self not counted; None if it does not."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return names.index("labels") if "labels" in names else None


@functools.cache
def accelerated_class(base: type) -> type:
    """``base`` with a ``forward`` of the same signature that computes its loss without logits. The class has the name
    and module of ``base``: file formats and registries go by them."""
    position = labels_position(base)
    own_skip = "skip_logits" in inspect.signature(base.forward).parameters
    # torch.compile traces the layer CrossEntropyLoss, where a forward makes one, for tensors only.
    code = getattr(inspect.unwrap(base.forward), "__code__", None)
    makes_loss_layer = code is not None and "CrossEntropyLoss" in code.co_names

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        skip = None if own_skip else kwargs.pop("skip_logits", None)
        labels = args[position] if len(args) > position else kwargs.get("labels")
        skip = self.training if skip is None else skip
        compiling = torch.compiler.is_compiling()
        head = None
        if skip and labels is not None and not (compiling and makes_loss_layer):
            head = _ready_head(self)
        if head is None:
            return base.forward(self, *args, **kwargs)
        family = head.deferring = []
        if compiling:  # a graph break inside `try` would end the trace of the whole forward
            output = _without_logits(base.forward(self, *args, **kwargs))
            head.deferring = None
            family.clear()
            return output
        try:
            return _without_logits(base.forward(self, *args, **kwargs))
        finally:
            head.deferring = None
            family.clear()

    names = {
        "forward": forward,
        "_fastllm_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (Accelerated, base), names)
