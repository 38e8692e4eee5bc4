"""The CUDA kernels compiled for GPUs that are not here."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("FASTLLM_CUDA_HOST") == "1":
    pytest.skip("once is enough", allow_module_level=True)

import cuda_aot  # noqa: E402

if reason := cuda_aot.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def compiled():
    out = cuda_aot.ROOT / "build" / "cuda_aot"
    assert cuda_aot.compile_all(out) == ""
    return out


def test_no_kernel_spills(compiled):
    kernels = cuda_aot.kernels_of(compiled)
    assert not [k.failure for k in kernels if k.failure]
    assert {k.target for k in kernels} == set(cuda_aot.TARGETS)
    assert {k.file for k in kernels} >= set(cuda_aot.INSTRUCTIONS)


def test_the_committed_report_lists_every_kernel(compiled):
    """Registers may differ from compiler to compiler, names may not."""

    def names(text: str) -> set[str]:
        return {line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")}

    assert names(cuda_aot.REPORT.read_text()) == names(cuda_aot.table(cuda_aot.kernels_of(compiled)))


@pytest.mark.skipif(cuda_aot.disassembler() is None, reason="no cuobjdump")
def test_the_meant_instructions_are_there(compiled):
    assert not cuda_aot.missing_instructions(compiled)


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
