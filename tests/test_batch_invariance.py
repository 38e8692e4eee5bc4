"""Under ``fastllm.batch_invariant``: the bits of a row, and of its input's gradient, in every batch that it is in."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from helpers import DTYPES, EMULATED, INTERPRETED, check_against_float64, drawn, run_python

import fastllm
import fastllm.functional as F

pytestmark = pytest.mark.numbers

# Rows of the whole batch, and the parts of it that are computed alone: first row and number of rows.
ROWS = 40 if INTERPRETED else 260 if EMULATED else 1000
PARTS = [
    (first, size)
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 24, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 385, 500)
    for first in {0, 1, 5, 130, ROWS - size}
    if first + size <= ROWS
]
if EMULATED:
    PARTS = PARTS[:: 13 if INTERPRETED else 7]


def _weights(op: str, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [drawn(torch.empty(size, dtype=dtype), seed) for seed, size in enumerate(sizes, 1)]


def _calls(dtype: torch.dtype, features: int, classes: int):
    """(name, width of a row of input, function of input rows and their targets giving one row of numbers a row)."""
    up, bias, head, down = _weights(
        "", dtype, (classes, features), (classes,), (classes, features), (features, classes)
    )
    head_bias = drawn(torch.empty(classes, dtype=dtype), 9)
    small = down[:, :classes] / 4

    def statistics(result):
        return torch.stack([result.log_prob, result.entropy, result.lse], 1)

    outputs = ("log_prob", "entropy", "lse")
    return {
        "linear_relu": (features, lambda x, y: F.linear_relu(x, up, bias)),
        "relu_mlp": (features, lambda x, y: F.relu_mlp(x, up, bias, small, None)),
        "mse_loss": (classes, lambda x, y: F.mse_loss(x, x.detach() * 0 + 1, reduction="none")),
        "cross_entropy": (classes, lambda x, y: F.cross_entropy(x, y, reduction="none", label_smoothing=0.1)),
        "capped cross_entropy": (
            classes,
            lambda x, y: F.cross_entropy(x, y, bias.float().abs().to(dtype), reduction="none", softcap=3.0),
        ),
        "linear_cross_entropy": (
            features,
            lambda x, y: F.linear_cross_entropy(x, head, y, linear_bias=head_bias, reduction="none"),
        ),
        "smoothed linear_cross_entropy": (
            features,
            lambda x, y: F.linear_cross_entropy(
                x, head, y, reduction="none", label_smoothing=0.1, lse_square_scale=1e-3
            ),
        ),
        "log_probs": (classes, lambda x, y: statistics(F.log_probs(x, y, outputs=outputs))),
        "linear_log_probs": (features, lambda x, y: statistics(F.linear_log_probs(x, head, y, outputs=outputs))),
    }


NAMES = tuple(_calls(torch.float32, 2, 3))
# Features and classes: few of both, more features than are summed at once, an odd number of classes, many of them.
SHAPES = ((5, 3), (16, 37), (33, 257)) if EMULATED else ((5, 3), (16, 37), (48, 1030), (300, 70), (700, 31), (20, 5003))


def _bits(call, x: torch.Tensor, y: torch.Tensor, incoming: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    output = call(leaf, y)
    return output.detach(), torch.autograd.grad(output, leaf, incoming[: len(x)].expand_as(output))[0]


def _check(name: str, dtype: torch.dtype, features: int, classes: int, parts=PARTS) -> None:
    width, call = _calls(dtype, features, classes)[name]
    x = drawn(torch.empty(ROWS, width, dtype=dtype), 3)
    y = torch.randint(classes, (ROWS,), generator=torch.Generator().manual_seed(0), device="cpu").to(x.device)
    y[::7] = -100
    incoming = torch.linspace(0.5, 2, ROWS).to(dtype)
    with fastllm.batch_invariant():
        probe = call(x[:1], y[:1])
        incoming = incoming.to(probe)[(...,) + (None,) * (probe.dim() - 1)]
        whole = _bits(call, x, y, incoming)
        for first, size in parts:
            last = first + size
            part = _bits(call, x[first:last], y[first:last], incoming[first:last])
            for what, got, want in zip(("value", "gradient"), part, whole, strict=True):
                differ = ~torch.isclose(got, want[first:last], rtol=0, atol=0, equal_nan=True)
                assert not differ.any(), f"{what} of {differ.any(-1).nonzero().flatten().tolist()} in {first}:{last}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if EMULATED else DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_same_bits_in_every_batch(name, dtype):
    for features, classes in SHAPES:
        _check(name, dtype, features, classes)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "smoothed linear_cross_entropy", "linear_log_probs"])
def test_however_chunks_are_cut(name, monkeypatch):
    features, classes = SHAPES[2]
    width, call = _calls(torch.float32, features, classes)[name]
    rows = 66 if INTERPRETED else 200
    x, y = drawn(torch.empty(rows, width)), torch.arange(rows) % classes
    found = []
    for chunk in (None, 64) if INTERPRETED else (None, 64, 128, 1):
        if chunk is not None:
            monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", str(chunk * classes * 4))
        with fastllm.batch_invariant():
            probe = call(x[:1], y[:1])
            found.append(_bits(call, x, y, torch.ones(rows, *probe.shape[1:])))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(EMULATED, reason="about threads of the CPU")
@pytest.mark.parametrize("name", NAMES)
def test_however_many_threads(name):
    before, found = torch.get_num_threads(), []
    width, call = _calls(torch.float32, 300, 1030)[name]
    x, y = drawn(torch.empty(ROWS, width)), torch.arange(ROWS) % 1030
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fastllm.batch_invariant():
                probe = call(x[:1], y[:1])
                found.append(_bits(call, x, y, torch.ones(ROWS, *probe.shape[1:])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(EMULATED, reason="about how the CPU writes large gradients")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_beyond_the_caches(dtype):
    """The blocks in which a row is summed do not follow where its gradient stands."""
    rows, classes = (900, 20003) if dtype == torch.float32 else (1700, 20003)
    x, y = drawn(torch.empty(rows, classes, dtype=dtype)) * 20, torch.arange(rows)

    def gradient(x, y):
        leaf = x.requires_grad_()
        return torch.autograd.grad(F.cross_entropy(leaf, y, reduction="sum"), leaf)[0]

    with fastllm.batch_invariant():
        whole = gradient(x.clone(), y)
        for first, size in ((0, 1), (1, 1), (3, 8), (rows - 5, 5)):
            part = slice(first, first + size)
            assert torch.equal(gradient(x[part].clone(), y[part]), whole[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_against_float64(dtype):
    """Sizes on both sides of what a task, a panel and a piece of the kernel hold, with bias and ReLU."""
    rows = (1, 6, 13) if EMULATED else (1, 5, 6, 7, 12, 13, 191, 193)
    for m in rows:
        for k in (0, 1, 255, 256, 257, 513) if not EMULATED else (0, 1, 33):
            for n in (1, 7, 15, 17, 33, 65, 129, 130):
                x, w, b = _weights("", dtype, (m, k), (n, k), (n,))
                leaves = [t.requires_grad_() for t in (x, w, b)]
                with fastllm.batch_invariant():
                    check_against_float64(
                        F.linear_relu,
                        lambda x, w, b: torch.relu(torch.nn.functional.linear(x, w, b)),
                        leaves,
                    )
        if EMULATED:
            break


def test_layouts():
    """Transposed and strided operands are the same numbers."""
    x, w = drawn(torch.empty(50, 70)), drawn(torch.empty(40, 70), 1)
    with fastllm.batch_invariant():
        want = F.linear_relu(x, w)
        assert torch.equal(F.linear_relu(x.t().contiguous().t(), w), want)
        assert torch.equal(F.linear_relu(x, w.t().contiguous().t()), want)
        assert torch.equal(F.linear_relu(torch.stack([x, x], 1)[:, 1], w), want)
        assert torch.equal(F.linear_relu(torch.cat([x, x], 1)[:, 70:], w), want)


@pytest.mark.parametrize("name", ["linear_relu", "relu_mlp", "linear_cross_entropy", "linear_log_probs"])
def test_backward_after_the_block(name):
    """The mode of a forward pass is that of its backward pass, in a thread of its own too."""
    width, call = _calls(torch.float32, 33, 257)[name]
    x, y = drawn(torch.empty(70, width)), torch.arange(70)
    with fastllm.batch_invariant():
        want = _bits(call, x, y, torch.ones(70, *call(x[:1], y[:1]).shape[1:]))[1][:1]
        leaf = x[:1].clone().requires_grad_()
        output = call(leaf, y[:1])
    thread = threading.Thread(target=lambda: output.backward(torch.ones_like(output)))
    thread.start()
    thread.join()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("name", ["linear_relu", "relu_mlp", "linear_cross_entropy"])
def test_with_create_graph(name):
    width, call = _calls(torch.float32, 33, 257)[name]
    x, y = drawn(torch.empty(150, width)), torch.arange(150)

    def gradient(x, y):
        leaf = x.clone().requires_grad_()
        output = call(leaf, y)
        return torch.autograd.grad(output, leaf, torch.ones_like(output), create_graph=True)[0].detach()

    with fastllm.batch_invariant():
        whole = gradient(x, y)
        for first, size in ((0, 1), (3, 7), (127, 2), (20, 130)):
            assert torch.equal(gradient(x[first : first + size], y[first : first + size]), whole[first : first + size])


@pytest.mark.contract
def test_blocks_nest_and_end():
    from fastllm import invariance

    before = invariance.active()
    with fastllm.batch_invariant(), fastllm.batch_invariant():
        assert invariance.active()
    assert invariance.active() == before
    with pytest.raises(ZeroDivisionError), fastllm.batch_invariant():
        raise ZeroDivisionError
    assert invariance.active() == before


@pytest.mark.contract
def test_compiled():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    x, w = drawn(torch.empty(70, 33)), drawn(torch.empty(20, 33), 1)
    with fastllm.batch_invariant():
        compiled = torch.compile(F.linear_relu, backend=counter, fullgraph=True)
        whole = compiled(x, w)
        assert torch.equal(compiled(x[3:8].clone(), w), whole[3:8])
        assert torch.equal(whole, F.linear_relu(x, w))

    def inside(x):
        with fastllm.batch_invariant():
            return F.linear_relu(x, w)

    with pytest.raises(Exception, match="batch_invariant: enter it around"):
        torch.compile(inside, backend="eager", fullgraph=True)(x)


@pytest.mark.contract
def test_environment():
    code = "import fastllm; from fastllm import invariance; print(invariance.active())"
    for value, answer in (("1", "True"), ("0", "False")):
        assert run_python(code, {"FASTLLM_BATCH_INVARIANT": value}).stdout.strip() == answer
    wrong = run_python(code, {"FASTLLM_BATCH_INVARIANT": "yes"})
    assert wrong.returncode != 0
    assert "FASTLLM_BATCH_INVARIANT: expected 0 or 1, got 'yes'" in wrong.stderr


@pytest.mark.skipif(EMULATED or os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="a library's products")
def test_that_there_is_something_to_do():
    """Without the mode some row has other bits in another batch: the tests above can fail."""
    width, call = _calls(torch.float32, 300, 5003)["linear_relu"]
    x, y = drawn(torch.empty(ROWS, width)), torch.zeros(ROWS, dtype=torch.long)
    whole = call(x, y)
    assert any(not torch.equal(call(x[f : f + s], y[f : f + s]), whole[f : f + s]) for f, s in PARTS)
