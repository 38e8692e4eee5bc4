"""The definitions: against torch.nn.functional, and, for what PyTorch lacks, against sums written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as TF

from fastllm import eager


def row_loss(z, target, weight, smoothing, s):
    """One row by the formula, on Python floats: w_y (lse - z_y), smoothed over the classes, plus s lse^2."""
    lse = math.log(sum(math.exp(v) for v in z))
    if isinstance(target, list):
        shares = [(1 - smoothing) * p + smoothing / len(z) for p in target]
    else:
        shares = [(1 - smoothing) * (c == target) + smoothing / len(z) for c in range(len(z))]
    return sum(p * w * (lse - v) for p, w, v in zip(shares, weight, z, strict=True)) + s * lse**2


def by_hand(x, target, weight, reduction, ignore_index, smoothing, s, cap):
    z = [[v if cap is None else cap * math.tanh(v / cap) for v in row] for row in x.tolist()]
    w = [1.0] * x.shape[1] if weight is None else weight.tolist()
    losses, divisor = [], 0.0
    for row, t in zip(z, target.tolist(), strict=True):
        counted = isinstance(t, list) or t != ignore_index
        losses.append(row_loss(row, t, w, smoothing, s) if counted else 0.0)
        divisor += 1.0 if isinstance(t, list) else w[t] * counted
    if reduction == "none":
        return losses
    return math.fsum(losses) if reduction == "sum" else math.fsum(losses) / divisor


@pytest.mark.parametrize("kind", ["indices", "ignored", "int32", "uint8", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("s", "cap"), [(0.0, None), (0.25, None), (0.0, 1.5), (0.25, 1.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_by_hand(kind, weighted, s, cap, smoothing, reduction):
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 5, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if weighted else None
    ignore_index = 3 if kind == "ignored" else -100
    if kind == "probabilities":
        target = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    else:
        dtype = {"int32": torch.int32, "uint8": torch.uint8}.get(kind, torch.int64)
        target = torch.tensor([4, 3, 0, 3], dtype=dtype)
    found = eager.cross_entropy(x, target, weight, ignore_index, reduction, smoothing, s, cap)
    expected = by_hand(x, target, weight, reduction, ignore_index, smoothing, s, cap)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_z_loss_of_every_position_of_an_image(reduction):
    """(N, C, d1, d2): the classes are dimension 1, every position is a row."""
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    y[0, 1, 2] = -100
    rows = eager.cross_entropy(
        x.permute(0, 2, 3, 1).reshape(-1, 3), y.flatten(), reduction=reduction, lse_square_scale=0.1, softcap=2.0
    )
    image = eager.cross_entropy(x, y, reduction=reduction, lse_square_scale=0.1, softcap=2.0)
    torch.testing.assert_close(image, rows.view(y.shape) if reduction == "none" else rows)
    alone = eager.cross_entropy(x[0, :, 0, 0], y[0, 0, 0], lse_square_scale=0.1, softcap=2.0)
    torch.testing.assert_close(alone, by_hand_scalar(x[0, :, 0, 0], int(y[0, 0, 0])))


def by_hand_scalar(x, target):
    return torch.tensor(by_hand(x[None], torch.tensor([target]), None, "sum", -100, 0.0, 0.1, 2.0), dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_z_loss_is_summed_in_float32(dtype):
    """3000 squares of 64: their sum is beyond float16, and beyond what bfloat16 adds up one by one."""
    x = torch.full((3000, 1), 8.0, dtype=dtype)
    y = torch.zeros(3000, dtype=torch.int64)
    for weight in (None, torch.full((1,), 0.3, dtype=dtype)):
        mean = eager.cross_entropy(x, y, weight, lse_square_scale=1.0)
        assert mean.dtype == dtype
        expected = 64.0 if weight is None else 64.0 / weight.double().item()
        assert mean.item() == torch.tensor(expected, dtype=dtype).item()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mse_loss(reduction):
    x, t = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    w = torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(eager.mse_loss(x, t, reduction), TF.mse_loss(x, t, reduction=reduction))
    squares = [c * (a - b) ** 2 for a, b, c in zip(*(v.flatten().tolist() for v in (x, t, w)), strict=True)]
    expected = {
        "none": squares,
        "sum": math.fsum(squares),
        "mean": math.fsum(squares) / math.fsum(w.flatten().tolist()),
    }
    found = eager.mse_loss(x, t, reduction, w)
    torch.testing.assert_close(
        found.flatten() if reduction == "none" else found, torch.tensor(expected[reduction]).double()
    )
    with pytest.raises(ValueError, match="'avg'"):
        eager.mse_loss(x, t, "avg", w)


def test_linear_layers_and_embedding_are_torch():
    x, w, b = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randn(6)
    v, c = torch.randn(5, 6), torch.randn(5)
    assert torch.equal(eager.linear_relu(x, w, b), torch.relu(TF.linear(x, w, b)))
    assert torch.equal(eager.relu_mlp(x, w, None, v, c), TF.linear(torch.relu(TF.linear(x, w)), v, c))
    ids = torch.tensor([[1, 5], [0, 1]])
    assert torch.equal(eager.embedding(ids, w, max_norm=0.5), TF.embedding(ids, w.clone(), max_norm=0.5))
    y = torch.tensor([3, -100, 0])
    found = eager.linear_cross_entropy(x[0], w, y, b, softcap=2.0, lse_square_scale=0.1)
    torch.testing.assert_close(found, eager.cross_entropy(TF.linear(x[0], w, b), y, softcap=2.0, lse_square_scale=0.1))


@pytest.mark.parametrize("probabilities", [False, True])
def test_derivatives_and_transforms_of_the_z_loss(probabilities):
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.softmax(torch.randn(3, 4, dtype=torch.float64), 1) if probabilities else torch.tensor([1, -100, 3])

    def loss(x):
        return eager.cross_entropy(x, y, label_smoothing=0.1, lse_square_scale=0.3, softcap=2.0)

    assert torch.autograd.gradcheck(loss, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    two = torch.stack([x.detach(), -x.detach()])
    torch.testing.assert_close(torch.vmap(loss)(two), torch.stack([loss(two[0]), loss(two[1])]))
