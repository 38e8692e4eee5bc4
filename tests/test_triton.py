"""What only the Triton backend has: the contract itself is tests/run.py's run of all kernel tests in the interpreter."""

import importlib
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as TF
from helpers import run_python

import fastllm
import fastllm.functional as F
from fastllm import operations

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)


import triton as language
import triton.language as tl

from fastllm.triton.cross_entropy import _row_start

pytestmark = pytest.mark.numbers


@language.jit
def _starts(out, stride, base, classes, VEC: tl.constexpr):
    row = tl.program_id(0)
    _start, head, groups = _row_start(row, stride, base, classes, VEC)
    tl.store(out + row * 2, head)
    tl.store(out + row * 2 + 1, groups)


@pytest.fixture(autouse=True)
def chosen():
    with fastllm.use_backend("triton"):
        yield


def test_every_plain_operation_has_a_launcher():
    schemas = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastllm_triton::")}
    assert schemas == {kernel.name for kernel in operations.KERNELS if kernel.function is None}
    for operation in operations.OPERATIONS:
        module = importlib.import_module(f"fastllm.triton.{operation.name}")
        for kernel in operation.kernels:
            assert kernel.function is not None or callable(
                getattr(module, kernel.name.removeprefix(f"{operation.name}_"))
            )


def test_the_kernels_serve_the_call(monkeypatch):
    from fastllm.triton import mse_loss

    calls = []
    launch = mse_loss.launch
    monkeypatch.setattr(mse_loss, "launch", lambda kernel, *a, **k: (calls.append(kernel), launch(kernel, *a, **k)))
    x = torch.randn(5, requires_grad=True)
    loss = F.mse_loss(x, torch.zeros(5))
    with fastllm.use_backend("cpu"):  # backward keeps the backend of its forward
        (2 * loss).backward()
    assert len(calls) == 3
    with fastllm.use_backend("cpu"):
        F.mse_loss(x, torch.zeros(5))
    assert len(calls) == 3


@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_incoming_gradient_is_read_on_the_device(reduction, scale):
    """Two backwards agree, whatever the incoming gradient: what forward has formed is never scaled where it is kept."""
    x, y = torch.randn(4, 7, requires_grad=True), torch.tensor([1, -100, 6, 0])
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    for ours, theirs, leaf in (
        (lambda: F.cross_entropy(x, y, reduction=reduction), lambda: TF.cross_entropy(x, y, reduction=reduction), x),
        (lambda: F.mse_loss(x, x.detach() + 1, reduction=reduction),
         lambda: TF.mse_loss(x, x.detach() + 1, reduction=reduction), x),
        (lambda: F.linear_cross_entropy(h, w, y, reduction=reduction),
         lambda: TF.cross_entropy(h @ w.t(), y, reduction=reduction), w),
    ):  # fmt: skip
        loss = ours() * scale
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])
        torch.testing.assert_close(first, torch.autograd.grad(theirs() * scale, leaf)[0])


def test_offsets_beyond_32_bits():
    """Rows more than 2^31 items apart; the pages between them are never touched."""
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    x = far.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    y = torch.tensor([3, 39])
    torch.testing.assert_close(F.cross_entropy(x, y), TF.cross_entropy(x.clone(), y), rtol=2e-2, atol=2e-2)
    w = torch.randn(8, 40).bfloat16()
    torch.testing.assert_close(F.linear_relu(x, w), torch.relu(x.clone() @ w.t()), rtol=2e-2, atol=2e-2)
    table = far[: 2**31 + 2048].view(-1, 2048)
    table[-1].copy_(torch.randn(2048))
    assert torch.equal(F.embedding(torch.tensor([table.size(0) - 1]), table)[0], table[-1])


def test_incoming_gradients_beyond_32_bits():
    """Rows' incoming gradients more than 2^31 items apart; in a process of its own, which a wrong address would end."""
    code = """
import torch
import fastllm
import fastllm.functional as F
far = torch.empty(2**31 + 3, dtype=torch.bfloat16)
g = far.as_strided((3,), (2**30 + 1,))
g.copy_(torch.tensor([1.0, -2.0, 3.0]))
x, y = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True), torch.tensor([3, 0, 4])
with fastllm.use_backend("triton"):
    loss = F.cross_entropy(x, y, reduction="none")
    found, expected = (torch.autograd.grad(loss, x, v, retain_graph=True)[0] for v in (g, g.clone()))
assert torch.equal(found, expected)
print("checked")
"""
    result = run_python(code)
    assert result.stdout.strip() == "checked", (result.returncode, result.stderr)


