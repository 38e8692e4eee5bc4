"""Builds fastllm and its compiled operations, ``fastllm._C``.

The kernels of ``csrc/cpu`` are compiled once per instruction set, the torch-facing layer once with base-line flags;
with a CUDA build of PyTorch and nvcc, the kernels of ``csrc/cuda`` once per GPU architecture. ninja runs the compilers.
Without PyTorch or a compiler the package still installs and runs on its eager backend.

Environment: CXX (compiler), MAX_JOBS (parallel compilers), FASTLLM_WERROR=1 (warnings are errors),
FASTLLM_SANITIZE=address (a sanitizer build), FASTLLM_REQUIRE_NATIVE=1 (a failed build is an error). CUDA_HOME (the CUDA
toolkit), TORCH_CUDA_ARCH_LIST (GPU architectures, such as "8.0;9.0a"), FASTLLM_CUDA=0 (no CUDA kernels) or 1 (not being
able to build them is an error).
"""

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
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
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"  # pruned to what nvcc knows
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
PLAIN_CPU_FILES = {"isa.cpp", "index_checks.cpp"}  # in csrc/cpu, yet no kernels


def version():
    for line in (ROOT / "fastllm" / "_version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("fastllm/_version.py holds no __version__")


class CannotBuild(Exception):
    """The compiled operations cannot be built here; the message says why."""


def find_compiler():
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx.split()[0]) is None:
        raise CannotBuild(f"no C++ compiler: '{cxx}' was not found (Debian: apt-get install g++; or set CXX)")
    first_line = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
    return cxx, first_line[0] if first_line else "unknown"


def find_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuild(
            f"PyTorch cannot be imported in the build environment ({error}); install torch first, then "
            "'pip install --no-build-isolation .'"
        ) from error
    return torch, cpp_extension


def find_ninja():
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CannotBuild("ninja was not found: pip install ninja") from None
        return found


@dataclass
class Cuda:
    """A CUDA toolkit that fits this torch, and the GPUs to compile for."""

    home: Path
    version: str
    architectures: list[str]  # nvcc's -gencode options

    @property
    def nvcc(self):
        return self.home / "bin" / "nvcc"


def find_cuda_home():
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


def architecture_flags(wanted, known):
    """nvcc's options for a TORCH_CUDA_ARCH_LIST, without architectures that this nvcc does not know."""
    flags = []
    for name in re.split(r"[;\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0;9.0a;12.0+PTX, got {name!r}")
        major, minor, variant, ptx = match.groups()
        number = major + minor
        if number not in known:
            continue
        flags.append(f"-gencode=arch=compute_{number}{variant},code=sm_{number}{variant}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number}{variant},code=compute_{number}{variant}")
    if not flags:
        raise CannotBuild(f"nvcc knows none of the architectures {wanted}; it knows {', '.join(sorted(known))}")
    return flags


def find_cuda(torch_version):
    """The toolkit for a torch that was built with CUDA ``torch_version``.

    Raises
    ------
    CannotBuild
        There is none, or it is of another major version.
    """
    home = find_cuda_home()
    nvcc = home / "bin" / "nvcc"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise CannotBuild(f"{nvcc} does not tell its version")
    if found.group(1) != torch_version.split(".")[0]:
        raise CannotBuild(
            f"nvcc is of CUDA {found.group(1)}.{found.group(2)}, this torch of CUDA {torch_version}: their major versions "
            "must agree (CUDA_HOME names another toolkit)"
        )
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    return Cuda(home, ".".join(found.groups()), architecture_flags(wanted, known))


def cuda_for(torch):
    """The toolkit to build with, or None; and why there is none."""
    wish = os.environ.get("FASTLLM_CUDA", "")
    if wish == "0":
        return None, "FASTLLM_CUDA=0 when it was built"
    try:
        if torch.version.cuda is None:
            raise CannotBuild("this torch is not a CUDA build")
        return find_cuda(torch.version.cuda), None
    except CannotBuild as reason:
        if wish == "1":
            raise
        return None, str(reason)


def compile_steps(out):
    """Yields (source, object, extra flags) of every translation unit for the CPU."""
    arch = ["-DFASTLLM_X86"] if X86 else []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name in PLAIN_CPU_FILES:
            yield source, out / f"{source.stem}.o", arch
            continue
        for isa in ISAS:
            flags = [*arch, *ISA_FLAGS[isa], f"-DFASTLLM_ISA={isa}"]
            yield source, out / f"{source.stem}.{isa}.o", flags
    for source in [ROOT / "csrc" / "module.cpp", *sorted((ROOT / "csrc" / "ops").glob("*.cpp"))]:
        yield source, out / f"ops_{source.stem}.o", arch


