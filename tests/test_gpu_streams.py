"""Streams, threads, graphs, memory and large sizes on a GPU: what the emulated kernels cannot show.

``make gpu-check`` runs this. Without a GPU the file is skipped; FASTLLM_TEST_DEVICE=cpu with TRITON_INTERPRET=1 or
FASTLLM_CUDA_HOST=1 runs small sizes, without streams, so that the tests themselves are tested.
"""

import contextlib
import os
import threading

import pytest
import torch
import torch.nn.functional as TF

import fastllm
import fastllm.functional as F

DEVICE = os.environ.get("FASTLLM_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
ON_GPU = DEVICE == "cuda"
TABLE = fastllm.backends.TABLE
BACKENDS = [b for b in ("cuda", "triton") if TABLE[b].missing is None and DEVICE in TABLE[b].device_types]
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
LONG = 50_000_000  # cycles that a stream sleeps: some 30 ms
MIB = 1 << 20
# Read when PyTorch first multiplies: its products need it under use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    torch.manual_seed(0)
    with torch.device(DEVICE), fastllm.use_backend(request.param):
        yield request.param


def sized(on_gpu: int, emulated: int) -> int:
    return on_gpu if ON_GPU else emulated


def tensors(dtype, *shapes):
    return [torch.randn(s).mul(s[-1] ** -0.5).to(dtype).requires_grad_() for s in shapes]


def embedding(dtype):
    rows = sized(3000, 50)
    ids = torch.randint(0, rows, (sized(20_000, 70),))
    return lambda table: F.embedding(ids, table), tensors(dtype, (rows, 40))


def linear_relu(dtype):
    return F.linear_relu, tensors(dtype, (sized(300, 5), 64), (96, 64), (96,))


def relu_mlp(dtype):
    return F.relu_mlp, tensors(dtype, (sized(300, 5), 64), (96, 64), (96,), (72, 96), (72,))


def mse_loss(dtype):
    return F.mse_loss, tensors(dtype, (sized(300, 3), 1001), (sized(300, 3), 1001))


def cross_entropy(dtype):
    classes = sized(20_011, 301)  # on a GPU rows of a cluster of blocks, that start anywhere
    y = torch.randint(0, classes, (33,))
    return lambda x: F.cross_entropy(x, y), tensors(dtype, (33, classes))


def linear_cross_entropy(dtype):
    y = torch.randint(0, 1001, (sized(130, 70),))
    return lambda x, w: F.linear_cross_entropy(x, w, y), tensors(dtype, (len(y), 64), (1001, 64))


OPERATIONS = [embedding, linear_relu, relu_mlp, mse_loss, cross_entropy, linear_cross_entropy]
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.__name__)


def results_of(call, leaves):
    """Output, and the gradients for an incoming gradient of 2: losses have formed them for 1, and correct them."""
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.full_like(output, 2))]


