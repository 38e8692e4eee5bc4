"""``accelerate``: the layers and losses of a model that people already have, computed by fastllm.

Layers are found by structure. A layer is replaced by changing the class of the instance and nothing else, so that its
parameters, hooks, device, dtype, mode and names stay, and whoever holds the layer (an optimizer, a tied layer) still
does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastllm import nn as layers
from fastllm._deferred import has_hooks
from fastllm._feed_forward import DeferringReLU, DownLinear, FusedSequential, Place, UpLinear
from fastllm._logits import Accelerated, LanguageModelHead, accelerated_class, labels_position
from fastllm.backends import TABLE, get_backend

__all__ = ["Left", "Replaced", "Report", "accelerate", "accelerated"]


@dataclass(frozen=True)
class Replaced:
    """A layer that fastllm computes: its name and class, what it became, and the backend for its tensors."""

    name: str
    kind: str
    became: str
    backend: str


@dataclass(frozen=True)
class Left:
    """A layer of a kind that was asked for, and why it stays as it is."""

    name: str
    kind: str
    reason: str


class _Change:
    """The new class of a module, and the attributes that the class needs. The module is not kept alive."""

    def __init__(self, module: nn.Module, name: str, new: type, attributes: dict) -> None:
        self.module = weakref.ref(module)
        self.name = name
        self.old, self.new = type(module), new
        self.attributes = attributes

    def make(self) -> None:
        module = self.module()
        module.__class__ = self.new
        module.__dict__.update(self.attributes)

    def undo(self) -> None:
        module = self.module()
        if module is not None:
            module.__class__ = self.old
            for name in (*self.attributes, "deferring"):
                module.__dict__.pop(name, None)


class Report:
    """What ``accelerate`` did: ``replaced`` and ``left`` are lists, and printing it shows them as a table."""

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._changes: list[_Change] = []

    def undo(self) -> None:
        """Make the model what it was. A second call does nothing.

        Raises
        ------
        RuntimeError
            Something else (FSDP2, parametrisation) has changed the class of a replaced layer since; nothing is undone.
        """
        for change in self._changes:
            module = change.module()
            if module is not None and type(module) is not change.new:
                raise RuntimeError(
                    f"undo: {change.name or 'the model'} was made a {_class_name(type(module))} after accelerate; "
                    "take that back first"
                )
        for change in reversed(self._changes):
            change.undo()
        self._changes = []

    def __str__(self) -> str:
        lines = [f"fastllm.accelerate: {len(self.replaced)} replaced, {len(self.left)} left"]
        replaced = [(row.name or "(the model)", row.kind, row.became, row.backend) for row in self.replaced]
        lines += _table("replaced", ("name", "class", "became", "backend"), replaced)
        left = [(row.name or "(the model)", row.kind, row.reason) for row in self.left]
        return "\n".join(lines + _table("left", ("name", "class", "why"), left))

    __repr__ = __str__


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)]
    return ["", f"{title}:", *(f"  {line}" for line in lines)]


def _class_name(kind: type) -> str:
    return kind.__name__ if kind.__module__.startswith("torch.nn.modules") else f"{kind.__module__}.{kind.__name__}"


def _why_not(module: nn.Module, kind: type[nn.Module], weight: str | None = "weight") -> str | None:
    """Why a layer of class ``kind``, or derived from it, cannot be replaced; None if it can."""
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    if type(module) is not kind:
        return f"a subclass of {kind.__name__} may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if weight is None:
        return None
    value = module._parameters.get(weight)
    if value is None:
        return f"its {weight} is computed before each call (weight norm, pruning)"
    if type(value) is not nn.Parameter:
        return f"its {weight} is a {type(value).__name__}, not a plain Parameter"
    return None if value.is_floating_point() else f"its {weight} is {str(value.dtype).removeprefix('torch.')}"


def _backend(op: str, tensor: Tensor | None) -> str:
    """The backend that serves ``op`` on such a tensor now."""
    if tensor is not None and tensor.is_meta:
        return "its device's"
    tensor = torch.empty(0) if tensor is None else tensor
    asked = get_backend()
    for name in TABLE if asked == "auto" else [asked]:
        if TABLE[name].refusal(op, tensor) is None:
            return name
    return f"none: {TABLE[asked].refusal(op, tensor)}"


class _Plan:
    """Walks over a model and writes down what to change, without changing it."""

    def __init__(self, model: nn.Module) -> None:
        self.report = Report()
        self.names = {module: name for name, module in model.named_modules()}  # the first name of a shared module
        self.any_tensor = next((p for p in model.parameters() if p.is_floating_point()), None)

    def change(self, module: nn.Module, new: type, **attributes) -> None:
        self.report._changes.append(_Change(module, self.names[module], new, attributes))

    def replaced(self, name: str, kind: str, became: str, op: str, tensor: Tensor | None) -> None:
        self.report.replaced.append(Replaced(name, kind, became, _backend(op, tensor)))

    def left(self, name: str, module: nn.Module | str, reason: str) -> None:
        kind = module if isinstance(module, str) else _class_name(type(module))
        self.report.left.append(Left(name, kind, reason))

    # --- embeddings and losses: the class of that name in fastllm.nn

    def embedding(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding) or isinstance(module, layers.Embedding):
            return
        reason = _why_not(module, nn.Embedding)
        if reason is not None:
            self.left(name, module, reason)
            return
        self.change(module, layers.Embedding)
        self.replaced(name, "Embedding", "fastllm.Embedding", "embedding", module.weight)

    def loss(self, name: str, module: nn.Module) -> None:
        for kind, new, op in (
            (nn.MSELoss, layers.MSELoss, "mse_loss"),
            (nn.CrossEntropyLoss, layers.CrossEntropyLoss, "cross_entropy"),
        ):
            if not isinstance(module, kind) or isinstance(module, new):
                continue
            reason = _why_not(module, kind, weight=None)
            if reason is not None:
                self.left(name, module, reason)
                continue
            added = {key: value for key, value in new().__dict__.items() if key not in module.__dict__}
            self.change(module, new, **added)
            self.replaced(name, kind.__name__, f"fastllm.{kind.__name__}", op, self.any_tensor)

    # --- Linear and ReLU

    def sequential(self, name: str, module: nn.Module) -> None:
        """Pairs of Linear and ReLU; which of them ``FusedSequential`` joins to three layers, its ``forward`` says."""
        if not isinstance(module, nn.Sequential) or isinstance(module, FusedSequential):
            return
        children = list(module._modules.items())
        found = False
        at = 0
        while at + 1 < len(children):
            (first_name, first), (_, relu) = children[at : at + 2]
            if not (isinstance(first, nn.Linear) and isinstance(relu, nn.ReLU)):
                at += 1
                continue
            where = _join(name, first_name)
            reason = _why_not(module, nn.Sequential, None) or self._why_not_fused(first, relu)
            if reason is not None:
                self.left(where, "Linear, ReLU", reason)
                at += 2
                continue
            found = True
            dropouts, next_at = [], at + 2
            while next_at < len(children) and type(children[next_at][1]) is nn.Dropout:
                dropouts.append(children[next_at][1])
                next_at += 1
            second = children[next_at][1] if next_at < len(children) else None
            has_relu = next_at + 1 < len(children) and isinstance(children[next_at + 1][1], nn.ReLU)
            idle = not any(has_hooks(dropout) for dropout in dropouts)
            if second is not None and idle and not has_relu and self._is_second(first, second):
                kind = "Linear, ReLU, Dropout, Linear" if dropouts else "Linear, ReLU, Linear"
                became = "linear_relu; relu_mlp without active dropout" if dropouts else "relu_mlp"
                self.replaced(where, kind, became, "relu_mlp", first.weight)
                at = next_at + 1
            else:
                self.replaced(where, "Linear, ReLU", "linear_relu", "linear_relu", first.weight)
                at += 2
        if found:
            self.change(module, FusedSequential)

    @staticmethod
    def _why_not_fused(*modules: nn.Module) -> str | None:
        for module in modules:
            reason = _why_not(module, nn.Linear) if isinstance(module, nn.Linear) else _why_not(module, nn.ReLU, None)
            if reason is None and has_hooks(module):
                reason = f"a hook on its {type(module).__name__} may need what is between them"
            if reason is not None:
                return reason
        return None

    @staticmethod
    def _is_second(first: nn.Linear, second: nn.Module) -> bool:
        return (
            isinstance(second, nn.Linear)
            and _Plan._why_not_fused(second) is None
            and second.in_features == first.out_features
            and second.weight.dtype == first.weight.dtype
        )

    def feed_forward(self, name: str, module: nn.Module) -> None:
        """A block of a library whose code is known to hand the first layer's output to the ReLU only."""
        if not type(module).__module__.startswith(("transformers.", "torch.nn.")) or isinstance(
            module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        ):
            return
        relus = [child_name for child_name, child in module._modules.items() if isinstance(child, nn.ReLU)]
        functions = [key for key, value in vars(module).items() if value is nn.functional.relu or value is torch.relu]
        linears = {key: child for key, child in module._modules.items() if isinstance(child, nn.Linear)}
        if not linears or not (relus or functions) or any(isinstance(child, UpLinear) for child in linears.values()):
            return
        first, *others = linears
        where, kind = _join(name, first), f"{type(module).__name__}: {', '.join([first, *relus, *functions, *others])}"
        if len(linears) != 2 or len(relus) + len(functions) != 1:
            count = len(relus) + len(functions)
            self.left(where, kind, f"{len(linears)} Linear and {count} ReLU: their order is not known")
            return
        (_, up), (down_name, down) = linears.items()
        relu = module._modules[relus[0]] if relus else None
        reason = self._why_not_fused(*([up, down] if relu is None else [up, relu, down]))
        if reason is None and relu is not None and relu.inplace:
            reason = "its ReLU works in place"
        if reason is None and not self._is_second(up, down):
            reason = "its second Linear does not take what the first gives"
        if reason is not None:
            self.left(where, kind, reason)
            return
        self.change(up, UpLinear, _fastllm_place=Place(module, relus[0] if relus else None, down_name))
        self.change(down, DownLinear)
        if relu is not None:
            self.change(relu, DeferringReLU)
        self.replaced(where, kind, "relu_mlp; linear_relu where dropout between is active", "relu_mlp", up.weight)

    # --- the loss of a language model

    def language_model(self, name: str, model: Any) -> None:
        if not any(
            k.__name__ == "PreTrainedModel" and k.__module__.startswith("transformers.") for k in type(model).__mro__
        ):
            return
        if labels_position(type(model)) is None:
            return
        try:
            head = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            head = None
        if head is None:
            if type(model).can_generate():
                self.left(name, model, "get_output_embeddings() gives no output layer")
            return
        is_accelerated = isinstance(model, Accelerated) and model._fastllm_head is not None
        if is_accelerated and type(head) is LanguageModelHead:
            return
        path = next((n for n, module in model.named_modules() if module is head), None)
        head_name = name if path is None else _join(name, path)
        reason = self._why_not_head(model, head, path)
        if reason is not None:
            self.left(head_name, head if isinstance(head, nn.Module) else type(head).__name__, reason)
            return
        if type(head) is nn.Linear and all(change.module() is not head for change in self.report._changes):
            self.change(head, LanguageModelHead)
        if not is_accelerated:
            base = vars(type(model)).get("_fastllm_base", type(model))  # of a model made by an accelerated one's class
            self.change(model, accelerated_class(base), _fastllm_head=tuple(str(path).split(".")))
        became = "its loss by linear_cross_entropy, without logits"
        self.replaced(head_name, f"{type(model).__name__}'s head", became, "linear_cross_entropy", head.weight)

    def _why_not_head(self, model: nn.Module, head: object, path: str | None) -> str | None:
        if not isinstance(head, nn.Linear):
            return f"the head is a {_class_name(type(head))}, not a torch.nn.Linear"
        if path is None:
            return "the head is not a module of the model"
        reason = None if type(head) is LanguageModelHead else _why_not(head, nn.Linear)
        if reason is not None:
            return f"the head: {reason}"
        if "forward" in model.__dict__:
            return "the model's forward was replaced on the instance"
        module: Any = model
        for part in path.split("."):
            module = module._modules[part]
            if has_hooks(module):
                return f"a hook on {part} may need the logits"
        return None if _is_linear(head) else "its output is not x W^T + b on a probe"


