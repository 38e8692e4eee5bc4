"""linear_cross_entropy against float64, every option and dtype."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from helpers import DTYPES, check_against_float64, cpu_kernels, run_python
from operations import cases_of

import fastllm
import fastllm.functional as F
from fastllm import eager

pytestmark = pytest.mark.numbers
TESTS = str(Path(__file__).resolve().parent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("linear_cross_entropy", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


# Around what the kernel for few features cuts at: panels of 4 to 32 rows, groups of panels, tiles and blocks of 64
# classes, vectors of 4 to 16 features with the bias beside them; and the first shapes beyond it.
SKINNY = [
    (1, 1, 1),
    (2, 7, 2),
    (8, 8, 63),
    (9, 15, 64),
    (17, 16, 65),
    (33, 31, 128),
    (65, 32, 130),
    (129, 20, 300),
    (300, 3, 77),
    (530, 10, 13),
    (9, 33, 64),
    (3, 2, 4096),
    (3, 2, 4097),
]


@cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d", "v"), SKINNY)
def test_few_features(n, d, v, dtype):
    torch.manual_seed(0)
    x = torch.randn(n, d).to(dtype).requires_grad_()
    w = (2 * torch.randn(v, d)).to(dtype).requires_grad_()
    b = torch.randn(v).to(dtype).requires_grad_()
    cw = torch.rand(v) + 0.5
    for reduction, weighted, biased, ids in (
        ("mean", False, True, torch.int64),
        ("sum", True, False, torch.int32),
        ("none", True, True, torch.int64),
    ):
        y = torch.randint(0, v, (n,))
        y[n // 3 :: 5] = -100
        options, own = {"reduction": reduction}, y.to(ids)

        def ours(x, w, b, y=own, weighted=weighted, options=options):
            return F.linear_cross_entropy(x, w, y, linear_bias=b, weight=cw.to(x) if weighted else None, **options)

        def reference(x, w, b, y=y, weighted=weighted, options=options):
            return TF.cross_entropy(TF.linear(x, w, b), y, weight=cw.to(x) if weighted else None, **options)

        check_against_float64(ours, reference, [x, w, b if biased else None])


@cpu_kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_few_features_some_gradients(wanted):
    """Whichever gradients are asked for, each has the bits that it has among all of them; the loss too."""
    torch.manual_seed(0)
    values = [torch.randn(70, 16), torch.randn(50, 16), torch.randn(50)]
    y = torch.randint(0, 50, (70,))

    def run(wanted):
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(values)]
        loss = F.linear_cross_entropy(inputs[0], inputs[1], y, linear_bias=inputs[2])
        return loss.detach(), torch.autograd.grad(loss, [inputs[i] for i in wanted])

    (loss, grads), (whole_loss, all_grads) = run(wanted), run((0, 1, 2))
    assert torch.equal(loss, whole_loss)
    assert torch.equal(F.linear_cross_entropy(values[0], values[1], y, linear_bias=values[2]), loss)
    for i, grad in zip(wanted, grads, strict=True):
        # Groups of rows are cut otherwise where nothing is summed over them: input's gradient is a row's own.
        assert torch.equal(grad, all_grads[i])


@cpu_kernels
@pytest.mark.skipif(fastllm.backends.get_backend() not in ("auto", "cpu"), reason="library products read every row")
def test_few_features_rows_that_do_not_count():
    """Ignored rows are skipped, whole groups of them too, and what they hold is not read."""
    torch.manual_seed(0)
    x, w, b = torch.randn(600, 12), torch.randn(40, 12), torch.randn(40)
    y = torch.randint(0, 40, (600,))
    y[:200] = y[333] = -100
    dirty = x.clone()
    dirty[y == -100] = float("nan")
    counted = y != -100

    def gradients(x, y):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = F.linear_cross_entropy(inputs[0], inputs[1], y, linear_bias=inputs[2])
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    clean, found = gradients(x[counted], y[counted]), gradients(dirty, y)
    for a, e in zip([found[0], found[1][counted], *found[2:]], clean, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-7)
    assert found[1][~counted].eq(0).all()


@cpu_kernels
@pytest.mark.parametrize("bias", [float("-inf"), float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", [slice(None), slice(0, 3), slice(5, 40)], ids=str)
def test_few_features_special_logits(where, bias):
    """Masked classes, rows of -inf alone, infinite and NaN logits: what PyTorch gives."""
    torch.manual_seed(0)
    x, w, b = torch.randn(11, 6), torch.randn(70, 6), torch.randn(70)
    b[where] = bias
    y = torch.tensor([1, 50, 69, 2, -100, 39, 0, 45, 60, 51, 52])
    results = []
    for f in (
        lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b),
        lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), y),
    ):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = f(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    ours, theirs = results
    ours[1], theirs[1] = (g[y != -100] for g in (ours[1], theirs[1]))  # an ignored row's is 0, PyTorch's may be NaN
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks(dtype):
    """Chunks of at most 64 rows, in a process of their own: the size is read once. Few and very many classes, neither
    in whole vectors: rows of logits are padded, and a wide product is cut into blocks of columns."""
    code = f"""
