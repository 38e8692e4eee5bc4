"""log_probs and linear_log_probs against their definition in float64."""

import os
import re
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, cpu_kernels, drawn

import fastllm
import fastllm.functional as F
from fastllm.operations.log_probs import DIFFERENTIABLE, FIELDS

BACKEND = fastllm.backends.TABLE.get(os.environ.get("FASTLLM_BACKEND", "auto"))
pytestmark = [
    pytest.mark.numbers,
    pytest.mark.skipif(BACKEND is not None and "log_probs" not in BACKEND.operations, reason="it has no log_probs"),
]
KERNELS = fastllm.backends.TABLE["cpu"].missing is None
kernels = pytest.mark.skipif(
    not KERNELS or os.environ.get("FASTLLM_BACKEND") == "eager", reason="about the kernels and their walk over chunks"
)

ALL = FIELDS[:-1]
# Relative to the largest number of a result. Products in bfloat16 and float16 round the logits to that dtype.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def definition(z, target, top_ids=None, ignore_index=-100, temperature=1.0, softcap=None):
    """All fields, by PyTorch's differentiable operations."""
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    counted = target != ignore_index
    if isinstance(temperature, torch.Tensor):
        temperature = torch.where(counted, temperature, 1)[..., None]
    z = z / temperature
    y = torch.where(counted, target, 0).long()
    # Relative to the largest, whose own 1 is left to log1p: float64 too would round tails of e^-80 off.
    largest = torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).bool()
    below = torch.where(largest, 0.0, z - torch.where(largest, z, 0.0).sum(-1, keepdim=True))
    others = torch.where(largest, 0.0, below.exp())
    tail = others.sum(-1, keepdim=True).log1p()
    log_p = below - tail
    p = log_p.exp()
    finite = torch.where(p == 0, 0.0, log_p)
    fields = {
        "log_prob": log_p.gather(-1, y[..., None])[..., 0],
        "entropy": -(p * finite).sum(-1),
        "lse": z.logsumexp(-1),
        "argmax": z.argmax(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq_probs": others.square().sum(-1).log1p() - 2 * tail[..., 0],
    }
    result = {name: torch.where(counted, v, -1 if name == "argmax" else 0) for name, v in fields.items()}
    if top_ids is not None:
        top = log_p.gather(-1, torch.where(counted[..., None], top_ids, 0))
        result["top_log_prob"] = torch.where(counted[..., None], top, 0)
    return result


def close(got, truth, dtype, what):
    assert got.shape == truth.shape, (what, got.shape, truth.shape)
    got, truth = got.detach().double(), truth.detach().double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (got - truth).abs())
    size = float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 0.0
    bound = TOLERANCE[dtype] * size + 1e-40
    worst = float(torch.nan_to_num(error, nan=float("inf")).max()) if error.numel() else 0.0
    assert worst <= bound, f"{what}: error {worst:.3g} > {bound:.3g} (max {size:.3g})"


def check(call, logits, tensors, target, *, outputs=ALL, top_ids=None, seed=0, grads_of=DIFFERENTIABLE, **options):
    """``call(*tensors)`` is the function under test, ``logits(*tensors)`` what it is about, in float64."""
    dtype = tensors[0].dtype
    got = call(*tensors, target, outputs=outputs, top_ids=top_ids, **options)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].double()
    truth = definition(logits(*wide), target, top_ids, **options)
    for name in FIELDS:
        value = getattr(got, name)
        if name not in outputs and not (name == "top_log_prob" and top_ids is not None):
            assert value is None, name
            continue
        if name == "argmax":
            assert value.dtype == torch.int64
            # Equal where the logits of a low precision are the same; else it must name one as large but for rounding.
            if dtype in (torch.float32, torch.float64):
                assert torch.equal(value, truth[name])
            continue
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.requires_grad == (name in DIFFERENTIABLE and any(t.requires_grad for t in tensors)), name
        close(value, truth[name], dtype, name)
    names = [n for n in grads_of if getattr(got, n) is not None]
    leaves = [t for t in tensors if t.requires_grad]
    if not names or not leaves:
        return got
    incoming = [drawn(getattr(got, n), seed + i) for i, n in enumerate(names)]
    found = torch.autograd.grad([getattr(got, n) for n in names], leaves, incoming)
    expected = torch.autograd.grad(
        [truth[n] for n in names], [w for w in wide if w.requires_grad], [g.double() for g in incoming]
    )
    for i, (f, e, leaf) in enumerate(zip(found, expected, leaves, strict=True)):
        assert f.dtype == leaf.dtype
        close(f, e, dtype, f"gradient {i} of {names}")
    return got


