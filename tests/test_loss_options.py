"""num_items, all_ignored and shift of the losses, against their definitions in plain PyTorch and float64."""

# ruff: noqa: B023 - every function is called in the turn of the loop that makes it

import itertools

import pytest
import torch
import torch.nn.functional as TF
from helpers import DEVICE, check_against_float64, drawn

import fastllm
import fastllm.functional as F
from fastllm import eager

pytestmark = pytest.mark.contract

BACKENDS = ["auto", "eager"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"lse_square_scale": 0.1},
    {"softcap": 2.0},
    {"weighted": True},
    {"weighted": True, "label_smoothing": 0.2, "lse_square_scale": 0.1, "softcap": 3.0},
]


def data(dtype=torch.float32, rows=7, features=5, classes=6):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype).requires_grad_()

    target = torch.randint(0, classes, (rows,), generator=generator, device="cpu").to(DEVICE)
    target[1] = -100
    return draw(rows, features), draw(classes, features), draw(classes), draw(rows, classes), target


def keywords(options, dtype, classes=6):
    options = dict(options)
    if options.pop("weighted", False):
        options["weight"] = (0.25 + torch.arange(classes) / classes).to(dtype)
    return options


def divided_eagerly(logits, target, options, num_items):
    """The sum of the losses, divided by a number: the definition."""
    options = dict(options)
    if "weight" in options:
        options["weight"] = options["weight"].to(logits.dtype)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    options = {k: v.to(wide.dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return (eager.cross_entropy(wide, target, reduction="sum", **options) / num_items).to(logits.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [11, 2.5, torch.tensor(11), torch.tensor(2.5, dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_num_items_divides_the_sum(options, number, backend):
    for dtype in DTYPES:
        x, w, b, logits, target = data(dtype)
        given = keywords(options, dtype)
        with fastllm.use_backend(backend):
            check_against_float64(
                lambda z: F.cross_entropy(z, target, num_items=number, **given),
                lambda z: divided_eagerly(z, target, given, number),
                [logits],
            )
            check_against_float64(
                lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, num_items=number, **given),
                lambda x, w, b: divided_eagerly(TF.linear(x, w, b), target, given, number),
                [x, w, b],
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_items_is_the_count_of_all_micro_batches(backend):
    _, _, _, logits, target = data(torch.float64)
    count = (target != -100).sum()
    with fastllm.use_backend(backend):
        parts = [F.cross_entropy(logits[s], target[s], num_items=count) for s in (slice(0, 2), slice(2, 7))]
    whole = TF.cross_entropy(logits, target)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (sum(parts), whole)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_items_with_probabilities_and_other_shapes(backend):
    for shape in ((6,), (4, 6), (2, 6, 3)):
        logits = drawn(torch.empty(shape, dtype=torch.float64), 2).requires_grad_()
        class_dim = 0 if len(shape) == 1 else 1
        probabilities = drawn(logits, 5).softmax(class_dim)
        for target in (probabilities, probabilities.argmax(class_dim), probabilities.argmax(class_dim).int()):
            with fastllm.use_backend(backend):
                found = F.cross_entropy(logits, target, num_items=3)
                same = F.cross_entropy(logits, target, all_ignored="zero")
            long = target if target.is_floating_point() else target.long()
            expected = TF.cross_entropy(logits, long, reduction="sum") / 3
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(same, TF.cross_entropy(logits, long))
            torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (found, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_beyond_float16(backend):
    """4096 rows of loss 20 add up to 82000; the weight's gradient of the sum is beyond 65504, too."""
    x = torch.full((4096, 4), 10.0, dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[0.5] * 4, [0.0] * 4], dtype=torch.float16, requires_grad=True)
    target = torch.ones(4096, dtype=torch.int64)
    with fastllm.use_backend(backend):
        loss = F.linear_cross_entropy(x, w, target, num_items=4096)
        grads = torch.autograd.grad(loss, (x, w))
        logits = TF.linear(x, w).detach().requires_grad_()
        of_logits = F.cross_entropy(logits, target, num_items=torch.tensor(4096))
    assert abs(loss.item() - 20) < 0.1 and abs(of_logits.item() - 20) < 0.1
    torch.testing.assert_close(
        grads[1], torch.tensor([[10.0] * 4, [-10.0] * 4], dtype=torch.float16), rtol=0.01, atol=0
    )
    torch.testing.assert_close(grads[0].float() * 4096, torch.full((4096, 4), 0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("rows", [0, 7])
def test_nothing_counted_is_zero(options, rows, backend):
    for dtype in DTYPES:
        x, w, b, logits, target = data(dtype)
        x, logits, target = x[:rows].detach(), logits[:rows].detach(), torch.full((rows,), -100)
        leaves = [t.detach().requires_grad_() for t in (x, w, b, logits)]
        x, w, b, logits = leaves
        given = keywords(options, dtype) | {"all_ignored": "zero"}
        with fastllm.use_backend(backend):
            losses = (
                F.linear_cross_entropy(x, w, target, linear_bias=b, **given),
                F.cross_entropy(logits, target, **given),
            )
        for loss in losses:
            assert loss.dtype == dtype and float(loss) == 0
            (3 * loss).backward()
        assert all(leaf.grad is not None and leaf.grad.count_nonzero() == 0 for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=repr)
def test_weights_that_sum_to_zero_count_for_nothing(options, backend):
    for dtype in DTYPES:
        *leaves, target = data(dtype)
        weight = torch.ones(6, dtype=dtype)
        weight[3] = 0
        target[target >= 0] = 3
        x, w, b, logits = leaves
        given = {**options, "weight": weight}
        with fastllm.use_backend(backend):
            assert F.cross_entropy(logits, target, **given).isnan() or options
            given["all_ignored"] = "zero"
            losses = (
                F.linear_cross_entropy(x, w, target, linear_bias=b, **given),
                F.cross_entropy(logits, target, **given),
            )
        for loss in losses:
            assert float(loss) == 0
            loss.backward()
        assert all(leaf.grad.count_nonzero() == 0 for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_all_ignored_changes_no_other_mean(options, backend):
    for dtype in DTYPES:
        x, w, b, logits, target = data(dtype)
        given = keywords(options, dtype)
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}

        def reference(logits):
            exact = logits.dtype == torch.float64
            return eager.cross_entropy(logits, target, **(wide if exact else given))

        with fastllm.use_backend(backend):
            check_against_float64(
                lambda z: F.cross_entropy(z, target, all_ignored="zero", **given), reference, [logits]
            )
            check_against_float64(
                lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, all_ignored="zero", **given),
                lambda x, w, b: reference(TF.linear(x, w, b)),
                [x, w, b],
            )
            for reduction in ("none", "sum"):
                found = F.cross_entropy(logits, target, reduction=reduction, all_ignored="zero", **given)
                torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction=reduction, **given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [0, 0.0, torch.tensor(0)], ids=repr)
def test_zero_items(number, backend):
    _, _, _, logits, target = data()
    ignored = torch.full_like(target, -100)
    with fastllm.use_backend(backend):
        loss = F.cross_entropy(logits, target, num_items=number, all_ignored="zero")
        assert float(loss) == 0 and torch.autograd.grad(loss, logits)[0].count_nonzero() == 0
        assert F.cross_entropy(logits, target, num_items=number).isinf()
        assert F.cross_entropy(logits, ignored, num_items=number).isnan()
        loss = F.cross_entropy(logits, ignored, num_items=5)
        assert float(loss) == 0 and torch.autograd.grad(loss, logits)[0].count_nonzero() == 0


def shifted_eagerly(x, w, target, ignore_index=-100, **options):
    """Position t against target t + 1, by slices."""
    logits = TF.linear(x[..., :-1, :], w).flatten(0, -2)
    loss = eager.cross_entropy(logits, target[..., 1:].flatten().long(), ignore_index=ignore_index, **options)
    return loss if loss.dim() == 0 else TF.pad(loss.view(target[..., 1:].shape), (0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 1), (2, 6)], ids=str)
def test_shift_scores_the_next_target(shape, reduction, backend):
    w = drawn(torch.empty(6, 5, dtype=torch.float64), 3).requires_grad_()
    for dtype, ignore in itertools.product((torch.int64, torch.int32), (-100, 2, 2**40)):
        x = drawn(torch.empty(*shape, 5, dtype=torch.float64), 4).requires_grad_()
        target = torch.randint(0, 6, shape).to(dtype)
        kept = target.clone()
        with fastllm.use_backend(backend):
            check_against_float64(
                lambda x, w: F.linear_cross_entropy(x, w, target, reduction=reduction, ignore_index=ignore, shift=True),
                lambda x, w: shifted_eagerly(x, w, target, ignore, reduction=reduction),
                [x, w],
            )
        assert torch.equal(target, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shift_with_the_other_options(backend):
    x = drawn(torch.empty(3, 4, 5, dtype=torch.float64), 4).requires_grad_()
    w = data(torch.float64)[1]
    target = torch.arange(12).view(3, 4) % 6
    target[0, 2] = -100
    given = keywords(OPTIONS[-1], torch.float64)
    with fastllm.use_backend(backend):
        found = F.linear_cross_entropy(x, w, target, shift=True, num_items=5, **given)
        expected = shifted_eagerly(x, w, target, reduction="sum", **given) / 5
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v, (x, w)) for v in (found, expected)))
        for positions in (0, 1):  # nothing follows
            loss = F.linear_cross_entropy(x[:, :positions], w, target[:, :positions], shift=True, all_ignored="zero")
            assert float(loss) == 0 and torch.autograd.grad(loss, w)[0].count_nonzero() == 0


def test_shift_takes_the_input_where_it_lies(monkeypatch):
    seen = []
    operation = F.native

    def spy(op, *tensors):
        seen.append(tensors[0].data_ptr())
        return operation(op, *tensors)

    monkeypatch.setattr(F, "native", spy)
    x, w = torch.randn(3, 4, 5), torch.randn(6, 5)
    F.linear_cross_entropy(x, w, torch.zeros(3, 4, dtype=torch.int64), shift=True)
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(backend):
    x, w, b, logits, target = data()
    for dtype, number in itertools.product((torch.bfloat16, torch.float16), (9, torch.tensor(9))):
        with fastllm.use_backend(backend), torch.autocast("cpu", dtype=dtype):
            found = F.cross_entropy(logits.to(dtype), target, num_items=number)
            mean = F.linear_cross_entropy(x, w, target, linear_bias=b, all_ignored="zero")
            linear = F.linear_cross_entropy(x, w, target, linear_bias=b, num_items=number)
            plain = F.linear_cross_entropy(x, w, target, linear_bias=b)
        assert found.dtype == torch.float32 and linear.dtype == plain.dtype == mean.dtype
        torch.testing.assert_close(found, divided_eagerly(logits.to(dtype).float(), target, {}, 9), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean, plain)
        torch.testing.assert_close(linear, plain * 6 / 9, rtol=2e-2 if linear.dtype == dtype else 1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_one_graph(backend):
    x, w, _, logits, target = data(torch.float64)
    weight = torch.rand(6, dtype=torch.float64)

    def losses(x, w, logits, target, number):
        return (
            F.cross_entropy(logits, target, num_items=number),
            F.cross_entropy(logits, target, weight, all_ignored="zero"),
            F.cross_entropy(logits, target, all_ignored="zero", num_items=number),
            F.linear_cross_entropy(x, w, target, all_ignored="zero"),
            F.linear_cross_entropy(x[None], w, target[None], shift=True, num_items=number),
            F.linear_cross_entropy(x[None], w, target[None], shift=True, reduction="none").sum(),
        )

    torch.compiler.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=True)
    for number in (3, torch.tensor(3.5)):
        with fastllm.use_backend(backend):
            expected, found = losses(x, w, logits, target, number), compiled(x, w, logits, target, number)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(sum(v), (x, w, logits)) for v in (found, expected)]
        torch.testing.assert_close(*grads)


def test_inplace_backward_and_second_derivatives():
    for dtype in (torch.float32, torch.float16):
        _, _, _, logits, target = data(dtype)
        for options in ({"num_items": 9}, {"all_ignored": "zero"}):
            expected = torch.autograd.grad(F.cross_entropy(logits, target, **options), logits)[0]
            copy = logits.clone()
            loss = F.cross_entropy(copy, target, inplace_backward=True, **options)
            found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
            torch.testing.assert_close(found, expected)
            assert torch.equal(copy, found)
            with pytest.raises(RuntimeError, match="a second backward"):
                torch.autograd.grad(loss, logits)
    _, _, _, logits, target = data(torch.float64)
    for options in (
        {"num_items": 9},
        {"all_ignored": "zero"},
        {"all_ignored": "zero", "weight": torch.rand(6).double()},
    ):
        assert torch.autograd.gradgradcheck(lambda z: F.cross_entropy(z, target, **options), logits)


def test_layers_pass_them_on():
    x, w, _, logits, target = data()
    layer = fastllm.CrossEntropyLoss(num_items=9, all_ignored="zero")
    torch.testing.assert_close(layer(logits, target), F.cross_entropy(logits, target, num_items=9))
    layer = fastllm.LinearCrossEntropyLoss(5, 6, num_items=9, all_ignored="zero", shift=True)
    layer.linear.weight = torch.nn.Parameter(w.detach())
    expected = shifted_eagerly(x, w, target, reduction="sum") / 9
    torch.testing.assert_close(layer(x, target), expected)
    for word in ("num_items=9", "all_ignored=zero", "shift=True"):
        assert word in repr(layer) and word not in repr(fastllm.LinearCrossEntropyLoss(5, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_are_named(backend):
    x, w, _, logits, target = data()
    calls = {
        "cross_entropy": lambda **options: F.cross_entropy(logits, target, **options),
        "linear_cross_entropy": lambda **options: F.linear_cross_entropy(x, w, target, **options),
    }
    mistakes = [
        ({"all_ignored": "none"}, ValueError, "all_ignored must be 'nan' or 'zero', got 'none'"),
        ({"all_ignored": None}, ValueError, "all_ignored must be 'nan' or 'zero', got None"),
        ({"all_ignored": "none", "reduction": "sum"}, ValueError, "all_ignored must be"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items must be None for another reduction .* got 'sum'"),
        ({"num_items": 3, "reduction": "none"}, ValueError, "num_items must be None for another reduction"),
        ({"num_items": torch.ones(1)}, ValueError, r"num_items must be a number or a 0-dim tensor, got shape \(1,\)"),
        ({"num_items": "3"}, TypeError, "num_items must be float, got '3' of type str"),
        ({"num_items": torch.tensor(3, device="meta")}, RuntimeError, "num_items must be on cpu.* got meta"),
    ]
    deep = torch.zeros(6, 2, 5)
    shifted = [
        (lambda: F.linear_cross_entropy(x, w, target, shift=1), TypeError, "shift must be bool, got 1"),
        (lambda: F.linear_cross_entropy(x[0], w, target[0], shift=True), RuntimeError, "input must be 2-D or 3-D"),
        (lambda: F.linear_cross_entropy(x, w, target[1:], shift=True), RuntimeError, r"target must hold .* \(7,\)"),
        (lambda: F.linear_cross_entropy(x, w, logits, shift=True), RuntimeError, r"got shape \(7, 6\)"),
        (lambda: F.linear_cross_entropy(x, deep, target, shift=True), RuntimeError, "linear_weight must be 2-D"),
    ]
    with fastllm.use_backend(backend):
        for (op, call), (options, error, message) in itertools.product(calls.items(), mistakes):
            with pytest.raises(error, match=f"^{op}: {message}"):
                call(**options)
        for call, error, message in shifted:
            with pytest.raises(
                error, match=f"^linear_cross_entropy: {message}" if "got shape" not in message else message
            ):
                call()
