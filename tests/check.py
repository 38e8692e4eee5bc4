"""Static checks: ruff (lint and format), clang-format, mypy where it is installed, and the rooms' rules of
docs/architecture.md."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NATIVE = sorted(
    p
    for room in ("csrc", "tests/cuda_host")
    for p in (ROOT / room).rglob("*")
    if p.suffix in (".h", ".cpp", ".cu", ".cuh")
)


def command(*arguments: str | Path) -> bool:
    return subprocess.run([str(a) for a in arguments], cwd=ROOT).returncode == 0


def types_fit() -> bool:
    if importlib.util.find_spec("mypy") is None:
        print("mypy: not installed, no types checked")
        return True
    return command(sys.executable, "-m", "mypy", "--cache-dir", ROOT / "build" / "mypy")


def kernels_know_no_torch() -> bool:
    """Kernels include no PyTorch header; those of the CPU no container either: the linker would merge inline code across
    instruction sets."""
    torch, containers = "ATen|torch|c10", "vector|string|map|algorithm|functional|memory|numeric"
    forbidden = {"cpu": rf'#include [<"]({torch}|{containers})\b', "cuda": rf'#include [<"]({torch})\b'}
    bad = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for room, pattern in forbidden.items()
        for path in (ROOT / "csrc" / room).glob("*")
        if path.name != "isa.cpp"
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]
    print("\n".join(bad) or f"rooms: {len(NATIVE)} native files checked")
    return not bad


def main() -> int:
    checks = {
        "ruff check": lambda: command(BIN / "ruff", "check", "."),
        "ruff format": lambda: command(BIN / "ruff", "format", "--check", "."),
        "clang-format": lambda: command(BIN / "clang-format", "--dry-run", "--Werror", *NATIVE),
        "mypy": types_fit,
        "rooms": kernels_know_no_torch,
    }
    failed = [name for name, check in checks.items() if not check()]
    print(f"check: {len(checks) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
