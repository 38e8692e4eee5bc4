"""Which backend serves a call: the one table, the switch, and the report.

``auto`` takes the fastest backend that serves the tensor at hand, and ``eager`` (plain PyTorch) where none does. A
backend that was asked for by name serves the call or raises; it is never silently replaced. The exceptions are
PyTorch's own transforms (``torch.func``, forward-mode derivatives, tensor subclasses such as DTensor in any argument):
compiled operations cannot be traced by them, so the eager definition, which they differentiate, is used under any
backend.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fastllm import _native, operations, triton
from fastllm._build import cache
from fastllm._version import TESTED_TORCH, __version__
from fastllm.operations import DTYPES, dense, node
from fastllm.operations import NAMES as OPERATIONS


@dataclass(frozen=True)
class Backend:
    """What a backend serves, and why it is missing where it is."""

    name: str
    operations: frozenset[str]
    device_types: tuple[str, ...]  # empty: every device
    missing: str | None  # why it cannot be used here, or None

    def refusal(self, op: str, tensor: torch.Tensor) -> str | None:
        """Why this backend cannot serve ``op`` on ``tensor``, or None. Dtypes are the operation's own to refuse."""
        if self.missing is not None:
            return self.missing
        if op not in self.operations:
            return f"it has no {op}"
        if self.device_types and tensor.device.type not in self.device_types:
            return f"it serves {' and '.join(self.device_types)} tensors, got one on {tensor.device}"
        return None


def _why_no_cuda() -> str | None:
    """Why the CUDA C++ kernels cannot be used, or None."""
    if _native.MISSING is not None:
        return _native.MISSING
    if _native.BUILD.get("cuda") is None:
        return f"CUDA C++ kernels are not built: {_native.BUILD.get('cuda_missing')}; {_native.CUDA_REMEDY}"
    return None


_ALL = frozenset(operations.FUNCTIONS)
TABLE = {  # in the order in which "auto" asks them
    "cpu": Backend("cpu", _ALL, ("cpu",), _native.MISSING),
    "cuda": Backend("cuda", _ALL, ("cuda",), _why_no_cuda()),
    "triton": Backend("triton", _ALL, triton.DEVICE_TYPES, triton.why_missing()),
    "eager": Backend("eager", _ALL, (), None),
}
NAMES = ("auto", *TABLE)  # their numbers in csrc/ops/backend.h
if _native.extension is None:
    operations.implement_in_python(operations.OPERATIONS)
else:
    operations.complete_in_extension(operations.OPERATIONS, _native.extension)
    dense.use(_native.extension)
if TABLE["triton"].missing is None:
    triton.register()


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


_default = _checked(os.environ.get("FASTLLM_BACKEND", "auto"), "FASTLLM_BACKEND")
if _native.extension is not None:
    _native.extension.set_process_backend(NAMES.index(_default))


class _Chosen(threading.local):
    """The backend of a ``use_backend`` block in this thread; None outside of one."""

    def __init__(self) -> None:  # runs in every thread; torch.compile before 2.13 would read a class attribute instead
        self.name: str | None = None


_chosen = _Chosen()


def _usable(name: str, source: str) -> str:
    _checked(name, source)
    if name != "auto" and TABLE[name].missing is not None:
        raise RuntimeError(f"{source}: backend {name!r} cannot be used: {TABLE[name].missing}")
    return name


def get_backend() -> str:
    """The backend asked for in this thread: ``"auto"`` unless chosen otherwise."""
    return _chosen.name or _default


