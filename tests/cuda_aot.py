"""Compiles the CUDA kernels for GPUs that are not there, and reads what the compiler reports.

Every ``csrc/cuda/*.cu`` is compiled by nvcc for sm_80, sm_90a and sm_100 with warnings as errors, and the torch-facing
layer by the host compiler in its CUDA form, against the CUDA headers that every torch carries. A spilled register, a
stack frame, or a kernel without the instructions that are meant is a failure. ``python tests/cuda_aot.py`` writes the
report.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

from fastllm._build import plan, toolchain

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90a", "sm_100")
REPORT = ROOT / "benchmarks" / "results" / "cuda" / "compiled.md"
# Instructions that each file's machine code must hold: 16-byte accesses, matrix units, asynchronous copies.
WIDE = [r"LDG\.E\S*\.128", r"STG\.E\S*\.128"]
INSTRUCTIONS = {
    "cross_entropy": {
        target: [*WIDE, r"MUFU\.EX2", *([] if target == "sm_80" else ["UCGABAR_ARV"])] for target in TARGETS
    },
    "embedding": dict.fromkeys(TARGETS, WIDE),
    "gemm_mma": dict.fromkeys(TARGETS, [r"HMMA\.16816", r"LDGSTS\S*\.128", r"LDSM\.16\.M88\.4", *WIDE]),
    "gemm_wgmma": {"sm_90a": [r"HGMMA\.64x256x16", r"UTMALDG\.2D", r"SYNCS\S*TRYWAIT", "USETMAXREG", WIDE[1]]},
    "linear_cross_entropy": dict.fromkeys(TARGETS, WIDE),
    "linear_relu": dict.fromkeys(TARGETS, WIDE),
    "log_probs": dict.fromkeys(TARGETS, [*WIDE, r"MUFU\.EX2"]),
    "mse_loss": dict.fromkeys(TARGETS, WIDE),
}


@dataclass
class Kernel:
    """What ptxas tells of one kernel."""

    file: str
    name: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def failure(self) -> str | None:
        if self.stack or self.spills:
            return f"{self.file}: {self.name} for {self.target}: {self.stack} bytes of stack, {self.spills} spilled"
        return None


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        toolchain.find_cuda("13.0")
    except toolchain.CannotBuild as reason:
        return str(reason)
    return None


def nvcc() -> Path:
    return toolchain.find_cuda("13.0").nvcc


def kernel_files(kernels: Path = ROOT / "csrc" / "cuda") -> list[Path]:
    return sorted(kernels.glob("*.cu"))


def compile_all(out: Path, targets: Sequence[str] = TARGETS, layer: bool = True) -> str:
    """Compile kernels and torch-facing layer into ``out`` with ninja; the compilers' output if one fails, else ""."""
    cuda = toolchain.find_cuda("13.0")
    nvcc_flags = " ".join([*plan.NVCC_FLAGS, "-Werror=all-warnings", "-Xptxas=-v"])
    includes = plan.system_includes([*map(Path, cpp_extension.include_paths()), cuda.home / "include"])
    flags = [*plan.COMMON_FLAGS, "-Werror", "-fsyntax-only", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *includes]
    commands = {
        "nvcc": f"{plan.quote(cuda.nvcc)} -MD -MF $out.d {nvcc_flags} $flags -c $in -o $out > $out.log 2>&1 "
        "|| (cat $out.log; false)",
        "check": f"g++ -MMD -MF $out.d -MT $out {' '.join(flags)} $in && touch $out",
    }
    # Machine code alone: no PTX to assemble.
    architectures = tuple(f"-gencode=arch=compute_{target[3:]},code={target}" for target in targets)
    steps = [
        plan.Step("nvcc", f"{source.stem}.o", (source,), architectures)
        for source in (kernel_files() if targets else [])
    ]
    if layer:
        steps += [plan.Step("check", f"{source.stem}.checked", (source,)) for source in plan.cuda_layer()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "build.ninja").write_text(plan.ninja_text(commands, steps))
    ninja = subprocess.run([toolchain.find_ninja(), "-C", out, "-k", "0"], capture_output=True, text=True)
    return "" if ninja.returncode == 0 else ninja.stdout + ninja.stderr


def read_report(file: str, log: str) -> Iterator[Kernel]:
    """The kernels of a file, from what ``ptxas -v`` printed; those of CUDA's own libraries are left out."""
    names = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    clear = subprocess.run(["c++filt"], input="\n".join(n for n, _ in names), capture_output=True, text=True).stdout
    parts = re.split(r"Compiling entry function '\w+' for '\w+'", log)[1:]
    for (_, target), name, part in zip(names, clear.splitlines(), parts, strict=True):
        if "cub::" in name.split("(")[0]:
            continue
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        short = re.sub(r"\(anonymous namespace\)::|fastllm::cuda::|fastllm::|^void ", "", name)
        yield Kernel(
            file,
            re.sub(r"\(.*$", "", short),
            target,
            int(used.group(1)),
            int(frame.group(1)),
            int(frame.group(2)) + int(frame.group(3)),
            int(shared.group(1)) if shared else 0,
        )


def kernels_of(out: Path) -> list[Kernel]:
    return [
        k for source in kernel_files() for k in read_report(source.stem, (out / f"{source.stem}.o.log").read_text())
    ]


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None:
        carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


def missing_instructions(out: Path, targets: Sequence[str] = TARGETS) -> list[str]:
    """What the machine code lacks of INSTRUCTIONS."""
    missing = []
    for file, wanted in INSTRUCTIONS.items():
        for target, patterns in wanted.items():
            if target not in targets:
                continue
            command = [disassembler(), "-sass", "-arch", target, out / f"{file}.o"]
            code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            missing += [f"{file} for {target}: no {p}" for p in patterns if not re.search(p, code)]
    return missing


def table(kernels: list[Kernel]) -> str:
    lines = [
        "Registers of each CUDA kernel, as nvcc's assembler reports them. No kernel spills or has a stack frame; shared",
        "memory is asked for at the launch, so that the compiler knows of none.",
        "",
        f"| file | kernel | {' | '.join(TARGETS)} |",
        "| --- | --- |" + " --- |" * len(TARGETS),
    ]
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for k in kernels:
        rows.setdefault((k.file, k.name), {})[k.target] = k.registers
    for (file, name), registers in sorted(rows.items()):
        lines.append(f"| {file} | `{name}` | {' | '.join(str(registers.get(t, '')) for t in TARGETS)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda_aot", help="folder of the objects")
    out = parser.parse_args().build
    if reason := why_not():
        print(reason)
        return 1
    if failed := compile_all(out):
        print(failed)
        return 1
    kernels = kernels_of(out)
    failures = [k.failure for k in kernels if k.failure] + missing_instructions(out)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(table(kernels))
    print("\n".join(failures) or f"{len(kernels)} kernels, no spills; {REPORT}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
