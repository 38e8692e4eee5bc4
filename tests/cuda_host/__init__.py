"""The CUDA kernels on the CPU: builds csrc/cuda and its torch-facing layer with the host compiler and loads them.

``FASTLLM_CUDA_HOST=1`` makes tests/conftest.py call :func:`enable`: backend ``cuda`` then serves CPU tensors, every
thread of every block emulated by a fiber (emulator.cpp). ``FASTLLM_CUDA_HOST_LIBRARY`` names another library to load.
What has been built from the same sources, compiler and flags is not built again.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import keyed
import torch
from torch.utils import cpp_extension

import fastllm
from fastllm import _native
from fastllm._build import plan, toolchain

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_host"
CUDA = 2  # the backend's number in csrc/ops/backend.h
FLAGS = [
    "-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=fast", "-Wall", "-Wextra",
    "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Werror", "-mfma", "-mf16c",
    "-DFASTLLM_CUDA_HOST",
]  # fmt: skip


def _ninja(
    out: Path, made_of: Path, sources: dict[str, Path], library: Path, link: str, objects: tuple[Path, ...] = ()
) -> Path:
    """Compile ``sources`` (object: source), which read files of ``made_of`` alone; link them and ``objects``."""
    compiler = keyed.version_of("g++")
    flags = [
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-I{plan.quote(HERE)}",
        *plan.system_includes(map(Path, cpp_extension.include_paths())),
    ]
    commands = {
        "compile": f"g++ -MMD -MF $out.d {' '.join(flags)} -x c++ -c $in -o $out",
        "link": f"g++ $in -shared {link} -o $out",
    }
    steps = [plan.Step("compile", obj, (source,), needs=("compiler",)) for obj, source in sources.items()]
    steps.append(plan.Step("link", library, (*sources, *objects)))
    rules = plan.ninja_text(commands, steps)
    parts = (rules, compiler, torch.__version__, HERE, made_of, *objects)
    with keyed.made_once(out, *parts, files=[library]) as missing:
        if missing:
            (out / "build.ninja").write_text(rules)
            if not (out / "compiler").exists() or (out / "compiler").read_text() != compiler:
                (out / "compiler").write_text(compiler)
            subprocess.run([toolchain.find_ninja(), "-C", out], check=True, stdout=sys.stderr)
    return library


def _link_torch() -> str:
    return (
        " ".join(f"-L{plan.quote(path)}" for path in cpp_extension.library_paths()) + " -ltorch -ltorch_cpu -lc10 -ldl"
    )


def _sources() -> dict[str, Path]:
    layer = [*sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cpp")), HERE / "emulator.cpp"]
    kernels = {f"{source.stem}.o": source for source in plan.cuda_kernels()}
    return kernels | {f"{source.stem}_layer.o": source for source in layer}


def build() -> Path:
    """The kernels and their torch-facing layer, as one library."""
    return _ninja(BUILD, ROOT / "csrc", _sources(), BUILD / "libcuda_host.so", _link_torch())


def build_mutant(kernel: str, file: str, old: str, new: str) -> Path:
    """The library with one kernel compiled from a copy of csrc in which ``old`` in ``file`` became ``new``."""
    build()
    out = BUILD / "mutants" / keyed.key(kernel, file, old, new)[:16]
    changed = out / "csrc" / "cuda" / file
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    shutil.copytree(ROOT / "csrc", out / "csrc", dirs_exist_ok=True)
    changed.write_text(text.replace(old, new))
    others = tuple(BUILD / obj for obj in _sources() if obj != f"{kernel}.o")
    source = {f"{kernel}.o": out / "csrc" / "cuda" / f"{kernel}.cu"}
    return _ninja(out, out / "csrc", source, out / "libmutant.so", _link_torch(), others)


def build_selftest() -> Path:
    """Small kernels that break rules, and the emulator, without torch."""
    sources = {"selftest.o": HERE / "selftest.cu", "emulator.o": HERE / "emulator.cpp"}
    return _ninja(BUILD / "selftest", HERE, sources, BUILD / "selftest" / "libselftest.so", "")


def _routed(operation: str) -> Callable:
    """The CPU kernel of a plain operation, unless the chosen backend is CUDA."""
    compiled = torch.library.get_kernel(f"fastllm::{operation}", "CPU")
    emulated = getattr(torch.ops.fastllm_cuda, operation).default

    def call(keys, *args):
        if _native.extension.current_backend() == CUDA:
            return emulated(*args)
        return compiled.call_boxed(keys, *args)

    return call


_libraries: list[torch.library.Library] = []  # registrations last as long as these


def enable() -> None:
    """Let backend ``cuda`` serve CPU tensors in this process."""
    if _libraries:
        return
    torch.ops.load_library(os.environ.get("FASTLLM_CUDA_HOST_LIBRARY") or build())
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
