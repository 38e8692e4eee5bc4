"""Compiles the Triton kernels, as they would be launched, for GPUs that are not there, and reads what came out.

The launchers run on CPU tensors with their launches recorded instead of made; every recorded kernel, with the types,
constants and alignments of its arguments, is compiled for each target. A spilled register or a product without matrix
instructions is a failure. ``python tests/triton_aot.py`` compiles every case and writes the report.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm.triton import (
    common,
    cross_entropy,
    embedding,
    gemm,
    linear_cross_entropy,
    linear_relu,
    log_probs,
    mse_loss,
    relu_mlp,
)

MODULES = (cross_entropy, embedding, gemm, linear_cross_entropy, linear_relu, log_probs, mse_loss, relu_mlp)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), ("cuda", 8)),
    "sm_90": (GPUTarget("cuda", 90, 32), ("cuda", 9)),
    "sm_100": (GPUTarget("cuda", 100, 32), ("cuda", 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), ("hip", 9)),
}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass
class Launch:
    kernel: triton.runtime.JITFunction
    arguments: dict[str, object]
    options: dict[str, object]


class Recorder:
    """Stands in for ``common.launch`` in every module, and for the size and kind of the device."""

    def __init__(self, kind: tuple[str, int]):
        self.kind, self.launches = kind, []

    def __enter__(self) -> Recorder:
        self.saved = [(m, n, getattr(m, n)) for m in MODULES for n in ("launch", "multiprocessors") if hasattr(m, n)]
        self.saved.append((gemm, "target", gemm.target))
        for module, name, _ in self.saved:
            setattr(module, name, getattr(self, name))
        return self

    def __exit__(self, *_) -> None:
        for module, name, value in self.saved:
            setattr(module, name, value)

    def launch(self, kernel, grid, tensor, *args, **options) -> None:
        if 0 in grid:
            return
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: options.pop(name) for name in list(options) if name in names}
        assert set(arguments) == set(names), (kernel.__name__, set(names) ^ set(arguments))
        self.launches.append(Launch(kernel, arguments, options))

    def multiprocessors(self, device) -> int:
        return 132

    def target(self, device) -> tuple[str, int]:
        return self.kind


def source_of(launch: Launch) -> ASTSource:
    """Types, constants and alignments of the arguments, by the rules of Triton's own launcher."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type or "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


@dataclass
class Result:
    kernel: str
    case: str
    target: str
    registers: int
    spills: int
    shared: int
    widest_load: str
    matrix: bool

    @property
    def failure(self) -> str | None:
        if self.spills:
            return f"{self.kernel} ({self.case}, {self.target}): {self.spills} bytes spilled"
        if self.kernel == "matmul" and not self.matrix:
            return f"{self.kernel} ({self.case}, {self.target}): no {MATRIX_INSTRUCTION[self.target]}"
        return None


