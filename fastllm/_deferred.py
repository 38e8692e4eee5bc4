"""Results that are computed when something asks for their numbers.

A layer that ``fastllm.accelerate`` has changed may return a ``Deferred`` in place of a tensor. The next layer or loss,
if it is the one that was expected, reads the recipe and runs one fused operation. Everything else finds the tensor: any
function of torch, any attribute, method or operator that a subclass does not know computes it first, as the original
layer would, and goes on with it. So a guess about what comes next can cost time, but not correctness.

Plain Python objects with ``__torch_function__``, not tensor subclasses: ``torch.compile`` traces them away.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what goes into this module or comes out of it."""
    if any(len(getattr(module, name)) > 0 for name in _HOOKS):
        return True
    return "forward" in module.__dict__


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """A module of exactly this class whose call is the class's ``forward`` and nothing else."""
    return type(module) is kind and not has_hooks(module)


def all_calls_are_hooked() -> bool:
    return torch.nn.modules.module._has_any_global_hook()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts this tensor to in a linear layer; None where it does not."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(tensor: Tensor, dtype: torch.dtype | None):
    """The context in which ``autocast_dtype(tensor)`` is ``dtype``."""
    if autocast_dtype(tensor) == dtype:
        return contextlib.nullcontext()
    if dtype is None:
        return torch.autocast(tensor.device.type, enabled=False)
    return torch.autocast(tensor.device.type, dtype=dtype)


def plain(argument):
    """``argument`` with the tensor in place of every ``Deferred``."""
    if isinstance(argument, Deferred):
        return argument.value()
    if type(argument) in (list, tuple):
        return type(argument)(plain(item) for item in argument)
    if type(argument) is dict:
        return {key: plain(item) for key, item in argument.items()}
    return argument


class Deferred:
    """One deferred result, of a layer's input ``source``.

    ``family`` lists those that are derived from one another, in the order of their making. It refers to them and they to
    it: whoever made the list clears it, so that their tensors are freed at once.
    """

    def __init__(self, source: Tensor, family: list[Deferred] | None = None) -> None:
        self._tensor = None
        self._family = family
        self._source = source
        self._version = version_of(source)
        self.autocast_dtype = autocast_dtype(source)
        if family is not None:
            family.append(self)

    def is_open(self) -> bool:
        """Whether it is still only a recipe."""
        return self._tensor is None

    def value(self) -> Tensor:
        """The tensor, computed once. The whole family is computed: afterwards views share their memory, and what is
        changed in place is seen, exactly as without deferring."""
        if self._tensor is None:
            self.check_source()
            with autocast(self._source, self.autocast_dtype):
                for member in (*(self._family or ()), self):
                    if member._tensor is None:
                        member._tensor = member.compute()
        return self._tensor

    def check_source(self) -> None:
        if self._version != version_of(self._source):
            raise RuntimeError(
                f"fastllm.accelerate: the input of a layer, of shape {tuple(self._source.shape)}, was changed in place "
                "before its output was used; undo the acceleration of this model"
            )

    def compute(self) -> Tensor:
        raise NotImplementedError

    def handle(self, func, args, kwargs):
        """The result of a function of torch that this class knows, or NotImplemented."""
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if len(args) == 0 and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        if len(args) > 0 and isinstance(args[0], Deferred) and args[0].is_open():
            result = args[0].handle(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*plain(tuple(args)), **plain(kwargs))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    @property
    def data(self) -> Tensor:
        return self.value().data

    @data.setter
    def data(self, new: Tensor) -> None:
        self.value().data = new

    __hash__ = object.__hash__


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place, where that is counted."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def _forwarded(name: str):
    def method(self, *args):
        return getattr(self.value(), name)(*plain(args))

    method.__name__ = name
    return method


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs invert "
    "eq ne lt le gt ge and rand or ror xor rxor getitem setitem len iter contains bool int float index repr format array"
).split():
    setattr(Deferred, f"__{_name}__", _forwarded(f"__{_name}__"))
