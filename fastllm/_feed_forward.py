"""Linear layers and the ReLU between them, fused when they are called.

The layers stay what they are: parameters, hooks and names are theirs, and what changes them later (adapters,
parametrisation, quantisation, sharding one layer alone) is seen, and ends the fusion, at the next call.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm._deferred import Deferred, all_calls_are_hooked, autocast_dtype, has_hooks, is_plain, plain


def is_idle_dropout(module: nn.Module | None) -> bool:
    return is_plain(module, nn.Dropout) and not (module.training and module.p > 0)


def is_second_layer(first: nn.Linear, second: nn.Module | None) -> bool:
    """Whether ``relu_mlp`` can compute ``second(relu(first(x)))``."""
    return (
        is_plain(second, nn.Linear)
        and second.in_features == first.out_features
        and second.weight.dtype == first.weight.dtype
    )


class FusedSequential(nn.Sequential):
    """:class:`torch.nn.Sequential` that calls ``linear_relu`` and ``relu_mlp`` where its layers allow it."""

    def forward(self, input):
        modules = list(self._modules.values())
        if all_calls_are_hooked():
            return super().forward(input)
        at = 0
        while at < len(modules):
            module = modules[at]
            after = modules[at + 1] if at + 1 < len(modules) else None
            if not (is_plain(module, nn.Linear) and is_plain(after, nn.ReLU)):
                input = module(input)
                at += 1
                continue
            next_at = at + 2
            while next_at < len(modules) and is_idle_dropout(modules[next_at]):
                next_at += 1
            second = modules[next_at] if next_at < len(modules) else None
            third = modules[next_at + 1] if next_at + 1 < len(modules) else None
            # A second layer that has a ReLU of its own is fused with that.
            if is_second_layer(module, second) and not is_plain(third, nn.ReLU):
                input = F.relu_mlp(input, module.weight, module.bias, second.weight, second.bias)
                at = next_at + 1
            else:
                input = F.linear_relu(input, module.weight, module.bias)
                at += 2
        return input


class DeferredLinear(Deferred):
    """``input @ up.weight.T + up.bias`` and, once it has passed the ReLU, the larger of that and 0."""

    def __init__(self, input: Tensor, up: UpLinear, down: nn.Linear, activated: bool = False) -> None:
        super().__init__(input)
        self.input = input
        self.up = up
        self.down = down
        self.activated = activated

    def compute(self) -> Tensor:
        layer = F.linear_relu if self.activated else nn.functional.linear
        return layer(self.input, self.up.weight, self.up.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast_dtype or self.input.dtype

    def relu(self):
        is_same = self.autocast_dtype == autocast_dtype(self.input)
        if not self.is_open() or self.activated or not is_same:
            return self.value().relu()
        return DeferredLinear(self.input, self.up, self.down, activated=True)

    def handle(self, func, args, kwargs):
        if func in (torch.relu, nn.functional.relu):
            return self._relu(*args[1:], **kwargs)
        if func is nn.functional.dropout:
            return self._dropout(*args[1:], **kwargs)
        return NotImplemented

    def _relu(self, inplace: bool = False):
        return NotImplemented if inplace else self.relu()

    def _dropout(self, p: float = 0.5, training: bool = True, inplace: bool = False):
        is_idle = self.activated and not inplace and not (training and p > 0)
        return self if is_idle else NotImplemented


class Place:
    """Where a first layer stands: its block, not owned, and the names of the ReLU (None for a function) and the second
    layer in it."""

    def __init__(self, block: nn.Module | None, relu: str | None, second: str) -> None:
        self.block = weakref.ref(block) if block is not None else _no_block
        self.relu = relu
        self.second = second

    def __deepcopy__(self, memo: dict) -> Place:
        return Place(memo.get(id(self.block())), self.relu, self.second)  # in the copied block, if that is being copied

    def __reduce__(self):
        return Place, (self.block(), self.relu, self.second)


def _no_block() -> None:
    return None


class UpLinear(nn.Linear):
    """The first layer of a feed-forward block: defers its output if the block's ReLU and second layer come next."""

    def forward(self, input: Tensor) -> Tensor | DeferredLinear:
        place = self._fastllm_place
        block = place.block()
        second = None if block is None else block._modules.get(place.second)
        if (
            isinstance(input, Tensor)
            and is_plain(second, DownLinear)
            and not has_hooks(self)
            and (place.relu is None or is_plain(block._modules.get(place.relu), DeferringReLU))
            and second.weight.dtype == self.weight.dtype
            and torch.amp.is_autocast_available(input.device.type)  # not on the meta device
            and not all_calls_are_hooked()
        ):
            return DeferredLinear(input, self, second)
        return nn.functional.linear(plain(input), self.weight, self.bias)


class DeferringReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` that passes a deferred linear layer on."""

    def forward(self, input: Tensor | DeferredLinear) -> Tensor | DeferredLinear:
        if isinstance(input, DeferredLinear) and not self.inplace:
            return input.relu()
        return nn.functional.relu(plain(input), inplace=self.inplace)


class DownLinear(nn.Linear):
    """The second layer of a feed-forward block: computes the whole block if the first layer was deferred."""

    def forward(self, input: Tensor | DeferredLinear) -> Tensor:
        if (
            isinstance(input, DeferredLinear)
            and input.is_open()
            and input.activated
            and input.down is self
            and input.autocast_dtype == autocast_dtype(input.input)
        ):
            input.check_source()
            return F.relu_mlp(input.input, input.up.weight, input.up.bias, self.weight, self.bias)
        return nn.functional.linear(plain(input), self.weight, self.bias)
