"""The CUDA kernels compiled for GPUs that are not here."""

import cuda_aot
import keyed
import pytest
import torch

needs_nvcc = pytest.mark.skipif(cuda_aot.why_not() is not None, reason=str(cuda_aot.why_not()))


def compiled(target):
    """The folder of what nvcc made for a target; the same sources and compiler are not compiled again."""
    out = cuda_aot.ROOT / "build" / "cuda_aot" / target
    sources = (cuda_aot.ROOT / "csrc", cuda_aot.ROOT / "tests" / "cuda_aot.py", cuda_aot.ROOT / "setup.py")
    with keyed.made_once(out, *sources, keyed.version_of(cuda_aot.nvcc()), torch.__version__) as missing:
        if missing:
            assert cuda_aot.compile_all(out, [target], layer=False) == ""
    return out


TARGETS = pytest.mark.parametrize(
    "target", [t if t == "sm_90a" else pytest.param(t, marks=pytest.mark.slow) for t in cuda_aot.TARGETS]
)


@needs_nvcc
@TARGETS
def test_no_kernel_spills(target):
    kernels = cuda_aot.kernels_of(compiled(target))
    assert not [k.failure for k in kernels if k.failure]
    assert {k.target for k in kernels} == {target}
    assert {k.file for k in kernels} >= {file for file, wanted in cuda_aot.INSTRUCTIONS.items() if target in wanted}


@needs_nvcc
@TARGETS
def test_the_committed_report_lists_every_kernel(target):
    """Registers may differ from compiler to compiler, names may not."""
    column = cuda_aot.TARGETS.index(target) + 3
    rows = [line.split("|") for line in cuda_aot.REPORT.read_text().splitlines() if line.startswith("| ")][1:]
    listed = {(row[1].strip(), row[2].strip().strip("`")) for row in rows[1:] if row[column].strip()}
    assert listed == {(k.file, k.name) for k in cuda_aot.kernels_of(compiled(target))}


@needs_nvcc
@TARGETS
@pytest.mark.skipif(cuda_aot.disassembler() is None, reason="no cuobjdump")
def test_the_meant_instructions_are_there(target):
    assert not cuda_aot.missing_instructions(compiled(target), [target])


@needs_nvcc
@pytest.mark.slow
def test_the_torch_facing_layer_compiles(tmp_path):
    """In its CUDA form, against CUDA's headers; the emulator compiles the other form of the same files."""
    assert cuda_aot.compile_all(tmp_path, []) == ""


def test_a_spill_fails():
    log = """
ptxas info    : Compiling entry function '_ZN7fastllm4cuda4someEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN7fastllm4cuda4someEPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem
"""
    (kernel,) = cuda_aot.read_report("file", log)
    assert (kernel.name, kernel.registers, kernel.shared) == ("some", 255, 64)
    assert "16 bytes of stack, 12 spilled" in kernel.failure
