"""The plain functions on ``DTensor``s: which rows a process holds follows from placements; and plans that place a model.

A table or an output layer is ``Shard(0)``, logits are sharded over their class dimension, over one dimension of a mesh. Over
the mesh's other dimensions the batch may be sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fastllm import functional as F
from fastllm import nn as layers
from fastllm.distributed.embedding import embedding as _embedding
from fastllm.distributed.log_probs import linear_log_probs as _linear_log_probs
from fastllm.distributed.losses import cross_entropy as _cross_entropy
from fastllm.distributed.losses import linear_cross_entropy as _linear_cross_entropy
from fastllm.functional import LogProbs


@dataclass
class _Layout:
    """Where the vocabulary of a call lies.

    Parameters
    ----------
    mesh_dim : int or None
        The mesh's dimension that it is sharded over; None: every process has all of it.
    batch : tuple of Placement
        Of what has a row for each token: ``Shard(0)`` over the mesh's dimensions that the batch is sharded over.
    """

    op: str
    mesh: DeviceMesh
    mesh_dim: int | None
    start: int
    stop: int
    batch: tuple

    @property
    def keywords(self) -> dict:
        """What the functions over processes take in addition."""
        if self.mesh_dim is None:
            return {}
        return {"vocab_start": self.start, "group": self.mesh.get_group(self.mesh_dim)}

    @property
    def batch_is_sharded(self) -> bool:
        return any(placement.is_shard() for placement in self.batch)

    def _dim_name(self, dim: int) -> str:
        names = self.mesh.mesh_dim_names
        return f"{dim}" if names is None else f"{dim} ({names[dim]!r})"

    def rows(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """This process's part of a tensor with a row for each token; its gradient is placed as it is."""
        if not isinstance(tensor, DTensor):
            if tensor is not None and self.batch_is_sharded:
                raise ValueError(
                    f"{self.op}: {name} must be a DTensor, as input, whose batch is sharded, got a plain tensor"
                )
            return tensor
        if tensor.device_mesh != self.mesh or tensor.placements != self.batch:
            raise ValueError(
                f"{self.op}: {name} must be placed {self.batch} on {self.mesh}, got {tensor.placements} on "
                f"{tensor.device_mesh}"
            )
        return tensor.to_local()

    def classes(self, name: str, tensor: Tensor | None, dim: int = 0) -> Tensor | None:
        """This process's part of a tensor with an entry for each class. A plain tensor is taken to be the whole."""
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            if tensor.requires_grad:
                raise ValueError(
                    f"{self.op}: {name} must be a DTensor, as the vocabulary's others, got a plain tensor that "
                    "requires a gradient"
                )
            return tensor.narrow(dim, self.start, self.stop - self.start)
        found = layout_of(self.op, name, tensor, dim)
        if tensor.device_mesh != self.mesh or found.mesh_dim != self.mesh_dim:
            raise ValueError(
                f"{self.op}: {name} must be sharded over the mesh's dimension {self.mesh_dim}, as the vocabulary's others, "
                f"got {tensor.placements} on {tensor.device_mesh}"
            )
        # Each part of a sharded batch adds its own gradient to a parameter's.
        pairs = zip(tensor.placements, self.batch, strict=True)
        placements = [Partial() if rows.is_shard() and not own.is_shard() else own for own, rows in pairs]
        return tensor.to_local(grad_placements=placements)

    def wrapped(self, like: Tensor, output: Tensor | None, placements: tuple | None = None) -> Tensor | None:
        """An output as a DTensor where the input is one."""
        if output is None or not isinstance(like, DTensor):
            return output
        placements = self.batch if placements is None else placements
        shape = list(output.shape)
        if placements == self.batch and self.batch_is_sharded:
            shape[0] = like.shape[0]
        strides = torch.empty(shape, device="meta").stride()
        output = output.contiguous()
        return DTensor.from_local(
            output, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )

    def loss(self, like: Tensor, reduction: str, num_items, call: Callable[[], Tensor]) -> Tensor:
        """A loss, which over a sharded batch is the sum of its parts."""
        if reduction == "none":
            return self.wrapped(like, call())
        if reduction == "mean" and num_items is None and self.batch_is_sharded:
            raise ValueError(
                f"{self.op}: num_items must tell the divisor of the mean over a batch that is sharded, got None"
            )
        parts = tuple(Partial() if placement.is_shard() else placement for placement in self.batch)
        return self.wrapped(like, call(), parts)


