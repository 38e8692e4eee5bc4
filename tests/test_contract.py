"""What every operation promises, whatever it computes: derivatives, tracing, determinism, no side effects."""

import contextlib
import itertools
import os
import weakref

import pytest
import torch
import torch.nn.functional as TF
from helpers import DEVICE, INTERPRETED, bytes_left, check_against_float64, cpu_kernels, drawn
from operations import ALL, Case, cases_of, plain_calls, small_cases
from torch.utils.checkpoint import checkpoint

import fastllm
import fastllm.functional as F

OPERATIONS = ("embedding", "linear_relu", "relu_mlp", "mse_loss", "cross_entropy", "linear_cross_entropy")
SMALL = small_cases()
native = pytest.mark.skipif(
    all(fastllm.backends.TABLE[name].missing is not None for name in ("cpu", "triton")), reason="no kernels here"
)


def differentiable(case):
    return [a for a in case.inputs if a is not None and a.requires_grad]


def gradients(case, seed=0, **kwargs):
    output = case.ours(*case.inputs)
    incoming = drawn(output, seed)
    return output, torch.autograd.grad(output, differentiable(case), incoming, **kwargs)


@pytest.mark.contract
def test_every_operation_has_cases():
    assert {case.op for case in SMALL} == set(OPERATIONS)
    assert {case.op for f in ALL.values() for case in f(torch.float32)} == set(OPERATIONS)


@pytest.mark.numbers
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_gradcheck(case):
    # In random directions in the interpreter: an element at a time takes it minutes.
    assert torch.autograd.gradcheck(case.ours, case.inputs, fast_mode=INTERPRETED)


@pytest.mark.contract
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_gradgradcheck(case):
    assert torch.autograd.gradgradcheck(case.ours, case.inputs)


@pytest.mark.numbers
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_two_backwards_agree(case):
    output = case.ours(*case.inputs)
    incoming = torch.randn_like(output)
    wanted = differentiable(case)
    first = torch.autograd.grad(output, wanted, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7.0)  # what the caller does to a gradient must not reach the next
    second = torch.autograd.grad(output, wanted, incoming, retain_graph=True)
    third = torch.autograd.grad(output, wanted, incoming)
    for a, b, c in zip(kept, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, wanted, incoming)