def usage_on_nvidia(ptx: str, target: str) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas reports them."""
    architecture = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [
            get_ptxas(int(re.search(r"\d+", architecture).group())).path,
            "-v",
            f"--gpu-name={architecture}",
            str(file),
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", said)), spilled


def compile_launch(launch: Launch, case: str, target: str) -> Result:
    options = {name: value for name, value in launch.options.items()}
    compiled = triton.compile(source_of(launch), target=TARGETS[target][0], options=options)
    name = launch.kernel.__name__.strip("_")
    if target.startswith("sm"):
        text = compiled.asm["ptx"]
        registers, spills = usage_on_nvidia(text, target)
        widths = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", text)
        widest = max((int(v or 1) * int(b) for v, b in widths), default=0)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))
        widest = 128 if "load_dwordx4" in text or "load_b128" in text else 64 if "load_dwordx2" in text else 32
    matrix = MATRIX_INSTRUCTION[target] in text
    return Result(name, case, target, registers, spills, compiled.metadata.shared, f"{widest} bit", matrix)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the launchers that between them launch every kernel, at sizes of language models."""
    x = lambda *shape: torch.empty(shape, dtype=dtype)  # noqa: E731
    acc = common.ACCUMULATORS[dtype]
    y, loss = torch.zeros(16, dtype=torch.int64), (-100, 0.0, 0.0, None)
    for classes in (4096, 50257, 128256):
        logits, softmax = x(16, classes), torch.empty(2, 16, dtype=acc)
        yield f"V {classes}", lambda z=logits: cross_entropy.forward(z, y, None, 1, *loss, False)
        yield f"V {classes}, gradient", lambda z=logits: cross_entropy.forward(z, y, None, 1, *loss, True)
        yield (
            f"V {classes}, correct",
            lambda z=logits, s=softmax: cross_entropy.correct_(s[0, 0], z, y, None, s, 1, *loss, z),
        )
    full = (-100, 0.1, 1e-4, 30.0)
    logits, softmax, w = x(16, 50257), torch.empty(2, 16, dtype=acc), x(50257)
    yield "every option", lambda: cross_entropy.forward(logits, y, w, 1, *full, True)
    yield "every option, none", lambda: cross_entropy.backward(softmax[0], logits, y, w, softmax, 0, *full)
    yield "probabilities", lambda: cross_entropy.forward(logits, logits, w, 1, *full, True)
    yield "loss alone", lambda: linear_cross_entropy.scale_(softmax[0, 0], x(64, 64))
    for classes, every in ((128256, False), (50257, False), (128256, True), (50257, True)):
        logits, ids, g = (
            x(16, classes),
            torch.zeros(16, 64 if every else 0, dtype=torch.int64),
            torch.empty(16, dtype=acc),
        )
        rows = (logits, y, g if every else None, ids, -100, 1.0, 30.0 if every else None)
        asked = [True] * 7 if every else [True, True, *[False] * 5]
        incoming = (g, g, g, torch.empty(ids.shape, dtype=acc)) if every else (g, g, None, None)
        case = f"log_probs, V {classes}, {'every option' if every else 'log_prob and entropy'}"
        yield case, lambda r=rows, a=asked: log_probs.rows_forward(*r, a)
        yield case, lambda r=rows, i=incoming: log_probs.rows_backward_(*i, torch.empty(3, 16, dtype=acc), *r, r[0])
    yield "log_probs, most ids", lambda: log_probs.rows_backward_(
        None, None, None, torch.empty(16, 1024, dtype=acc), torch.empty(3, 16, dtype=acc), logits, y, None,
        torch.zeros(16, 1024, dtype=torch.int64), -100, 1.0, None, logits,
    )  # fmt: skip
    table, ids = x(1000, 768), torch.zeros(4096, dtype=torch.int64)
    yield "768 features", lambda: embedding.forward(table, ids)
    yield "768 features", lambda: embedding.backward(x(4096, 768), ids, 1000, -1, True)
    yield "10 features", lambda: embedding.backward(x(4096, 10), ids, 1000, 0, False)
    for reduction in (0, 1):
        g = x(4096, 32) if reduction == 0 else x()
        yield f"reduction {reduction}", lambda r=reduction: mse_loss.forward(x(4096, 32), x(4096, 32), None, r, True)
        yield f"reduction {reduction}", lambda r=reduction, g=g: mse_loss.backward(g, x(4096, 32), x(4096, 32), None, r)
    for rows, k, n in ((4096, 1024, 4096), (128, 1000, 999)):
        a, weight, bias = x(rows, k), x(n, k), x(n)
        shape = f"{rows} x {k} x {n}"
        yield shape, lambda a=a, w=weight, b=bias: linear_relu.linear(a, w, b, True)
        yield shape, lambda n=n, r=rows: linear_relu.masked(x(r, n), x(r, n), True)
        yield (
            shape,
            lambda a=a, w=weight: relu_mlp._hidden_gradient(x(a.size(0), w.size(0)), w, x(a.size(0), w.size(1)), True),
        )


def compile_all(targets: list[str], dtypes: list[torch.dtype]) -> Iterator[Result]:
    for target in targets:
        seen = set()
        for dtype in dtypes:
            for case, call in cases(dtype):
                with Recorder(TARGETS[target][1]) as recorder:
                    call()
                for launch in recorder.launches:
                    key = (launch.kernel.__name__, str(source_of(launch).hash()), str(launch.options))
                    if key not in seen:
                        seen.add(key)
                        yield compile_launch(launch, f"{TYPES[dtype]}, {case}", target)


def report(results: list[Result]) -> str:
    lines = [
        f"Triton {triton.__version__}, compiled without a GPU by `python tests/triton_aot.py`.",
        "",
        "| kernel | case | target | registers | spilled bytes | shared bytes | widest load | matrix instructions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        matrix = MATRIX_INSTRUCTION[r.target] if r.matrix else ""
        lines.append(
            f"| {r.kernel} | {r.case} | {r.target} | {r.registers} | {r.spills} | {r.shared} | {r.widest_load} | {matrix} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="of " + ", ".join(TARGETS))
    parser.add_argument("--out", type=Path, help="write the report to this file")
    options = parser.parse_args()
    results = []
    for result in compile_all(options.targets.split(","), [torch.bfloat16, torch.float32]):
        results.append(result)
        print(
            result.failure or f"{result.target} {result.kernel} ({result.case}): {result.registers} registers",
            flush=True,
        )
    if options.out:
        options.out.write_text(report(results))
    failures = [r.failure for r in results if r.failure]
    print(f"{len(results)} compiled, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
