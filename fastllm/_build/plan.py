"""Which source becomes which object by which flags, and the ninja file that says so.

The kernels of ``csrc/cpu`` are compiled once per instruction set, the torch-facing layer once with base-line flags; the
kernels of ``csrc/cuda`` once per GPU architecture.
"""

from __future__ import annotations

import hashlib
import io
import platform
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .toolchain import Cuda, Toolchain

X86 = platform.machine() in ("x86_64", "AMD64")
COMMON_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # these two: g++ 12 finds them in its own intrinsics
    "-Wno-uninitialized",
]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
ISAS = list(ISA_FLAGS) if X86 else ["portable"]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
PLAIN_CPU_FILES = {"isa.cpp", "index_checks.cpp"}  # in csrc/cpu, yet no kernels


def csrc() -> Path:
    """The folder of the sources: in the installed package, or beside it in a source tree."""
    package = Path(__file__).absolute().parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def fingerprint() -> str:
    """Twelve hexadecimal digits that change with the sources and with how they are compiled."""
    digest = hashlib.sha256()
    folder = csrc()
    for path in [*sorted(p for p in folder.rglob("*") if p.is_file()), Path(__file__)]:
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Step:
    """One call of a compiler or of the linker."""

    rule: str
    output: Path | str
    inputs: tuple[Path | str, ...]
    flags: tuple[str, ...] = ()
    needs: tuple[Path | str, ...] = ()  # what it is made again for, beside its inputs


def cpu_steps() -> list[Step]:
    """The translation units for the CPU, with the module's entry."""
    arch = ("-DFASTLLM_X86",) if X86 else ()
    steps = []
    for source in sorted((csrc() / "cpu").glob("*.cpp")):
        if source.name in PLAIN_CPU_FILES:
            steps.append(Step("compile", f"{source.stem}.o", (source,), arch))
            continue
        for isa in ISAS:
            flags = (*arch, *ISA_FLAGS[isa], f"-DFASTLLM_ISA={isa}")
            steps.append(Step("compile", f"{source.stem}.{isa}.o", (source,), flags))
    layer = [csrc() / "module.cpp", *sorted((csrc() / "ops").glob("*.cpp"))]
    return steps + [Step("compile", f"ops_{source.stem}.o", (source,), arch) for source in layer]


def cuda_kernels() -> list[Path]:
    return sorted((csrc() / "cuda").glob("*.cu"))


def cuda_layer() -> list[Path]:
    """The torch-facing C++ of the CUDA kernels."""
    return sorted([*(csrc() / "cuda").glob("*.cpp"), *(csrc() / "ops" / "cuda").glob("*.cpp")])


def cuda_steps(cuda: Cuda) -> list[Step]:
    """The translation units of the CUDA kernels and of their torch-facing layer."""
    kernels = [Step("nvcc", f"cuda_{path.stem}.o", (path,), tuple(cuda.architectures)) for path in cuda_kernels()]
    include = ("-isystem", quote(cuda.home / "include"))
    return kernels + [Step("compile", f"cuda_ops_{path.stem}.o", (path,), include) for path in cuda_layer()]


def quote(word: Path | str) -> str:
    """A word of a shell command, as a ninja file spells it."""
    return shlex.quote(str(word)).replace("$", "$$")


def system_includes(folders: Iterable[Path]) -> list[str]:
    """Headers that are not ours, and whose warnings are not ours either."""
    return [part for folder in folders for part in ("-isystem", quote(folder))]


def ninja_text(commands: Mapping[str, str], steps: Iterable[Step]) -> str:
    """The text of a ninja file.

    Parameters
    ----------
    commands
        The command of each rule. ``$in``, ``$out`` and ``$flags`` are those of a step. A command that holds
        ``-MF $out.d`` writes the headers that it read there.
    steps
        What is to be made. Relative paths are relative to the folder in which ninja runs.
    """
    from ninja.ninja_syntax import Writer

    text = io.StringIO()
    writer = Writer(text, width=10**6)  # unbroken lines: a break would change a name with two spaces in it
    for name, command in commands.items():
        depends = {"depfile": "$out.d", "deps": "gcc"} if "-MF $out.d" in command else {}
        writer.rule(name, command, description=f"{name} $out", **depends)
    for step in steps:
        flags = {"flags": " ".join(step.flags)} if step.flags else None
        inputs, needs = [str(path) for path in step.inputs], [str(path) for path in step.needs]
        writer.build(str(step.output), step.rule, inputs, implicit=needs, variables=flags)
    return text.getvalue()


def extension(
    tools: Toolchain, target: Path | str, werror: bool = False, sanitizer: str | None = None
) -> tuple[dict[str, str], list[Step]]:
    """The commands and steps that make the extension ``target``."""
    compile_flags, nvcc_flags, link_flags = list(COMMON_FLAGS), list(NVCC_FLAGS), ["-shared"]
    if werror:
        compile_flags.append("-Werror")
        nvcc_flags.append("-Werror=all-warnings")
    if sanitizer:
        compile_flags += [f"-fsanitize={sanitizer}", "-g", "-fno-omit-frame-pointer"]
        link_flags.append(f"-fsanitize={sanitizer}")
    # _OPENMP gives at::parallel_for its threads.
    compile_flags += ["-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(tools.cxx11_abi)}"]
    compile_flags += system_includes([*tools.torch_includes, tools.python_include])
    # No rpath: the package imports torch first, which loads these libraries.
    link_flags += [f"-L{quote(tools.torch_libraries)}"]
    link_flags += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-fopenmp"]
    steps = cpu_steps()
    if tools.cuda is not None:
        steps += cuda_steps(tools.cuda)
        link_flags += [f"-L{quote(tools.cuda.home / folder)}" for folder in ("lib64", "lib")]
        link_flags += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    steps.append(Step("link", target, tuple(step.output for step in steps)))
    cxx = " ".join(quote(word) for word in tools.cxx)
    commands = {
        "compile": f"{cxx} -MMD -MF $out.d {' '.join(compile_flags)} $flags -c $in -o $out",
        "link": f"{cxx} $in {' '.join(link_flags)} -o $out",
    }
    if tools.cuda is not None:
        commands["nvcc"] = f"{quote(tools.cuda.nvcc)} -MD -MF $out.d {' '.join(nvcc_flags)} $flags -c $in -o $out"
    return commands, steps