@pytest.mark.numbers
@pytest.mark.parametrize("case", [c for c in SMALL if c.name.split("-")[-1] in ("mean", "sum")], ids=repr)
def test_two_backwards_agree_for_an_incoming_gradient_of_one(case):
    output = case.ours(*case.inputs)
    wanted = differentiable(case)
    first = [g.clone() for g in torch.autograd.grad(output, wanted, retain_graph=True)]
    threefold = torch.autograd.grad(output, wanted, torch.full_like(output, 3.0), retain_graph=True)
    last = torch.autograd.grad(output, wanted)
    for a, b, c in zip(first, threefold, last, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(3 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, wanted)


@pytest.mark.numbers
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_inputs_unchanged(case):
    before = [None if a is None else a.detach().clone() for a in case.inputs]
    versions = [None if a is None else a._version for a in case.inputs]
    gradients(case)
    for a, b, v in zip(case.inputs, before, versions, strict=True):
        assert a is None or (torch.equal(a, b) and a._version == v)


@pytest.mark.numbers
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_gradients_only_where_asked(case):
    """Any subset of inputs may be frozen: the others' gradients are the same, and frozen inputs get none."""
    full = dict(zip([id(a) for a in differentiable(case)], gradients(case)[1], strict=True))
    index = [i for i, a in enumerate(case.inputs) if a is not None and a.requires_grad]
    for kept in itertools.chain.from_iterable(itertools.combinations(index, n) for n in range(1, len(index))):
        frozen = [a if a is None or i in kept else a.detach() for i, a in enumerate(case.inputs)]
        output = case.ours(*frozen)
        incoming = drawn(output)
        found = torch.autograd.grad(output, [frozen[i] for i in kept], incoming)
        for i, g in zip(kept, found, strict=True):
            torch.testing.assert_close(g, full[id(case.inputs[i])], rtol=1e-12, atol=1e-14)
    assert not case.ours(*[a if a is None else a.detach() for a in case.inputs]).requires_grad


@pytest.mark.numbers
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_no_grad_and_inference_mode(case):
    expected = case.ours(*case.inputs).detach()
    with torch.no_grad():
        output = case.ours(*case.inputs)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
    with torch.inference_mode():
        torch.testing.assert_close(case.ours(*case.inputs).clone(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.contract
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_functional_transforms(case):
    """torch.func.grad and vmap differentiate the eager definition."""
    wanted = differentiable(case)

    def scalar(*args):
        return (case.ours(*args) * 1.5).sum()

    argnums = tuple(range(len(wanted)))
    if len(wanted) == len(case.inputs):
        found = torch.func.grad(scalar, argnums=argnums)(*case.inputs)
        expected = torch.autograd.grad(scalar(*case.inputs), wanted)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    stacked = [torch.stack([a.detach(), 2 * a.detach()]) for a in case.inputs]
    batched = torch.vmap(case.ours)(*stacked)
    for i in range(2):
        torch.testing.assert_close(batched[i], case.ours(*[a[i] for a in stacked]))


@pytest.mark.contract
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_forward_mode(case):
    tangents = [torch.randn_like(a) for a in case.inputs]
    _, found = torch.func.jvp(case.ours, tuple(case.inputs), tuple(tangents))
    with fastllm.use_backend("eager"):
        _, expected = torch.func.jvp(case.ours, tuple(case.inputs), tuple(tangents))
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(a, t) for a, t in zip(case.inputs, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(case.ours(*duals)).tangent
    torch.testing.assert_close(tangent, expected)


@pytest.mark.contract
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_checkpoint(case):
    output, expected = gradients(case)
    again = checkpoint(case.ours, *case.inputs, use_reentrant=False)
    incoming = drawn(output)
    for a, b in zip(torch.autograd.grad(again, differentiable(case), incoming), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.contract
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPERATIONS)
def test_compile(op, dynamic):
    torch._dynamo.reset()
    for case in small_cases(torch.float32):
        if case.op != op:
            continue
        compiled = torch.compile(case.ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        output = compiled(*case.inputs)
        expected, grads = gradients(case)
        torch.testing.assert_close(output, expected)
        incoming = drawn(output)
        for a, b in zip(torch.autograd.grad(output, differentiable(case), incoming), grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.contract
def test_compile_of_a_transform():
    x, t = torch.randn(4, 3), torch.randn(4, 3)
    f = torch.func.grad(lambda x: F.mse_loss(x, t))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.contract
def test_compile_with_inductor():
    torch._dynamo.reset()
    ids, y = torch.randint(0, 50, (12,)), torch.randint(0, 50, (12,))
    table, w, b = torch.randn(50, 8), torch.randn(16, 8), torch.randn(16)
    head = torch.randn(50, 16)
    leaves = [a.requires_grad_() for a in (table, w, b, head)]

    def loss(table, w, b, head):
        return F.linear_cross_entropy(F.linear_relu(F.embedding(ids, table), w, b), head, y) * 2.0

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.contract
@native
def test_opcheck():
    seen = set()
    for op, arguments in plain_calls():
        torch.library.opcheck(op.default, arguments)
        seen.add(op.default._schema.name)
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastllm::")}
    elsewhere = {"fastllm::log_probs_forward", "fastllm::log_probs_backward"}  # in test_log_probs.py
    assert seen == registered - elsewhere, registered ^ seen


@pytest.mark.contract
@native
def test_plain_operations_refuse_silent_gradients():
    """A plain forward or backward op has no derivative: differentiating it is an error, not a missing gradient."""
    x = torch.randn(3, 4, requires_grad=True)
    output, _ = torch.ops.fastllm.mse_loss_forward(x, torch.randn(3, 4), None, 1, False)
    with pytest.raises(RuntimeError, match="not implemented"):
        output.backward()


@cpu_kernels
@pytest.mark.numbers
@pytest.mark.parametrize("op", OPERATIONS)
def test_thread_count_does_not_show(op):
    """Our own kernels: bit for bit. Products by a library differ in the order of their sums."""
    torch.manual_seed(0)
    big = {
        "mse_loss": (F.mse_loss, [torch.randn(300, 401), torch.randn(300, 401)]),
        "embedding": (lambda w: F.embedding(torch.arange(6000) % 7, w), [torch.randn(900, 33)]),
        "cross_entropy": (lambda x: F.cross_entropy(x, torch.arange(67)), [torch.randn(67, 3001)]),
        "linear_relu": (F.linear_relu, [torch.randn(700, 20), torch.randn(90, 20), torch.randn(90)]),
        "relu_mlp": (
            F.relu_mlp,
            [torch.randn(700, 20), torch.randn(30, 20), torch.randn(30), torch.randn(20, 30), torch.randn(20)],
        ),
        "linear_cross_entropy": (
            lambda x, w: F.linear_cross_entropy(x, w, torch.arange(300)),
            [torch.randn(300, 24), torch.randn(500, 24)],
        ),
    }
    function, inputs = big[op]
    inputs = [a.requires_grad_() for a in inputs]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            output = function(*inputs)
            incoming = drawn(output)
            results.append([output.detach(), *torch.autograd.grad(output, inputs, incoming)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


AUTOCAST = {
    "embedding": (lambda f: lambda w: f.embedding(torch.tensor([0, 2]), w), [(5, 4)]),
    "linear_relu": (
        lambda f: f.linear_relu if f is F else lambda x, w, b: torch.relu(TF.linear(x, w, b)),
        [(3, 4), (5, 4), (5,)],
    ),
    "relu_mlp": (
        lambda f: f.relu_mlp if f is F else lambda x, w, b, v, c: TF.linear(torch.relu(TF.linear(x, w, b)), v, c),
        [(3, 4), (5, 4), (5,), (2, 5), (2,)],
    ),
    "mse_loss": (lambda f: lambda x, t: f.mse_loss(x, t), [(3, 4), (3, 4)]),
    "cross_entropy": (lambda f: lambda x: f.cross_entropy(x, torch.tensor([0, 1, 3])), [(3, 4)]),
    "linear_cross_entropy": (
        lambda f: (
            (lambda x, w: F.linear_cross_entropy(x, w, torch.tensor([0, 1, 3])))
            if f is F
            else lambda x, w: TF.cross_entropy(TF.linear(x, w), torch.tensor([0, 1, 3]))
        ),
        [(3, 4), (6, 4)],
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_autocast(op, dtype, low):
    make, shapes = AUTOCAST[op]
    inputs = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    results = []
    for functions in (F, TF):
        with torch.autocast(DEVICE, dtype=low):
            output = make(functions)(*inputs)
        results.append([output, *torch.autograd.grad(output.float().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, -t], -1)[..., 0],
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.numbers
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_any_layout(op, layout):
    """The same numbers in another layout give the same result and gradients."""
    for case in small_cases():
        if case.op != op:
            continue
        output, grads = gradients(case)
        leaves = [a.detach().clone().requires_grad_() for a in case.inputs]
        moved = [LAYOUTS[layout](a) if a.dim() > 0 else a for a in leaves]
        again = case.ours(*moved)
        torch.testing.assert_close(again, output, rtol=1e-12, atol=1e-14)
        incoming = drawn(output)
        for variant in (incoming, incoming.t().contiguous().t() if incoming.dim() == 2 else incoming):
            found = torch.autograd.grad(again, leaves, variant, retain_graph=True)
            for a, b in zip(found, grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        expanded = torch.autograd.grad(again.sum(), leaves)  # an incoming gradient of stride 0
        for a, b in zip(expanded, torch.autograd.grad(case.ours(*case.inputs).sum(), case.inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.numbers
def test_channels_last_mse():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    t = torch.randn(2, 3, 4, 5)
    check_against_float64(F.mse_loss, TF.mse_loss, [x, t])
    (g,) = torch.autograd.grad(F.mse_loss(x, t), x)
    assert g.stride() == x.stride()


def memory_cases(dtype):
    """The small cases, logits that may be overwritten, and class probabilities that are differentiated."""
    cases = small_cases(dtype)
    x, q, y = torch.randn(3, 5, dtype=dtype), torch.softmax(torch.randn(3, 5, dtype=dtype), 1), torch.tensor([1, 4, 0])
    for r in ("none", "mean"):
        own = lambda a, r=r: F.cross_entropy(a.clone(), y, reduction=r, inplace_backward=True)  # noqa: E731
        both = lambda a, b, r=r: F.cross_entropy(a, b, reduction=r)  # noqa: E731
        cases.append(Case("cross_entropy", f"inplace-{r}", own, None, [x.clone().requires_grad_()]))
        cases.append(Case("cross_entropy", f"both-{r}", both, None, [x.clone().requires_grad_(), q.requires_grad_()]))
    return cases


def one_backward(how, output, wanted):
    incoming = torch.ones_like(output) if how == "of one" else torch.full_like(output, 1.5)
    if how == "first input":
        torch.autograd.grad(output, wanted[:1], incoming)
    elif how == "last input":
        torch.autograd.grad(output, wanted[-1:], incoming)
    elif how == "create_graph":
        torch.autograd.grad(output, wanted, incoming, create_graph=True, retain_graph=False)
    elif how == "graph kept before":
        torch.autograd.grad(output, wanted, incoming, retain_graph=True)
        torch.autograd.grad(output, wanted, incoming)
    else:
        torch.autograd.grad(output, wanted, incoming)


@pytest.mark.contract
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter keeps memory of its own")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["of one", "other", "first input", "last input", "create_graph", "graph kept before"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_nothing_is_held_after_backward(op, how, dtype):
    """An output that lives on after backward holds its own numbers: no gradient, statistics or saved tensor."""
    for case in memory_cases(dtype):
        if case.op != op or (how == "graph kept before" and "inplace" in case.name):
            continue
        wanted, own = differentiable(case), []

        def step(case=case, wanted=wanted, own=own):
            inputs = [a if a is None else a.clone() for a in case.inputs]  # which a node alone will hold
            own[:] = [weakref.ref(a) for a in inputs if a is not None]
            output = case.ours(*inputs)
            one_backward(how, output, wanted)
            return output

        output = step()
        unit = 512 if DEVICE == "cuda" else 1
        assert bytes_left(step) == -(-output.nbytes // unit) * unit, case
        output = step()
        assert all(reference() is None for reference in own), case


@pytest.mark.contract
def test_every_node_has_the_name_of_its_operation():
    """As the profiler and print(loss.grad_fn) show it."""
    names = {}
    for case in small_cases(torch.float32):
        output = case.ours(*case.inputs)
        node = output.grad_fn
        while (
            "fastllm" not in node.name() + getattr(node, "_forward_cls", object).__module__
        ):  # a view or a cast after it
            node = node.next_functions[0][0]
        names.setdefault(case.op, set()).add(node.name())
    assert set(names) == set(OPERATIONS)
    for op, found in names.items():
        assert len(found) == 1
        assert op.replace("_", "") + "backward" in next(iter(found)).lower()
    assert len(set.union(*names.values())) == len(OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", ["linear_relu", "relu_mlp", "linear_cross_entropy"])
def test_biases_may_change_before_backward(op, reduction, dtype):
    """Two forwards, a step of the biases, two backwards: the gradients of the biases that forward saw."""
    torch.manual_seed(0)
    x, w, v = (torch.randn(s).to(dtype).requires_grad_() for s in [(3, 4), (6, 4), (2, 6)])
    b, c = torch.randn(6).to(dtype).requires_grad_(), torch.randn(2).to(dtype).requires_grad_()
    y = torch.tensor([1, 5, 0])
    call, leaves = {
        "linear_relu": (lambda: F.linear_relu(x, w, b), [x, w, b]),
        "relu_mlp": (lambda: F.relu_mlp(x, w, b, v, c), [x, w, b, v, c]),
        "linear_cross_entropy": (
            lambda: F.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction),
            [x, w, b],
        ),
    }[op]
    expected = torch.autograd.grad(call().sum() * 1.5, leaves)
    outputs = [call(), call()]
    with torch.no_grad():
        b.sub_(7.0)
        c.sub_(7.0)
    for output in outputs:
        for a, e in zip(torch.autograd.grad(output.sum() * 1.5, leaves), expected, strict=True):
            assert torch.equal(a, e)


# Inputs that backward reads again where PyTorch has saved results of the logits' size instead: to change them in place
# before is an error, never a wrong gradient. Their positions, for which incoming gradients, and in which cases.
READ_AGAIN = {
    "cross_entropy": ([0], "other", lambda name: True),
    "mse_loss": ([0, 1], "other", lambda name: name == "weight"),
    "linear_cross_entropy": ([0, 1], "any", lambda name: name == "none"),
}


def is_read_again(case, position, incoming):
    positions, when, which = READ_AGAIN.get(case.op, ([], "any", lambda name: False))
    # Only on the CPU does the host see whether an incoming gradient is 1: on a GPU it would wait for it.
    reads = when == "any" or incoming != 1 or case.name.endswith("none") or DEVICE == "cuda"
    return position in positions and which(case.name) and reads


@pytest.mark.contract
@pytest.mark.parametrize("incoming", [1, 1.5])
@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_inputs_changed_in_place_before_backward(case, incoming):
    """Whichever inputs are frozen and whichever is changed: gradients where PyTorch has them, else those or an error."""
    index = [i for i, a in enumerate(case.inputs) if a is not None]
    for kept in itertools.chain.from_iterable(itertools.combinations(index, n) for n in range(1, len(index) + 1)):
        for changed in [None, *index]:
            results = []
            for backend in ("eager", None):
                inputs = [
                    a if a is None else a.detach().clone().requires_grad_(i in kept) for i, a in enumerate(case.inputs)
                ]
                with fastllm.use_backend(backend) if backend else contextlib.nullcontext():
                    output = case.ours(*inputs)
                    if changed is not None:
                        with torch.no_grad():
                            inputs[changed].add_(1.0)
                    try:
                        wanted = [inputs[i] for i in kept]
                        results.append(torch.autograd.grad(output, wanted, torch.full_like(output, incoming)))
                    except RuntimeError as error:
                        assert "modified by an inplace operation" in str(error), (kept, changed, backend)
                        results.append(None)
            theirs, ours = results
            if changed is None:
                right = theirs
            if ours is None:
                assert theirs is None or is_read_again(case, changed, incoming), (kept, changed)
                continue
            for a, b in zip(ours, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_repeats_bit_for_bit(op, dtype):
    for case in cases_of(op, dtype)[::5]:
        first, grads = gradients(case)
        again, more = gradients(case)
        for a, b in zip([first, *grads], [again, *more], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # torch.equal takes no NaN for equal
