"""fastllm.accelerate on models of plain PyTorch; tests/test_accelerate_families.py has those of Hugging Face."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm

torch.manual_seed(0)


class Calls(TorchDispatchMode):
    """The operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def forward_operations(model: nn.Module, *args) -> set[str]:
    """Which fused operations a call runs (none of them without the extension)."""
    with Calls() as calls:
        model(*args)
    return {name.removesuffix("_forward") for name in calls.names} & {"linear_relu", "relu_mlp", "embedding"}


class Words(nn.Module):
    """Everything that can be found: tied embeddings, a Sequential, losses."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8, padding_idx=0)
        self.same = self.words
        self.net = nn.Sequential(
            nn.Linear(8, 16),
            nn.ReLU(),
            nn.Linear(16, 12),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(12, 50),
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)
        self.distance = nn.MSELoss(reduction="sum")

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids)
        logits = self.net(hidden)
        return self.loss(logits, target) + self.distance(hidden, self.same(target))


IDS, TARGET = torch.randint(50, (20,)), torch.randint(50, (20,))


def snapshot(model: nn.Module) -> dict:
    state = {}
    for name, module in model.named_modules(remove_duplicate=False):
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        state[name] = (type(module), values)
    return state


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, (kind, values) in before.items():
        assert after[name][0] is kind and after[name][1].keys() == values.keys(), name
        for key, value in values.items():
            now = after[name][1][key]
            if isinstance(value, dict):
                assert value.keys() == now.keys() and all(value[k] is now[k] for k in value), (name, key)
            else:
                assert now is value or now == value, (name, key)


def assert_agree(model: nn.Module, reference: nn.Module, *args) -> None:
    model.zero_grad(), reference.zero_grad()
    output, expected = model(*args), reference(*args)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    output.sum().backward(), expected.sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_what_becomes_what():
    model = Words()
    reference, before = copy.deepcopy(model), snapshot(model)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    report = fastllm.accelerate(model)
    assert [(row.name, row.kind, row.became) for row in report.replaced] == [
        ("words", "Embedding", "fastllm.Embedding"),
        ("net.0", "Linear, ReLU", "linear_relu"),
        ("net.2", "Linear, ReLU, Dropout, Linear", "linear_relu; relu_mlp without active dropout"),
        ("loss", "CrossEntropyLoss", "fastllm.CrossEntropyLoss"),
        ("distance", "MSELoss", "fastllm.MSELoss"),
    ]
    assert report.left == []
    assert type(model.words) is fastllm.Embedding and model.same is model.words
    assert type(model.loss) is fastllm.CrossEntropyLoss and type(model.distance) is fastllm.MSELoss
    assert list(model.state_dict()) == keys and all(p is parameters[n] for n, p in model.named_parameters())
    assert_agree(model, reference, IDS, TARGET)
    report.undo()
    model.zero_grad()
    assert_same(before, snapshot(model))
    report.undo()  # nothing more to undo
    assert_same(before, snapshot(model))


def test_twice_changes_nothing_more():
    model = Words()
    first = fastllm.accelerate(model)
    changed = snapshot(model)
    second = fastllm.accelerate(model, strict=True)
    assert second.replaced == second.left == []
    second.undo()
    assert_same(changed, snapshot(model))
    first.undo()
    assert type(model.words) is nn.Embedding


def test_context_manager_restores_after_an_error():
    model = Words()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), fastllm.accelerated(model, losses=False) as report:
        assert type(model.words) is fastllm.Embedding and type(model.loss) is nn.CrossEntropyLoss
        assert len(report.replaced) == 3
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", ["embedding", "linear_relu", "losses"])
def test_only_what_is_asked_for(kind):
    asked = {name: name == kind for name in ("embedding", "linear_relu", "losses")}
    report = fastllm.accelerate(Words(), **asked)
    found = {"embedding": ["words"], "linear_relu": ["net.0", "net.2"], "losses": ["loss", "distance"]}
    assert [row.name for row in report.replaced] == found[kind]


def test_the_model_itself():
    layer = nn.Embedding(5, 3)
    report = fastllm.accelerate(layer)
    assert type(layer) is fastllm.Embedding and "(the model)  Embedding  fastllm.Embedding" in str(report)
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got list"):
        fastllm.accelerate([layer])


# --- Linear and ReLU

needs_extension = pytest.mark.skipif(fastllm.info()["built_with"] == "not built", reason="the extension is not built")


@needs_extension
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.5, True), (0.5, False)])
def test_dropout_between_layers(dropout, training):
    model = Words(dropout).net.train(training)
    reference = copy.deepcopy(model)
    fastllm.accelerate(model)
    x = torch.randn(7, 8)
    fused = forward_operations(model, x)
    assert fused == ({"linear_relu"} if dropout and training else {"linear_relu", "relu_mlp"})
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(output, reference(x), rtol=1e-5, atol=1e-6)


def wrap_hook(net):
    net[0].register_forward_hook(lambda module, args, output: output * 2)


def wrap_pre_hook(net):
    net[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def wrap_backward_hook(net):
    net[0].register_full_backward_hook(lambda module, grads, incoming: None)


def wrap_forward(net):
    net[0].forward = lambda x: nn.functional.linear(x, net[0].weight) * 2


def wrap_parametrised(net):
    nn.utils.parametrizations.weight_norm(net[0])


def wrap_weight_norm(net):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[0])


def wrap_pruning(net):
    prune.random_unstructured(net[0], "weight", 0.5)


def wrap_subclass(net):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net[0].__class__ = Doubled


WRAPS = {
    wrap_hook: "a hook on its Linear",
    wrap_pre_hook: "a hook on its ReLU",
    wrap_backward_hook: "a hook on its Linear",
    wrap_forward: "its forward was replaced on the instance",
    wrap_parametrised: "it is parametrised",
    wrap_weight_norm: "its weight is computed before each call",
    wrap_pruning: "its weight is computed before each call",
    wrap_subclass: "a subclass of Linear may compute something else",
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changed_layers_are_computed_as_they_are(wrap, when):
    """Before: left, with the reason. After: seen at the next call. The other pair stays fused."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    if when == "before":
        wrap(model)
        expected = model(torch.ones(2, 8))
        report = fastllm.accelerate(model)
        assert [(row.name, row.kind) for row in report.left] == [("0", "Linear, ReLU")]
        assert WRAPS[wrap] in report.left[0].reason
        assert [row.name for row in report.replaced] == ["2"]
    else:
        reference = copy.deepcopy(model)
        fastllm.accelerate(model)
        torch.manual_seed(1)
        wrap(model)
        torch.manual_seed(1)
        wrap(reference)
        expected = reference(torch.ones(2, 8))
    torch.testing.assert_close(model(torch.ones(2, 8)), expected, rtol=1e-5, atol=1e-6)