def _is_linear(head: nn.Linear) -> bool:
    """The probe: one row through the layer as it is, against the definition. Not on the meta device, without numbers."""
    weight, bias = head.weight, head.bias
    if weight.is_meta:
        return True
    row = torch.linspace(-1, 1, head.in_features, device=weight.device).to(weight.dtype)
    with torch.no_grad():
        output = head(row.unsqueeze(0))
        expected = torch.mv(weight, row)
        expected = expected if bias is None else expected + bias
    if not isinstance(output, Tensor) or output.shape != (1, head.out_features):
        return False
    difference = (output[0].float() - expected.float()).norm()
    return bool(difference <= 0.02 * expected.float().norm() + 1e-6)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def accelerate(
    model: nn.Module,
    *,
    embedding: bool = True,
    linear_relu: bool = True,
    losses: bool = True,
    language_model_loss: bool = True,
    strict: bool = False,
) -> Report:
    """Let fastllm compute the layers and losses of ``model``, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; layers inside wrappers (PEFT, DDP) are found too. Its parameters stay the same objects, and its
        hooks, device, dtype, mode, ``forward`` signature and ``state_dict`` keys stay.
    embedding : bool
        ``nn.Embedding`` by :func:`fastllm.functional.embedding`.
    linear_relu : bool
        ``nn.Linear`` and ``nn.ReLU`` in an ``nn.Sequential``, and the ReLU feed-forward blocks of Hugging Face and
        PyTorch layers, by :func:`~fastllm.functional.linear_relu` and :func:`~fastllm.functional.relu_mlp`.
    losses : bool
        ``nn.MSELoss`` and ``nn.CrossEntropyLoss`` by :func:`~fastllm.functional.mse_loss` and
        :func:`~fastllm.functional.cross_entropy`.
    language_model_loss : bool
        The loss of a Hugging Face language model by :func:`~fastllm.functional.linear_cross_entropy`. In training with
        labels its output then has no logits (None); in evaluation it has, unless the call says ``skip_logits=True``.
    strict : bool
        Raise, and change nothing, if a layer of a kind that was asked for has to be left as it is.

    Returns
    -------
    Report
        What was replaced and what was left, and why; ``report.undo()`` takes everything back.

    Raises
    ------
    TypeError
        ``model`` is not a module.
    RuntimeError
        Under ``strict``, with the layers that were left.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    plan = _Plan(model)
    wanted = {
        plan.embedding: embedding,
        plan.sequential: linear_relu,
        plan.feed_forward: linear_relu,
        plan.loss: losses,
        plan.language_model: language_model_loss,
    }
    for module, name in plan.names.items():
        for look in [look for look, is_wanted in wanted.items() if is_wanted]:
            look(name, module)
    report = plan.report
    if strict and report.left:
        rows = [f"{row.name or '(the model)'} ({row.kind}): {row.reason}" for row in report.left]
        raise RuntimeError("accelerate: strict=True, and these would be left as they are: " + "; ".join(rows))
    for change in report._changes:
        change.make()
    return report


@contextlib.contextmanager
def accelerated(model: nn.Module, **options: bool) -> Iterator[Report]:
    """``accelerate`` within a ``with`` block; at its end the model is what it was."""
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        report.undo()
