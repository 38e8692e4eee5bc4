"""What a result was measured on, and the folder that is named after it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import harness
import torch

import fastllm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def commit() -> str:
    """The commit, and whether the code that is measured has changed since."""
    changed = _git("status", "--porcelain", "--", "csrc", "fastllm", "benchmarks/*.py")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def facts(threads: int, device: str) -> dict:
    """Machine, versions, commit and date; sets the number of threads."""
    torch.set_num_threads(threads)
    info = fastllm.info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),  # before the measurement: what else ran
        "threads": threads,
        "instruction_set": info["instruction_set"],
        "float32_gemm": info["float32_gemm"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fastllm": fastllm.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def describe(threads: int, device: str) -> dict:
    """The facts, and the limits as measured now."""
    return facts(threads, device) | {"limits": harness.machine_limits(device)}


def where(machine: dict) -> str:
    """The machine in a few words."""
    if machine["device"] != "cpu":
        return machine["device"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{machine['processor']}, {machine['instruction_set']}, {threads}"


def slug(device: str) -> str:
    """A folder's name: ``cpu-amd-epyc-avx2``, ``cuda-nvidia-h100-80gb-hbm3``."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor().split("@")[0]
    if device == "cpu":
        name += f" {fastllm.info()['instruction_set']}"
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {name}").strip("-")


def folder(out: str | None, device: str) -> Path | None:
    """Where results go: a folder, the one named after this machine for ``auto``, or nowhere."""
    return None if out is None else RESULTS / slug(device) if out == "auto" else Path(out)