def test_pieces_of_a_sequential():
    """Its layers stay what they are: called alone, shared, sliced or replaced."""
    net = Words().net
    reference = copy.deepcopy(net)
    fastllm.accelerate(net)
    x = torch.randn(4, 8)
    assert [type(child) for child in net] == [type(child) for child in reference]
    assert torch.equal(net[0](x), reference[0](x)) and (net[0](x) < 0).any()
    torch.testing.assert_close(net[:3](x), reference[:3](x))
    shared = nn.Sequential(net[0], nn.Tanh(), net[2])
    torch.testing.assert_close(shared(x), reference[2](torch.tanh(reference[0](x))))
    net[1] = nn.Tanh()
    reference[1] = nn.Tanh()
    torch.testing.assert_close(net(x), reference(x))
    net.append(nn.ReLU())
    reference.append(nn.ReLU())
    torch.testing.assert_close(net(x), reference(x))


def test_a_watched_process_sees_every_layer():
    net = Words().net
    fastllm.accelerate(net)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    net(torch.randn(2, 8))
    handle.remove()
    assert seen.count(nn.ReLU) == 2


def test_subclass_of_sequential_is_left():
    class Mine(nn.Sequential):
        pass

    report = fastllm.accelerate(Mine(nn.Linear(2, 2), nn.ReLU()))
    assert [row.reason for row in report.left] == ["a subclass of Sequential may compute something else"]


@needs_extension
@pytest.mark.parametrize("activation", ["relu", torch.relu, nn.ReLU()])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers(kind, activation):
    layer = kind(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
    reference = copy.deepcopy(layer)
    before = snapshot(layer)
    report = fastllm.accelerate(layer)
    assert [(row.name, row.became[:8]) for row in report.replaced] == [("linear1", "relu_mlp")]
    args = (torch.randn(2, 5, 16),) * (1 if kind is nn.TransformerEncoderLayer else 2)
    assert forward_operations(layer, *args) == {"relu_mlp"}
    assert_agree(layer, reference, *args)
    copied = pickle.loads(pickle.dumps(layer))
    assert_agree(copied, reference, *args)
    layer.eval(), reference.eval()
    torch.testing.assert_close(layer(*args), reference(*args), rtol=1e-5, atol=1e-6)
    layer.train(), layer.zero_grad()
    report.undo()
    assert_same(before, snapshot(layer))


def test_transformer_layer_with_dropout_and_hooks():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
    reference = copy.deepcopy(layer)
    fastllm.accelerate(layer)
    x = torch.randn(2, 5, 16)
    for hooked in (False, True):
        if hooked:
            for model in (layer, reference):
                model.linear2.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
                model.linear1.register_forward_hook(lambda module, args, output: output + 1)
        torch.manual_seed(1)
        output = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(output, reference(x), rtol=1e-5, atol=1e-6)


# --- what is left


def test_layers_that_are_left_say_why():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    class Robust(nn.MSELoss):
        pass

    model = nn.ModuleDict({"scaled": Scaled(4, 2), "norm": nn.Embedding(4, 2), "old": nn.Embedding(4, 2)})
    model["loss"] = Robust()
    nn.utils.parametrizations.weight_norm(model["norm"])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["old"])
    before = snapshot(model)
    report = fastllm.accelerate(model)
    assert [(row.name, row.reason) for row in report.left] == [
        ("scaled", "a subclass of Embedding may compute something else"),
        ("norm", "it is parametrised"),
        ("old", "its weight is computed before each call (weight norm, pruning)"),
        ("loss", "a subclass of MSELoss may compute something else"),
    ]
    assert report.replaced == []
    assert_same(before, snapshot(model))
    with pytest.raises(
        RuntimeError, match=r"accelerate: strict=True.*scaled .*Scaled.*: a subclass of Embedding.*norm"
    ):
        fastllm.accelerate(model, strict=True)
    assert fastllm.accelerate(model, embedding=False, losses=False, strict=True).left == []


