"""Finds what compiles fastllm: a C++ compiler, ninja, Python's headers, PyTorch, and nvcc."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

OLDEST_GCC = 11
OLDEST_ARCHITECTURE = 80  # the kernels use instructions of compute capability 8.0
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"  # pruned to what nvcc knows


class CannotBuild(RuntimeError):
    """Something that a build needs is missing; the message says what, and how to get it."""


class CompileFailed(CannotBuild):
    """A compiler ran and failed."""


def torch_release(version: str) -> str:
    """The releases of torch that share one build of the extension.

    Patch releases of one build (``2.13.0+cpu``, ``2.13.1+cpu``) share their symbols; another minor version, another
    local tag (``+cpu``, ``+cu130``) or any two pre-releases may not.

    Examples
    --------
    >>> torch_release("2.13.1+cpu"), torch_release("2.14.0.dev20261101+cpu")
    ('2.13+cpu', '2.14.0.dev20261101+cpu')
    """
    public, plus, local = version.partition("+")
    if not public.replace(".", "").isdigit():
        return version
    return ".".join(public.split(".")[:2]) + plus + local


def output_of(*command: str | Path) -> str:
    """What a command prints on stdout; "" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler as words of a command line, and the first line of its ``--version``."""
    named = os.environ.get("CXX") or "g++"
    # A path may hold spaces, and a command may have several words, such as "ccache g++".
    words = [named] if shutil.which(named) else shlex.split(named)
    if not words or shutil.which(words[0]) is None:
        raise CannotBuild(f"no C++ compiler: {named!r} was not found (Debian: apt-get install g++; or set CXX)")
    first_line = (output_of(*words, "--version").splitlines() or ["unknown"])[0]
    major = output_of(*words, "-dumpversion").strip().partition(".")[0]
    if "clang" not in first_line and major.isdigit() and int(major) < OLDEST_GCC:
        raise CannotBuild(f"{first_line} is too old: g++ {OLDEST_GCC} or newer is needed (or set CXX)")
    return words, first_line


def find_torch() -> ModuleType:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise CannotBuild(
            f"PyTorch could not be imported while fastllm was installed ({error}); pip hides installed packages from a "
            "build unless --no-build-isolation is given"
        ) from error
    return torch


def find_ninja() -> Path:
    """The program ninja, if the Python package ``ninja`` is there, whose ``ninja_syntax`` writes the build file."""
    try:
        import ninja
        from ninja import ninja_syntax  # noqa: F401 - an old or foreign package may lack it
    except ImportError as error:
        raise CannotBuild(f"the Python package ninja was not found ({error}): pip install ninja") from None
    # Installed for the user or for one build, the program lies on the PATH alone.
    program = shutil.which("ninja", path=ninja.BIN_DIR or None) or shutil.which("ninja")
    if program is None:
        raise CannotBuild("the Python package ninja is here, its program is not: pip install --force-reinstall ninja")
    return Path(program).absolute()


def find_python_headers() -> Path:
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise CannotBuild(f"Python's headers were not found in {include} (Debian: apt-get install python3-dev)")
    return include


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that fits this torch, and the GPUs to compile for."""

    home: Path
    version: str
    architectures: list[str]  # nvcc's -gencode options

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def targets(self) -> list[str]:
        """Names of the architectures: ``sm_90a`` for machine code, ``compute_120`` for PTX."""
        return re.findall(r",code=(\w+)", " ".join(self.architectures))