def set_backend(name: str) -> None:
    """Use backend ``name`` in all threads, outside ``use_backend`` blocks.

    Parameters
    ----------
    name
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"eager"``.

    Raises
    ------
    ValueError
        Another name.
    RuntimeError
        A backend that is not built here; the message says why. Or ``"cuda"`` or ``"triton"``, chosen inside code that
        torch.compile traces: its graph holds operations, and which kernels serve them is asked when they run.
    """
    global _default
    _default = _usable(name, "set_backend")
    if _native.extension is not None:
        _native.extension.set_process_backend(NAMES.index(name))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` in this thread within the ``with`` block. Errors as ``set_backend``."""
    before = _chosen.name
    _choose(_usable(name, "use_backend"))
    try:
        yield
    finally:
        _choose(before)


node.know_backends(get_backend, use_backend)


def _choose(name: str | None) -> None:
    """The choice of this thread, here and in the compiled operations."""
    _chosen.name = name
    if torch.compiler.is_compiling():
        # Traced code decides here between eager and compiled operations; what serves these, it asks when it runs.
        if name in ("cuda", "triton"):
            raise RuntimeError(f"use_backend: choose {name!r} around the call of the compiled function, not inside it")
    elif _native.extension is not None:
        _native.extension.set_thread_backend(-1 if name is None else NAMES.index(name))


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_STRIDED = torch.strided
_CPU_READY = TABLE["cpu"].missing is None
_CUDA_READY = TABLE["cuda"].missing is None
_ACCELERATORS = frozenset(
    kind
    for kind in ("cuda", "xpu")
    if (_CUDA_READY and kind == "cuda") or (TABLE["triton"].missing is None and kind in TABLE["triton"].device_types)
)  # device types for which there are kernels
_in_transform = torch._C._are_functorch_transforms_active  # the form that torch.compile traces to the right constant

# The operations twice: as torch.compile can trace them, and called from C (csrc/ops/calls.h says why) where `_serves`.
_TRACEABLE = {op: getattr(torch.ops.fastllm, op).default for op in OPERATIONS}
if _native.extension is not None:
    _DIRECT: dict[str, Callable[..., torch.Tensor]] = {op: getattr(_native.extension, op) for op in OPERATIONS}
    _serves = _native.extension.serves
    # Triton is tried first: `_triton_refusal` adds its devices.
    _native.extension.set_served_devices(["cpu", "cuda"] if _CUDA_READY else ["cpu"])
else:

    def _serves(*tensors: torch.Tensor | None) -> bool:
        return False


def _is_traced(op: str, tensor: object) -> bool:
    """Whether ``tensor`` is fake or functional: PyTorch's compilers trace the compiled operations with such stand-ins.

    Raises
    ------
    TypeError
        It is neither a tensor nor an object that overrides PyTorch's functions.
    """
    if isinstance(tensor, torch.Tensor):
        return isinstance(tensor, (FakeTensor, FunctionalTensor))
    if hasattr(type(tensor), "__torch_function__"):
        return False
    raise TypeError(f"{op}: arguments must be tensors, got one of type {type(tensor).__name__}")


_told: set[str] = set()  # reasons of which there has been a warning


def _triton_refusal(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton cannot serve ``op`` on a GPU, or None. It is tried once: what it lacks shows at a launch alone."""
    from fastllm.triton import probe

    reason = probe.why_not_operation(op, dtype, device)
    if reason is None and _native.extension is not None and probe.serves_every_device(device.type):
        _native.extension.set_served_devices(["cpu", device.type])  # from now on without a look from Python
    return reason


# What torch.compiler.assume_constant_result sets; calling that imports the compiler, which takes seconds.
_triton_refusal.__dict__["_dynamo_marked_constant"] = True


def _accelerator_serves(op: str, tensor: torch.Tensor) -> bool:
    """Whether ``auto`` has kernels for a tensor of a GPU; if not, PyTorch serves, and one warning says why."""
    kind = tensor.device.type
    if kind not in _ACCELERATORS:
        return False
    if kind == "cuda" and _CUDA_READY and op in TABLE["cuda"].operations:
        return True
    if op not in TABLE["triton"].operations:
        return False
    reason = _triton_refusal(op, tensor.dtype, tensor.device)
    if reason is not None and reason not in _told and not torch.compiler.is_compiling():
        _told.add(reason)
        warnings.warn(f"fastllm: {reason}; {op} takes the eager backend on {tensor.device}.", stacklevel=4)
    return reason is None


def holds_numbers(*tensors: torch.Tensor) -> bool:
    """Whether values may be looked at without a wait: plain CPU tensors, and nothing traces or transforms the call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not _in_transform()
        and all(type(tensor) in _PLAIN and tensor.is_cpu for tensor in tensors)
    )


def native(op: str, tensor: torch.Tensor, *others: torch.Tensor | None) -> Callable[..., torch.Tensor] | None:
    """The compiled operation ``op``, to be called with its arguments by position, or None: the eager definition serves.

    Raises
    ------
    RuntimeError
        A backend was asked for by name and cannot serve the call.
    TypeError
        An argument is neither a tensor nor, among the ``others``, None.
    """
    if not torch.compiler.is_compiling() and _serves(tensor, *others):
        return _DIRECT[op]
    return _TRACEABLE[op] if has_kernels(op, tensor, *others) else None


def has_kernels(op: str, tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the chosen backend has kernels for ``op``; if not, the eager definition serves. Errors as :func:`native`."""
    name = _chosen.name or _default
    if name == "eager":
        return False
    if type(tensor) not in _PLAIN and not _is_traced(op, tensor):
        return False
    dense = tensor.layout is _STRIDED and not tensor.is_nested
    for other in others:
        if type(other) not in _PLAIN_OR_NONE and not _is_traced(op, other):
            return False
        dense = dense and (other is None or other.layout is _STRIDED)
    if _in_transform() or forward_ad._current_level >= 0:
        return False
    if name == "auto":
        if not dense or tensor.dtype not in DTYPES:
            return False
        return _CPU_READY if tensor.is_cpu else _accelerator_serves(op, tensor)
    reason = TABLE[name].refusal(op, tensor) if dense else "it serves dense tensors, got a sparse or nested one"
    if reason is None and name == "triton" and tensor.device.type in _ACCELERATORS:
        reason = _triton_refusal(op, tensor.dtype, tensor.device)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} cannot serve this call: {reason}")
    return True


def _server(op: str, device_type: str) -> str:
    """The backend that ``auto`` takes for ``op`` on floating-point tensors of a device."""
    return next(
        name
        for name, backend in TABLE.items()
        if backend.missing is None
        and op in backend.operations
        and (not backend.device_types or device_type in backend.device_types)
    )


def _cuda_build(build: dict) -> str:
    if build.get("cuda") is None:
        return "not built"
    return f"nvcc {build['cuda']}, {', '.join(build['cuda_architectures'])}"


def _tested_torch(running: str) -> str:
    """The releases of torch that were tested, and whether ``running`` is one of them."""
    oldest, newest = (tuple(map(int, release.split("."))) for release in TESTED_TORCH)
    release = re.match(r"(\d+)\.(\d+)(\.\d+)*(\+|$)", running)  # no pre-release
    inside = release is not None and oldest <= tuple(map(int, release.groups()[:2])) <= newest
    return " to ".join(dict.fromkeys(TESTED_TORCH)) + ("" if inside else f"; torch {running} is not among them")


class Info(dict):
    """What ``info()`` returns: a dictionary whose text is a table."""

    def __str__(self) -> str:
        lines = []
        for key, value in self.items():
            if isinstance(value, dict):
                lines.append(f"{key}:")
                lines += [f"  {name:<22}{text}" for name, text in value.items()]
            else:
                lines.append(f"{key + ':':<24}{value}")
        return "\n".join(lines)


def info() -> Info:
    """What is built, what was found, and which backend serves which operation.

    Returns
    -------
    Info
        A ``dict``; ``print(fastllm.info())`` shows it as a table.
    """
    build, extension = _native.BUILD, _native.extension
    served = {
        op: f"CPU tensors: {_server(op, 'cpu')}; CUDA tensors: {_server(op, 'cuda')}" for op in operations.FUNCTIONS
    }
    report = Info(
        fastllm=__version__,
        torch=torch.__version__,
        tested_with_torch=_tested_torch(torch.__version__),
        built_with=f"torch {build['torch']}, {build['cxx_version']}" if build else f"nothing: {_native.MISSING}",
        extension=extension.__file__ if extension else f"none; `{cache.COMMAND}` compiles it for this torch",
        instruction_sets=", ".join(build["isa"]) if build else "none",
        cuda_kernels=_cuda_build(build),
        instruction_set=extension.cpu_capability() if extension else "none",
        float32_gemm=extension.float32_gemm_library() if extension else "BLAS",
        threads=torch.get_num_threads(),
        memory_pool=f"keeps at most {extension.pool_limit() / 2**20:.0f} MiB" if extension else "none",
        backend=get_backend(),
    )
    report["backends"] = {
        name: "usable" if backend.missing is None else f"not usable: {backend.missing}"
        for name, backend in TABLE.items()
    }
    report["operations"] = served
    report["gpu"] = (
        "the CUDA C++ kernels pass their tests played on the CPU and compile for sm_80, sm_90a and sm_100, the Triton "
        "kernels theirs in Triton's interpreter and compile for sm_80, sm_90, sm_100 and gfx942; both have run on an H100, "
        "where the CUDA C++ kernels were mostly the faster ones, and on no other GPU; "
        "the kernels of log_probs and the present ones of cross_entropy have not run on one"
    )
    return report
