"""The Triton kernels compiled for GPUs that are not here, and their launchers watched for waits."""

import dataclasses
import json
import os
from pathlib import Path

import keyed
import pytest
import torch
from helpers import Waits

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton_aot

ROOT = Path(__file__).resolve().parent.parent


def compiled(target: str) -> list[triton_aot.Result]:
    """What came of compiling for a target; the same sources are not compiled by the same Triton again."""
    out = ROOT / "build" / "triton_aot" / target
    results = out / "results.json"
    versions = f"{triton_aot.triton.__version__} {torch.__version__}"
    with keyed.made_once(
        out, ROOT / "fastllm" / "triton", Path(triton_aot.__file__), versions, files=[results]
    ) as missing:
        if missing:
            found = triton_aot.compile_all([target], [torch.bfloat16, torch.float32])
            results.write_text(json.dumps([dataclasses.asdict(result) for result in found]))
    return [triton_aot.Result(**result) for result in json.loads(results.read_text())]


@pytest.mark.parametrize(
    "target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.slow) for t in triton_aot.TARGETS]
)
def test_no_spills_and_matrix_instructions(target):
    results = compiled(target)
    assert not [r.failure for r in results if r.failure]
    assert {r.kernel for r in results} >= {"forward", "backward", "matmul", "mask", "mse", "sum_rows", "gather"}
    rows = [r for r in results if r.kernel == "forward"]
    assert all(r.widest_load == "128 bit" for r in rows), [(r.case, r.widest_load) for r in rows]


@pytest.mark.slow
def test_a_spill_and_a_missing_instruction_fail():
    """A tile too large for its warps, and a product that is not one."""
    launches = []
    for _, call in triton_aot.cases(torch.bfloat16):
        with triton_aot.Recorder(("cuda", 9)) as recorder:
            call()
        launches += [x for x in recorder.launches if x.kernel.__name__ == "_matmul"]
    crowded = launches[0]
    crowded.options["num_warps"] = 1
    assert "spilled" in triton_aot.compile_launch(crowded, "one warp", "sm_90").failure
    result = triton_aot.compile_launch(launches[1], "as launched", "sm_90")
    result.matrix = False
    assert "no wgmma" in result.failure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_launchers_never_wait(dtype, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a tensor was copied to the host")

    for name in ("cpu", "tolist", "numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for _, call in triton_aot.cases(dtype):
        with triton_aot.Recorder(("cuda", 9)) as recorder, Waits():
            call()
        assert recorder.launches


def test_the_watch_sees_a_wait():
    with pytest.raises(AssertionError, match="waits"), Waits():
        torch.ones(()).item()
