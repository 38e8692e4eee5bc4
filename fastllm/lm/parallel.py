"""A model over several processes: DDP, FSDP2 or a vocabulary that is cut; gradients and tensors of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastllm.lm.processes import Processes
from fastllm.operations.checks import is_placed


def spread(loss: nn.Module, model: nn.Module, device: torch.device, processes: Processes, cut: str | None) -> nn.Module:
    """``loss``, whose forward computes the model's loss, over the processes; the model's parameters change in place.

    Parameters
    ----------
    cut : str or None
        None: DDP; ``"fsdp"``: FSDP2, a block at a time; ``"vocabulary"``: :func:`fastllm.distributed.plan`.
    """
    if cut is None:
        return nn.parallel.DistributedDataParallel(loss, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (processes.size,))
    if cut == "vocabulary":
        from torch.distributed.tensor.parallel import parallelize_module

        from fastllm import distributed

        parallelize_module(model, mesh, distributed.plan(model))
        return loss
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    # After forward as well: an evaluation leaves parameters that a checkpoint and the optimizer know.
    return fully_shard(loss, mesh=mesh, reshard_after_forward=True)


def synchronised(loss: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around a forward and backward: gradients of all processes meet after the last part of a step alone."""
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if last else loss.no_sync()
    if hasattr(loss, "set_requires_gradient_sync"):
        loss.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def mean(value: Tensor, processes: Processes) -> Tensor:
    """Of the processes' values."""
    if processes.size == 1:
        return value
    torch.distributed.all_reduce(value)
    return value / processes.size


def alike(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Whole ones and cut ones apart, where there are both."""
    parts: tuple[list, list] = ([], [])
    for parameter in parameters:
        parts[is_placed(parameter)].append(parameter)
    return [part for part in parts if part]


def clip_(parameters: list[Tensor], longest: float) -> Tensor:
    """Shorten the gradient to ``longest``; its length before."""
    groups = alike(parameters)
    if len(groups) == 1 and not is_placed(parameters[0]):
        return nn.utils.clip_grad_norm_(parameters, longest)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.stack([norm.full_tensor() if is_placed(norm) else norm for norm in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, longest, norm)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if is_placed(tensor) else tensor


def gathered(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The whole tensors in the first process; no process holds more than one whole tensor that it does not keep."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_placed(tensor) else tensor
        if processes.is_first:
            found[name] = whole
    return found