def linear(x, w, b=None):
    return torch.nn.functional.linear(x, w, b)


def linear_call(*arguments, **options):
    x, w, *bias, target = arguments
    return F.linear_log_probs(x, w, target, linear_bias=bias[0] if bias else None, **options)


def plain_call(x, target, **options):
    return F.log_probs(x, target, **options)


def inputs(shape, features, classes, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    tensors = [torch.randn(*shape, features), torch.randn(classes, features) / features**0.5]
    if bias:
        tensors.append(torch.randn(classes))
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    target = torch.randint(classes, shape)
    return tensors, target


ROWS, FEW = (66, 20) if INTERPRETED else (150, 150)  # of several chunks, and of logits


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setenv("FASTLLM_LOSS_WORKSPACE", "1")  # 64 rows


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"softcap": 2.0, "temperature": 1.7}], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_every_field_in_several_chunks(dtype, options, index_dtype, small_chunks):
    tensors, target = inputs((ROWS,), 12, 37, dtype)
    target[::7] = -100
    target = target.to(index_dtype)
    ids = torch.randint(37, (ROWS, 5))
    ids[::7] = -5  # not read where the target is ignored
    check(linear_call, linear, tensors, target, top_ids=ids, **options)
    logits = torch.randn(FEW, 37).to(dtype).requires_grad_()
    check(plain_call, lambda z: z, [logits], target[:FEW], top_ids=ids[:FEW], **options)


@pytest.mark.parametrize("field", DIFFERENTIABLE)
def test_each_field_alone(field):
    tensors, target = inputs((9,), 5, 11)
    ids = torch.randint(11, (9, 3)) if field == "top_log_prob" else None
    outputs = () if field == "top_log_prob" else (field,)
    check(linear_call, linear, tensors, target, outputs=outputs, top_ids=ids)
    # Asked for with others, and alone in the incoming gradient.
    check(linear_call, linear, tensors, target, top_ids=ids, grads_of=(field,))


def test_nothing_asked_for():
    assert F.log_probs(torch.randn(2, 3), torch.tensor([0, 1]), outputs=()) == F.LogProbs()


