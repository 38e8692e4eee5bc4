"""Builds fastllm and its compiled operations, ``fastllm._C``; ``fastllm/_build`` does the work.

With a CUDA build of PyTorch and nvcc, the CUDA kernels are built, too. Without PyTorch or a compiler the package still
installs; it says at import what was missing.

Environment: CXX (compiler), MAX_JOBS (parallel compilers), FASTLLM_WERROR=1 (warnings are errors),
FASTLLM_SANITIZE=address (a sanitizer build), FASTLLM_REQUIRE_NATIVE=1 (a failed build is an error), FASTLLM_PURE=1 (a
package without compiled operations, for any machine), FASTLLM_NAME_TORCH=1 (the version names the torch of the build).
CUDA_HOME (the CUDA toolkit), TORCH_CUDA_ARCH_LIST (GPU architectures, such as "8.0;9.0a"), FASTLLM_CUDA=0 (no CUDA
kernels) or 1 (not being able to build them is an error).
"""

import importlib.util
import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).absolute().parent
PACKAGE = ROOT / "fastllm"
PURE = os.environ.get("FASTLLM_PURE") == "1"
VERSION = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]


def load_build_tools():
    """``fastllm._build`` under another name: importing ``fastllm`` takes torch, which may be missing here."""
    folder = PACKAGE / "_build"
    spec = importlib.util.spec_from_file_location(
        "fastllm_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)


load_build_tools()
from fastllm_build import builder, toolchain  # noqa: E402


def named_version():
    """The version of the package; that of a native wheel names its torch: ``0.1.0+torch2.13.cpu``."""
    if os.environ.get("FASTLLM_NAME_TORCH") != "1":
        return VERSION
    return f"{VERSION}+torch{toolchain.torch_release(toolchain.find_torch().__version__).replace('+', '.')}"


def say(line):
    print(line, file=sys.stderr, flush=True)


class Sources(build_py):
    """Copies the package, and says in ``_build_info`` that a pure one holds no compiled operations."""

    def run(self):
        if not self.editable_mode:  # an earlier build may have left modules that are gone
            shutil.rmtree(Path(self.build_lib) / "fastllm", ignore_errors=True)
        super().run()
        if PURE:
            folder = PACKAGE if self.editable_mode else Path(self.build_lib) / "fastllm"
            reason = "this is the pure-Python package"
            builder.write_build_info(folder / "_build_info.py", builder.not_built(VERSION, reason))


class Native(build_ext):
    """Builds the one extension with ninja and records what it was built with, or why it was not."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            info = self.build_native(target)
        except toolchain.CannotBuild as reason:
            target.unlink(missing_ok=True)
            if os.environ.get("FASTLLM_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fastllm: {reason}") from reason
            say(f"fastllm: the compiled operations are NOT built: {reason}")
            info = builder.not_built(VERSION, str(reason))
        builder.write_build_info(target.parent / "_build_info.py", info)

    def build_native(self, target):
        wish = os.environ.get("FASTLLM_CUDA", "")
        tools = toolchain.find(wish, say)
        if tools.cuda is None:
            say(f"fastllm: without CUDA C++ kernels: {tools.cuda_missing}")
        # In the source tree, whatever directory pip builds in: ninja compiles again only what changed.
        objects = ROOT / "build" / "objects" / (os.environ.get("FASTLLM_SANITIZE") or "release")
        with builder.locked(objects, say) as lock:
            info = builder.build_extension(
                tools,
                target,
                objects,
                objects / "build.log",
                VERSION,
                cuda_required=wish == "1",
                show=builder.Progress(sys.stderr),
                say=say,
                keep_open=(lock,),
            )
        builder.write_compile_commands(tools, objects, ROOT / "build" / "compile_commands.json")
        return info

    def built_files(self):
        """The library and ``_build_info.py``, where they are built."""
        folder = Path(self.build_lib) / "fastllm"
        return folder / Path(self.get_ext_filename("fastllm._C")).name, folder / "_build_info.py"

    def copy_extensions_to_source(self):
        """What was built, into the source tree; what was not is removed there, so that nothing older is loaded."""
        for built in self.built_files():
            placed = PACKAGE / built.name
            if built.exists():
                # A process that has loaded the old library keeps it.
                shutil.copy(built, f"{placed}.new")
                os.replace(f"{placed}.new", placed)
            else:
                placed.unlink(missing_ok=True)

    def get_outputs(self):
        return [str(path) for path in self.built_files() if path.exists()]


if __name__ == "__main__":
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".cu")]
    setup(
        version=named_version(),
        packages=[*find_packages(include=["fastllm", "fastllm.*"]), "fastllm.csrc"],
        package_dir={"fastllm.csrc": "csrc"},  # for `python -m fastllm build`
        package_data={"fastllm": ["py.typed"], "fastllm.csrc": ["**/*"]},
        include_package_data=False,
        ext_modules=[] if PURE else [Extension("fastllm._C", sources=sources)],
        cmdclass={"build_ext": Native, "build_py": Sources},
    )
