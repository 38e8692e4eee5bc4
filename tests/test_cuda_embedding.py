"""The CUDA kernels of embedding, played on the host: every width of access, every way a row's positions can lie."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, check_against_float64
from torch import Tensor

import fastllm
import fastllm.functional as F

if os.environ.get("FASTLLM_CUDA_HOST") != "1":
    pytest.skip("needs the host build: FASTLLM_CUDA_HOST=1", allow_module_level=True)

pytestmark = pytest.mark.numbers

CHUNK = 32  # positions summed by one team, for up to 65536 of them
BLOCK = 16384  # positions that one block sorts


@pytest.fixture(autouse=True)
def played():
    torch.manual_seed(0)
    with fastllm.use_backend("cuda"):
        yield


def shifted(t: Tensor, items: int) -> Tensor:
    """The same values, `items` behind a 16-byte boundary."""
    flat = torch.empty(t.numel() + items, dtype=t.dtype)[items:]
    return flat.view(t.shape).copy_(t)


def integers(*shape: int, dtype=torch.float32) -> Tensor:
    """Whose sums no accumulator rounds."""
    return torch.randint(-8, 9, shape).to(dtype)


def shuffled(lengths: list[int]) -> Tensor:
    """Row i at lengths[i] positions."""
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ids[torch.randperm(ids.numel())]


def check_exact(ids: Tensor, rows: int, features: int = 3, dtype=torch.float32, **options) -> Tensor:
    """Output and gradient equal the definition's in float64, rounded once; the gradient."""
    weight = torch.randn(rows, features).to(dtype).requires_grad_()
    incoming = integers(*ids.shape, features, dtype=dtype)
    output = F.embedding(ids, weight, **options)
    grad = torch.autograd.grad(output, weight, incoming)[0]
    truth = weight.detach().double().requires_grad_()
    expected = torch.autograd.grad(TF.embedding(ids, truth, **options), truth, incoming.double())[0]
    assert torch.equal(output, weight[ids.long()])
    if options.get("scale_grad_by_freq"):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(grad, expected.to(dtype))
    return grad


