"""What an installation ends with: a working package, and one line about what it lacks. docs/install.md has the table.

Environments are made of what the running interpreter has: a folder of links to its packages, without those that a test
leaves out. A stand-in for g++ copies the library of this tree where it should link, so that a build takes seconds.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import types
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm import _native, backends
from fastllm._build import builder, cache, plan, toolchain
from fastllm._version import TESTED_TORCH
from fastllm.lm import cli

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_paths()["purelib"])
NINJA = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
needs_extension = pytest.mark.skipif(_native.extension is None, reason=str(_native.MISSING))
pytestmark = pytest.mark.skipif(
    not (SITE / "torch").is_dir() or NINJA is None, reason="torch or ninja is not among this interpreter's packages"
)

# What each situation says. docs/install.md shows these lines; a test compares.
SAYS = {
    "pure": "the compiled operations (fastllm._C) are not built: this is the pure-Python package",
    "no compiler": "no C++ compiler: 'g++' was not found (Debian: apt-get install g++; or set CXX)",
    "no torch": "PyTorch could not be imported while fastllm was installed",
    "no ninja": "the Python package ninja was not found",
    "compiler fails": "error: planted; its whole output is in",
    "other torch": "the compiled operations were built with torch 2.12.0, but this is torch",
    "other Python": "the compiled operations were built with Python 3.9.1, but this is Python",
    "no torch at import": "fastllm needs PyTorch, which is not installed here: pip install 'torch>=2.11'",
    "no CUDA torch": "this torch is not a CUDA build",
    "no toolkit": "no CUDA toolkit (nvcc and its headers) was found",
    "other toolkit": "nvcc is of CUDA 13.0, this torch of CUDA 12.8",
    "old architecture": "GPU architecture 7.5 is left out: the CUDA kernels need 8.0 or newer",
    "only old architectures": "no GPU architecture is left of '7.0 7.5'",
    "damaged": "is damaged: it was built with",
    "cache not writable": "cannot write to the cache",
    "no home": "this user has no home folder",
    "already": "already built: ",
    "packaged": "nothing to do: the package has compiled operations for this torch",
}
REMEDY = "run `python -m fastllm build`"

COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo "g++ (stand-in) 12.2.0"; exit;;
  *-dumpversion*) echo 12; exit;;
esac
if [ -n "$STANDIN_WAITS" ]; then
  : > "$STANDIN_WAITS.started"
  while [ -e "$STANDIN_WAITS" ]; do /bin/sleep 0.1; done
fi
if [ -n "$STANDIN_FAILS" ]; then echo "csrc/x.cpp:1:2: error: planted" >&2; exit 1; fi
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out=$2; shift;;
    -MF) dep=$2; shift;;
    -shared) shared=1;;
  esac
  shift
done
if [ -n "$shared" ]; then exec /bin/cp "$STANDIN_LIBRARY" "$out"; fi
: > "$out"
echo "$out:" > "$dep"
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def environment(path: Path, **more: str | Path) -> dict[str, str]:
    """The environment without what would lead to this source tree or to a compiler; PATH is one folder."""
    ours = ("FASTLLM_", "STANDIN_", "PYTHON", "XDG_", "CUDA_", "TORCH_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours) and name != "CXX"}
    return env | {"PATH": str(path), "PYTHONNOUSERSITE": "1"} | {name: str(value) for name, value in more.items()}


def check(command: list[str | Path], env: dict[str, str], status: int = 0, cwd: Path | None = None) -> str:
    """Run a command outside of the source tree; what it printed."""
    result = subprocess.run(
        command, env=env, cwd=cwd or "/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
    )
    assert result.returncode == status, result.stdout
    return result.stdout


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    """A PATH without compilers."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "ninja").symlink_to(NINJA)
    return folder


@pytest.fixture(scope="session")
def compiler(tmp_path_factory) -> Path:
    return executable(tmp_path_factory.mktemp("a compiler") / "g++", COMPILER)


@pytest.fixture
def with_compiler(path, compiler) -> dict[str, str]:
    return environment(path, CXX=compiler, STANDIN_LIBRARY=_native.extension.__file__)


