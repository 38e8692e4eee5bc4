"""linear_cross_entropy against float64, every option and dtype."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, check_against_float64, run_python
from operations import cases_of

import fastllm.functional as F

TESTS = str(Path(__file__).resolve().parent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("linear_cross_entropy", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks(dtype):
    """Chunks of 64 rows, in a process of their own: the size is read once."""
    code = f"""
import sys; sys.path.insert(0, {TESTS!r})
import conftest
import torch
import torch.nn.functional as TF
import fastllm.functional as F
from helpers import check_against_float64
torch.manual_seed(0)
for n in (65, 128, 300):
    for reduction in ("none", "mean", "sum"):
        x = torch.randn(n, 24).to({dtype}).requires_grad_()
        w = (torch.randn(900, 24) / 4).to({dtype}).requires_grad_()
        b = torch.randn(900).to({dtype}).requires_grad_()
        y = torch.randint(0, 900, (n,)); y[3] = -100
        check_against_float64(
            lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction),
            lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), y, reduction=reduction), [x, w, b])
print("checked")
"""
    result = run_python(code, {"FASTLLM_LOSS_WORKSPACE": "1"})
    assert result.stdout.strip() == "checked", result.stderr


def test_logits_are_never_held():
    """Memory beyond the inputs and gradients stays far under the N x V logits (400 MB here)."""
    code = """
import resource, torch, fastllm.functional as F
x = torch.randn(4096, 16, requires_grad=True); w = torch.randn(24576, 16, requires_grad=True)
y = torch.randint(0, 24576, (4096,))
F.linear_cross_entropy(x[:64], w, y[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.linear_cross_entropy(x, w, y).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = run_python(code)
    assert int(result.stdout) < 150, result.stdout + result.stderr


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_row_without_batch(reduction):
    x, w, y = torch.randn(4, requires_grad=True), torch.randn(6, 4), torch.tensor(2)
    ours = F.linear_cross_entropy(x, w, y, reduction=reduction)
    theirs = TF.cross_entropy(TF.linear(x, w), y, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    q = torch.softmax(torch.randn(6), 0)
    torch.testing.assert_close(F.linear_cross_entropy(x, w, q), TF.cross_entropy(TF.linear(x, w), q))


def test_signature_of_torch():
    """PyTorch 2.13's own function, where it is there, gives the same for every argument that both have."""
    if not hasattr(TF, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    x, y = torch.randn(3, 4), torch.tensor([1, 2, 0])
    for w, target in ((torch.randn(5, 4), y), (torch.randn(5, 2, 4), torch.tensor([[1, 2], [0, 4], [3, 3]]))):
        b = torch.randn(w.shape[:-1])
        options = {"linear_bias": b, "weight": torch.rand(5), "label_smoothing": 0.1}
        for reduction in ("none", "mean", "sum"):
            for ignored in (None, 2):
                arguments = {**options, "reduction": reduction, "ignore_index": ignored}
                torch.testing.assert_close(
                    F.linear_cross_entropy(x, w, target, **arguments),
                    TF.linear_cross_entropy(x, w, target, **arguments),
                )


def test_nothing_counted():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = torch.full((3,), -100)
    loss = F.linear_cross_entropy(x, w, y)
    assert loss.isnan()
    expected = torch.autograd.grad(TF.cross_entropy(TF.linear(x, w), y), [x, w])
    for a, b in zip(torch.autograd.grad(loss, [x, w]), expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_gradient_of_probabilities():
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4)))
    q = torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, q: F.linear_cross_entropy(x, w, q), [x, w, q])
