"""Layers: constructors, state and results of the layers that they replace."""

import pytest
import torch
from torch import nn

import fastllm
import fastllm.functional as F

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_embedding(options):
    theirs = nn.Embedding(5, 3, **options)
    ours = fastllm.Embedding(5, 3, **options)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[1, 2], [4, 1]])
    torch.testing.assert_close(ours(ids), theirs(ids))
    assert repr(ours) == repr(theirs)
    pretrained = fastllm.Embedding.from_pretrained(torch.eye(4))
    assert torch.equal(pretrained(torch.tensor([2])), torch.eye(4)[2:3])
    assert not pretrained.weight.requires_grad


def test_linear_relu():
    theirs = nn.Linear(4, 6)
    ours = fastllm.LinearReLU(4, 6, dtype=torch.float32, device="cpu")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(ours(x), torch.relu(theirs(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_relu_mlp(bias):
    layer = fastllm.ReLUMLP(4, 8, bias=bias, dtype=torch.float64)
    names = ["up.weight", "up.bias", "down.weight", "down.bias"] if bias else ["up.weight", "down.weight"]
    assert list(layer.state_dict()) == names
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.down(torch.relu(layer.up(x))))
    assert fastllm.ReLUMLP(4, 8, 2)(torch.randn(3, 4)).shape == (3, 2)


def test_losses():
    x, y, q = torch.randn(3, 5), torch.tensor([0, 4, -100]), torch.randn(3, 5)
    w = torch.rand(5)
    for options in ({}, {"weight": w, "reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 4}):
        t = y.clamp(min=0) if "ignore_index" in options else y
        torch.testing.assert_close(fastllm.CrossEntropyLoss(**options)(x, t), nn.CrossEntropyLoss(**options)(x, t))
    torch.testing.assert_close(fastllm.MSELoss(reduction="sum")(x, q), nn.MSELoss(reduction="sum")(x, q))
    layer = fastllm.CrossEntropyLoss(softcap=2.0, lse_square_scale=0.1)
    torch.testing.assert_close(layer(x, y), F.cross_entropy(x, y, softcap=2.0, lse_square_scale=0.1))
    assert "weight" in fastllm.CrossEntropyLoss(weight=w).state_dict()


@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy_loss(bias):
    layer = fastllm.LinearCrossEntropyLoss(4, 6, bias=bias, label_smoothing=0.1, weight=torch.rand(6))
    x, y = torch.randn(3, 4), torch.tensor([0, 5, -100])
    logits = layer.linear(x)
    torch.testing.assert_close(layer(x, y), F.cross_entropy(logits, y, layer.weight, label_smoothing=0.1))
    keys = {"linear.weight", "weight"} | ({"linear.bias"} if bias else set())
    assert set(layer.state_dict()) == keys


def test_linear_cross_entropy_loss_checks_and_shows_its_options():
    with pytest.raises(RuntimeError, match=r"weight must be of shape \(6,\), got \(5,\)"):
        fastllm.LinearCrossEntropyLoss(4, 6, weight=torch.rand(5))
    for smoothing in (-0.1, 1.1):
        with pytest.raises(RuntimeError, match="label_smoothing must be in"):
            fastllm.LinearCrossEntropyLoss(4, 6, label_smoothing=smoothing)
    shown = repr(fastllm.LinearCrossEntropyLoss(4, 6, bias=True, softcap=2.0, reduction="sum"))
    for word in ("in_features=4", "num_classes=6", "bias=True", "reduction=sum", "softcap=2.0"):
        assert word in shown
    assert "softcap" not in repr(fastllm.LinearCrossEntropyLoss(4, 6))


def test_training_step_on_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(fastllm.Embedding(20, 8), fastllm.LinearReLU(8, 16), fastllm.ReLUMLP(16, 16))
    head = fastllm.LinearCrossEntropyLoss(16, 20)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ids, y = torch.arange(20), (torch.arange(20) + 1) % 20
    losses = []
    for _ in range(200):
        loss = head(model(ids), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
