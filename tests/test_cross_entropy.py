"""cross_entropy against float64, every option and dtype."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, EMULATED, INTERPRETED, check_against_float64, cpu_kernels, drawn
from operations import cases_of

import fastllm
import fastllm.functional as F
from fastllm import eager


def view_without_gradients(z):
    with torch.no_grad():
        view = z[:2]
    return view.requires_grad_()


pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("cross_entropy", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def gradient(function, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def assert_same(x, *args, **kwargs):
    for ours, theirs in zip(
        gradient(F.cross_entropy, x, *args, **kwargs), gradient(TF.cross_entropy, x, *args, **kwargs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def half_unit(dtype):
    """Half a unit in the last place and a little: the error of one rounding of what float32 holds."""
    if INTERPRETED and dtype == torch.bfloat16:  # Triton's interpreter cuts where a GPU rounds
        return 1.04 * torch.finfo(dtype).eps
    return max(0.52 * torch.finfo(dtype).eps, 1e-5)


INF = float("inf")


def assert_same_pattern(ours, definition, x):
    """Values and gradients are NaN, inf, -inf or finite in the same places, and equal where finite."""
    incoming = None
    results = []
    for function in (ours, definition):
        leaf = x.detach().clone().requires_grad_()
        output = function(leaf)
        incoming = drawn(output) if incoming is None else incoming
        grads = [
            torch.autograd.grad(output, leaf, g, retain_graph=True)[0] for g in (torch.ones_like(output), incoming)
        ]
        results.append([output.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [[1, 3], [1, -100, 3], [-100, -100]], ids=str)
@pytest.mark.parametrize("zeros", ["all", "at the targets"])
def test_mean_over_weights_that_sum_to_zero(zeros, targets, dtype):
    """0 over 0: NaN in the loss and in the gradient of counted rows, whatever is smoothed or added."""
    y = torch.tensor(targets)
    weight = torch.zeros(5, dtype=dtype) if zeros == "all" else torch.tensor([0.5, 0, 2, 0, 1], dtype=dtype)
    x = torch.randn(len(targets), 5).to(dtype)
    for smoothing, s, cap in itertools.product([0.0, 0.1, 1.0], [0.0, 0.25], [None, 2.0]):
        arguments = (y, weight, -100, "mean", smoothing, s, cap)

        def ours(z, w=weight, e=smoothing, s=s, cap=cap):
            return F.cross_entropy(z, y, w, label_smoothing=e, lse_square_scale=s, softcap=cap)

        assert_same_pattern(ours, lambda z, a=arguments: eager.cross_entropy(z, *a), x)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("s", [1.0, 0.25, 1e-4])
@pytest.mark.parametrize(
    "row",
    [
        [3e38, 0.0, 1.0, 2.0, 3.0],
        [3e38, 3e38, -3e38, 0.0, 1.0],
        [-3e38, -3e38, -3e38, -3e38, -3e38],
        [-3e38, 3e38, 1e38, 2.9999999e38, 0.0],
        [2e19, 1e19, 0.0, -2e19, 1.9e19],
    ],
    ids=str,
)
def test_z_loss_of_huge_logits(row, s, reduction):
    """Infinite and NaN where the definition is: its square overflows from 1.8e19 on, the derivative from 1.7e38 on."""
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], row])
    for y in ([1, 2], [0, 0], [4, 1], [-100, 4]):
        for smoothing in (0.0, 0.1):
            arguments = (torch.tensor(y), None, -100, reduction, smoothing, s)

            def ours(z, y=y, e=smoothing):
                return F.cross_entropy(z, torch.tensor(y), reduction=reduction, label_smoothing=e, lse_square_scale=s)

            assert_same_pattern(ours, lambda z, a=arguments: eager.cross_entropy(z, *a), x)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "row",
    [
        [-INF] * 5,
        [-INF, -INF, 3.0, -INF, 1.0],
        [INF, 0.0, 1.0, 2.0, 3.0],
        [float("nan"), 0.0, 1.0, 2.0, 3.0],
        [1e4, -1e4, 0.0, 9999.0, 1.0],
        [1e30, 1e30, -1e30, 0.0, 0.0],
    ],
    ids=str,
)
def test_special_rows(row, reduction):
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], row])
    # An ignored row of NaN is another matter: ours is not read, and its gradient is 0 where PyTorch's is NaN.
    for y in ([1, 2], [0, 0], [-100, 4]):
        assert_same(x, torch.tensor(y), reduction=reduction)
        assert_same(x, torch.tensor(y), reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("start", [0, 1500, 2500])
def test_blocks_of_minus_infinity(start):
    """A masked vocabulary: whole blocks of a row are -inf, wherever they stand."""
    x = torch.full((2, 3001), -INF)
    x[:, start : start + 400] = torch.randn(2, 400) - 200
    assert_same(x, torch.tensor([start, start + 399]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_counted(reduction):
    x = torch.randn(3, 5)
    assert_same(x, torch.full((3,), -100), reduction=reduction)
    assert_same(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64), reduction=reduction)
    assert_same(torch.randn(0, 5), torch.zeros(0, 5), reduction=reduction)
    assert_same(torch.randn(0, 5, 2), torch.zeros(0, 2, dtype=torch.int64), reduction=reduction)


def test_ignored_rows_are_not_read():
    x = torch.randn(3, 5)
    x[1] = float("nan")
    loss, grad = gradient(F.cross_entropy, x, torch.tensor([0, -100, 2]))
    assert loss.isfinite() and grad.isfinite().all() and grad[1].eq(0).all()


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (2, 5, 3, 4), (2, 5, 1, 2, 3)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_any_number_of_dimensions(shape, probabilities):
    x = torch.randn(shape)
    class_dim = 0 if len(shape) == 1 else 1
    if probabilities:
        y = torch.softmax(torch.randn(shape), class_dim)
    else:
        y = torch.randint(0, 5, shape[:class_dim] + shape[class_dim + 1 :])
    for reduction in ("none", "mean", "sum"):
        assert_same(x, y, reduction=reduction, label_smoothing=0.2, weight=torch.rand(5))
        if len(shape) == 4:
            assert_same(x.to(memory_format=torch.channels_last), y, reduction=reduction)


def test_gradient_of_probabilities():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    q = torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, q: F.cross_entropy(x, q, label_smoothing=0.1), [x, q])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradient_of_class_weights(reduction):
    """PyTorch differentiates by the weights under class probabilities, and refuses to with class indices."""
    x, q = torch.randn(2, 5, 3, requires_grad=True), torch.rand(2, 5, 3)
    w = torch.rand(5, requires_grad=True)
    ours, theirs = (f(x, q, w, reduction=reduction, label_smoothing=0.1) for f in (F.cross_entropy, TF.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), [x, w]), torch.autograd.grad(theirs.sum(), [x, w]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"^cross_entropy: weight must not require a gradient"):
        F.cross_entropy(x, q.argmax(1), w)


@pytest.mark.parametrize("classes", [1, 2, 15, 31, 32, 33, 65, *([] if EMULATED else [1023, 1041, 2100])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_class_finds_its_probability(classes, dtype):
    """However exponentials lie in the scratch row: p - 1 at the true class and p elsewhere, wherever a row begins."""
    torch.manual_seed(0)
    wide, y = torch.randn(classes, classes + 3).to(dtype), torch.arange(classes)
    for offset in (0, 1) if INTERPRETED else (0, 1, 2):
        x = wide[:, offset : offset + classes]
        _, grad = gradient(F.cross_entropy, x, y, reduction="sum")
        p = torch.softmax(x.double(), 1)
        p[y, y] -= 1
        torch.testing.assert_close(grad.double(), p, rtol=half_unit(dtype), atol=1e-7)


@cpu_kernels
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))],
    ids=str,
)
def test_gradients_beyond_the_caches(dtype):
    """More than 64 MiB are written past the caches, from the first aligned item of each row on."""
    torch.manual_seed(0)
    x, y = torch.randn(331, 101377).to(dtype), torch.randint(0, 101377, (331,))
    y[::7] = torch.arange(48)  # near the beginning of rows of every alignment
    _, grad = gradient(F.cross_entropy, x, y, reduction="sum")
    again = x.clone().requires_grad_()
    F.cross_entropy(again.clone(), y, reduction="sum", inplace_backward=True).backward()
    for rows in torch.arange(331).split(50):
        p = torch.softmax(x[rows].double(), 1)
        p[torch.arange(len(rows)), y[rows]] -= 1
        for found in (grad[rows], again.grad[rows]):
            torch.testing.assert_close(found.double(), p, rtol=half_unit(dtype), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_of_any_payload(dtype):
    """A NaN stays one through the rounding, whatever its bits."""
    x = torch.randn(2, 70).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    x.view(bits)[1, 33] = torch.iinfo(bits).max
    _, grad = gradient(F.cross_entropy, x, torch.tensor([3, 4]))
    assert grad[0].isfinite().all() and grad[1].isnan().all()
    weight = torch.ones(70).to(dtype)
    weight.view(bits)[4] = -1
    _, grad = gradient(F.cross_entropy, torch.randn(2, 70).to(dtype), torch.tensor([3, 4]), weight, reduction="sum")
    assert grad[0].isfinite().all() and grad[1].isnan().all()


def test_confident_rows_keep_their_gradient():
    """p - 1 at the true class, formed before it is rounded: rounding p first would give 0."""
    x = torch.tensor([[12.0, 0.0, 0.0]], dtype=torch.bfloat16)
    _, grad = gradient(F.cross_entropy, x, torch.tensor([0]))
    expected = gradient(TF.cross_entropy, x.double(), torch.tensor([0]))[1]
    # float32 leaves 2^-24 / 1.2e-5 = 0.5% for each rounding of a number near 1.
    torch.testing.assert_close(grad.double(), expected, rtol=3e-2, atol=0)


def test_float16_under_a_loss_scale():
    """Gradients of 1/N that float16 cannot hold appear once the incoming gradient lifts them."""
    rows = 256 if INTERPRETED else 4096
    x = torch.randn(rows, 64, dtype=torch.float16)
    y = torch.randint(0, 64, (rows,))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    (F.cross_entropy(ours, y) * 8192).backward()
    (TF.cross_entropy(theirs, y) * 8192).backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-3, atol=1e-5)


class TestInplaceBackward:
    y = torch.tensor([0, 3, 1])

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradient_takes_the_storage_of_the_logits(self, dtype, reduction):
        x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
        logits = x * 2.0
        before = logits.detach().clone()
        loss = F.cross_entropy(logits, self.y, reduction=reduction, inplace_backward=True)
        assert torch.equal(logits, before)  # until backward they keep their values
        incoming = torch.randn_like(loss)
        loss.backward(incoming)
        z = x.detach().clone().requires_grad_()
        F.cross_entropy(z * 2.0, self.y, reduction=reduction).backward(incoming)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert not torch.equal(logits, before)

    def test_second_backward_is_an_error(self):
        logits = torch.randn(3, 5, requires_grad=True) * 1.0
        loss = F.cross_entropy(logits, self.y, inplace_backward=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace_backward"):
            loss.backward()

    def test_other_users_of_the_logits_notice(self):
        logits = torch.randn(3, 5, requires_grad=True) * 1.0
        loss = F.cross_entropy(logits, self.y, inplace_backward=True)
        other = logits.pow(2).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        logits = torch.randn(3, 5, requires_grad=True) * 1.0
        both = [F.cross_entropy(logits, self.y, inplace_backward=True) for _ in range(2)]
        with pytest.raises(RuntimeError):
            (both[0] + both[1]).backward()

    NOT_OWN = {
        "parameter": lambda w: w,
        "view": lambda w: w.view(3, 5),
        "rows": lambda w: w[1:],
        "one row": lambda w: w[0],
        "reshape": lambda w: w.reshape(5, 3),
        "transpose": lambda w: w.t(),
        "expand": lambda w: w[:1].expand(3, 5),
        "image": lambda w: w[None].transpose(1, 2),
        "detached": lambda w: w.detach().requires_grad_(),
        "view of detached": lambda w: w.detach().requires_grad_()[1:],
        "data": lambda w: w.data.requires_grad_(),
        "cast to its own dtype": lambda w: w.to(w.dtype),
        "float": lambda w: w.float(),
        "contiguous": lambda w: w.contiguous(),
        "to": lambda w: w.to(w.device),
        "view as itself": lambda w: w.view_as(w),
        "unbind": lambda w: (w * 1.0).unbind(0)[1],
        "split": lambda w: (w * 1.0).split(2)[0],
        "chunk": lambda w: (w * 1.0).chunk(2)[0],
        "view of a chunk": lambda w: (w * 1.0).chunk(2)[0][:1],
        "view without gradients": lambda w: view_without_gradients(w * 1.0),
    }

    @pytest.mark.parametrize("backend", [None, "eager"])
    @pytest.mark.parametrize("make", NOT_OWN)
    def test_only_own_results_are_overwritten(self, make, backend):
        """Where PyTorch refuses an operation in place, before anything is computed: even a bad target is not seen."""
        w = torch.nn.Parameter(torch.randn(3, 5))
        before = w.detach().clone()
        logits = self.NOT_OWN[make](w)
        with pytest.raises(RuntimeError, match=r"in-place|modified inplace"):
            logits.mul_(1.0)
        y = torch.full(logits.shape[:1] if logits.dim() == 2 else logits.shape[2:] if logits.dim() == 1 else (1, 3), 99)
        with fastllm.use_backend(backend) if backend else contextlib.nullcontext():
            with pytest.raises(
                RuntimeError, match=r"^cross_entropy: input must be logits of your own for inplace_backward"
            ):
                F.cross_entropy(logits, y, inplace_backward=True)
            with pytest.raises(RuntimeError, match="inplace_backward"):
                F.cross_entropy(w, torch.softmax(torch.randn(3, 5), 1).double(), inplace_backward=True)  # w is cast
        assert torch.equal(w, before) and w.grad is None and w._version == 0

    @pytest.mark.parametrize(
        "make",
        [lambda z: z, lambda z: z.view(5, 3), lambda z: z[1:], lambda z: z.flatten().view(3, 5), lambda z: z[0]],
        ids=["itself", "view", "rows", "two views", "one row"],
    )
    def test_own_results_and_their_views_are_overwritten(self, make):
        x = torch.randn(3, 5, requires_grad=True)
        logits = make(x * 2.0)
        y = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        F.cross_entropy(logits, y, inplace_backward=True).backward()
        (expected,) = torch.autograd.grad(TF.cross_entropy(make(x * 2.0), y), x)
        torch.testing.assert_close(x.grad, expected)

    def test_traced_leaf_is_an_error(self):
        def step(a):
            torch._dynamo.reset()  # a frame that raised runs uncompiled, and what it calls would be compiled instead
            return torch.compile(lambda a: F.cross_entropy(a, self.y, inplace_backward=True), backend="aot_eager")(a)

        with pytest.raises(RuntimeError, match="logits of your own"):
            step(torch.randn(3, 5, requires_grad=True))
        step(torch.randn(3, 5, requires_grad=True) * 1.0).backward()

    def test_operation_that_saved_its_result_notices(self):
        """exp keeps its result for backward; the gradient written over it must not pass for that."""
        x = torch.randn(3, 5, requires_grad=True)
        for logits in (x.exp(), F.linear_relu(x, torch.randn(5, 5)), x.exp().view(5, 3)[:3]):
            loss = F.cross_entropy(logits, self.y.clamp(max=2), inplace_backward=True)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_no_grad_leaves_the_logits_alone(self):
        logits = torch.randn(3, 5)
        before = logits.clone()
        F.cross_entropy(logits, self.y, inplace_backward=True)
        with torch.no_grad():
            F.cross_entropy(logits.requires_grad_(), self.y, inplace_backward=True)
        assert torch.equal(logits, before)

    @pytest.mark.parametrize(
        "make", [lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(3, 5), lambda x: x[:, ::2]]
    )
    def test_other_layouts_are_copied(self, make):
        x = torch.randn(3, 5, requires_grad=True)
        logits = make(x * 1.0)
        before = logits.detach().clone()
        y = self.y.clamp(max=2)
        F.cross_entropy(logits, y, inplace_backward=True).backward()
        assert torch.equal(logits, before)
        (expected,) = torch.autograd.grad(TF.cross_entropy(make(x * 1.0), y), x)
        torch.testing.assert_close(x.grad, expected)

    def test_softcap_and_smoothing(self):
        x = torch.randn(3, 5, requires_grad=True)
        options = {"softcap": 2.0, "label_smoothing": 0.1, "lse_square_scale": 0.1, "weight": torch.rand(5)}
        (expected,) = torch.autograd.grad(F.cross_entropy(x, self.y, **options), x)
        F.cross_entropy(x * 1.0, self.y, inplace_backward=True, **options).backward()
        torch.testing.assert_close(x.grad, expected)


def test_worked_example():
    """-sum y log p for p = [0.2, 0.8] and y = [1, 0] is -log 0.2 = 1.6094."""
    logits = torch.tensor([0.2, 0.8]).log()
    assert F.cross_entropy(logits, torch.tensor([1.0, 0.0])).item() == pytest.approx(1.6094, abs=1e-4)
    assert F.cross_entropy(logits, torch.tensor(0)).item() == pytest.approx(1.6094, abs=1e-4)
