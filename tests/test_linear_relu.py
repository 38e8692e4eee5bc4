"""linear_relu against float64, every option and dtype."""

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, INTERPRETED, check_against_float64
from operations import cases_of

import fastllm.functional as F

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("linear_relu", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_worked_example():
    """relu(W x) for W = [[1, 0, 1], [0, 1, 0], [1, 0, 1]] and x = [1, 0, 1] is [2, 0, 2]."""
    w = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert F.linear_relu(torch.tensor([1.0, 0.0, 1.0]), w).tolist() == [2.0, 0.0, 2.0]


@pytest.mark.parametrize("size", [4, 150 if INTERPRETED else 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_goes_through(dtype, size):
    """relu(NaN) is NaN, and its gradient passes, as in PyTorch; infinities and zeros too."""
    x = torch.randn(size, size, dtype=dtype)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    w, b = torch.eye(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    results = []
    for function in (F.linear_relu, lambda x, w, b: torch.relu(TF.linear(x, w, b))):
        leaf = x.clone().requires_grad_()
        output = function(leaf, w, b)
        results.append((output, *torch.autograd.grad(output, leaf, torch.ones_like(output))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_weight_of_one_dimension():
    x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.testing.assert_close(F.linear_relu(x, w), torch.relu(TF.linear(x, w)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_sum(dtype):
    """No features: the bias alone."""
    b = torch.randn(3).to(dtype).requires_grad_()
    x, w = torch.randn(2, 0, dtype=dtype), torch.randn(3, 0, dtype=dtype)
    check_against_float64(
        lambda b: F.linear_relu(x.to(b.dtype), w.to(b.dtype), b),
        lambda b: torch.relu(TF.linear(x.to(b.dtype), w.to(b.dtype), b)),
        [b],
    )


def test_bfloat16_rounds_once():
    """Product and bias nearly cancel: rounding the product first would give a wrong sign."""
    x = torch.full((4, 256), 1.0, dtype=torch.bfloat16)
    w = torch.full((64, 256), 1.0 + 2**-7, dtype=torch.bfloat16)
    b = torch.full((64,), -257.0, dtype=torch.bfloat16)  # held as -256 or -258
    expected = torch.relu(x.double() @ w.double().t() + b.double()).to(torch.bfloat16)
    assert torch.equal(F.linear_relu(x, w, b), expected)
    big = x.repeat(40 if INTERPRETED else 200, 1)
    assert torch.equal(F.linear_relu(big, w.repeat(10, 1), b.repeat(10)), expected[:1, :1].expand(len(big), 640))