def test_strict_changes_nothing_when_it_raises():
    class Mine(nn.MSELoss):
        pass

    model = Words()
    model.other = Mine()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="other"):
        fastllm.accelerate(model, strict=True)
    assert_same(before, snapshot(model))


def test_undo_after_something_else_changed_the_class():
    model = Words()
    report = fastllm.accelerate(model)
    nn.utils.parametrizations.weight_norm(model.words)
    with pytest.raises(RuntimeError, match=r"undo: words was made a .*ParametrizedEmbedding after accelerate"):
        report.undo()
    assert type(model.loss) is fastllm.CrossEntropyLoss  # nothing is undone by half
    nn.utils.parametrize.remove_parametrizations(model.words, "weight")
    report.undo()
    assert type(model.words) is nn.Embedding and type(model.loss) is nn.CrossEntropyLoss


# --- tools


def test_hooks_modes_and_frozen_parameters_stay():
    model = Words().eval()
    model.words.weight.requires_grad_(False)
    seen = []
    model.words.register_forward_hook(lambda module, args, output: seen.append(output))
    fastllm.accelerate(model)
    model(IDS, TARGET)
    assert len(seen) == 2 and not model.training and not model.words.training
    assert not model.words.weight.requires_grad


def test_optimizer_made_before():
    model = Words()
    reference = copy.deepcopy(model)
    losses = []
    for each in (model, reference):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        if each is model:
            fastllm.accelerate(each)
        losses.append([])
        for _ in range(10):
            loss = each(IDS, TARGET)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_copies():
    model = Words()
    report = fastllm.accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    made = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model(IDS, TARGET)
    report.undo()
    for other in made:
        assert type(other.words) is fastllm.Embedding and other.same is other.words
        torch.testing.assert_close(other(IDS, TARGET), expected)


def test_compile():
    torch._dynamo.reset()
    model = nn.Sequential(Words().net, nn.TransformerEncoderLayer(50, 2, 16, dropout=0.0))
    reference = copy.deepcopy(model)
    fastllm.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (5, 6):
        assert_agree(compiled, reference, torch.randn(rows, 8))


def test_meta_device_then_to_empty():
    with torch.device("meta"):
        model = Words()
        layer = nn.TransformerEncoderLayer(16, 2, 32)
    report = fastllm.accelerate(model)
    fastllm.accelerate(layer)
    assert {row.backend for row in report.replaced} == {"its device's"}
    assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)
    reference = Words()
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    assert_agree(model, reference, IDS, TARGET)


def test_transforms():
    net = Words().net
    reference = copy.deepcopy(net)
    fastllm.accelerate(net)
    x = torch.randn(3, 8)
    for model in (net, reference):
        parameters = dict(model.named_parameters())

        def loss(parameters, row, model=model):
            return torch.func.functional_call(model, parameters, (row,)).sum()

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        if model is net:
            ours = grads
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6)


def test_nothing_of_transformers_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would raise
    fastllm.accelerate(Words(), strict=True)


def test_the_name_is_the_function():
    import fastllm.acceleration

    assert inspect.isfunction(fastllm.accelerate)
    assert list(inspect.signature(fastllm.accelerate).parameters) == [
        "model",
        "embedding",
        "linear_relu",
        "losses",
        "language_model_loss",
        "strict",
    ]


# --- the report


def test_backend_in_the_report():
    assert {row.backend for row in fastllm.accelerate(Words()).replaced} <= {"cpu", "eager", "cuda", "triton"}
    with fastllm.use_backend("eager"):
        assert {row.backend for row in fastllm.accelerate(Words()).replaced} == {"eager"}


def test_report_as_text():
    text = str(fastllm.accelerate(nn.ModuleList([nn.Embedding(4, 2), nn.MSELoss()])))
    backend = fastllm.accelerate(nn.Embedding(4, 2)).replaced[0].backend
    assert text.splitlines() == [
        "fastllm.accelerate: 2 replaced, 0 left",
        "",
        "replaced:",
        "  name  class      became             backend",
        f"  0     Embedding  fastllm.Embedding  {backend}",
        f"  1     MSELoss    fastllm.MSELoss    {backend}",
    ]


def test_autocast_and_low_precision():
    model = Words()
    reference = copy.deepcopy(model)
    fastllm.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = model(IDS, TARGET), reference(IDS, TARGET)
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, dtype=torch.bfloat16)
    reference = copy.deepcopy(layer)
    fastllm.accelerate(layer)
    x = torch.randn(3, 2, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), reference(x), rtol=2e-2, atol=2e-2)
