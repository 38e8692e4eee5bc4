"""The CUDA kernels on the CPU: builds csrc/cuda and its torch-facing layer with the host compiler and loads them.

``FASTLLM_CUDA_HOST=1`` makes tests/conftest.py call :func:`enable`: backend ``cuda`` then serves CPU tensors, every
thread of every block played by a fiber (emulator.cpp). ``FASTLLM_CUDA_HOST_SANITIZE=1`` builds without optimization and
with the undefined-behavior sanitizer's checks as errors.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import cpp_extension

import fastllm
from fastllm import _native

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = 2  # the backend's number in csrc/ops/backend.h
FLAGS = [
    "-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=fast", "-Wall", "-Wextra",
    "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Werror", "-mfma", "-mf16c",
    "-DFASTLLM_CUDA_HOST",
]  # fmt: skip


def kernel_sources(root: Path = ROOT) -> list[Path]:
    return sorted((root / "csrc" / "cuda").glob("*.cu"))


def build(kernels: Path = ROOT, name: str = "cuda_host") -> Path:
    """The library, built by ninja where a source is newer; ``kernels``: the tree whose csrc/cuda is taken."""
    import ninja

    out = ROOT / "build" / name
    out.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    layer = [*sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cpp")), here / "emulator.cpp"]
    includes = " ".join(f"-isystem '{path}'" for path in cpp_extension.include_paths())
    folders = " ".join(f"-L'{path}'" for path in cpp_extension.library_paths())
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    library = out / f"lib{name}.so"
    lines = [
        "rule compile",
        f"  command = g++ -MMD -MF $out.d {' '.join(FLAGS)} -D_GLIBCXX_USE_CXX11_ABI={abi} -I'{here}' {includes} "
        "-x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ $in -shared {folders} -ltorch -ltorch_cpu -lc10 -ldl -o $out",
    ]
    objects = []
    for source in [*kernel_sources(kernels), *layer]:
        objects.append(f"{source.stem}{'_layer' if source in layer else ''}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {library}: link {' '.join(objects)}")
    (out / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", out, "--quiet"], check=True, stdout=sys.stderr)
    return library


def _routed(operation: str) -> Callable:
    """The CPU kernel of a plain operation, unless the chosen backend is CUDA."""
    compiled = torch.library.get_kernel(f"fastllm::{operation}", "CPU")
    played = getattr(torch.ops.fastllm_cuda, operation).default

    def call(keys, *args):
        if _native.extension.current_backend() == CUDA:
            return played(*args)
        return compiled.call_boxed(keys, *args)

    return call


_libraries: list[torch.library.Library] = []  # registrations last as long as these


def enable(library: Path | None = None) -> None:
    """Let backend ``cuda`` serve CPU tensors in this process."""
    if _libraries:
        return
    torch.ops.load_library(library or build())
    plain = torch.library.Library("fastllm", "IMPL")
    _libraries.append(plain)
    served = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastllm_cuda::")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in served:
            operation = name.split("::")[1]
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
                plain.impl(operation, _routed(operation), "CPU", with_keyset=True, allow_override=True)
    table = fastllm.backends.TABLE
    table["cuda"] = dataclasses.replace(table["cuda"], device_types=("cpu",), missing=None)