import sys; sys.path.insert(0, {TESTS!r})
import conftest
import torch
import torch.nn.functional as TF
import fastllm.functional as F
from fastllm import eager
from helpers import EMULATED, INTERPRETED, check_against_float64
torch.manual_seed(0)
few = 200 if INTERPRETED else 900
sizes = ((65, few), (128, few)) if EMULATED else ((65, few), (128, few), (300, few), (70, 16389))
for n, classes in sizes:
    for reduction in ("none", "mean", "sum"):
        x = torch.randn(n, 40).to({dtype}).requires_grad_()
        w = (torch.randn(classes, 40) / 5).to({dtype}).requires_grad_()
        b = torch.randn(classes).to({dtype}).requires_grad_()
        y = torch.randint(0, classes, (n,)); y[3] = -100
        check_against_float64(
            lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction),
            lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), y, reduction=reduction), [x, w, b])
print("checked")
"""
    result = run_python(code, {"FASTLLM_LOSS_WORKSPACE": "1"})
    assert result.stdout.strip() == "checked", result.stderr


@cpu_kernels
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


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_of_an_input_without_features(reduction):
    """Only the bias has something to learn; its gradient starts in memory that held NaN."""
    y = torch.tensor([3, -100, 0])
    for _ in range(3):
        held = [torch.full((7,), float("nan"), dtype=torch.float64) for _ in range(50)]
        del held
        x, w = torch.randn(3, 0).double().requires_grad_(), torch.randn(7, 0).double().requires_grad_()
        b = torch.randn(7).double().requires_grad_()
        check_against_float64(
            lambda x, w, b: F.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction),
            lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), y, reduction=reduction),
            [x, w, b],
        )


def test_gradient_of_class_weights():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    q, classes = torch.rand(3, 5), torch.rand(5, requires_grad=True)
    ours = F.linear_cross_entropy(x, w, q, weight=classes)
    theirs = TF.cross_entropy(TF.linear(x, w), q, classes)
    torch.testing.assert_close(ours, theirs)
    wanted = [x, w, classes]
    for a, b in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [3, 40], ids=["own kernel", "products"])
def test_mean_over_weights_that_sum_to_zero(features, dtype):
    """0 over 0: NaN in the loss and in the gradients that counted rows reach, whatever is smoothed or added."""
    torch.manual_seed(0)
    x, w = torch.randn(3, features).to(dtype), torch.randn(5, features).to(dtype)
    weight, y = torch.tensor([0.5, 0, 2, 0, 1], dtype=dtype), torch.tensor([1, -100, 3])
    for smoothing, s in itertools.product([0.0, 0.1], [0.0, 0.25]):
        results = []
        for function in (F.linear_cross_entropy, eager.linear_cross_entropy):
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            options = dict(weight=weight, label_smoothing=smoothing, lse_square_scale=s)
            output = function(*leaves, y, **options)
            once = torch.autograd.grad(output, leaves, retain_graph=True)
            results.append([output, *once, *torch.autograd.grad(output, leaves, torch.full_like(output, 1.5))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_derivatives_reach_the_bias(reduction, dtype):
    """Also where backward has a copy of its numbers: after a change of the bias, with its graph, leaf or not."""
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
    y = torch.tensor([1, -100, 3])
    for scaled in (False, True):
        results = []
        for function in (F.linear_cross_entropy, eager.linear_cross_entropy):
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            bias = leaves[2] * 2 if scaled else leaves[2]
            output = function(*leaves[:2], y, linear_bias=bias, reduction=reduction)
            grads = torch.autograd.grad(output.sum() * 1.5, leaves, create_graph=True)
            results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
        for a, b2 in zip(*results, strict=True):
            torch.testing.assert_close(
                a, b2, rtol=2e-2 if dtype == torch.float16 else 1e-4, atol=1e-2 if dtype == torch.float16 else 1e-5
            )
