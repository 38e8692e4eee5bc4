"""PyTorch's tools see the operations: FLOP counts, profiles, fake tensors, modules."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as TF
from operations import small_cases
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import fastllm
import fastllm.functional as F
from fastllm import operations
from fastllm.models import MLPLanguageModel

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(fastllm.backends.TABLE["cpu"].missing is not None, reason="compiled operations not built"),
]

N, K, H, V = 6, 5, 7, 11
OPERATIONS = ("embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy")


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


ids = torch.randint(0, V, (N,))
# The operation and its definition in PyTorch, which counts by its own formulas.
CALLS = {
    "embedding": (lambda w: F.embedding(ids, w), lambda w: TF.embedding(ids, w), [(V, K)]),
    "linear_relu": (
        F.linear_relu,
        lambda x, w, b: torch.relu(TF.linear(x, w, b)),
        [(2, 3, K), (H, K), (H,)],
    ),
    "relu_mlp": (
        F.relu_mlp,
        lambda x, w, b, v, c: TF.linear(torch.relu(TF.linear(x, w, b)), v, c),
        [(2, 3, K), (H, K), (H,), (V, H), (V,)],
    ),
    "mse_loss": (F.mse_loss, TF.mse_loss, [(N, K), (N, K)]),
    "cross_entropy": (lambda x: F.cross_entropy(x, ids), lambda x: TF.cross_entropy(x, ids), [(N, V)]),
    "linear_cross_entropy": (
        lambda x, w, b: F.linear_cross_entropy(x, w, ids, linear_bias=b),
        lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), ids),
        [(N, K), (V, K), (V,)],
    ),
}


def counted(function, inputs, mode=torch.enable_grad) -> tuple[int, FlopCounterMode]:
    with FlopCounterMode(display=False) as counter, mode():
        output = function(*inputs)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops(), counter


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPERATIONS)
def test_flops_are_those_of_the_definition(op, mode):
    """Forward and backward, whichever of the inputs need a gradient."""
    ours, definition, shapes = CALLS[op]
    for needed in itertools.product([False, True], repeat=len(shapes)):
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors(*shapes), needed, strict=True)]
        found, counter = counted(ours, inputs, mode)
        assert found == counted(definition, inputs, mode)[0], needed
        assert any(str(key) == f"fastllm.{op}" or f"fastllm.{op}_" in str(key) for key in counter.flop_counts["Global"])


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "none"), (torch.float16, "mean")])
def test_logits_computed_again_are_counted_again(dtype, reduction):
    def loss(x, w):
        return F.linear_cross_entropy(x, w, ids, reduction=reduction)

    assert counted(loss, tensors((N, K), (V, K), dtype=dtype))[0] == 4 * 2 * N * K * V


def test_every_registered_operation_is_declared():
    registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastllm::")}
    assert registered == {*operations.NAMES, *(kernel.name for kernel in operations.KERNELS)}


def test_flops_of_modules():
    """The counter and the tracker tell whose module an operation belongs to, in forward and in backward."""
    model = MLPLanguageModel(V, K, H)
    with FlopCounterMode(display=False) as counter:
        model(ids.view(2, 3)).sum().backward()
    own = {name: sum(table.values()) for name, table in counter.get_flop_counts().items()}
    assert own["Global"] == own["MLPLanguageModel"] == 3 * 2 * N * K * H + 3 * 2 * N * H * V
    layer, parents = fastllm.LinearReLU(K, H), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "fastllm" in str(func):
                parents.append((func._schema.name, set(tracker.parents)))
            return func(*args, **(kwargs or {}))

    with ModuleTracker() as tracker, Watch():
        layer(torch.randn(N, K, requires_grad=True)).sum().backward()
    assert [name for name, _ in parents] == ["fastllm::linear_relu_forward", "fastllm::linear_relu_backward"]
    assert all("LinearReLU" in modules for _, modules in parents), parents


def test_import_is_light():
    """What takes seconds to import waits until it is used."""
    code = "import sys, torch; before = set(sys.modules); import fastllm; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not [name for name in found if name in ("torch._dynamo", "torch._inductor", "triton", "transformers")]


def test_formulas_wait_for_the_counter():
    """Importing fastllm does not import PyTorch's counter, and the counter finds the formulas whichever comes first."""
    code = """
import sys
import {first}
import torch, fastllm
assert ("torch.utils.flop_counter" in sys.modules) == {imported}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastllm.functional.linear_relu(torch.randn(2, 3), torch.randn(5, 3))
assert counter.get_total_flops() == 2 * 2 * 3 * 5
assert not [finder for finder in sys.meta_path if "fastllm.operations" in type(finder).__module__]
"""
    for first, imported in (("fastllm", False), ("torch.utils.flop_counter", True)):
        subprocess.run([sys.executable, "-c", code.format(first=first, imported=imported)], check=True)


@pytest.mark.parametrize("op", OPERATIONS)
def test_profiler_names_operations_and_shapes(op):
    ours, _, shapes = CALLS[op]
    inputs = tensors(*shapes)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        (ours(*inputs).sum() * 3).backward()
    found = {event.name: event.input_shapes for event in recorded.events() if event.name.startswith("fastllm::")}
    tensor_shapes = [list(s) for s in found[f"fastllm::{op}"] if s]
    assert [list(s) for s in shapes] == [s for s in tensor_shapes if s != [N]], found
    assert f"fastllm::{op}_forward" in found
    assert any(name.startswith(f"fastllm::{op}_") and name != f"fastllm::{op}_forward" for name in found), found


@pytest.mark.parametrize("case", small_cases(torch.float32), ids=repr)
def test_fake_tensors(case):
    """Shapes, dtypes and strides without numbers: forward and backward as with real tensors."""
    real = case.ours(*case.inputs)
    wanted = [t for t in case.inputs if t is not None and t.requires_grad]
    real_grads = torch.autograd.grad(real.sum(), wanted)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # targets and class weights of the case are real
    fakes = [None if t is None else mode.from_tensor(t) for t in case.inputs]
    with mode:
        output = case.ours(*fakes)
        grads = torch.autograd.grad(output.sum(), [t for t in fakes if t is not None and t.requires_grad])
    for fake, expected in zip([output, *grads], [real, *real_grads], strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_a_model_made_and_run_in_fake_mode():
    with FakeTensorMode():
        model = MLPLanguageModel(10**6, 4096, 4096)
        batch = torch.zeros(8, 512, dtype=torch.int64)
        model.loss(batch, batch).backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
