"""What the build promises: no code of one instruction set in another, and a source distribution that holds everything."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = sorted(ROOT.glob("build/objects/release/*.o"))


@pytest.mark.skipif(not OBJECTS or shutil.which("nm") is None, reason="no object files of a build in this tree")
def test_kernels_leave_nothing_to_the_linker():
    """A weak symbol compiled for AVX-512 could be picked for every processor."""
    kernels = [o for o in OBJECTS if ".avx" in o.name]
    assert kernels
    for obj in kernels:
        symbols = subprocess.run(["nm", "-C", obj], capture_output=True, text=True, check=True).stdout.splitlines()
        weak = [line for line in symbols if line[17:18] in "WVu"]
        assert not weak, (obj.name, weak[:5])


@pytest.mark.skipif(not OBJECTS or shutil.which("objdump") is None, reason="no object files of a build in this tree")
def test_base_line_has_no_wide_registers():
    for obj in OBJECTS:
        if ".avx" in obj.name:
            continue
        code = subprocess.run(["objdump", "-d", obj], capture_output=True, text=True, check=True).stdout
        assert "%zmm" not in code and "%ymm" not in code, obj.name


def test_source_distribution_is_complete(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder, patterns in {"csrc": ["*.cpp", "*.h"], "fastllm": ["*.py"], "tests": ["*.py"]}.items():
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                if path.name != "_build_info.py":
                    assert str(path.relative_to(ROOT)) in names
    assert not any(name.endswith((".so", ".pyc")) for name in names)