def layout_of(op: str, name: str, tensor: DTensor, class_dim: int) -> _Layout:
    """From the tensor that the vocabulary is a dimension of.

    Raises
    ------
    ValueError
        Another placement.
    """
    mesh, placements, dim = tensor.device_mesh, tensor.placements, None
    for k, placement in enumerate(placements):
        sharded = type(placement) is Shard and placement.dim % tensor.dim() == class_dim and dim is None
        if sharded:
            dim = k
        elif not placement.is_replicate() and not (class_dim > 0 and placement == Shard(0)):
            raise ValueError(
                f"{op}: {name} must be Shard({class_dim}) over one dimension of the mesh and Replicate over the others, "
                f"got {placement} over dimension {k} of {placements}"
            )
    size = tensor.shape[class_dim]
    start, stop = 0, size
    if dim is not None:
        step = -(-size // mesh.size(dim))
        start = min(mesh.get_local_rank(dim) * step, size)
        stop = min(start + step, size)
    return _Layout(op, mesh, dim, start, stop, ())


def _layout(op: str, name: str, tensor: Tensor, class_dim: int, rows: Tensor, rows_name: str) -> _Layout:
    """Of a call: of the vocabulary by ``tensor``, of the batch by ``rows``."""
    if not isinstance(tensor, DTensor):
        raise ValueError(f"{op}: {name} must be a DTensor, as {rows_name}, got a plain tensor")
    layout = layout_of(op, name, tensor, class_dim)
    if not isinstance(rows, DTensor):
        layout.batch = (Replicate(),) * tensor.device_mesh.ndim
        return layout
    if rows.device_mesh != layout.mesh:
        raise ValueError(f"{op}: {rows_name} must be on {name}'s mesh {layout.mesh}, got {rows.device_mesh}")
    for k, placement in enumerate(rows.placements):
        if placement.is_replicate() or (placement == Shard(0) and k != layout.mesh_dim and rows.dim() > 0):
            continue
        if rows is tensor and k == layout.mesh_dim:
            continue
        accepted = "Replicate" if k == layout.mesh_dim else "Replicate or Shard(0), the batch,"
        raise ValueError(
            f"{op}: {rows_name} must be {accepted} over the mesh's dimension {layout._dim_name(k)}, got {placement}"
        )
    layout.batch = tuple(Replicate() if k == layout.mesh_dim else p for k, p in enumerate(rows.placements))
    return layout


def embedding(input: Tensor, weight: Tensor, *arguments) -> Tensor:
    layout = _layout("embedding", "weight", weight, 0, input, "input")
    ids, table = layout.rows("input", input), layout.classes("weight", weight)
    function = F.embedding if layout.mesh_dim is None else _embedding
    return layout.wrapped(input, function(ids, table, *arguments, **layout.keywords))


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, num_items, **options) -> Tensor:
    class_dim = 0 if input.dim() == 1 else 1
    layout = _layout("cross_entropy", "input", input, class_dim, input, "input")
    logits = input.to_local()
    y = layout.classes("target", target, class_dim) if target.is_floating_point() else layout.rows("target", target)
    w = layout.classes("weight", weight)
    function = F.cross_entropy if layout.mesh_dim is None else _cross_entropy
    options |= {"reduction": reduction, "num_items": num_items, **layout.keywords}
    return layout.loss(input, reduction, num_items, lambda: function(logits, y, w, **options))


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias, weight, reduction: str, num_items, **options
) -> Tensor:
    op = "linear_cross_entropy"
    layout = _layout(op, "linear_weight", linear_weight, 0, input, "input")
    x, head = layout.rows("input", input), layout.classes("linear_weight", linear_weight)
    y = (
        layout.classes("target", target, target.dim() - 1)
        if target.is_floating_point()
        else layout.rows("target", target)
    )
    options["linear_bias"] = layout.classes("linear_bias", linear_bias)
    options["weight"] = layout.classes("weight", weight)
    function = F.linear_cross_entropy if layout.mesh_dim is None else _linear_cross_entropy
    options |= {"reduction": reduction, "num_items": num_items, **layout.keywords}
    return layout.loss(input, reduction, num_items, lambda: function(x, head, y, **options))


def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias, temperature, top_ids, **options
) -> LogProbs:
    layout = _layout("linear_log_probs", "linear_weight", linear_weight, 0, input, "input")
    x, head = layout.rows("input", input), layout.classes("linear_weight", linear_weight)
    options["linear_bias"] = layout.classes("linear_bias", linear_bias)
    options["top_ids"] = layout.rows("top_ids", top_ids)
    options["temperature"] = layout.rows("temperature", temperature) if isinstance(temperature, Tensor) else temperature
    function = F.linear_log_probs if layout.mesh_dim is None else _linear_log_probs
    found = function(x, head, layout.rows("target", target), **options, **layout.keywords)
    return LogProbs(*(layout.wrapped(input, value) for value in found))


# --- plans


class VocabParallel(ParallelStyle):
    """Cuts the parameters of a table or an output layer, ``Shard(0)``: ``fastllm.functional`` does the rest.

    Parameters
    ----------
    made : dict, optional
        Parameters that are placed already, shared by the styles of one plan: tied ones stay one.
    """

    def __init__(self, made: dict | None = None) -> None:
        super().__init__()
        self.made = {} if made is None else made

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in self.made:
                placed = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
                self.made[id(parameter)] = parameter, nn.Parameter(placed, parameter.requires_grad)
            module.register_parameter(name, self.made[id(parameter)][1])
        return module


def plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for ``torch.distributed.tensor.parallel.parallelize_module`` that cuts the vocabulary of a model.

    It names every :class:`fastllm.Embedding`, the output layer of the models of ``fastllm.models``, and the layer of
    :class:`fastllm.LinearCrossEntropyLoss` and :class:`fastllm.LinearLogProbs`. Tied parameters stay one parameter. Add
    entries for other layers as you like.

    Parameters
    ----------
    model : Module

    Raises
    ------
    ValueError
        There is no such layer in it.

    Examples
    --------
    ``parallelize_module(model, init_device_mesh("cuda", (8,)), fastllm.distributed.plan(model))``
    """
    from fastllm.models.base import LanguageModel

    made: dict = {}
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, layers.Embedding) and name:
            found[name] = VocabParallel(made)
        elif isinstance(module, (layers.LinearCrossEntropyLoss, layers.LinearLogProbs)):
            found[f"{prefix}linear"] = VocabParallel(made)
        elif isinstance(module, LanguageModel) and getattr(module, "output", None) is not None:
            found[f"{prefix}output"] = VocabParallel(made)
    if not found:
        raise ValueError(
            f"plan: model must hold an Embedding or an output layer of fastllm, got {type(model).__name__}"
        )
    return found
