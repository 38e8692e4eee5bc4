"""How an operation is declared: once, for the library ``fastllm`` and for the namespace of every GPU backend.

A public operation (``fastllm::mse_loss``) checks its arguments and applies an autograd node; the node calls kernel
operations (``fastllm::mse_loss_forward``), which the backends implement. The compiled extension registers public
operations and CPU kernels in C++ under the names that are declared here; without it, the Python functions named here
serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

LIBRARY = "fastllm"
BACKENDS = ("fastllm_cuda", "fastllm_triton")  # namespaces in which a GPU backend registers its kernels
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
REDUCTIONS = ("none", "mean", "sum")  # their numbers in a schema


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_flops(*_, **__) -> int:
    """An operation without a matrix product: ``torch.utils.flop_counter`` counts nothing else."""
    return 0


def no_result(*_) -> None:
    """The fake of a kernel operation that returns nothing."""


@dataclass(frozen=True)
class Autocast:
    """What ``torch.autocast`` does to the arguments.

    Parameters
    ----------
    lower_precision : bool
        Floating-point tensors are cast to autocast's dtype; otherwise to float32.
    keep : tuple of str
        Arguments that stay as they are.
    flag : str, optional
        A ``bool`` argument that is set to True: the operation knows that its arguments were cast.
    """

    lower_precision: bool
    keep: tuple[str, ...] = ()
    flag: str | None = None


@dataclass(frozen=True)
class Kernel:
    """A kernel operation.

    Parameters
    ----------
    name, schema : str
        ``mse_loss_forward`` and its arguments and results, ``"(Tensor input, ...) -> Tensor"``.
    fake : callable
        Its results for tensors without numbers: shapes, dtypes and strides.
    flops : callable
        Its floating-point operations, from the shapes of its arguments.
    function : callable, optional
        Serves every device by itself, out of PyTorch's and other kernel operations. None: the backends implement it.
    """

    name: str
    schema: str
    fake: Callable = no_result
    flops: Callable[..., int] = no_flops
    function: Callable | None = None


@dataclass(frozen=True)
class Operation:
    """A public operation and its kernel operations.

    Parameters
    ----------
    name, schema : str
        As for :class:`Kernel`. None as schema: the public function calls its autograd node in Python, nothing between.
    function : callable
        Checks and autograd node in Python, for machines without the compiled extension.
    kernels : tuple of Kernel
        What its node calls.
    autocast : Autocast, optional
        None: autocast leaves the arguments as they are.
    flops : callable
        Floating-point operations of a call that nothing is differentiated in.
    """

    name: str
    schema: str | None
    function: Callable | None
    kernels: tuple[Kernel, ...]
    autocast: Autocast | None = None
    flops: Callable[..., int] = no_flops


_libraries: dict[str, torch.library.Library] = {}  # declarations last as long as these


def declare(operations: tuple[Operation, ...]) -> None:
    """Declare schemas and fakes. The extension, loaded after this, finds them by name."""
    library = _libraries[LIBRARY] = torch.library.Library(LIBRARY, "DEF")
    for space in BACKENDS:
        _libraries[space] = torch.library.Library(space, "DEF")
    for operation in operations:
        if operation.schema is not None:
            library.define(operation.name + operation.schema)
        for kernel in operation.kernels:
            library.define(kernel.name + kernel.schema)
            library.impl(kernel.name, kernel.fake, "Meta")
            if kernel.function is not None:
                library.impl(kernel.name, kernel.function, "CompositeExplicitAutograd")
                library.impl(kernel.name, _refusing(kernel), "Autograd")
                continue
            for space in BACKENDS:
                _libraries[space].define(kernel.name + kernel.schema)


class _NotDifferentiable(torch.autograd.Function):
    """A kernel operation has no derivative of its own: differentiating it is an error, not a missing gradient."""

    @staticmethod
    def forward(ctx, refusal: str, call: Callable, *arguments):
        ctx.refusal = refusal
        return call(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.refusal)


def _refusing(kernel: Kernel) -> Callable:
    """The Autograd entry of a kernel operation."""
    refusal = f"derivative for {LIBRARY}::{kernel.name} is not implemented"
    operation = getattr(getattr(torch.ops, LIBRARY), kernel.name).default

    def call(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*arguments)

    def differentiable(*arguments):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _NotDifferentiable.apply(refusal, call, *arguments)
        return call(*arguments)

    return differentiable


def _autocast_rule(operation: Operation) -> tuple[str, bool, list[bool], int]:
    """Name, whether the dtype is the lower precision, which arguments are cast, and the index of the flag or -1."""
    rule = operation.autocast
    assert rule is not None
    overload = getattr(getattr(torch.ops, LIBRARY), operation.name).default
    names = [argument.name for argument in overload._schema.arguments]
    flag = -1 if rule.flag is None else names.index(rule.flag)
    return operation.name, rule.lower_precision, [name not in rule.keep for name in names], flag


def autocast_to(value: Any, dtype: torch.dtype, device_type: str) -> Any:
    """A tensor as autocast hands it to an operation: float64, other devices' and whatever else stays as it is."""
    eligible = (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.device.type == device_type
        and value.dtype != torch.float64
    )
    return value.to(dtype) if eligible else value


def _cast(operation: Operation, device_type: str) -> Callable:
    """The Autocast entry of a public operation."""
    overload = getattr(getattr(torch.ops, LIBRARY), operation.name).default
    _, lower_precision, casts, flag = _autocast_rule(operation)
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}[device_type]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*arguments):
        dtype = torch.get_autocast_dtype(device_type) if lower_precision else torch.float32

        values = [
            autocast_to(value, dtype, device_type) if wanted else value
            for value, wanted in zip(arguments, casts, strict=True)
        ]
        if flag >= 0:
            values[flag] = True
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*values)

    return call


def complete_in_extension(operations: tuple[Operation, ...], extension: ModuleType) -> None:
    """Register, in C++, what follows from the declarations: autocast, the refusal of derivatives, routing to a backend."""
    rules = [_autocast_rule(operation) for operation in operations if operation.autocast is not None]
    kernels = [k.name for operation in operations for k in operation.kernels if k.function is None]
    extension.complete_declarations(rules, kernels)


def implement_in_python(operations: tuple[Operation, ...], override: bool = False) -> None:
    """Register what the compiled extension registers where it is built: public operations, autograd, autocast.

    ``override`` replaces what the extension has registered, so that the tests of its nodes run on these.
    """
    library = torch.library.Library(LIBRARY, "IMPL")
    _libraries[f"{LIBRARY} in Python"] = library
    for operation in operations:
        for key in ("Autograd", "CompositeExplicitAutograd") if operation.function is not None else ():
            library.impl(operation.name, operation.function, key, allow_override=override)
        if operation.autocast is not None:
            for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU")):
                library.impl(operation.name, _cast(operation, device_type), key, allow_override=override)
        for kernel in operation.kernels:
            if kernel.function is None:
                library.impl(kernel.name, _refusing(kernel), "Autograd", allow_override=override)