class Venv:
    """A virtual environment that sees the running interpreter's packages, but for fastllm and those named."""

    def __init__(self, folder: Path, without: tuple[str, ...] = ()) -> None:
        packages = folder / "packages"
        packages.mkdir(parents=True)
        for entry in SITE.iterdir():
            name = entry.name.lower()
            if name.endswith(".pth") or any(re.match(rf"_*{gone}\b|_*(editable)?_*fastllm", name) for gone in without):
                continue
            if "fastllm" not in name:
                (packages / entry.name).symlink_to(entry)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
        self.python = folder / "env" / "bin" / "python"
        self.site = next((folder / "env" / "lib").glob("python*/site-packages"))
        (self.site / "packages.pth").write_text(f"{packages}\n")

    def pip(self, *arguments: str | Path, env: dict[str, str], status: int = 0) -> str:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        return check([*pip, *arguments], env, status)

    def install(self, what: Path, *options: str, env: dict[str, str]) -> str:
        """pip install, by default without looking anywhere for anything; what pip printed."""
        return self.pip("install", "--no-index", "--no-build-isolation", *options, what, env=env)

    def imports(self, env: dict[str, str], then: str = "") -> dict:
        """What ``import fastllm`` warns of, what ``info()`` reports and which function serves a loss; and ``then``."""
        code = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastllm, fastllm.functional as F
x = torch.ones(3, requires_grad=True)
loss = F.mse_loss(x, 2 * x.detach())
loss.backward()
assert torch.equal(x.grad, torch.full((3,), -2 / 3)), x.grad
warned = [str(w.message) for w in caught if str(w.message).startswith("fastllm")]
print(json.dumps({"warned": warned, "info": fastllm.info(), "node": loss.grad_fn.name(), "file": fastllm.__file__}))
"""
        first, _, rest = check([self.python, "-c", code + then], env).partition("\n")
        return json.loads(first) | {"then": rest}


def eager_with_one_warning(found: dict, reason: str) -> None:
    assert len(found["warned"]) == 1 and reason in found["warned"][0] and REMEDY in found["warned"][0], found["warned"]
    assert reason in found["info"]["built_with"] and "python -m fastllm build" in found["info"]["extension"]
    assert found["node"].startswith("Mse")


def compiled(found: dict) -> str:
    """The path of the library that serves."""
    assert found["warned"] == [] and "Node" in found["node"]
    return found["info"]["extension"]


@pytest.fixture(scope="session")
def source(tmp_path_factory, path) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder]
    check(command, environment(path), cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(entry for entry in folder.iterdir() if (entry / "setup.py").exists())


def build_wheel(command: list[str | Path], source: Path, out: Path, env: dict[str, str]) -> Path:
    tree = out / "source"  # a build leaves folders behind
    shutil.copytree(source, tree)
    check(command, env, cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory, source, path) -> Path:
    out = tmp_path_factory.mktemp("pure")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", out]
    return build_wheel(command, source, out, environment(path, FASTLLM_PURE="1"))


@pytest.fixture(scope="session")
def pure(tmp_path_factory, pure_wheel, path) -> Venv:
    """An environment into which the pure wheel was installed, with its dependencies looked for."""
    venv = Venv(tmp_path_factory.mktemp("pure venv"))
    venv.install(pure_wheel, env=environment(path))
    return venv


def sane_metadata(wheel: Path, version: str) -> set[str]:
    """Checks a wheel's metadata and that it holds the sources; the names in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        text = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    fields = HeaderParser().parsestr(text)
    assert (fields["Name"], fields["Version"]) == ("fastllm", version)
    assert "torch>=2.11" in fields.get_all("Requires-Dist") and fields["Description-Content-Type"] == "text/markdown"
    assert {"fastllm/_build_info.py", "fastllm/_build/plan.py", "fastllm/py.typed"} <= names
    sources = {f"fastllm/csrc/{p.relative_to(ROOT / 'csrc').as_posix()}" for p in (ROOT / "csrc").rglob("*.*")}
    assert sources <= names and len(sources) > 50
    return names