def same(ours, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def a_stream():
    return torch.cuda.Stream() if ON_GPU else None


def on_stream(stream):
    return torch.cuda.stream(stream) if ON_GPU else contextlib.nullcontext()


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def values_that_come_late(leaves, stream):
    """On ``stream``, leaves of zeros that hold the values of ``leaves`` after a while."""
    late = [torch.zeros_like(t).requires_grad_() for t in leaves]
    synchronize()
    with on_stream(stream):
        if ON_GPU:
            torch.cuda._sleep(LONG)
        with torch.no_grad():
            for t, values in zip(late, leaves, strict=True):
                t.copy_(values)
        yield late


@each_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_side_stream(operation, dtype):
    """Every kernel of forward and backward runs behind what the current stream has under way."""
    call, leaves = operation(dtype)
    expected = results_of(call, leaves)
    with values_that_come_late(leaves, a_stream()) as late:
        ours = results_of(call, late)
    synchronize()
    assert same(ours, expected)


@each_operation
def test_backward_from_another_stream(operation):
    call, leaves = operation(torch.bfloat16)
    expected = results_of(call, leaves)
    first, second = a_stream(), a_stream()
    with values_that_come_late(leaves, first) as late:
        output = call(*late)
    if ON_GPU:
        second.wait_stream(first)
    with on_stream(second):
        grads = torch.autograd.grad(output, late, torch.full_like(output, 2))
        del late
    synchronize()
    assert same([output.detach(), *grads], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_threads(backend, dtype):
    """Each with a stream of its own; what one frees, the other may not be given too early."""
    steps = [operation(dtype) for operation in OPERATIONS]
    expected = [results_of(*step) for step in steps]
    wrong = []
    alone = contextlib.nullcontext() if ON_GPU else threading.Lock()  # the emulator has one thread

    def work(order):
        try:
            with torch.device(DEVICE), fastllm.use_backend(backend), on_stream(a_stream()):
                for index in order * sized(10, 1):
                    with alone:
                        ours = results_of(*steps[index])
                    if ON_GPU:
                        torch.cuda.current_stream().synchronize()
                    if not same(ours, expected[index]):
                        wrong.append(OPERATIONS[index].__name__)
        except Exception as error:
            wrong.append(repr(error))

    synchronize()
    order = list(range(len(steps)))
    threads = [threading.Thread(target=work, args=(o,)) for o in (order, order[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_gpu
@each_operation
def test_the_second_gpu(operation):
    """Called while the first is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call, leaves = operation(torch.bfloat16)
    expected = results_of(call, leaves)
    with torch.device("cuda:1"):
        torch.manual_seed(0)
        call, _ = operation(torch.bfloat16)
    torch.manual_seed(0)
    there = [t.detach().to("cuda:1").requires_grad_() for t in leaves]
    synchronize()
    ours = results_of(call, there)
    assert all(t.device == torch.device("cuda:1") for t in ours)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        # The same generator and seed draw the same ids and targets there.
        assert same([t.to("cuda:0") for t in ours], expected)


def captured(step):
    """A graph of ``step()``, as a function that replays it and gives what it wrote."""
    if not ON_GPU:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()

    def replay():
        for t in written:
            t.fill_(float("nan"))
        graph.replay()
        return written

    return replay


def check_graph(call, leaves, incoming=1):
    """A replay sees new values in the same tensors."""

    def step():
        output = call(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, torch.full_like(output, incoming))]

    replay = captured(step)
    for scale in (1, -0.5):
        with torch.no_grad():
            for t in leaves:
                t.mul_(scale)
        assert same(replay(), step())


@each_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph(operation, dtype):
    check_graph(*operation(dtype))
    check_graph(*operation(dtype), incoming=2)


# On sm_90: clusters of 2, 4, 8 and 16 blocks, rows that a block walks twice.
@pytest.mark.parametrize("classes", [20_000, 50_257, 128_256, 262_144, 270_001] if ON_GPU else [300])
def test_a_graph_of_long_rows(classes):
    y = torch.randint(0, classes, (40,))
    check_graph(lambda x: F.cross_entropy(x, y), tensors(torch.bfloat16, (40, classes)))
    check_graph(lambda x: F.cross_entropy(x, y, label_smoothing=0.1), tensors(torch.bfloat16, (40, classes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_several_chunks(monkeypatch, dtype):
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", "1")  # 64 rows
    classes = sized(20_011, 301)
    y = torch.randint(0, classes, (130,))
    check_graph(lambda x, w: F.linear_cross_entropy(x, w, y), tensors(dtype, (130, 16), (classes, 16)))


# To 16384 ids of few rows one block sorts; more go to a sort of the whole device, in chunks of 32 ids or, of more than
# 65536, of 64.
@pytest.mark.parametrize(("count", "rows"), [(16_384, 128_256), (16_384, 262_144), (20_000, 500), (70_000, 3000)])
def test_many_ids(count, rows):
    count, rows = sized(count, count // 100), sized(rows, rows // 100)
    ids = (torch.rand(count) ** 4 * rows).long()  # some rows often, many never
    table = torch.randn(rows, 40).requires_grad_()
    incoming = torch.randint(-8, 9, (count, 40)).float()  # whose sums float32 holds exactly
    output = F.embedding(ids, table)
    assert torch.equal(output, table[ids])
    expected = torch.zeros(rows, 40, dtype=torch.float64).index_add_(0, ids, incoming.double())
    assert torch.equal(torch.autograd.grad(output, table, incoming)[0].double(), expected)
    table = table.detach().bfloat16().requires_grad_()
    grad = torch.autograd.grad(F.embedding(ids, table), table, incoming.bfloat16())[0]
    assert torch.equal(grad, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "apart"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_large_mse_loss(dtype, offset, weighted):
    """More elements than all blocks take at once; arrays that are not aligned alike."""
    count = sized(9_000_001, 5001)
    x = torch.randn(count + offset).to(dtype)[offset:].detach().requires_grad_()
    t = torch.randn(count).to(dtype)
    w = torch.rand(count).to(dtype) if weighted else torch.ones(count, dtype=dtype)
    loss = F.mse_loss(x, t, weight=w) if weighted else F.mse_loss(x, t)
    d, total = x.detach().double() - t.double(), w.double().sum()
    expected = (w.double() * d * d).sum() / total
    rtol = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for scale in (1, 1024):  # formed in forward, formed anew
        grad = torch.autograd.grad(loss * scale, x, retain_graph=True)[0].double()
        torch.testing.assert_close(grad, 2 * scale * w.double() * d / total, rtol=rtol, atol=1e-12)
    each = F.mse_loss(x.detach(), t, reduction="none").double()
    torch.testing.assert_close(each, d * d, rtol=rtol, atol=1e-12)


@each_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms(operation, dtype):
    """PyTorch then fills fresh memory with NaN: no result may be left unwritten."""
    call, leaves = operation(dtype)
    expected = results_of(call, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        ours = results_of(call, leaves)
        again = results_of(call, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(ours, again)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def memory_beyond(step) -> int:
    """Bytes that ``step()`` holds at its peak, beyond what is there already."""
    step()  # PyTorch's libraries keep workspaces
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_linear_cross_entropy(monkeypatch, dtype, backend):
    n, d, v = 4096, 512, 65_536
    x, w = tensors(dtype, (n, d), (v, d))
    y = torch.randint(0, v, (n,))
    results = (n * d + v * d) * x.element_size()  # the gradients
    logits, chunk = n * v * x.element_size(), 64 * MIB
    slack = 16 * MIB

    def both():
        return torch.autograd.grad(F.linear_cross_entropy(x, w, y), [x, w])

    def forward():
        with torch.no_grad():
            return F.linear_cross_entropy(x, w, y)

    monkeypatch.delenv("FASTLLM_LOSS_WORKSPACE", raising=False)
    assert memory_beyond(both) < logits + results + slack
    assert memory_beyond(forward) < logits + slack
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", str(chunk))
    float32_sum = 4 * v * d if dtype != torch.float32 else 0
    assert memory_beyond(both) < chunk + results + float32_sum + slack
    assert memory_beyond(forward) < chunk + slack
    if backend == "cuda" and dtype != torch.float32:  # the logits are gone before the sum is rounded
        assert memory_beyond(both) < float32_sum + max(chunk, 2 * v * d) + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_for_each_chunk(monkeypatch, backend, dtype):
    """As many chunks as the rule in fastllm/operations/chunks.py says, three products each."""
    from fastllm.operations.chunks import GPU_WORKSPACE, chunk_rows

    n, d, v = 300, 8, 1000
    x, w = tensors(dtype, (n, d), (v, d))
    y = torch.randint(0, v, (n,))
    item = x.element_size()
    for size in (None, 1, 100 * v * item, 200 * v * item):
        monkeypatch.delenv("FASTLLM_LOSS_WORKSPACE", raising=False)
        if size is not None:
            monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", str(size))
        beside = 2 * v * d if item == 2 else 0
        chunks = -(-n // chunk_rows(n, v, item, GPU_WORKSPACE, beside))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            F.linear_cross_entropy(x, w, y)
        products = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
        assert products == 3 * chunks, size
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", "many")
    with pytest.raises(ValueError, match="FASTLLM_LOSS_WORKSPACE: expected a number of bytes > 0, got 'many'"):
        F.linear_cross_entropy(x, w, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_several_chunks(monkeypatch, dtype):
    """On CUDA the library adds the weight's gradient up in float32."""
    n, v, d = sized(2000, 150), sized(5003, 130), 48
    x, w = tensors(dtype, (n, d), (v, d))
    y = torch.randint(0, v, (n,))
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", "1")
    ours = torch.autograd.grad(F.linear_cross_entropy(x, w, y, reduction="sum"), [x, w])
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(TF.cross_entropy(TF.linear(*leaves), y, reduction="sum"), leaves)
    plain = torch.autograd.grad(TF.cross_entropy(TF.linear(x, w), y, reduction="sum"), [x, w])
    for a, p, t in zip(ours, plain, truth, strict=True):
        assert (a - t).norm() <= 1.5 * (p - t).norm() + 1e-6 * t.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_relu_keeps_nan_in_products_of_every_size(dtype):
    """Whoever multiplies by default: libraries have kernels whose ReLU makes 0 of NaN."""
    lost = []
    for m in (1, 2, 7, 16, 33, 64, 100, 130, 512, 2048) if ON_GPU else (1, 7):
        for k in (8, 16, 20, 33, 64, 72, 256, 768, 1024) if ON_GPU else (8, 20):
            for n in (8, 20, 24, 33, 64, 96, 128, 200, 520, 3072) if ON_GPU else (8, 20):
                x, w, b = (t.detach() for t in tensors(dtype, (m, k), (n, k), (n,)))
                x[m // 2, k // 2], b[n - 1], w[n // 2, 0] = float("nan"), float("nan"), float("-inf")
                for bias in (b, None):
                    if not torch.equal(F.linear_relu(x, w, bias).isnan(), torch.relu(TF.linear(x, w, bias)).isnan()):
                        lost.append((m, k, n, bias is not None))
    assert not lost
