"""The CUDA kernels' machine code: what is read from it, and each kernel within its budget of instructions."""

import sys
from pathlib import Path

import cuda_aot
import pytest
import test_cuda_aot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import machine_code

# A loop of two 16-byte loads and stores, with a load where a predicate holds; then a loop that only stores zeros.
SASS = """
		Function : _ZN7fastllm4cuda4someEPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x0 */
                                                                          /* 0x0 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;  /* 0x0 */
        /*0030*/              @!P1 LDG.E.U16 R20, desc[UR4][R12.64] ;     /* 0x0 */
        /*0040*/               @P2 BRA 0x80 ;                             /* 0x0 */
        /*0050*/                   FFMA R4, R4, R5, R6 ;                  /* 0x0 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                      /* 0x0 */
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;       /* 0x0 */
        /*0080*/                   STG.E.128 desc[UR4][R2.64+0x10], R8 ;  /* 0x0 */
        /*0090*/               @P0 BRA 0x10 ;                             /* 0x0 */
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], RZ ;       /* 0x0 */
        /*00b0*/               @P0 BRA 0xa0 ;                             /* 0x0 */
        /*00c0*/                   EXIT ;                                 /* 0x0 */
        /*00d0*/                   BRA 0xd0;                              /* 0x0 */
"""


def test_the_main_loop_is_found():
    (code,) = machine_code.functions(SASS).values()
    assert len(code) == 14 and list(machine_code.functions(SASS)) == ["some"]
    route = machine_code.main_path(code)
    # The way that stores both, not the shorter one; without zeros.
    assert [i.at for i in route.code] == list(range(0x10, 0xA0, 0x10))
    assert (route.loads, route.stores, route.in_flight()) == (32, 32, 32)
    whole = machine_code.main_path(code, loop=False)
    assert whole.code[0].at == 0 and whole.code[-1].word == "EXIT" and whole.stores == 48
    kinds = [i.kind for i in route.code]
    assert (kinds.count("memory"), kinds.count("exp, log"), kinds.count("float"), kinds.count("control")) == (
        5,
        1,
        1,
        2,
    )


def test_numbers_follow_from_the_path():
    (code,) = machine_code.functions(SASS).values()
    main = machine_code.Main("file", "some", "what", item=4, budget=1.0)
    one = machine_code.Measured(main, machine_code.main_path(code), registers=63, threads=512)
    assert one.blocks == 2 and one.items == 16 and sum(one.kinds().values()) == 9 / 16
    # 64 bytes a thread, 9 instructions a warp, four warps a clock on each multiprocessor.
    full = 132 * 4 * machine_code.CLOCK / 9 * 64 * 32
    assert one.slots(full) == pytest.approx(1) and one.slots(full / 2) == pytest.approx(0.5)
    assert one.little() == pytest.approx(2 * 512 * 2 * 32 * 132 / machine_code.LATENCY)
    assert 0 < one.reached("H100") < machine_code.REACHED["H100"]
    busy = machine_code.Route(one.path.code + [i for i in one.path.code if not i.bytes] * 50)
    slow = machine_code.Measured(main, busy, registers=63, threads=512)
    assert slow.reached("H100") < 0.9 * one.reached("H100")


def test_the_report_shows_these_kernels():
    text = machine_code.REPORT.read_text()
    shown = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    wanted = [f"| {m.what}: `{m.kernel}` |" for m in machine_code.MAINS]
    assert [line[: len(start)] for line, start in zip(shown, wanted, strict=True)] == wanted


@pytest.mark.slow
@test_cuda_aot.needs_nvcc
@pytest.mark.skipif(cuda_aot.disassembler() is None, reason="no cuobjdump")
def test_kernels_keep_to_their_budgets():
    kernels = machine_code.of_objects(test_cuda_aot.compiled("sm_90a"))
    assert len(kernels) == len(machine_code.MAINS)
    for kernel in kernels:
        used = kernel.slots(machine_code.MEMORY["H100"])
        assert 0.03 < used <= kernel.main.budget, f"{kernel.main.kernel}: {used:.0%} of an H100's issue slots"
        assert kernel.little() > machine_code.MEMORY["H200"], f"{kernel.main.kernel}: too few bytes in flight"