def test_pure_wheel(pure_wheel):
    assert pure_wheel.name == f"fastllm-{fastllm.__version__}-py3-none-any.whl"
    assert not any(name.endswith(".so") for name in sane_metadata(pure_wheel, fastllm.__version__))


@needs_extension
def test_pure_wheel_and_its_build(pure, path, with_compiler, tmp_path):
    """Eager with one warning; then a build, in a folder with a space, which a fresh interpreter finds."""
    env = with_compiler | {"FASTLLM_HOME": str(tmp_path / "a home")}
    found = pure.imports(env, 'from fastllm.lm import cli; sys.exit(cli.main(["build", "--cpu"]))')
    assert Path(found["file"]).is_relative_to(pure.site)
    eager_with_one_warning(found, SAYS["pure"])
    said = found["then"]
    assert f"compiling for torch {torch.__version__} without CUDA kernels" in said and "by request" in said, said
    assert re.search(r"^\[\d+/\d+\] compile ", said, re.MULTILINE)
    library = Path(said.splitlines()[-1].removeprefix("built "))
    assert Path(compiled(pure.imports(env))) == library and library.is_relative_to(tmp_path / "a home" / "builds")
    assert {p.name for p in library.parent.iterdir()} == {"build.json", "build.log", "lock", library.name}


# The cache, in this process. Builds are small: nothing is loaded.


