"""Which backend serves a call: the one table, the switch, and the report.

``auto`` takes the fastest backend that serves the tensor at hand, and ``eager`` (plain PyTorch) where none does. A
backend that was asked for by name serves the call or raises; it is never silently replaced. The exceptions are
PyTorch's own transforms (``torch.func``, forward-mode derivatives, tensor subclasses): compiled operations cannot be
traced by them, so the eager definition, which they differentiate, is used under any backend.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastllm import _native
from fastllm._version import __version__

OPERATIONS = ("embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy")
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Backend:
    """What a backend serves, and why it is missing where it is."""

    name: str
    device_types: tuple[str, ...]  # empty: every device
    dtypes: frozenset[torch.dtype]  # empty: every dtype
    missing: str | None  # why it cannot be used here, or None

    def refusal(self, tensor: torch.Tensor) -> str | None:
        """Why this backend cannot serve ``tensor``, or None."""
        if self.missing is not None:
            return self.missing
        if self.device_types and tensor.device.type not in self.device_types:
            return f"it serves {' and '.join(self.device_types)} tensors, got one on {tensor.device}"
        if self.dtypes and tensor.dtype not in self.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"it serves {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        return None


_NOT_BUILT = "it is not part of this version of fastllm"
TABLE = {
    "cpu": Backend("cpu", ("cpu",), DTYPES, _native.MISSING),
    "cuda": Backend("cuda", ("cuda",), DTYPES, _NOT_BUILT),
    "triton": Backend("triton", ("cuda", "xpu"), DTYPES, _NOT_BUILT),
    "eager": Backend("eager", (), frozenset(), None),
}
NAMES = ("auto", *TABLE)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


_default = _checked(os.environ.get("FASTLLM_BACKEND", "auto"), "FASTLLM_BACKEND")


class _Chosen(threading.local):
    """The backend of a ``use_backend`` block in this thread; None outside of one."""

    name: str | None = None


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
        A backend that is not built here; the message says why.
    """
    global _default
    _default = _usable(name, "set_backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` in this thread within the ``with`` block. Errors as ``set_backend``."""
    before = _chosen.name
    _chosen.name = _usable(name, "use_backend")
    try:
        yield
    finally:
        _chosen.name = before


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_CPU_READY = TABLE["cpu"].missing is None


def _is_traced(tensor: object) -> bool:
    """Fake and functional tensors stand for plain ones: PyTorch's compilers trace the compiled operations with them."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def _under_transform() -> bool:
    """Inside torch.func (grad, vmap, jvp, ...) or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def native(op: str, tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the compiled operation ``op`` serves a call on ``tensor``; else the eager definition does.

    Raises
    ------
    RuntimeError
        A backend was asked for by name and cannot serve the call.
    TypeError
        One of the ``others`` is neither a tensor nor None.
    """
    name = _chosen.name or _default
    if name == "eager":
        return False
    if not torch.compiler.is_compiling() and type(tensor) not in _PLAIN and not _is_traced(tensor):
        return False
    if _under_transform():
        return False
    for other in others:
        if other is not None and not isinstance(other, torch.Tensor):
            raise TypeError(f"{op}: arguments must be tensors, got one of type {type(other).__name__}")
    if name == "auto":
        return _CPU_READY and tensor.is_cpu and tensor.dtype in DTYPES
    reason = TABLE[name].refusal(tensor)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} cannot serve this call: {reason}")
    return True


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
    served = {}
    for op in OPERATIONS:
        cpu = "cpu (C++)" if _CPU_READY else "eager"
        served[op] = f"CPU tensors: {cpu}; CUDA tensors: eager"
    report = Info(
        fastllm=__version__,
        torch=torch.__version__,
        built_with=f"torch {build['torch']}, {build['cxx_version']}" if build else "not built",
        instruction_sets=", ".join(build["isa"]) if build else "none",
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
    report["gpu"] = "fastllm has no GPU kernels yet: CUDA tensors run on the eager backend, which is plain PyTorch"
    return report