def find_cuda_home() -> Path:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [named, on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    for home in filter(None, candidates):
        # A wrapper of nvcc may lie outside the toolkit.
        if (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return Path(home)
    raise CannotBuild(
        "no CUDA toolkit (nvcc and its headers) was found: install the CUDA toolkit, or set CUDA_HOME to it"
    )


def architecture_flags(wanted: str, known: set[str], say: Callable[[str], None] = print) -> list[str]:
    """nvcc's options for a list of GPU architectures.

    Machine code for 9.0 is made for 9.0a: it runs on the same GPUs, and has wgmma and TMA.

    Parameters
    ----------
    wanted
        As ``TORCH_CUDA_ARCH_LIST`` gives them: ``"7.5 8.0;9.0a;12.0+PTX"``.
    known
        Those that this nvcc compiles for: ``{"80", "90"}``.
    say
        Is given a line for each architecture that is left out: one below 8.0, or one that nvcc does not know.

    Raises
    ------
    CannotBuild
        A name is malformed, or no architecture is left.
    """
    flags = []
    for name in re.split(r"[;,\s]+", wanted.strip(";, \t\n")):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0;9.0a;12.0+PTX, got {name!r}")
        major, minor, variant, ptx = match.groups()
        number = major + minor
        if int(number) < OLDEST_ARCHITECTURE:
            say(f"fastllm: GPU architecture {name} is left out: the CUDA kernels need 8.0 or newer")
            continue
        if number not in known:
            say(f"fastllm: GPU architecture {name} is left out: this nvcc does not know it")
            continue
        machine = number + (variant or ("a" if number == "90" else ""))
        flags.append(f"-gencode=arch=compute_{machine},code=sm_{machine}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number}{variant},code=compute_{number}{variant}")
    if not flags:
        raise CannotBuild(
            f"no GPU architecture is left of {wanted!r}: the CUDA kernels need 8.0 or newer, and this nvcc knows "
            f"{', '.join(sorted(known, key=int))}"
        )
    return list(dict.fromkeys(flags))  # nvcc refuses one twice


def find_cuda(torch_cuda: str, say: Callable[[str], None] = print) -> Cuda:
    """The toolkit for a torch that was built with CUDA ``torch_cuda``.

    Raises
    ------
    CannotBuild
        There is none, or it is of another major version.
    """
    home = find_cuda_home()
    nvcc = home / "bin" / "nvcc"
    found = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if found is None:
        raise CannotBuild(f"{nvcc} does not tell its version")
    if found.group(1) != torch_cuda.split(".")[0]:
        raise CannotBuild(
            f"nvcc is of CUDA {found.group(1)}.{found.group(2)}, this torch of CUDA {torch_cuda}: their major versions "
            "must agree (CUDA_HOME names another toolkit)"
        )
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    # What the default list holds and this nvcc lacks is no news.
    flags = architecture_flags(listed, known, say) if listed else architecture_flags(CUDA_ARCHITECTURES, known, str)
    return Cuda(home, ".".join(found.groups()), flags)


def cuda_for(torch: ModuleType, wish: str, say: Callable[[str], None] = print) -> tuple[Cuda | None, str | None]:
    """The toolkit to build with, or None; and why there is none.

    Parameters
    ----------
    wish
        ``"0"``: no CUDA kernels; ``"1"``: not being able to build them is an error; ``""``: build them if possible.
    """
    if wish == "0":
        return None, "they were left out by request (FASTLLM_CUDA=0)"
    try:
        if torch.version.cuda is None:
            raise CannotBuild("this torch is not a CUDA build")
        return find_cuda(torch.version.cuda, say), None
    except CannotBuild as reason:
        if wish == "1":
            raise
        return None, str(reason)


@dataclass(frozen=True)
class Toolchain:
    """Everything that one build is made with."""

    cxx: list[str]
    cxx_version: str
    ninja: Path
    python_include: Path
    torch_version: str
    torch_folder: Path
    cxx11_abi: bool
    cuda: Cuda | None
    cuda_missing: str | None

    @property
    def torch_includes(self) -> list[Path]:
        include = self.torch_folder / "include"
        return [include, include / "torch" / "csrc" / "api" / "include"]

    @property
    def torch_libraries(self) -> Path:
        return self.torch_folder / "lib"


def find(wish_cuda: str = "", say: Callable[[str], None] = print) -> Toolchain:
    """The toolchain of this machine and environment.

    Raises
    ------
    CannotBuild
        A part of it is missing.
    """
    torch = find_torch()
    cxx, cxx_version = find_compiler()
    ninja, python_include = find_ninja(), find_python_headers()
    cuda, cuda_missing = cuda_for(torch, wish_cuda, say)
    return Toolchain(
        cxx,
        cxx_version,
        ninja,
        python_include,
        torch.__version__,
        Path(torch.__file__).parent,
        torch.compiled_with_cxx11_abi(),
        cuda,
        cuda_missing,
    )
