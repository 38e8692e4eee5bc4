"""embedding against float64, every option and dtype."""

import os

import pytest
import torch
import torch.nn.functional as TF
from helpers import DEVICE, DTYPES, INTERPRETED, check_against_float64, cpu_kernels
from operations import cases_of

import fastllm.functional as F

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("embedding", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"scale_grad_by_freq": True}], ids=str)
def test_second_derivative_of_scaled_gradients(options):
    """Where the gradient is not the derivative, by choice, its own derivative still is: it is linear in grad_output."""
    ids = torch.tensor([[1, 4, 1], [0, 2, 4]])
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def gradient(g):
        return torch.autograd.grad(F.embedding(ids, weight, **options), weight, g, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, [incoming])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_sparse_gradient(padding_idx):
    ids = torch.tensor([[1, 4, 1], [0, 2, 4]])
    weight = torch.randn(5, 4, requires_grad=True)
    incoming = torch.randn(2, 3, 4)
    found, expected = (
        torch.autograd.grad(f(ids, weight, padding_idx, sparse=True), weight, incoming)[0]
        for f in (F.embedding, TF.embedding)
    )
    assert found.is_sparse and torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found._indices(), expected._indices())


def test_max_norm_renormalises_the_rows_looked_up():
    ids = torch.tensor([1, 3, 1])
    ours, theirs = torch.randn(5, 4).mul_(3).repeat(2, 1, 1).unbind()
    assert torch.equal(F.embedding(ids, ours, max_norm=1.5, norm_type=1.0), TF.embedding(ids, theirs, None, 1.5, 1.0))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [3, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_low_precision_gradients(dtype, rows):
    """2500 gradients of one row, of a small table and a larger: a bfloat16 sum stops at 256, a float16 one at 2048."""
    weight = torch.zeros(rows, 5, dtype=dtype, requires_grad=True)
    F.embedding(torch.ones(2500, dtype=torch.int64), weight).backward(torch.ones(2500, 5, dtype=dtype))
    expected = torch.zeros(rows, 5)
    expected[1] = 2500
    assert torch.equal(weight.grad, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_few_ids_and_many(options, dtype):
    """128 ids take another way than 129: the same bits where the last id is another row's."""
    torch.manual_seed(0)
    weight = torch.randn(12, 37).to(dtype).requires_grad_()
    ids, incoming = torch.randint(0, 11, (129,)), torch.randn(129, 37).to(dtype)
    ids[128] = 11
    few, many = (
        torch.autograd.grad(F.embedding(ids[:n], weight, **options), weight, incoming[:n])[0] for n in (128, 129)
    )
    assert torch.equal(few[:11], many[:11]) and few[11].eq(0).all()


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (7, 10), (100, 16), (200, 37), (250, 129)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_ids_of_a_small_table(dtype, rows, features, ids_dtype):
    """A table that fits in a cache is summed without sorting: one id holds most positions, some rows none."""
    torch.manual_seed(0)
    ids = torch.randint(0, rows, (41, 26), dtype=ids_dtype)
    ids[ids % 3 == 2] = 0
    weight, incoming = torch.randn(rows, features).to(dtype).requires_grad_(), torch.randn(41, 26, features).to(dtype)
    incoming[ids == 0] += 1
    expected = torch.zeros(rows, features, dtype=torch.float64)
    expected.index_add_(0, ids.flatten(), incoming.double().flatten(0, 1))
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = torch.finfo(dtype).eps * expected.abs() + accumulated * (8 * expected.abs() + 40)
    for padding_idx in (None, 0):
        if padding_idx is not None:
            expected[padding_idx] = 0
        (grad,) = torch.autograd.grad(F.embedding(ids, weight, padding_idx), weight, incoming)
        assert ((grad.double() - expected).abs() <= bound).all()


@cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_ids_of_a_table_beyond_the_caches(dtype):
    """17 MiB and more are zeroed by two threads, past the caches."""
    weight = torch.randn(9001, 1001).to(dtype).requires_grad_()
    ids = torch.tensor([9000, 0, 4500, 0])
    F.embedding(ids, weight).backward(torch.ones(4, 1001, dtype=dtype))
    expected = torch.zeros_like(weight)
    expected[0], expected[4500], expected[9000] = 2, 1, 1
    assert torch.equal(weight.grad, expected)


checked = pytest.mark.skipif(
    (DEVICE == "cuda" and os.environ.get("FASTLLM_CHECK") != "1") or os.environ.get("FASTLLM_BACKEND") == "eager",
    reason="PyTorch's own kernel stops the device",
)


@checked
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_id_out_of_range(bad, ids_dtype):
    ids = torch.tensor([[0, 1], [bad, 2]], dtype=ids_dtype)
    with pytest.raises(IndexError, match=rf"embedding: input .*\[0, 5\).* got {bad} at position 2"):
        F.embedding(ids, torch.randn(5, 3))


@checked
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [-1, 5])
@pytest.mark.parametrize("position", [511, 512, 1300])
def test_id_out_of_range_among_many(position, bad, ids_dtype):
    """Ids are checked in blocks: whichever block it stands in, the first bad one is named."""
    ids = torch.arange(1301).remainder(5).to(ids_dtype)
    ids[position:] = bad
    with pytest.raises(IndexError, match=rf"embedding: input .*\[0, 5\).* got {bad} at position {position}"):
        F.embedding(ids, torch.randn(5, 3))


def test_large_table_few_ids():
    rows = 1_500 if INTERPRETED else 200_000
    weight = torch.randn(rows, 16, requires_grad=True)
    ids = torch.tensor([rows - 1, 0, rows - 1])
    F.embedding(ids, weight).backward(torch.ones(3, 16))
    assert weight.grad.count_nonzero() == 32 and weight.grad[rows - 1].eq(2).all() and weight.grad[0].eq(1).all()


@pytest.mark.parametrize("create_graph", [False, True])
def test_frequencies_of_a_sparse_gradient_are_refused_in_backward(create_graph):
    """As in PyTorch: forward is right, and whoever wants no gradient never hears of it."""
    weight = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([1, 4, 1])
    output = F.embedding(ids, weight, scale_grad_by_freq=True, sparse=True)
    assert torch.equal(output, weight[ids])
    with pytest.raises(RuntimeError, match="scale_grad_by_freq"):
        torch.autograd.grad(output.sum(), weight, create_graph=create_graph)
    with torch.no_grad():
        assert torch.equal(F.embedding(ids, weight, scale_grad_by_freq=True, sparse=True), weight[ids])


@pytest.mark.parametrize("factor", [0.01, 10.0], ids=["rows within the norm", "rows beyond it"])
@pytest.mark.parametrize("kind", ["plain", "parameter", "intermediate", "inference", "view"])
@pytest.mark.parametrize("inside", [False, True], ids=["", "inference_mode"])
def test_max_norm_of_every_kind_of_table(factor, kind, inside):
    """Wherever PyTorch rescales rows in place, so do we, with the same version and gradients."""
    numbers, ids = factor * torch.randn(5, 3), torch.tensor([1, 4, 1])

    def table():
        if kind == "parameter":
            return torch.nn.Parameter(numbers.clone())
        if kind == "intermediate":
            return numbers.clone().requires_grad_() * 1.0
        if kind == "view":
            return torch.cat([numbers, numbers]).requires_grad_()[:5]
        with torch.inference_mode(kind == "inference"):
            return numbers.clone()

    results = []
    for function in (F.embedding, TF.embedding):
        weight = table()
        with torch.inference_mode(inside):
            output = function(ids, weight, max_norm=1.0)
        grads = torch.autograd.grad(output.sum(), weight) if output.requires_grad else ()
        results.append((output, weight.detach(), *grads, 0 if weight.is_inference() else weight._version))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
