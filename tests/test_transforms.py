"""PyTorch's transforms and tools on fastllm's layers: each gives what it gives on plain PyTorch's (docs/transforms.md)."""

import copy
import io
import shutil

import pytest
import torch
import torch.nn.functional as TF
from helpers import DEVICE, cpu_kernels
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize

import fastllm
import fastllm.functional as F

pytestmark = pytest.mark.contract
WORDS, WIDTH, HIDDEN = 50, 8, 16


class Plain(nn.Module):
    """A language model of PyTorch's layers, and the loss of its logits."""

    def __init__(self, device=None, dtype=None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.embed = nn.Embedding(WORDS, WIDTH, **options)
        self.inner = nn.Linear(WIDTH, WIDTH, **options)
        self.block = nn.ModuleDict(
            {"up": nn.Linear(WIDTH, HIDDEN, **options), "down": nn.Linear(HIDDEN, WIDTH, **options)}
        )
        self.head = nn.ModuleDict({"linear": nn.Linear(WIDTH, WORDS, bias=False, **options)})

    def forward(self, ids, targets):
        hidden = torch.relu(self.inner(self.embed(ids)))
        hidden = hidden + self.block["down"](torch.relu(self.block["up"](hidden)))
        square = TF.mse_loss(hidden, torch.ones_like(hidden))
        logits = self.head["linear"](hidden)
        return TF.cross_entropy(logits, targets, label_smoothing=0.1) + TF.cross_entropy(2 * logits, targets) + square


class Fused(nn.Module):
    """The same of fastllm's layers, with the same ``state_dict``."""

    def __init__(self, device=None, dtype=None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.embed = fastllm.Embedding(WORDS, WIDTH, **options)
        self.inner = fastllm.LinearReLU(WIDTH, WIDTH, **options)
        self.block = fastllm.ReLUMLP(WIDTH, HIDDEN, **options)
        self.head = fastllm.LinearCrossEntropyLoss(WIDTH, WORDS, label_smoothing=0.1, **options)

    def forward(self, ids, targets):
        hidden = self.inner(self.embed(ids))
        hidden = hidden + self.block(hidden)
        square = F.mse_loss(hidden, torch.ones_like(hidden))
        again = F.cross_entropy(2 * TF.linear(hidden, self.head.linear.weight), targets)
        return self.head(hidden, targets) + again + square


def models() -> tuple[Plain, Fused]:
    torch.manual_seed(0)
    plain, fused = Plain(), Fused()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def batch(rows: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(WORDS, (2, rows), generator=generator, device="cpu").to(DEVICE)
    return ids, targets


def assert_close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    gradients = {name: p.grad for name, p in found.named_parameters()}
    assert_close(gradients, {name: p.grad for name, p in expected.named_parameters()})


def operations_of(graph_module: nn.Module) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}


EVERY = {"embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy"}


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict):
    plain, fused = models()
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(fused, batch(), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    if fastllm.backends.TABLE["cpu"].missing is None:  # else the graph holds PyTorch's operations
        assert {f"fastllm.{name}.default" for name in EVERY} <= operations_of(exported)
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    for program in (exported, torch.export.load(stored), exported.run_decompositions()):
        for count in (12, 5):
            assert_close(program.module()(*batch(count)), plain(*batch(count)))
    trained = exported.module()
    trained(*batch()).backward()
    plain(*batch()).backward()
    assert_same_gradients(trained, plain)


@cpu_kernels
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_ahead_of_time_inductor(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    plain, fused = models()
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(fused, batch(), dynamic_shapes=({0: rows}, {0: rows}))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for count in (12, 5):
        assert_close(loaded(*batch(count)), plain(*batch(count)))


def test_func_grad_and_functional_call():
    plain, fused = models()

    def loss(model):
        return lambda parameters, *inputs: torch.func.functional_call(model, parameters, inputs)

    parameters = dict(plain.named_parameters())
    for transform in (torch.func.grad, torch.func.grad_and_value, torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(loss(fused))(parameters, *batch()), transform(loss(plain))(parameters, *batch()))
    # Outside of a transform the kernels serve, and the parameters that are given receive the gradients.
    given = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    loss(fused)(given, *batch()).backward()
    plain(*batch()).backward()
    assert_close({n: p.grad for n, p in given.items()}, {n: p.grad for n, p in plain.named_parameters()})


def test_vmap_over_samples_and_over_models():
    plain, fused = models()
    ids, targets = (torch.stack(both) for both in zip(batch(seed=0), batch(seed=1), strict=True))
    parameters = dict(plain.named_parameters())

    def of_each_sample(model):
        def loss(parameters, ids, targets):
            return torch.func.functional_call(model, parameters, (ids, targets))

        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, ids, targets)

    assert_close(of_each_sample(fused), of_each_sample(plain))

    def of_each_model(*members):
        stacked, _ = torch.func.stack_module_state(members)
        inputs = batch()
        skeleton = copy.deepcopy(members[0]).to("meta")
        return torch.vmap(lambda parameters: torch.func.functional_call(skeleton, parameters, inputs))(stacked)

    others = models()
    for member in others:
        with torch.no_grad():
            member.inner.weight.mul_(2)
    assert_close(of_each_model(fused, others[1]), of_each_model(plain, others[0]))


def test_jvp_and_hessian():
    plain, fused = models()
    hidden, targets = torch.randn(4, WIDTH), batch(4)[1]

    def through(model, function):
        def loss(hidden):
            hidden = function(hidden, model.inner)
            return model.head(hidden, targets) if isinstance(model, Fused) else eager_head(model, hidden)

        return loss

    def eager_head(model, hidden):
        return TF.cross_entropy(model.head["linear"](hidden), targets, label_smoothing=0.1)

    ours = through(fused, lambda hidden, layer: layer(hidden))
    theirs = through(plain, lambda hidden, layer: torch.relu(layer(hidden)))
    tangent = torch.randn_like(hidden)
    assert_close(torch.func.jvp(ours, (hidden,), (tangent,)), torch.func.jvp(theirs, (hidden,), (tangent,)))
    assert_close(torch.func.hessian(ours)(hidden), torch.func.hessian(theirs)(hidden))


def test_saved_tensors_hooks():
    plain, fused = models()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor.detach().clone()  # what offloading keeps: other memory, no graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.clone()):
        loss = fused(*batch())
    with torch.no_grad():
        assert_close(loss, plain(*batch()))
    assert sizes
    loss.backward()
    plain(*batch()).backward()
    assert_same_gradients(fused, plain)

    fused.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        fused(*batch()).backward()
    assert_same_gradients(fused, plain)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def test_parametrize():
    plain, fused = models()
    for model in (plain, fused):
        parametrize.register_parametrization(model.inner, "weight", Symmetric())
        parametrizations.weight_norm(model.embed)
        up = model.block.up if isinstance(model, Fused) else model.block["up"]
        parametrizations.weight_norm(up)
        model(*batch()).backward()
    assert_close(fused(*batch()), plain(*batch()))
    assert_same_gradients(fused, plain)
    assert type(fused.inner).__bases__ == (fastllm.LinearReLU,)
    parametrize.remove_parametrizations(fused.inner, "weight")
    assert type(fused.inner) is fastllm.LinearReLU


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (fastllm.Embedding, (WORDS, WIDTH)),
        (fastllm.LinearReLU, (WIDTH, HIDDEN)),
        (fastllm.ReLUMLP, (WIDTH, HIDDEN)),
        (fastllm.LinearCrossEntropyLoss, (WIDTH, WORDS)),
        (fastllm.LinearLogProbs, (WIDTH, WORDS)),
    ],
)
def test_skip_init(kind, sizes):
    before = torch.get_rng_state()
    layer = nn.utils.skip_init(kind, *sizes, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    expected = kind(*sizes)
    shapes = {name: value.shape for name, value in expected.state_dict().items()}
    assert {name: value.shape for name, value in layer.state_dict().items()} == shapes
    assert all(p.device.type == DEVICE and p.dtype == torch.float64 for p in layer.parameters())


@pytest.fixture
def swapped_on_conversion():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("swapped_on_conversion")
def test_swap_tensors_on_conversion():
    plain, fused = models()
    parameters = dict(fused.named_parameters())
    for model in (plain, fused):
        model(*batch()).backward()
        model.zero_grad()
        model.double()
        model(*batch()).backward()
    assert_same_gradients(fused, plain)
    # Conversion and load_state_dict swap contents: the parameters stay the objects that an optimizer holds.
    fused.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
    plain.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
    assert all(value is parameters[name] for name, value in fused.named_parameters())
    assert_close(fused(*batch()), plain(*batch()))


def test_swap_tensors():
    plain, fused = models()
    other = nn.Parameter(torch.randn(WIDTH, WIDTH))
    expected = other.detach().clone()
    torch.utils.swap_tensors(fused.inner.weight, other)
    with torch.no_grad():
        plain.inner.weight.copy_(expected)
    for model in (plain, fused):
        model(*batch()).backward()
    assert_same_gradients(fused, plain)


def test_memory_estimation_with_fake_tensors():
    """Sizes of everything that a step makes, without making it: a vocabulary that would take terabytes of logits."""
    rows, words = 1 << 20, 1 << 22
    with FakeTensorMode():
        table = fastllm.Embedding(words, WIDTH)
        head = fastllm.LinearCrossEntropyLoss(WIDTH, words)
        ids, targets = torch.randint(words, (2, rows))
        hidden = table(ids)
        loss = head(hidden, targets)
        loss.backward()
        assert hidden.shape == (rows, WIDTH) and loss.shape == ()
        for parameter in (*table.parameters(), *head.parameters()):
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == parameter.dtype


def fake_peak(model: nn.Module, rows: int) -> int:
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(*batch(rows)).backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


@cpu_kernels
def test_memory_tracker():
    """torch.distributed's tracker estimates the same with fake tensors as with real ones."""
    _, fused = models()
    real = fake_peak(fused, 64)
    with FakeTensorMode():
        fake = fake_peak(Fused(), 64)
    assert fake == real > 0


def test_trace():
    plain, fused = models()
    traced = torch.jit.trace(fused, batch())
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    for program in (traced, torch.jit.load(stored)):
        for count in (12, 5):
            assert_close(program(*batch(count)), plain(*batch(count)))
        program.zero_grad()
        program(*batch()).backward()
        plain.zero_grad()
        plain(*batch()).backward()
        assert_same_gradients(program, plain)
    if fastllm.backends.TABLE["cpu"].missing is None:
        graph = str(traced.inlined_graph)
        assert all(f"fastllm::{name}" in graph for name in EVERY)