def cuda_compile_steps(out, cuda):
    """Yields (rule, source, object, extra flags) of the CUDA kernels and of their torch-facing layer."""
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        yield "nvcc", source, out / f"cuda_{source.stem}.o", cuda.architectures
    layer = [*(ROOT / "csrc" / "cuda").glob("*.cpp"), *(ROOT / "csrc" / "ops" / "cuda").glob("*.cpp")]
    for source in sorted(layer):
        yield "compile", source, out / f"cuda_ops_{source.stem}.o", [f"-isystem '{cuda.home / 'include'}'"]


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(path, target, cxx, torch, cpp_extension, python_include, cuda=None):
    flags, nvcc_flags = list(COMMON_FLAGS), list(NVCC_FLAGS)
    link = ["-shared"]
    if os.environ.get("FASTLLM_WERROR") == "1":
        flags.append("-Werror")
        nvcc_flags.append("-Werror=all-warnings")
    sanitizer = os.environ.get("FASTLLM_SANITIZE")
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-g", "-fno-omit-frame-pointer"]
        link.append(f"-fsanitize={sanitizer}")
    # PyTorch's headers as system headers: their warnings are not ours. _OPENMP gives at::parallel_for its threads.
    includes = [*cpp_extension.include_paths(), python_include]
    flags += ["-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    flags += [f"-isystem '{p}'" for p in includes]
    # No rpath: the package imports torch first, which loads these libraries.
    link += [f"-L'{directory}'" for directory in cpp_extension.library_paths()]
    link += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-fopenmp"]
    steps = [("compile", *step) for step in compile_steps(path.parent)]
    if cuda is not None:
        steps += cuda_compile_steps(path.parent, cuda)
        link += [f"-L'{cuda.home / directory}'" for directory in ("lib64", "lib")]
        link += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    lines = [
        f"cxx = {cxx}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {' '.join(flags)} $extra -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {cuda.nvcc if cuda else 'nvcc'} -MD -MF $out.d {' '.join(nvcc_flags)} $extra -c $in -o $out",
        "  description = nvcc $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {' '.join(link)} -o $out",
        "  description = link $out",
    ]
    for rule, source, obj, extra in steps:
        lines += [f"build {escape(obj)}: {rule} {escape(source)}", f"  extra = {' '.join(extra)}"]
    lines.append(f"build {escape(target)}: link {' '.join(escape(obj) for _, _, obj, _ in steps)}")
    path.write_text("\n".join(lines) + "\n")


class NativeBuild(build_ext):
    """Builds the one extension with ninja and records what it was built with."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.build_native(target)
        except CannotBuild as reason:
            target.unlink(missing_ok=True)
            (target.parent / "_build_info.py").unlink(missing_ok=True)
            if os.environ.get("FASTLLM_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fastllm: {reason}") from reason
            print(f"\nfastllm: the compiled operations are NOT built: {reason}", file=sys.stderr)
            print("fastllm: the package works without them, on its eager backend.\n", file=sys.stderr)

    def build_native(self, target):
        import sysconfig

        torch, cpp_extension = find_torch()
        cxx, cxx_version = find_compiler()
        ninja = find_ninja()
        cuda, cuda_missing = cuda_for(torch)
        if cuda is None:
            print(f"fastllm: without CUDA C++ kernels: {cuda_missing}", file=sys.stderr)
        # In the source tree, whatever directory pip builds in: ninja compiles again only what changed.
        build_dir = ROOT.absolute() / "build" / "objects" / os.environ.get("FASTLLM_SANITIZE", "release")
        build_dir.mkdir(parents=True, exist_ok=True)
        ninja_file = build_dir / "build.ninja"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))

        def compiles(toolkit):
            write_ninja(ninja_file, target, cxx, torch, cpp_extension, sysconfig.get_paths()["include"], toolkit)
            return subprocess.run([ninja, "-f", str(ninja_file), "-j", jobs], cwd=build_dir).returncode == 0

        built = compiles(cuda)
        if not built and cuda is not None and os.environ.get("FASTLLM_CUDA") != "1":
            cuda_missing = f"nvcc {cuda.version} or the compiler failed on them when fastllm was built"
            print(f"fastllm: trying without CUDA C++ kernels: {cuda_missing}", file=sys.stderr)
            cuda = None
            built = compiles(cuda)
        if not built:
            raise CannotBuild(f"the compiler failed (see above); it was: {cxx_version}")
        info = {
            "version": version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cxx": cxx,
            "cxx_version": cxx_version,
            "isa": ISAS,
            "cuda": None if cuda is None else cuda.version,
            "cuda_architectures": [] if cuda is None else re.findall(r",code=(\w+)", " ".join(cuda.architectures)),
            "cuda_missing": cuda_missing,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        }
        (target.parent / "_build_info.py").write_text(f'"""Written by setup.py."""\n\nBUILD = {info!r}\n')

    def copy_extensions_to_source(self):
        built = Path(self.build_lib) / "fastllm" / "_build_info.py"
        if not built.exists():
            return
        super().copy_extensions_to_source()
        shutil.copy(built, ROOT / "fastllm" / "_build_info.py")

    def get_outputs(self):
        outputs = [path for path in super().get_outputs() if Path(path).exists()]
        return outputs + [str(Path(path).parent / "_build_info.py") for path in outputs]


if __name__ == "__main__":
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".cu")]
    setup(
        version=version(),
        ext_modules=[Extension("fastllm._C", sources=sources)],
        cmdclass={"build_ext": NativeBuild},
    )
