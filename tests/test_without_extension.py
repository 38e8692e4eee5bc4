"""A machine without a compiler: autograd nodes in Python, Triton's kernels (interpreted), PyTorch on the CPU."""

import os

import pytest
from helpers import run_python

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("FASTLLM_CUDA_HOST") == "1":
    pytest.skip("once is enough", allow_module_level=True)

pytestmark = pytest.mark.contract
ALONE = {"FASTLLM_TEST_NATIVE": "0", "OMP_NUM_THREADS": "1"}
INTERPRETED = {**ALONE, "TRITON_INTERPRET": "1", "FASTLLM_BACKEND": "triton"}


def run(code: str, env: dict[str, str]) -> str:
    result = run_python("import warnings; warnings.simplefilter('ignore')\n" + code, env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_and_nodes():
    """Each operation: its node, values and gradients beside the definition's, and a second backward that is refused."""
    code = """
import torch, fastllm
import fastllm.functional as F
from operations import small_cases
seen = set()
for case in small_cases(torch.float32):
    if case.op in seen or case.name.startswith("spatial"):
        continue
    seen.add(case.op)
    wanted = [a for a in case.inputs if a is not None and a.requires_grad]
    output = case.ours(*case.inputs)
    with fastllm.use_backend("eager"):
        expected = case.ours(*case.inputs)
    node = output.grad_fn
    while not getattr(node, "_forward_cls", object).__module__.startswith("fastllm.operations"):
        node = node.next_functions[0][0]
    torch.testing.assert_close(output, expected)
    incoming = torch.randn_like(output)
    for a, b in zip(torch.autograd.grad(output, wanted, incoming), torch.autograd.grad(expected, wanted, incoming)):
        torch.testing.assert_close(a, b)
    try:
        torch.autograd.grad(output, wanted, incoming)
    except RuntimeError as error:
        assert "second time" in str(error)
    else:
        raise AssertionError("a second backward passed")
assert len(seen) == 6
"""
    run(code, INTERPRETED)


def test_compiles_whole_and_passes_opcheck():
    code = """
import torch, fastllm.functional as F
x, w, y = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), torch.tensor([1, 0, 4])
compiled = torch.compile(lambda x, w: F.linear_cross_entropy(x, w, y), fullgraph=True, backend="aot_eager")
found = torch.autograd.grad(compiled(x, w) * 2, (x, w))
for a, b in zip(found, torch.autograd.grad(F.linear_cross_entropy(x, w, y) * 2, (x, w))):
    torch.testing.assert_close(a, b)
torch.library.opcheck(torch.ops.fastllm.linear_relu.default, (x, w, None))
torch.library.opcheck(torch.ops.fastllm.mse_loss.default, (x, torch.randn(3, 4), None, 1))
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert F.linear_relu(x, w).dtype == torch.bfloat16
    assert F.linear_cross_entropy(x, w, y).dtype == F.cross_entropy(x, y % 4).dtype == torch.float32
"""
    run(code, INTERPRETED)


def test_what_serves():
    """Tensors of the CPU by PyTorch; a backend by name is refused with the reason."""
    code = """
import torch, fastllm
import fastllm.functional as F
x = torch.randn(3, 4, requires_grad=True)
print(F.mse_loss(x, x.detach()).grad_fn.name())
print(fastllm.info())
try:
    fastllm.set_backend("cpu")
except RuntimeError as error:
    print(error)
loss = fastllm.models.MLPLanguageModel(9, 3, 4).loss(torch.tensor([1, 2]), torch.tensor([2, 3]))
loss.backward()
"""
    said = run(code, {**ALONE, "TRITON_INTERPRET": "0"})
    assert said.startswith("MseLossBackward0") and "backend 'cpu' cannot be used" in said
    assert "python -m fastllm build" in said


def test_a_launch_that_fails_falls_back_once():
    """`auto` tries Triton once and warns once of what is missing; by name it is an error."""
    code = """
import warnings, torch, fastllm
from fastllm import backends
from fastllm.triton import probe
backends._ACCELERATORS = frozenset({"meta"})
probe.why_not_operation = lambda op, dtype, device: "Triton needs a C compiler for its driver: cc was not found"
x = torch.empty(3, 4, device="meta")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        assert backends.native("linear_relu", x, x) is None
        assert backends.native("mse_loss", x, x) is None
assert len(seen) == 1 and "cc was not found" in str(seen[0].message), seen
"""
    run(code, {**ALONE, "TRITON_INTERPRET": "0"})


def test_reasons_of_a_failed_launch():
    code = """
from fastllm.triton.probe import _reason
assert _reason(RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")).startswith(
    "Triton needs a C compiler for its driver"
)
assert _reason(ValueError("no such target\\n\\nsm_10")) == "Triton cannot launch a kernel: ValueError: sm_10"
"""
    run(code, ALONE)