@pytest.fixture
def in_process(monkeypatch, compiler, tmp_path):
    """The command in this process, with the stand-in for g++; libraries are files of ten bytes, and all load."""
    library = tmp_path / "library"
    library.write_bytes(b"0123456789")
    for name in list(os.environ):
        if name.startswith(("FASTLLM_", "STANDIN_", "TORCH_CUDA")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("STANDIN_LIBRARY", str(library))
    monkeypatch.setenv("FASTLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(cache, "_load_error", lambda library: None)
    return tmp_path / "home"


def test_build_again_does_nothing(in_process, capsys):
    assert cli.main(["build"]) == 0
    found = cache.find(torch.__version__)
    assert found.info["cxx_version"] == "g++ (stand-in) 12.2.0" and found.info["missing"] is None
    capsys.readouterr()
    assert cli.main(["build"]) == 0
    assert SAYS["already"] in capsys.readouterr().out and cache.find(torch.__version__) == found


def test_a_build_is_of_one_everything(in_process, monkeypatch):
    """Another torch, fastllm, Python, architecture or source finds nothing, and builds beside it."""
    assert cli.main(["build"]) == 0
    folder = cache.folder_for(torch.__version__)
    folders = {folder, cache.folder_for("2.99.0"), cache.folder_for("2.98.0+cu130")}
    assert cache.find("2.99.0") is None
    for target, name, value in (
        (cache, "__version__", "0.2.0"),
        (cache.sysconfig, "get_config_var", lambda name: "cpython-399-x86_64-linux-gnu"),
        (cache.platform, "machine", lambda: "riscv64"),
        (plan, "fingerprint", lambda: "0" * 12),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert cache.find(torch.__version__) is None
            folders.add(cache.folder_for(torch.__version__))
    assert len(folders) == 7 and cache.find(torch.__version__) is not None


def test_fingerprint_changes_with_a_source(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(plan, "csrc", lambda: tmp_path / "csrc")
    before = plan.fingerprint()
    header = tmp_path / "csrc" / "cpu" / "simd.h"
    header.write_text(header.read_text() + "\n")
    assert plan.fingerprint() != before


def test_a_damaged_build_is_not_loaded_and_built_again(in_process, capsys):
    assert cli.main(["build"]) == 0
    cache.find(torch.__version__).library.write_bytes(b"01234")
    with pytest.raises(toolchain.CannotBuild, match=SAYS["damaged"]):
        cache.find(torch.__version__)
    assert cli.main(["build"]) == 0 and cache.find(torch.__version__).library.stat().st_size == 10
    (cache.folder_for(torch.__version__) / "build.json").write_text("{")
    with pytest.raises(toolchain.CannotBuild, match="damaged"):
        cache.find(torch.__version__)
    assert cli.main(["build"]) == 0 and cache.find(torch.__version__) is not None


def test_a_failed_compile_names_its_log(in_process, monkeypatch, capsys):
    assert cli.main(["build"]) == 0
    before = cache.find(torch.__version__)
    monkeypatch.setenv("STANDIN_FAILS", "1")
    monkeypatch.setattr(cache, "_serves", lambda found, tools: False)
    assert cli.main(["build"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and SAYS["compiler fails"] in error
    assert "error: planted" in Path(error.strip().rpartition(" ")[2]).read_text()
    assert cache.find(torch.__version__) == before
    monkeypatch.delenv("STANDIN_FAILS")
    assert cli.main(["build"]) == 0 and cache.find(torch.__version__) != before


def test_what_cannot_be_loaded_is_not_kept(in_process, monkeypatch, capsys):
    monkeypatch.setattr(cache, "_load_error", lambda library: "ImportError: undefined symbol: x")
    assert cli.main(["build"]) == 1
    error = capsys.readouterr().err
    assert "what was built cannot be loaded: ImportError: undefined symbol: x" in error
    assert cache.find(torch.__version__) is None


def test_two_builds_at_once(in_process, capsys):
    """One waits for the other and takes what that has built."""
    threads = [threading.Thread(target=cli.main, args=(["build"],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = capsys.readouterr().out
    assert said.count("\nbuilt ") == 1 and said.count(SAYS["already"]) == 1 and "waiting for it" in said, said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CXX": "/nowhere/g++"}, SAYS["no compiler"].replace("g++'", "/nowhere/g++'")),
        ({"FASTLLM_HOME": "/proc/absent"}, SAYS["cache not writable"]),
        ({"FASTLLM_HOME": __file__}, SAYS["cache not writable"]),
    ],
)
def test_mistakes_are_one_line(in_process, monkeypatch, capsys, change, message):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["build"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastllm build: ") and error.count("\n") == 1 and message in error


def test_cuda_that_cannot_be_is_a_mistake(in_process, capsys):
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch")
    assert cli.main(["build", "--cuda"]) == 2
    assert SAYS["no CUDA torch"] in capsys.readouterr().err
    with pytest.raises(SystemExit) as status:
        cli.main(["build", "--cuda", "--cpu"])
    assert status.value.code == 2


def test_without_ninja(in_process, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert cli.main(["build"]) == 2
    assert SAYS["no ninja"] in capsys.readouterr().err


@needs_extension
def test_a_package_with_its_operations_builds_nothing(capsys):
    if not Path(_native.extension.__file__).is_relative_to(ROOT / "fastllm"):
        pytest.skip("the extension is not in the package")
    assert cli.main(["build"]) == 0
    assert SAYS["packaged"] in capsys.readouterr().out


def test_home(monkeypatch, tmp_path):
    for name in ("FASTLLM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.home() == tmp_path / ".cache" / "fastllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by its specification
    assert cache.home() == tmp_path / ".cache" / "fastllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.home() == tmp_path / "x" / "fastllm"
    monkeypatch.setenv("FASTLLM_HOME", "~/y")
    assert cache.home() == tmp_path / "y"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTLLM_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(toolchain.CannotBuild, match=SAYS["no home"]):
        cache.home()
    assert cache.find(torch.__version__) is None


# What an extension was built for.


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ({}, "are not built"),
        ({"missing": "no C++ compiler"}, "are not built: no C++ compiler"),
        ({"missing": None, "torch": "2.12.0"}, SAYS["other torch"]),
        ({"missing": None, "torch": torch.__version__, "python": "3.9.1"}, SAYS["other Python"]),
    ],
)
def test_an_extension_for_something_else(build, reason):
    assert reason in _native._why_not_packaged(build)


def order(monkeypatch, packaged, cached, torch_cuda):
    """Which builds may be loaded, in order, and why others may not."""
    module = types.ModuleType("fastllm._build_info")
    module.BUILD = packaged
    monkeypatch.setitem(sys.modules, "fastllm._build_info", module)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(cache, "find", lambda version: cached and cache.CachedBuild(Path("cached"), cached))
    reasons = []
    names = ["package" if build is packaged else "cache" for build, _ in _native._candidates(reasons)]
    return names, len(reasons)


def test_which_extension_is_loaded(monkeypatch):
    """The package's, then the user's; but the user's for its CUDA kernels where the package has none."""
    ours = functools.partial(dict, torch=torch.__version__, missing=None)
    pure = {"missing": "pure"}
    look = functools.partial(order, monkeypatch)
    assert look(ours(cuda=None), None, None) == (["package"], 0)
    assert look(ours(cuda=None), {"cuda": None}, None) == (["package", "cache"], 0)
    assert look(ours(cuda="13.0"), {"cuda": None}, "13.0") == (["package", "cache"], 0)
    assert look(ours(cuda=None), {"cuda": None}, "13.0") == (["package"], 0)
    assert look(ours(cuda=None), {"cuda": "13.0"}, "13.0") == (["cache", "package"], 0)
    assert look(pure, {"cuda": None}, "13.0") == (["cache"], 1)
    assert look(pure, None, None) == ([], 1)


@pytest.mark.parametrize(
    ("running", "outside"),
    [
        (f"{TESTED_TORCH[0]}.0+cpu", False),
        (f"{TESTED_TORCH[1]}.9", False),
        ("2.9.1", True),
        ("2.99.0+cu130", True),
        (f"{TESTED_TORCH[1]}.0.dev20261101", True),
    ],
)
def test_torch_outside_of_what_was_tested(running, outside):
    assert ("is not among them" in backends._tested_torch(running)) == outside


# Toolkits and architectures, without a GPU's torch.

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;
  --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90; echo compute_120;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "a toolkit"
    executable(home / "bin" / "nvcc", NVCC)
    executable(home / "include" / "cuda_runtime.h", "")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return home


def torch_of(cuda: str | None) -> types.SimpleNamespace:
    return types.SimpleNamespace(version=types.SimpleNamespace(cuda=cuda))


def test_toolkit(toolkit, monkeypatch):
    said = []
    cuda, missing = toolchain.cuda_for(torch_of("13.1"), "", said.append)
    assert missing is None and cuda.nvcc == toolkit / "bin" / "nvcc" and cuda.version == "13.0"
    assert cuda.targets == ["sm_80", "sm_90a", "sm_120", "compute_120"] and said == []
    assert toolchain.cuda_for(torch_of("13.1"), "0")[0] is None
    for torch_cuda, reason in (("12.8", SAYS["other toolkit"]), (None, SAYS["no CUDA torch"])):
        assert toolchain.cuda_for(torch_of(torch_cuda), "")[0] is None
        with pytest.raises(toolchain.CannotBuild, match=reason):
            toolchain.cuda_for(torch_of(torch_cuda), "1")


def test_no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is a toolkit in the usual place")
    assert SAYS["no toolkit"] in toolchain.cuda_for(torch_of("13.0"), "")[1]


@pytest.mark.parametrize(
    ("listed", "targets", "dropped"),
    [
        ("8.0;9.0a", ["sm_80", "sm_90a"], []),
        ("7.5 8.0 9.0 12.0+PTX", ["sm_80", "sm_90a", "sm_120", "compute_120"], ["7.5"]),
        ("9.0a 9.0+PTX", ["sm_90a", "compute_90"], []),
        ("5.2 6.0 7.0 7.5+PTX 8.0;", ["sm_80"], ["5.2", "6.0", "7.0", "7.5+PTX"]),
        ("8.0;10.0", ["sm_80"], ["10.0"]),
    ],
)
def test_architectures(toolkit, monkeypatch, listed, targets, dropped):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    said = []
    assert toolchain.find_cuda("13.0", said.append).targets == targets
    assert [line.split()[3] for line in said] == dropped
    if "7.5" in dropped:
        assert SAYS["old architecture"] in said[0]


@pytest.mark.parametrize(
    ("listed", "message"),
    [("7.0 7.5", SAYS["only old architectures"]), ("9.9", "left of '9.9'"), ("Ampere", "such as .* got 'Ampere'")],
)
def test_no_architecture_left(toolkit, monkeypatch, listed, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(toolchain.CannotBuild, match=message):
        toolchain.find_cuda("13.0")


@pytest.mark.parametrize(
    ("version", "number", "fits"),
    [
        ("g++ (Debian) 10.2.1", "10", False),
        ("g++ (Debian) 11.4.0", "11", True),
        ("clang version 14.0.6", "14.0.6", True),
    ],
)
def test_age_of_the_compiler(monkeypatch, tmp_path, version, number, fits):
    path = executable(
        tmp_path / "c++", f'#!/bin/sh\ncase "$1" in --version) echo "{version}";; *) echo {number};; esac\n'
    )
    monkeypatch.setenv("CXX", str(path))
    if fits:
        assert toolchain.find_compiler() == ([str(path)], version)
    else:
        with pytest.raises(toolchain.CannotBuild, match=r"10.2.1 is too old: g\+\+ 11"):
            toolchain.find_compiler()


def test_compiler_of_several_words(monkeypatch):
    monkeypatch.setenv("CXX", f"{shutil.which('env')} g++ -m64")
    if shutil.which("g++"):
        assert toolchain.find_compiler()[0] == [shutil.which("env"), "g++", "-m64"]


def test_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(toolchain.CannotBuild, match=r"Python's headers were not found in .*python3-dev"):
        toolchain.find_python_headers()


# The plan.


def test_ninja_file_and_editors_database(toolkit, tmp_path, monkeypatch):
    """Every source once per instruction set; names with spaces and dollars reach the compiler as they are."""
    cuda = toolchain.find_cuda("13.0")
    folder = tmp_path / "two  spaces $HOME"
    folder.mkdir()
    tools = toolchain.Toolchain(
        ["a compiler", "g++"], "g++ 12", Path(NINJA), folder, "2.13.0", folder, True, cuda, None
    )  # fmt: skip
    text = plan.ninja_text(*plan.extension(tools, tmp_path / "a target.so"))
    (tmp_path / "build.ninja").write_text(text)
    builder.write_compile_commands(tools, tmp_path, tmp_path / "compile_commands.json")
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    files = [entry["file"] for entry in entries if not entry["file"].endswith(".o")]
    assert set(files) == {str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert files.count(str(ROOT / "csrc" / "cpu" / "mse_loss.cpp")) == len(plan.ISAS)
    command = next(e["command"] for e in entries if e["file"].endswith("module.cpp"))
    printed = subprocess.run(["/bin/sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    words = printed.stdout.splitlines()
    assert words[0] == "a compiler" and str(folder) in words and str(folder / "include") in words


def test_objects_are_made_once(in_process, tmp_path, monkeypatch):
    """A second build compiles nothing, one after a change of a flag all."""
    tools, objects = toolchain.find("0"), tmp_path / "an object folder"
    counts = []
    for werror in ("0", "0", "1"):
        monkeypatch.setenv("FASTLLM_WERROR", werror)
        lines = []
        builder.build_extension(tools, tmp_path / "x.so", objects, tmp_path / "log", "0.1", show=lines.append)
        counts.append(sum(" compile " in line for line in lines))
    assert counts[0] == counts[2] > 30 and counts[1] == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    show = builder.Progress(out)
    for line in ("[1/3] compile a.o", "a warning", "", "[2/3] compile b.o", "[3/3] link c.so", ""):
        show(line)
    ends = "\r\033[K[1/3] compile a.o\n\r\033[K[2/3] compile b.o\r\033[K[3/3] link c.so\n"
    assert out.getvalue() == (ends if terminal else "[1/3] compile a.o\n[3/3] link c.so\n")


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("FAILED: x.o\ng++ -Werror=x /error/y\nx.cpp:3:1: error: no\nx.cpp:4:1: error: never", "x.cpp:3:1: error: no"),
        ("/usr/bin/ld: cannot find -lx\ncollect2: error: ld returned 1", "/usr/bin/ld: cannot find -lx"),
        ("nothing to see", "ninja ended with status 3"),
    ],
)
def test_first_error(tmp_path, printed, error):
    log = tmp_path / "log"
    command = [sys.executable, "-c", f"print({printed!r}); raise SystemExit(3)"]
    assert builder.run_ninja(command, tmp_path, log, lambda line: None) == error
    assert log.read_text() == f"{printed}\n"


# Documents.


def test_the_table_of_situations():
    text = (ROOT / "docs" / "install.md").read_text()
    assert not [message for message in SAYS.values() if message not in text]
    tested = f"tested with torch {' to '.join(dict.fromkeys(TESTED_TORCH))}"
    assert f"{tested};" in " ".join(text.split()) and f"{tested})" in (ROOT / "README.md").read_text()


# Everything that follows installs into fresh environments.


@pytest.mark.slow
def test_pip_check(pure, path):
    assert "No broken requirements" in pure.pip("check", env=environment(path))


@pytest.mark.slow
@needs_extension
def test_native_wheel(tmp_path, source, path, with_compiler):
    """It names its platform and its torch, and is refused by another torch with the command that mends it."""
    env = with_compiler | {"FASTLLM_REQUIRE_NATIVE": "1", "FASTLLM_NAME_TORCH": "1"}
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    wheel = build_wheel([*pip, "-w", tmp_path, "."], source, tmp_path, env)
    release = toolchain.torch_release(torch.__version__).replace("+", ".")
    version = f"{fastllm.__version__}+torch{release}"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"fastllm-{version}-{python}-{python}-") and "any" not in wheel.name
    names = sane_metadata(wheel, version)
    assert any(re.fullmatch(r"fastllm/_C\..*\.so", name) for name in names)
    venv = Venv(tmp_path / "venv")
    venv.install(wheel, env=environment(path))
    assert "No broken requirements" in venv.pip("check", env=environment(path))
    assert Path(compiled(venv.imports(environment(path)))).is_relative_to(venv.site)
    info = venv.site / "fastllm" / "_build_info.py"
    info.write_text(info.read_text().replace(f"'torch': '{torch.__version__}'", "'torch': '2.12.0'"))
    eager_with_one_warning(venv.imports(environment(path, FASTLLM_HOME=tmp_path)), SAYS["other torch"])
    check([venv.python, "-m", "fastllm", "build"], with_compiler | {"FASTLLM_HOME": str(tmp_path)})
    assert Path(compiled(venv.imports(environment(path, FASTLLM_HOME=tmp_path)))).is_relative_to(tmp_path / "builds")


@pytest.mark.slow
@pytest.mark.parametrize("situation", ["no compiler", "no ninja", "no torch", "compiler fails"])
@pytest.mark.parametrize("editable", [False, True])
def test_install_without(situation, editable, tmp_path, source, path, compiler):
    """pip succeeds and hides why; import says it. With FASTLLM_REQUIRE_NATIVE=1 pip fails and says it."""
    tree = tmp_path / "source"
    shutil.copytree(source, tree)
    without = {"no ninja": ("ninja",), "no torch": ("torch",)}.get(situation, ())
    env = environment(path, FASTLLM_HOME=tmp_path)
    if situation != "no compiler":
        env |= {"CXX": str(compiler), "STANDIN_FAILS": "1"}
    venv = Venv(tmp_path / "venv", without)
    how = ["--no-deps", *(["-e"] if editable else [])]
    required = env | {"FASTLLM_REQUIRE_NATIVE": "1"}
    pip = ["install", "--no-index", "--no-build-isolation", *how, tree]
    said = venv.pip(*pip, env=required, status=1)
    assert re.search(rf"^ *fastllm: .*{re.escape(SAYS[situation])}", said, re.MULTILINE), said
    venv.install(tree, *how, env=env)
    if "torch" in without:
        said = check([venv.python, "-c", "import fastllm"], env, status=1)
        assert SAYS["no torch at import"] in said
        (venv.site / "torch.pth").write_text(f"{SITE}\n")
    eager_with_one_warning(venv.imports(env), SAYS[situation])


@pytest.mark.slow
@needs_extension
def test_editable(tmp_path, source, path, with_compiler):
    """As developers install it: compiled into the tree. A later build that fails leaves nothing old to be loaded."""
    tree = tmp_path / "source"
    shutil.copytree(source, tree)
    venv = Venv(tmp_path / "venv")
    venv.install(tree, "-e", env=with_compiler)
    assert Path(compiled(venv.imports(environment(path)))).is_relative_to(tree / "fastllm")
    assert (tree / "build" / "objects" / "release" / "module.o").exists() or list(
        tree.glob("build/objects/release/*.o")
    )
    assert json.loads((tree / "build" / "compile_commands.json").read_text())
    check([venv.python, "setup.py", "-q", "build_ext", "--inplace"], with_compiler | {"STANDIN_FAILS": "1"}, cwd=tree)
    eager_with_one_warning(venv.imports(environment(path, FASTLLM_HOME=tmp_path)), SAYS["compiler fails"])
    assert not list((tree / "fastllm").glob("_C*"))


@pytest.mark.slow
def test_install_with_build_isolation(tmp_path, source, path):
    """pip hides the installed torch from the build. Takes setuptools and ninja from a package index."""
    tree = tmp_path / "source"
    shutil.copytree(source, tree)
    venv, env = Venv(tmp_path / "venv"), environment(path, FASTLLM_HOME=tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", venv.python, "install", "--no-deps", tree]
    result = subprocess.run(pip, env=env, capture_output=True, text=True, cwd="/")
    if "No matching distribution" in result.stdout + result.stderr:
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stdout + result.stderr
    eager_with_one_warning(venv.imports(env), SAYS["no torch"])


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_stopped(stop, tmp_path, pure, with_compiler):
    """Nothing half-made is found, and the next build goes on, once no compiler of the first is left."""
    home, waits = tmp_path / "home", tmp_path / "compilers wait"
    waits.touch()
    env = with_compiler | {"FASTLLM_HOME": str(home)}
    begin = functools.partial(
        subprocess.Popen,
        [pure.python, "-m", "fastllm", "build"],
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    first = begin(env=env | {"STANDIN_WAITS": str(waits)})
    while not waits.with_name(f"{waits.name}.started").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(stop)
    said = first.stdout.read() if stop == signal.SIGINT else ""
    assert first.wait(timeout=600) == (130 if stop == signal.SIGINT else -stop)
    assert not list(home.glob("builds/*/build.json"))
    second, seen = begin(env=env), []
    for line in second.stdout:
        seen.append(line)
        if "waiting for it" in line:  # compilers that outlive a killed process hold its lock
            waits.unlink()
    assert second.wait() == 0 and seen[-1].startswith("built ") and "Warning" not in "".join(seen), seen
    assert waits.exists() == (stop == signal.SIGINT)
    assert stop != signal.SIGINT or said.endswith("\nfastllm build: interrupted\n"), said


@pytest.mark.slow
@needs_extension
def test_a_library_that_does_not_load(tmp_path, pure, path, with_compiler):
    """It is found broken when it is built; and one that breaks later is named at import, which goes on without it."""
    env = with_compiler | {"FASTLLM_HOME": str(tmp_path)}
    text = tmp_path / "text"
    text.write_text("no library")
    command = [pure.python, "-m", "fastllm", "build"]
    assert "what was built cannot be loaded: " in check(command, env | {"STANDIN_LIBRARY": str(text)}, status=1)
    check(command, env)
    library = next(tmp_path.glob("builds/*/*.so"))
    library.write_bytes(b"0" * library.stat().st_size)
    eager_with_one_warning(pure.imports(env), f"cannot be loaded: {library}")
    assert check(command, env).splitlines()[-1].startswith("built ")
    compiled(pure.imports(env))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_real_build(tmp_path, pure, path):
    """The real compiler, from the sources in the wheel."""
    home = tmp_path / "a home"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTLLM_", "PYTHON"))}
    env |= {"FASTLLM_HOME": str(home), "PYTHONNOUSERSITE": "1"}
    said = check([pure.python, "-m", "fastllm", "build"], env)
    assert Path(compiled(pure.imports(environment(path, FASTLLM_HOME=home)))).is_relative_to(home), said
