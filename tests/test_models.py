"""The language model: what it computes, that it learns, that it generates."""

import pytest
import torch
import torch.nn.functional as TF

import fastllm
from fastllm.models import MLPLanguageModel
from fastllm.models.sampling import filter_logits


def model(**kwargs):
    torch.manual_seed(0)
    options = {"context_length": 3, "num_hidden_layers": 2, **kwargs}
    return MLPLanguageModel(30, 6, 12, **options).double()


ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
targets = torch.tensor([[2, 3, 4, 5, 6], [7, -100, 9, 10, 11]])


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_small_model_trains(kind):
    """Vocabulary 1000, embedding 10, hidden 20, ids [1, 2, 3]."""
    torch.manual_seed(0)
    lm = MLPLanguageModel(1000, 10, 20)
    x, y = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 1])
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = lm.loss(x, y, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert lm.generate(x[:1], 4, temperature=0).tolist() == [1, 2, 3, 1, 2]


def test_logits_by_hand():
    lm = model()
    logits = lm(ids)
    assert logits.shape == (2, 5, 30)
    e = lm.embedding.weight
    for t in range(5):
        window = [e[ids[1, s]] if s >= 0 else torch.zeros(6).double() for s in (t - 2, t - 1, t)]
        h = torch.cat(window)
        for layer in lm.hidden:
            h = torch.relu(TF.linear(h, layer.weight, layer.bias))
        torch.testing.assert_close(logits[1, t], TF.linear(h, lm.output.weight, lm.output.bias))
    torch.testing.assert_close(lm(ids[0]), logits[0])


def test_no_look_ahead():
    lm = model()
    changed = ids.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(lm(ids)[:, :3], lm(changed)[:, :3], rtol=0, atol=0)


def test_losses_are_those_of_the_logits():
    lm = model()
    logits = lm(ids)
    torch.testing.assert_close(lm.loss(ids, targets), TF.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    one_hot = TF.one_hot(targets.clamp(min=0), 30).double()
    one_hot[targets == -100] = 0
    torch.testing.assert_close(lm.loss(ids, targets, "mse"), TF.mse_loss(logits, one_hot))
    torch.testing.assert_close(lm.loss(ids, one_hot, "mse"), TF.mse_loss(logits, one_hot))
    with pytest.raises(ValueError, match="kind"):
        lm.loss(ids, targets, "hinge")


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_targets_of_another_shape(backend):
    """As many targets in another shape would be scored against the wrong positions."""
    lm = model()
    for kind in ("cross_entropy", "mse"):
        for wrong in (targets.t(), targets.flatten(), targets[:1], targets[:, :4], targets[0]):
            with pytest.raises(ValueError, match=r"targets must be of shape \(2, 5\)"):
                lm.loss(ids, wrong, kind, backend=backend)
        with pytest.raises(ValueError, match="targets"):
            lm.loss(ids[0], targets, kind, backend=backend)
    for wrong in (torch.zeros(5, 2, 30), torch.zeros(2, 5, 1), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"\(2, 5, 30\)"):
            lm.loss(ids, wrong.double(), "mse", backend=backend)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_eager_backend_is_the_same_model(kind):
    lm = model()
    eager = MLPLanguageModel(30, 6, 12, 3, 2, backend="eager").double()
    eager.load_state_dict(lm.state_dict())
    a, b = lm.loss(ids, targets, kind), eager.loss(ids, targets, kind)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(lm.loss(ids, targets, kind, backend="eager"), b, rtol=0, atol=0)
    assert "fastllm" not in str(b.grad_fn.name()) and "Node" not in b.grad_fn.name()
    for p, q in zip(
        torch.autograd.grad(a, list(lm.parameters())), torch.autograd.grad(b, list(eager.parameters())), strict=True
    ):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(lm(ids), eager(ids))
    assert fastllm.backends.get_backend() == "auto"


def test_compiles_whole():
    lm = model()
    compiled = torch.compile(lambda i, t: lm.loss(i, t), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(lm.loss(ids, targets), list(lm.parameters()))
    for a, b in zip(torch.autograd.grad(compiled(ids, targets), list(lm.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_greedy_generation():
    lm = model().train()
    out = lm.generate(ids, 6, temperature=0.0)
    assert lm.training and torch.equal(out[:, :5], ids)
    for t in range(5, 11):
        assert torch.equal(out[:, t], lm.eval()(out[:, :t])[:, -1].argmax(-1))
    assert torch.equal(lm.generate(ids, 6, top_k=1), out)
    assert torch.equal(lm.generate(ids, 6, top_p=1e-9), out)
    assert torch.equal(lm.generate(ids[0], 6, temperature=0.0), out[0])
    assert torch.equal(lm.generate(ids, 0), ids)


def test_generation_repeats_with_a_generator():
    lm = model()
    draws = [lm.generate(ids, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_sampled_distribution():
    """Frequencies of 20000 draws lie within five standard deviations of the softmax."""
    lm = model()
    batch = ids[:1].expand(20000, -1)
    drawn = lm.generate(batch, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, -1]
    p = (lm(ids[:1])[0, -1] / 2).softmax(-1)
    counts = torch.bincount(drawn, minlength=30).double()
    assert ((counts - 20000 * p).abs() < 5 * (20000 * p * (1 - p)).sqrt() + 1).all()


def test_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda **options: filter_logits(logits, **options).isfinite()[0].tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_p=1.0) == [True] * 4


@pytest.mark.parametrize("temperature", [1e-45, 1e-50, 5e-324, 1e-40, 1e-38, 3e-38, 1e-30, 1e-12])
def test_a_temperature_that_overflows_is_the_argmax(temperature):
    lm = model().float()
    with torch.no_grad():
        lm.output.weight.mul_(1e4)  # logits divided by the temperature are infinite
    expected = lm.generate(ids, 6, temperature=0.0)
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}):
        assert torch.equal(lm.generate(ids, 6, temperature=temperature, **options), expected)
    assert lm.generate(ids, 6, temperature=float("inf")).shape == (2, 11)  # the even distribution


def test_modules_keep_their_modes():
    """Generation runs without dropout, and changes no module's mode, even if it ends in an error."""
    lm = model(dropout=0.5).train()
    lm.hidden[1].eval()  # a frozen part, as in fine-tuning
    modes = [module.training for module in lm.modules()]
    assert torch.equal(lm.generate(ids, 6, temperature=0.0), lm.generate(ids, 6, temperature=0.0))
    with pytest.raises(IndexError):
        lm.generate(ids + 30, 1)
    assert [module.training for module in lm.modules()] == modes


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": -1},
    ],
)
def test_generation_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        model().generate(ids, **{"max_new_tokens": 1, **options})
    with pytest.raises(ValueError, match="ids"):
        model().generate(ids[:, :0], 1)


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"context_length": 0}, {"num_hidden_layers": 0}], ids=str)
def test_constructor_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MLPLanguageModel(10, 4, 8, **options)


def test_dropout_acts_in_training_only():
    lm = model(dropout=0.5)
    assert not torch.equal(lm.train()(ids), lm(ids))
    assert torch.equal(lm.eval()(ids), lm(ids))