# Around a vector, a warp and a slice of them, a block and what it has in flight.
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 12, 31, 33, 63, 64, 66, 127, 128, 129, 130, 256, 258, 264, 520, 1023, 1032, 2056, 8200]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", LENGTHS)
def test_row_lengths(features, dtype):
    ids = torch.randint(0, 9, (41,) if features < 1000 else (3,))
    weight = torch.randn(9, features).to(dtype).requires_grad_()
    check_against_float64(lambda w: F.embedding(ids, w), lambda w: TF.embedding(ids, w), [weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("items", [1, 2, 3, 4, 7])
def test_rows_off_their_boundaries(items, dtype):
    ids = torch.randint(0, 7, (40,))
    for features in (7, 8, 40):
        weight = shifted(torch.randn(7, features).to(dtype), items).requires_grad_()
        incoming = shifted(integers(40, features, dtype=dtype), items)
        output = F.embedding(ids, weight)
        grad = torch.autograd.grad(output, weight, incoming)[0]
        expected = torch.zeros(7, features, dtype=torch.float64).index_add_(0, ids, incoming.double())
        assert torch.equal(output, weight[ids]) and torch.equal(grad, expected.to(dtype))


@pytest.mark.parametrize("lengths", [
    [CHUNK] * 3, [CHUNK - 1, CHUNK + 1, CHUNK], [1, CHUNK, CHUNK], [CHUNK, 1], [CHUNK - 1, 1], [CHUNK + 1],
    [2 * CHUNK, 2 * CHUNK], [5, 4 * CHUNK, 3], [5, 4 * CHUNK - 5, 3 * CHUNK + 1], [0, 7 * CHUNK, 0, 0, 1, CHUNK, 0],
    [9] * 20, [CHUNK // 2, 9 * CHUNK, CHUNK // 2, 0, 6 * CHUNK + 1, 6 * CHUNK - 1],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ends_of_chunks(lengths, dtype):
    check_exact(shuffled(lengths), len(lengths), dtype=dtype)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("frequency", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1, -7])
def test_frequent_rows_with_options(padding_idx, frequency, ids_dtype):
    rows = 150
    ids = torch.multinomial(1 / torch.arange(1, rows + 1.0), 1500, replacement=True).to(ids_dtype).view(30, 50)
    grad = check_exact(ids, rows, 5, padding_idx=padding_idx, scale_grad_by_freq=frequency)
    assert padding_idx is None or not grad[padding_idx].any()
    weight = torch.randn(rows, 5, dtype=torch.bfloat16).requires_grad_()
    options = dict(padding_idx=padding_idx, scale_grad_by_freq=frequency)
    check_against_float64(lambda w: F.embedding(ids, w, **options), lambda w: TF.embedding(ids, w, **options), [weight])


@pytest.mark.parametrize(("rows", "ids"), [
    (4, torch.full((5 * CHUNK,), 2)), (1, torch.zeros(3 * CHUNK + 1, dtype=torch.int64)), (200, torch.randperm(200)),
    (300, torch.randperm(300)[:77]), (1, torch.zeros(1, dtype=torch.int64)), (2, torch.tensor(1)),
    (9, torch.zeros(0, dtype=torch.int64)), (3, torch.zeros(2, 0, 4, dtype=torch.int64)),
], ids=lambda value: str(value) if isinstance(value, int) else str(tuple(value.shape)))  # fmt: skip
def test_few_and_many_rows(rows, ids):
    for dtype, features in itertools.product([torch.float32, torch.bfloat16], [1, 4, 19]):
        check_exact(ids, rows, features, dtype)
        check_exact(ids, rows, features, dtype, padding_idx=rows - 1)


def test_no_features_and_no_rows():
    weight = torch.randn(5, 0, requires_grad=True)
    output = F.embedding(torch.tensor([1, 4]), weight)
    assert output.shape == (2, 0) and torch.autograd.grad(output.sum(), weight)[0].shape == (5, 0)
    weight = torch.randn(0, 5, requires_grad=True)
    output = F.embedding(torch.zeros(0, dtype=torch.int64), weight)
    assert output.shape == (0, 5) and torch.autograd.grad(output.sum(), weight)[0].shape == (0, 5)


@pytest.mark.parametrize("count", [2, 31, 33, 128, 129, 1000, 4097, BLOCK - 1, BLOCK, BLOCK + 1])
def test_counts_and_bits_of_the_sort(count):
    """Rows of 1 to 18 bits and beyond, whose words no longer hold row and position."""
    for rows in [1, 63, 64, 4095] if count < 4000 else [(1 << 18) - 1] if count == BLOCK else [5000]:
        ids = torch.randint(0, rows, (count,))
        ids[count // 2 :] = rows - 1
        check_exact(ids, rows, 1, padding_idx=rows // 2)
        check_exact(ids, rows, 1, padding_idx=rows - 1)


def test_rows_of_more_bits_than_a_word_has_left():
    rows = 1 << 19
    ids = torch.cat([torch.randint(0, rows, (8200,)), torch.tensor([0, rows - 1, rows - 1])])
    check_exact(ids, rows, 1)
    check_exact(ids[:500], rows, 1)


def test_longer_chunks_of_many_positions():
    ids = torch.multinomial(1 / torch.arange(1, 41.0), 2048 * CHUNK + 77, replacement=True).int()
    check_exact(ids, 41, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_of_positions(dtype):
    """A row is summed position by position, in float32, and rounded once."""
    ids = torch.randint(0, 40, (300,))  # about 8 positions each
    incoming = (torch.randn(300, 6) * torch.logspace(-3, 3, 300)[:, None]).to(dtype)
    weight = torch.randn(40, 6, dtype=dtype, requires_grad=True)
    grad = torch.autograd.grad(F.embedding(ids, weight), weight, incoming)[0]
    order = torch.sort(ids, stable=True)
    for row in range(40):
        places = (order.values == row).nonzero().flatten()
        if places.numel() == 0 or places[0] // CHUNK != places[-1] // CHUNK:
            continue
        total = torch.zeros(6)
        for position in order.indices[places]:
            total += incoming[position].float()
        assert torch.equal(grad[row], total.to(dtype)), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat(dtype):
    ids = torch.multinomial(1 / torch.arange(1, 101.0), 2000, replacement=True)
    weight = torch.randn(100, 9, dtype=dtype, requires_grad=True)
    incoming = torch.randn(2000, 9).to(dtype)
    first, second = (torch.autograd.grad(F.embedding(ids, weight), weight, incoming)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_layouts():
    """Ids, table and incoming gradient of any strides."""
    ids = torch.randint(0, 6, (5, 4)).t()
    weight = torch.randn(9, 6).t().requires_grad_()
    incoming = integers(9, 5, 4).permute(2, 1, 0)
    output = F.embedding(ids, weight)
    grad = torch.autograd.grad(output, weight, incoming)[0]
    expected = torch.zeros(6, 9).index_add_(0, ids.flatten(), incoming.flatten(0, 1))
    assert torch.equal(output, weight[ids]) and torch.equal(grad, expected)
    broadcast = torch.autograd.grad(F.embedding(ids, weight).sum(), weight)[0]
    assert torch.equal(broadcast, torch.bincount(ids.flatten(), minlength=6).float()[:, None].expand(6, 9))


def test_more_positions_than_32_bits_number():
    ids, incoming = torch.zeros(1, dtype=torch.int64).expand(2**31), torch.zeros(1, 1).expand(2**31, 1)
    with pytest.raises(RuntimeError, match=r"embedding_backward: .*2\^31 ids and rows, got 2147483648 and 3"):
        torch.ops.fastllm_cuda.embedding_backward(incoming, ids, 3, -1, False)