def test_temperature_of_each_token(small_chunks):
    shape = (2, ROWS // 2)
    tensors, target = inputs(shape, 6, 13)
    target[0, :5] = -100
    temperature = torch.rand(shape) + 0.3
    temperature[0, :5] = 0.0  # not read
    ids = torch.randint(13, (*shape, 2))
    got = check(linear_call, linear, tensors, target, top_ids=ids, temperature=temperature, softcap=3.0)
    assert got.top_log_prob.shape == (*shape, 2)
    few = slice(None), slice(FEW // 2)
    logits = torch.randn(*target[few].shape, 13).requires_grad_()
    check(plain_call, lambda z: z, [logits], target[few], top_ids=ids[few], temperature=temperature[few])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_leading_dimensions(shape):
    tensors, target = inputs(shape, 4, 6)
    ids = torch.randint(6, (*shape, 2))
    check(linear_call, linear, tensors, target, top_ids=ids)
    check(plain_call, lambda z: z, [torch.randn(*shape, 6, requires_grad=True)], target, top_ids=ids)


def test_one_class():
    tensors, target = inputs((5,), 3, 1)
    check(linear_call, linear, tensors, target, top_ids=torch.zeros(5, 1, dtype=torch.int64))


def test_layouts_of_every_kind():
    logits = torch.randn(7, 9, 5).transpose(0, 2).requires_grad_()  # (5, 9, 7)
    target = torch.randint(7, (9, 5)).t()
    ids = torch.randint(7, (2, 9, 5)).permute(2, 1, 0)
    check(plain_call, lambda z: z, [logits], target, top_ids=ids)
    x, w = torch.randn(4, 6).t().requires_grad_(), torch.randn(4, 8).t().requires_grad_()
    target = torch.randint(8, (6,))
    check(linear_call, linear, [x, w], target)
    # An expanded incoming gradient, and repeated top_ids.
    check(linear_call, linear, [x, w], target, top_ids=torch.full((6, 4), 2))
    F.linear_log_probs(x, w, target, outputs=("entropy",)).entropy.sum().backward()


def test_ignored_rows_are_not_read(small_chunks):
    tensors, target = inputs((100,), 6, 9)
    target[10:80] = 3
    with torch.no_grad():
        tensors[0][10:80] = float("nan")
    got = F.linear_log_probs(tensors[0], tensors[1], target, linear_bias=tensors[2], ignore_index=3, outputs=ALL)
    for name in ALL:
        assert torch.all(getattr(got, name)[10:80] == (-1 if name == "argmax" else 0)), name
    grads = torch.autograd.grad((got.log_prob + got.entropy + got.lse).sum(), tensors)
    assert torch.all(grads[0][10:80] == 0)
    assert all(g.isfinite().all() for g in grads)
    logits = torch.full((3, 4), float("nan"), requires_grad=True)
    F.log_probs(logits, torch.full((3,), -100), outputs=("entropy",)).entropy.sum().backward()
    assert torch.all(logits.grad == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [20.0, 80.0])
@pytest.mark.parametrize("target", [3, 5])
def test_one_logit_far_above_the_others(dtype, gap, target):
    """Nearly certain rows: tails of e^-80 keep their relative accuracy in values and gradients."""
    logits = torch.randn(1, 50, dtype=dtype) * 0.1
    logits[0, 3] = gap
    check(plain_call, lambda z: z, [logits.requires_grad_()], torch.tensor([target]))
    for field in ("log_prob", "entropy"):  # alone, so that no larger gradient hides it
        check(plain_call, lambda z: z, [logits], torch.tensor([target]), outputs=(field,))


def test_minus_infinity():
    logits = torch.randn(6, 8)
    logits[0, 2] = logits[1, 1:] = logits[2, :3] = -torch.inf
    logits[4] = -torch.inf  # nothing is possible
    target = torch.tensor([2, 0, 5, 1, 3, 7])
    ids = torch.tensor([[2, 1]] * 6)
    check(plain_call, lambda z: z, [logits.clone().requires_grad_()], target, top_ids=ids, temperature=0.5)
    got = F.log_probs(logits.requires_grad_(), target, outputs=("entropy",))
    (grad,) = torch.autograd.grad(got.entropy[:4].sum(), logits)
    assert got.entropy[1] == 0 and grad[:4].isfinite().all()
    check(plain_call, lambda z: z, [logits[:4].detach().requires_grad_()], target[:4], outputs=("entropy",))


def test_minus_infinity_under_a_cap_and_not_a_number():
    logits = torch.randn(3, 8)
    logits[0, 2] = -torch.inf
    logits[1, 2] = torch.nan
    check(plain_call, lambda z: z, [logits[:1].requires_grad_()], torch.tensor([2]), softcap=2.0)
    got = F.log_probs(logits, torch.tensor([2, 3, 4]), outputs=("log_prob", "entropy", "lse"))
    for name in ("log_prob", "entropy", "lse"):
        assert getattr(got, name).isnan().tolist() == [False, True, False] or name == "log_prob"
    assert got.log_prob[1].isnan() and got.log_prob[2].isfinite()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_argmax_is_the_lowest_index(dtype):
    """NaN is the largest, as for torch.argmax."""
    logits = torch.zeros(9, 5000, dtype=dtype)
    logits[0, [3, 9, 4000]] = 3.0
    logits[1] = 2.0
    logits[2, 4999] = 1.0
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 4321] = -7.0
    logits[5, [70, 2000]] = torch.nan
    logits[6, 3000], logits[6, 4000] = torch.inf, torch.nan
    logits[7, [1500, 1600]] = torch.inf
    logits[8, 2000:2100] = 1.0
    for temperature in (1.0, 0.3):
        got = F.log_probs(logits, torch.zeros(9).long(), outputs=("argmax",), temperature=temperature).argmax
        assert got.tolist() == [3, 0, 4999, 0, 4321, 70, 4000, 1500, 2000] == logits.argmax(1).tolist()


@pytest.mark.parametrize("frozen", range(1, 8))
def test_frozen_inputs(frozen):
    tensors, target = inputs((9,), 4, 6)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(not frozen >> i & 1)
    check(linear_call, linear, tensors, target)
    if frozen == 7:
        assert not linear_call(*tensors, target).log_prob.requires_grad


@kernels
def test_a_frozen_weight_costs_no_product():
    from torch.utils.flop_counter import FlopCounterMode

    (x, w), target = inputs((9,), 4, 6, bias=False)
    product = 2 * 9 * 4 * 6
    for frozen, products in ((False, 4), (True, 3)):
        with FlopCounterMode(display=False) as counter:
            F.linear_log_probs(x, w.detach() if frozen else w, target).log_prob.sum().backward()
        assert counter.get_total_flops() == products * product


def test_gradcheck():
    tensors, target = inputs((6,), 3, 5, torch.float64)
    target[2] = -100
    temperature = torch.rand(6, dtype=torch.float64) + 0.5
    ids = torch.randint(5, (6, 2))

    def fields(x, w, b):
        got = F.linear_log_probs(
            x, w, target, linear_bias=b, outputs=ALL, top_ids=ids, temperature=temperature, softcap=3.0
        )
        return tuple(getattr(got, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(fields, tensors, fast_mode=INTERPRETED)


def fields_of(call, names, target, **options):
    """``call``'s differentiable fields as a function of its tensors."""

    def fields(*tensors):
        got = call(*tensors, target, outputs=[n for n in names if n != "top_log_prob"], **options)
        return tuple(getattr(got, name) for name in names)

    return fields


def test_second_derivatives():
    tensors, target = inputs((4,), 3, 5, torch.float64)
    target[2] = -100
    ids = torch.randint(5, (4, 2))
    for options in ({"softcap": 3.0, "temperature": 0.7}, {"temperature": torch.rand(4) + 0.5}):
        fields = fields_of(linear_call, DIFFERENTIABLE, target, top_ids=ids, **options)
        assert torch.autograd.gradgradcheck(fields, tensors, fast_mode=INTERPRETED)
        fields = fields_of(plain_call, DIFFERENTIABLE, target, top_ids=ids, **options)
        logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(fields, [logits], fast_mode=INTERPRETED)


@pytest.mark.contract
def test_transforms():
    """torch.func and forward-mode derivatives take the definition."""
    x, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, -100])

    def loss(x):
        got = F.log_probs(x, y, outputs=("log_prob", "entropy"))
        return (got.log_prob + 2 * got.entropy).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    tangent = torch.randn(3, 4)
    _, found = torch.func.jvp(loss, (x.detach(),), (tangent,))
    torch.testing.assert_close(found, (expected * tangent).sum())
    stacked = torch.randn(2, 3, 4)
    batched = torch.vmap(lambda x: F.log_probs(x, y).log_prob)(stacked)
    torch.testing.assert_close(batched, torch.stack([F.log_probs(x, y).log_prob for x in stacked]))


def test_two_backwards_agree(small_chunks):
    tensors, target = inputs((100,), 6, 9)
    fields = fields_of(linear_call, DIFFERENTIABLE, target, top_ids=target[:, None])(*tensors)
    incoming = [drawn(f, i) for i, f in enumerate(fields)]
    first = torch.autograd.grad(fields, tensors, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7.0)
    again = torch.autograd.grad(fields, tensors, incoming, retain_graph=True)
    other = torch.autograd.grad(fields, tensors, [3 * g for g in incoming])
    for a, b, c in zip(kept, again, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(3 * a, c)


@kernels
@pytest.mark.contract
def test_changed_inputs_are_told():
    tensors, target = inputs((5,), 3, 4)
    for changed in range(3):
        got = linear_call(*tensors, target)
        with torch.no_grad():
            tensors[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            got.log_prob.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    (x, w, b), target = inputs((30,), 4, 6)
    target[3] = -100
    ids = torch.randint(6, (30, 2))
    temperature = torch.rand(30) + 0.5

    def loss(x, w, b, target, ids, temperature):
        got = F.linear_log_probs(x, w, target, linear_bias=b, outputs=ALL, top_ids=ids, temperature=temperature)
        direct = F.log_probs(x, target.clamp(max=3), softcap=2.0, temperature=0.5)
        return (
            (got.log_prob * got.mean_logit.exp() + got.entropy).sum() + got.top_log_prob.sum() + direct.log_prob.sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (30, 17):
        arguments = (x[:rows], w, b, target[:rows], ids[:rows], temperature[:rows])
        value, truth = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(value, truth)
        for got, expected in zip(
            torch.autograd.grad(value, (x, w, b)), torch.autograd.grad(truth, (x, w, b)), strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.contract
@pytest.mark.skipif(not KERNELS, reason="no kernels here")
def test_opcheck():
    (x, w, b), target = inputs((5,), 4, 6)
    target[1] = -100
    ops, asked = torch.ops.fastllm, [True] * len(FIELDS)
    options = (-100, 0.7, 2.0)
    arguments = (x.detach(), w.detach(), b.detach(), target, None, torch.randint(6, (5, 2)), *options)
    torch.library.opcheck(ops.log_probs_forward.default, (*arguments, asked))
    *_, saved = ops.log_probs_forward(*arguments, asked)
    incoming = (torch.randn(5), torch.randn(5), None, torch.randn(5, 2), saved)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(ops.log_probs_backward.default, (*incoming, *arguments, *needs))
    logits, ids = torch.randn(5, 6), torch.randint(6, (5, 2))
    for temperature in (None, torch.rand(5) + 0.5):
        rows = (logits, target, temperature, ids, *options)
        torch.library.opcheck(ops.log_probs_rows_forward.default, (*rows, asked))
        torch.library.opcheck(ops.log_probs_rows_backward_.default, (*incoming, *rows, torch.empty(5, 6)))
        plain = (logits, None, None, *rows[1:])
        torch.library.opcheck(ops.log_probs_forward.default, (*plain, asked))
        torch.library.opcheck(ops.log_probs_backward.default, (*incoming, *plain, True, False, False))
    with pytest.raises(RuntimeError, match="not implemented"):  # a kernel operation has no derivative of its own
        ops.log_probs_forward(x.detach().requires_grad_(), *arguments[1:], asked)[0].sum().backward()


def test_autocast():
    (x, w, b), target = inputs((9,), 8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = F.linear_log_probs(x, w, target, linear_bias=b, outputs=ALL)
        direct = F.log_probs(x, target.clamp(max=5))
    low = [t.detach().bfloat16().requires_grad_() for t in (x, w, b)]
    expected = F.linear_log_probs(low[0], low[1], target, linear_bias=low[2], outputs=ALL)
    assert got.log_prob.dtype == torch.float32 and torch.equal(got.log_prob, expected.log_prob)
    assert torch.equal(direct.log_prob, F.log_probs(x, target.clamp(max=5)).log_prob)
    ours = torch.autograd.grad(got.log_prob.sum() + got.entropy.sum(), (x, w, b))
    theirs = torch.autograd.grad(expected.log_prob.sum() + expected.entropy.sum(), low)
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = F.linear_log_probs(x.double(), w.double(), target)
    assert double.log_prob.dtype == torch.float64


@cpu_kernels
@kernels
def test_logits_are_never_held(small_chunks):
    (x, w, b), target = inputs((1024,), 8, 40)

    def step():
        got = F.linear_log_probs(x, w, target, linear_bias=b, outputs=ALL, top_ids=target[:, None], softcap=3.0)
        torch.autograd.grad(got.log_prob.sum() + got.entropy.sum() + got.top_log_prob.sum(), (x, w, b))

    def largest(function):
        function()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        return max(event.self_cpu_memory_usage for event in profile.events())

    logits = 1024 * 40
    assert largest(lambda: torch.nn.functional.linear(x, w)) >= 4 * logits  # what holds them is seen
    assert largest(step) < logits


def test_repeated_calls_give_the_same_bits(small_chunks):
    tensors, target = inputs((ROWS,), 16, 50, torch.bfloat16)
    ids = torch.randint(50, (ROWS, 8))

    def step():
        got = linear_call(*tensors, target, outputs=ALL, top_ids=ids)
        fields = [getattr(got, name) for name in DIFFERENTIABLE]
        return [*fields, *torch.autograd.grad(sum(f.sum() for f in fields), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@cpu_kernels
@kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    """Alone or among others, wherever it starts in memory, by one thread or two."""

    def results(logits, target, ids):
        logits = logits.detach().requires_grad_()
        fields = fields_of(plain_call, DIFFERENTIABLE, target, top_ids=ids, temperature=0.7)(logits)
        return [*fields, *torch.autograd.grad([f.sum() for f in fields], logits)]

    logits, target, ids = torch.randn(67, 3001).to(dtype), torch.arange(67), torch.randint(3001, (67, 3))
    alone = [
        torch.cat(r)
        for r in zip(*(results(logits[i : i + 1], target[i : i + 1], ids[i : i + 1]) for i in range(67)), strict=True)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (logits, torch.cat([logits[:, :5], logits], 1)[:, 5:]):
                assert all(torch.equal(a, b) for a, b in zip(results(rows, target, ids), alone, strict=True))
    finally:
        torch.set_num_threads(before)


IDS = torch.tensor([[0], [-1], [2]])
X, Y, W = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(5, 4)
WRONG = [
    (IndexError, r"target must be in \[0, 4\).*got 4 at position 2", (X, torch.tensor([0, -100, 4])), {}),
    (IndexError, r"top_ids must be in \[0, 4\), got -1 at row 1, column 0", (X, Y), {"top_ids": IDS}),
    (IndexError, "input must have at least 1 dimension", (torch.tensor(1.0), torch.tensor(0)), {}),
    (NotImplementedError, "input must be float32.*got torch.int64", (X.long(), Y), {}),
    (ValueError, r"target must be .*\[3\], got \[2\]", (X, Y[:2]), {}),
    (RuntimeError, r"target must be .*\[3\], got \[3, 1\]", (X, Y[:, None]), {}),
    (RuntimeError, "target must be int64 or int32 class indices, got torch.float32", (X, Y.float()), {}),
    (RuntimeError, "target must be on input's device cpu, got meta", (X, Y.to("meta")), {}),
    (TypeError, "arguments must be tensors, got one of type list", (X, [0, 1, 2]), {}),
    (TypeError, "ignore_index must be int, got 1.5", (X, Y), {"ignore_index": 1.5}),
    (TypeError, "temperature must be float, got 'hot'", (X, Y), {"temperature": "hot"}),
    (ValueError, "temperature must be positive, got 0", (X, Y), {"temperature": 0}),
    (ValueError, r"temperature must be positive, got -1(\.0)? at position 0", (X, Y), {"temperature": Y - torch.ones(3)}),
    (RuntimeError, r"temperature must be a number or of target's shape \[3\], got \[\]", (X, Y), {"temperature": X[0, 0]}),
    (RuntimeError, "temperature must be floating point, got a tensor of torch.int64", (X, Y), {"temperature": Y}),
    (RuntimeError, "temperature must not require a gradient", (X, Y), {"temperature": torch.ones(3, requires_grad=True)}),
    (ValueError, "softcap must be positive or None, got -1.0", (X, Y), {"softcap": -1.0}),
    (TypeError, "outputs must be a tuple of names, got 'entropy'", (X, Y), {"outputs": "entropy"}),
    (ValueError, "outputs must be among .*got 'perplexity'", (X, Y), {"outputs": ("perplexity",)}),
    (ValueError, "'top_log_prob' only with top_ids", (X, Y), {"outputs": ("top_log_prob",)}),
    (TypeError, "top_ids must be a tensor or None, got list", (X, Y), {"top_ids": [[0]]}),
    (RuntimeError, "top_ids must be int64, got torch.int32", (X, Y), {"top_ids": Y[:, None].int()}),
    (RuntimeError, r"top_ids must be of target's shape .*\(3, K\), got \[3\]", (X, Y), {"top_ids": Y}),
    (ValueError, "top_ids must hold at most 1024 ids a row, got 1025", (X, Y), {"top_ids": Y[:, None].expand(3, 1025)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), WRONG, ids=[w[1][:40] for w in WRONG])
def test_wrong_arguments(error, message, arguments, options):
    with pytest.raises(error, match=f"^log_probs: .*{message}"):
        F.log_probs(*arguments, **options)


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        (r"input must be of shape \(\*, 4\)", (X[:, :2], W, Y), {}),
        ("linear_weight must be 2-D", (X, W[0], Y), {}),
        ("linear_weight must have input's dtype torch.float32, got torch.float64", (X, W.double(), Y), {}),
        (r"linear_bias must be of shape \(5,\)", (X, W, Y), {"linear_bias": X[0]}),
        ("input must be float32, float64", (X.long(), W.long(), Y), {}),
    ],
)
def test_wrong_layer(message, arguments, options):
    with pytest.raises(RuntimeError, match=f"^linear_log_probs: .*{message}"):
        F.linear_log_probs(*arguments, **options)


@pytest.mark.contract
def test_backends():
    served = fastllm.info()["operations"]
    assert served["log_probs"] == served["linear_log_probs"]
    assert served["log_probs"].startswith("CPU tensors: cpu" if KERNELS else "CPU tensors: ")
    for name in fastllm.backends.TABLE:
        backend = fastllm.backends.TABLE[name]
        if backend.missing is not None:
            continue
        with fastllm.use_backend(name):
            if backend.refusal("log_probs", X) is None:
                torch.testing.assert_close(F.log_probs(X, Y).log_prob, definition(X, Y)["log_prob"])
                F.linear_log_probs(X, W, Y)
                continue
            with pytest.raises(RuntimeError, match=f"^linear_log_probs: backend '{name}' cannot serve this call: it "):
                F.linear_log_probs(X, W, Y)
            with pytest.raises(RuntimeError, match=f"^log_probs: backend '{name}' cannot serve this call: it "):
                F.log_probs(X, Y)


@pytest.mark.contract
@pytest.mark.skipif(not KERNELS, reason="no kernels here")
@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_backward_keeps_the_backend_of_its_forward(name, monkeypatch):
    chosen = []
    call = torch.ops.fastllm.log_probs_backward
    monkeypatch.setattr(
        torch.ops.fastllm, "log_probs_backward", lambda *a: (chosen.append(fastllm.backends.get_backend()), call(*a))[1]
    )
    x = X.clone().requires_grad_()
    with fastllm.use_backend(name):
        got = F.log_probs(x, Y)
    with fastllm.use_backend("eager" if name == "cpu" else "cpu"):
        before = fastllm.backends.get_backend()
        got.log_prob.sum().backward()
        assert fastllm.backends.get_backend() == before
    assert chosen == ([] if name == "eager" else [name])


def test_layer():
    layer = fastllm.LinearLogProbs(4, 5, bias=True, temperature=0.7, softcap=3.0, outputs=("log_prob", "entropy"))
    assert list(layer.state_dict()) == ["linear.weight", "linear.bias"]
    options = {"linear_bias": layer.linear.bias, "softcap": 3.0, "outputs": ("log_prob", "entropy")}
    ids = Y[:, None]
    for given, temperature in ((None, 0.7), (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))):
        got = layer(X, Y, top_ids=ids, temperature=given)
        expected = F.linear_log_probs(X, layer.linear.weight, Y, top_ids=ids, temperature=temperature, **options)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert "temperature=0.7, softcap=3.0" in repr(layer)


def test_examples_of_the_documentation():
    path = Path(__file__).resolve().parent.parent / "docs" / "per-token-statistics.md"
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M)
    assert len(blocks) >= 3
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
