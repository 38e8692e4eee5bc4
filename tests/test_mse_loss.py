"""mse_loss against float64, every option and dtype."""

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, check_against_float64
from operations import cases_of

import fastllm.functional as F

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("mse_loss", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_float16_does_not_overflow():
    """A difference of 300 squares to 90000, beyond float16; the mean of the squares is not."""
    x = torch.zeros(1000, dtype=torch.float16, requires_grad=True)
    t = torch.zeros(1000, dtype=torch.float16)
    t[:10] = 300
    loss = F.mse_loss(x, t)
    assert loss.item() == pytest.approx(900, rel=1e-3)
    loss.backward()
    torch.testing.assert_close(x.grad[:10], torch.full((10,), -0.6, dtype=torch.float16))


def test_float16_under_a_loss_scale():
    x = (torch.randn(100_000) * 1e-3).half().requires_grad_()
    (F.mse_loss(x, torch.zeros_like(x)) * 32768).backward()
    expected = 2 * x.detach().double() / x.numel() * 32768
    torch.testing.assert_close(x.grad.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_broadcasting_warns_and_reduces_the_gradient(reduction):
    x = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="Using a target size"):
        loss = F.mse_loss(x, t, reduction=reduction)
    with pytest.warns(UserWarning):
        expected = TF.mse_loss(x, t, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss.sum(), [x, t]), torch.autograd.grad(expected.sum(), [x, t]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.contract
def test_broadcasting_compiles():
    x, t = torch.randn(4, 3, requires_grad=True), torch.randn(3)
    loss = torch.compile(F.mse_loss, fullgraph=True, backend="aot_eager")(x, t)
    torch.testing.assert_close(loss, (x - t).square().mean())


def test_mixed_dtypes_promote():
    x, t = torch.randn(3, requires_grad=True), torch.randn(3, dtype=torch.float64)
    loss = F.mse_loss(x, t)
    assert loss.dtype == torch.float64
    loss.backward()
    torch.testing.assert_close(x.grad, (2 * (x.detach() - t) / 3).float())


def test_a_wider_weight_promotes():
    x, w = torch.randn(100).bfloat16().requires_grad_(), torch.rand(100)
    loss = F.mse_loss(x, torch.zeros_like(x), weight=w)
    assert loss.dtype == torch.float32
    loss.backward()
    double = x.detach().double()
    torch.testing.assert_close(loss.double(), (w * double**2).sum() / w.double().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, (2 * w * double / w.double().sum()).bfloat16())


@pytest.mark.filterwarnings("ignore")
def test_legacy_reduction():
    x, t = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(F.mse_loss(x, t, False), TF.mse_loss(x, t, False))
    torch.testing.assert_close(F.mse_loss(x, t, True, False), TF.mse_loss(x, t, True, False))


def test_gradient_of_the_weight():
    x, t, w = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x, t, w: F.mse_loss(x, t, weight=w), [x, t, w])


def test_half_the_sum_of_squares():
    """The worked example: 0.5 ((0.2 - 1)^2 + (0.8 - 0)^2) = 0.64."""
    loss = 0.5 * F.mse_loss(torch.tensor([0.2, 0.8]), torch.tensor([1.0, 0.0]), reduction="sum")
    assert loss.item() == pytest.approx(0.64)