def test_more_classes_than_are_counted():
    long, one = torch.empty(2**30 + 1, dtype=torch.bfloat16), torch.tensor([0])  # whose pages are never touched
    with pytest.raises(
        RuntimeError, match=r"^cross_entropy: the backend triton serves at most 2\^30 classes, got 1073741825"
    ):
        F.cross_entropy(long[None], one)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: the backend triton serves at most 2\^30 classes"):
        F.linear_cross_entropy(long[:1, None], long[:, None], one)


def test_grids_of_many_columns(monkeypatch):
    """CUDA takes 2^31 - 1 programs in the first dimension of a grid, and 65535 in the others."""
    from fastllm.triton import linear_relu

    grids = []
    monkeypatch.setattr(linear_relu, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    wide, one = torch.empty(3, 2**23, device="meta"), torch.empty(3, 1, device="meta")
    linear_relu.linear(one, torch.empty(2**23, 1, device="meta"), None, relu=True)
    linear_relu.masked(wide, wide, need_bias=True)
    assert len(grids) == 2 and all(n <= 65535 for grid in grids for n in grid[1:])


def test_rows_that_a_descriptor_takes():
    from fastllm.triton.gemm import _describable

    rows = torch.zeros(64).bfloat16().expand(8, 64)
    assert _describable(rows.contiguous()) and not _describable(rows) and not _describable(rows[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", range(8))
def test_rows_at_every_distance_from_a_boundary(dtype, offset):
    """Row starts, and gradients beside them, that are and are not at the same distance from 16 bytes."""
    storage = torch.randn(offset + 3 * 50 + 50).to(dtype)
    x = storage[offset:].as_strided((3, 37), (50, 1)).requires_grad_()
    y = torch.tensor([36, 0, 17])
    theirs = x.detach().double().requires_grad_()
    TF.cross_entropy(theirs, y).backward()
    grad = torch.autograd.grad(F.cross_entropy(x, y), x)[0]
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("vec", [2, 4, 8])
def test_groups_start_at_a_boundary(vec):
    """What the compiler is told of the pointers is true: on a GPU a misaligned wide load is an error."""
    for stride, base, classes in ((37, 0, 37), (37, 1, 30), (40, vec - 1, 40), (5, 1, 3), (1, 0, 1)):
        out = torch.zeros(9, 2, dtype=torch.int32)
        _starts[(9,)](out, stride, base, classes, vec)
        for row, (head, groups) in enumerate(out.tolist()):
            assert head == min((-(base + row * stride)) % vec, classes)
            assert groups == (classes - head) // vec


@pytest.mark.parametrize("shift", [0, 1, -1, 5])
def test_frequent_ids_by_chunks(shift):
    """Segments that start and end inside, at and across the chunks that are summed ahead."""
    from fastllm.triton.embedding import CHUNK

    counts = [2 * CHUNK + shift, 1, CHUNK - 1, CHUNK, CHUNK + 1, 0, 3 * CHUNK, 2, 5 * CHUNK + 7]
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    weight = torch.randn(len(counts), 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(len(ids), 5, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(f(ids, weight), weight, g)[0] for f in (F.embedding, TF.embedding))
    torch.testing.assert_close(ours, theirs)


def test_tiles_are_timed_once_and_kept(monkeypatch, tmp_path):
    from fastllm.triton import gemm, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._table.cache_clear()
    entry = tuning.key("gpu", torch.bfloat16, 1000, 64, 32, "turned ")
    assert entry == tuning.key("gpu", torch.bfloat16, 1024, 64, 32, "turned ")
    assert tuning.tuned(entry) is None
    times = {tile: 2.0 + i for i, tile in enumerate(tuning.CANDIDATES)} | {tuning.CANDIDATES[4]: 1.0}

    def run(tile):
        if tile == tuning.CANDIDATES[0]:
            raise language.runtime.errors.OutOfResources(300000, 232448, "shared memory")
        return times[tile]

    assert tuning.tune(entry, run, lambda call: call()) == tuning.CANDIDATES[4]
    tuning._table.cache_clear()
    assert tuning.tuned(entry) == tuning.CANDIDATES[4]
    # An entry decides the tile of a product.
    x, w = torch.randn(40, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    expected, launched = torch.relu(x @ w.t()), []
    launch = gemm.launch
    monkeypatch.setattr(gemm, "launch", lambda *a, **k: (launched.append((k["M"], k["N"], k["K"])), launch(*a, **k)))
    tuning._table()[tuning.key("cpu", torch.bfloat16, 40, 24, 16, "turned tma")] = [64, 16, 32, 2, 4]
    torch.testing.assert_close(F.linear_relu(x, w), expected, rtol=2e-2, atol=2e-2)
    assert launched == [(64, 16, 32)]
    tuning.table_file().write_text("not a table")
    tuning._table.cache_clear()
    F.linear_relu(x, w)
    assert launched[1] == gemm.TILES["cpu", 0]["small"][:3]


def test_chunk_rows(monkeypatch):
    from fastllm.operations.chunks import GPU_WORKSPACE, chunk_rows

    monkeypatch.delenv("FASTLLM_LOSS_WORKSPACE", raising=False)
    assert chunk_rows(0, 10, 2, GPU_WORKSPACE) == 1 and chunk_rows(9999, 10, 2, GPU_WORKSPACE) == 9999
    assert chunk_rows(8192, 151936, 2, GPU_WORKSPACE) == 4096 and chunk_rows(7100, 151936, 2, GPU_WORKSPACE) == 3584
    assert chunk_rows(8192, 151936, 2, GPU_WORKSPACE, beside=2 * 151936 * 4096) == 8192
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", str(1000 * 10 * 2))
    assert chunk_rows(8192, 10, 2, GPU_WORKSPACE) == 960
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", "many")
    with pytest.raises(ValueError, match="'many'"):
        chunk_rows(8192, 10, 2, GPU_WORKSPACE)


def test_a_full_table_for_an_unknown_generation(monkeypatch):
    from fastllm.triton import gemm

    for kind in (("cuda", 12), ("hip", 11), ("xpu", 0)):
        monkeypatch.setattr(gemm, "target", lambda device, k=kind: k)
        assert gemm.tiles(torch.device("cpu"), 4096, True, False) in [t["plain"] for t in gemm.TILES.values()]


def test_rows_wider_than_a_program():
    """Several programs side by side in a row, in the lookup, in the sums of chunks and in those of rows."""
    from fastllm.triton.embedding import CHUNK, WIDTH

    ids = torch.tensor([1] * (2 * CHUNK + 3) + [0, 3, 3])
    weight = torch.randn(4, WIDTH + 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(len(ids), WIDTH + 6, dtype=torch.float64)
    ours, theirs = (f(ids, weight) for f in (F.embedding, TF.embedding))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(output, weight, g)[0] for output in (ours, theirs)))


def test_mse_one_item_more_than_the_programs_hold():
    from fastllm.triton import common, mse_loss

    n = mse_loss.PROGRAMS * common.multiprocessors(torch.device("cpu")) * mse_loss.BLOCK + 1
    x = torch.zeros(n)
    x[-1] = 3.0
    x.requires_grad_()
    loss = F.mse_loss(x, torch.zeros(n), reduction="sum")
    assert loss.item() == 9.0
    assert torch.autograd.grad(loss, x)[0][-1] == 6.0


def test_gradients_of_more_than_a_block_are_scaled():
    from fastllm.triton.linear_cross_entropy import SCALE_BLOCK

    x, y = torch.randn(2, 4, requires_grad=True), torch.tensor([0, 5])
    w = torch.randn(SCALE_BLOCK // 4 + 3, 4, requires_grad=True)
    ours, theirs = F.linear_cross_entropy(x, w, y), TF.cross_entropy(x @ w.t(), y)
    for a, b in zip(torch.autograd.grad(ours * 3, [x, w]), torch.autograd.grad(theirs * 3, [x, w]), strict=True):
        torch.testing.assert_close(a, b)
