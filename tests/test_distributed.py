"""A vocabulary cut over processes gives what one process gives: values, gradients, errors; and the same bits everywhere."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import DTYPES, EPSILON, Waits, _error, drawn
from processes import Processes

import fastllm.distributed as D
import fastllm.functional as F
from fastllm import use_backend

V, N, DIM = 13, 11, 5
# The rows that each rank holds: as DTensor cuts 13 rows, uneven, with an empty part first, in the middle and last, and
# not in the order of ranks.
CUTS = {
    4: [(0, 4, 8, 12, 13), (0, 1, 3, 10, 13), (0, 0, 5, 9, 13), (0, 6, 6, 6, 13), (0, 13, 13, 13, 13)],
    2: [(0, 7, 13), (0, 0, 13), (0, 12, 13)],
}


@pytest.fixture(scope="module")
def four():
    with Processes(4) as processes:
        yield processes


@pytest.fixture(scope="module")
def two():
    with Processes(2) as processes:
        yield processes


@pytest.fixture(params=[2, 4])
def group(request):
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


# --- what runs in the processes


def digest(*tensors):
    """Of the bits of tensors."""
    rows = [t.detach().flatten().contiguous() for t in tensors if t is not None]
    return hashlib.sha256(b"".join(row.view(torch.uint8).numpy().tobytes() for row in rows)).hexdigest()


def bounds(rank, size, cut):
    """Where this rank's rows begin and end; a cut's last entry may say "reversed"."""
    places = [k for k in cut if not isinstance(k, str)]
    rank = size - 1 - rank if "reversed" in cut else rank
    return places[rank], places[rank + 1]


def within(name, value, plain, truth, dtype, part=None):
    """By the yardstick of ``helpers.check_against_float64``; ``value`` may be a part of the others."""
    truth = truth.detach().double()
    truth = torch.where(truth.abs() > torch.finfo(dtype).max, truth.to(dtype).double(), truth)
    finite = truth[truth.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    bound = 2 * min(_error(plain, truth), size or float("inf")) + EPSILON[dtype] * size + 1e-45
    if part is not None:
        plain, truth = plain[part], truth[part]
    assert value.shape == plain.shape and value.dtype == plain.dtype, (name, value, plain)
    error = _error(value, truth)
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}, {value} for {truth}"


def differentiated(function, leaves, incoming=None):
    """Outputs, and gradients of the leaves for random incoming gradients."""
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
    smooth = [o for o in outputs if o.requires_grad]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not smooth:
        return outputs, [None] * len(wanted)
    incoming = [drawn(o, 7 + k).to(o.dtype) for k, o in enumerate(smooth)]
    return outputs, list(torch.autograd.grad(smooth, wanted, incoming, allow_unused=True))


def three_ways(ours, plain, whole, parts, dtype):
    """Outputs and gradients of ``ours`` on this rank's parts, against ``plain`` on the whole in ``dtype`` and float64.

    ``whole`` are tensors or None, ``parts`` for each of them a slice of rows, or None where the rank has all of it.
    """
    copies = [None if t is None else t.detach().to(dtype).requires_grad_() for t in whole]
    mine = [
        t if t is None or part is None else t.detach()[part].clone().requires_grad_()
        for t, part in zip(copies, parts, strict=True)
    ]
    mine = [
        t if part is not None or t is None else t.detach().clone().requires_grad_()
        for t, part in zip(mine, parts, strict=True)
    ]
    values, gradients = differentiated(ours, mine)
    expected, expected_gradients = differentiated(plain, copies)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in copies]
    truths, true_gradients = differentiated(plain, wide)
    for k, (value, other, truth) in enumerate(zip(values, expected, truths, strict=True)):
        within(f"output {k}", value, other, truth, dtype)
    cuts = [part for t, part in zip(whole, parts, strict=True) if t is not None]
    found = zip(gradients, expected_gradients, true_gradients, cuts, strict=True)
    for k, (value, other, truth, part) in enumerate(found):
        if other is None:
            assert value is None
            continue
        within(f"gradient {k}", value, other, truth, dtype, part)
    shared = [g for g, part in zip(gradients, cuts, strict=True) if part is None]
    again, again_gradients = differentiated(ours, mine)
    assert digest(*values, *gradients) == digest(*again, *again_gradients)
    return digest(*values, *shared)


def targets(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (N,), generator=generator)
    if kind == "all ignored":
        return torch.full((N,), -100)
    if kind == "some ignored":
        ids[::3] = -100
    if kind == "each":
        ids = torch.arange(N) % V
    return ids


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_case(rank, size, cut, dtype, kind, with_bias, with_weight, options, linear):
    start, stop = bounds(rank, size, cut)
    part = slice(start, stop)
    options = dict(options)
    class_weight = (normal(V, seed=5).abs() + 0.1).to(dtype) if with_weight else None
    probabilities = kind == "probabilities"
    y = normal(N, V, seed=6).softmax(1) if probabilities else targets(kind)
    leaves = [normal(N, DIM if linear else V, seed=1, scale=2.0)]
    parts = [None if linear else (slice(None), part)]
    if linear:
        leaves += [normal(V, DIM, seed=2), normal(V, seed=3) if with_bias else None]
        parts += [part, part]
    else:
        leaves[0] *= 3
    if probabilities:
        leaves.append(y)
        parts.append((slice(None), part))

    def ours(x, *rest):
        target = rest[-1] if probabilities else y
        weight = None if class_weight is None else class_weight[part].to(x.dtype)
        common = {"weight": weight, "vocab_start": start, **options}
        if not linear:
            return D.cross_entropy(x * 1 if options.get("inplace_backward") else x, target, **common)
        return D.linear_cross_entropy(x, rest[0], target, linear_bias=rest[1], **common)

    def plain(x, *rest):
        target = rest[-1] if probabilities else y
        weight = None if class_weight is None else class_weight.to(x.dtype)
        with use_backend("eager"):
            if not linear:
                return F.cross_entropy(x, target, weight, **{**options, "inplace_backward": False})
            return F.linear_cross_entropy(x, rest[0], target, linear_bias=rest[1], weight=weight, **options)

    if not linear:
        options.pop("shift", None)
    return three_ways(ours, plain, leaves, parts, dtype)


# --- tests

EVERY_OPTION = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.2},
    {"lse_square_scale": 0.1},
    {"softcap": 2.0},
    {"label_smoothing": 1.0, "softcap": 1.5, "lse_square_scale": 0.05, "reduction": "none"},
    {"num_items": 7.0, "label_smoothing": 0.1},
    {"all_ignored": "zero", "lse_square_scale": 0.2},
]


def same_everywhere(results):
    assert len(set(results)) == 1, "results differ between processes"


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
@pytest.mark.parametrize("kind", ["each", "some ignored", "all ignored", "probabilities"])
def test_losses(four, kind, options, linear):
    for k, cut in enumerate(CUTS[4]):
        weighted, dtype = (k + len(options)) % 2 == 1, (torch.float32, torch.float64)[k % 2]
        cut = (*cut, "reversed") if k == 1 else cut
        same_everywhere(four.run(loss_case, cut, dtype, kind, k % 2 == 0, weighted, options, linear))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_losses_in_every_dtype(group, dtype, linear):
    for k, cut in enumerate(CUTS[group.size]):
        options = [{}, {"softcap": 2.0, "reduction": "none"}, {"label_smoothing": 0.3}][k % 3]
        kind = ["each", "some ignored", "probabilities"][k % 3]
        same_everywhere(group.run(loss_case, cut, dtype, kind, True, True, options, linear))


def in_place_case(rank, size, cut):
    """As the plain function: the gradient stands in the logits, and a second backward is an error."""
    start, stop = bounds(rank, size, cut)
    leaf = normal(N, V, seed=1)[:, start:stop].clone().requires_grad_()
    found = []
    for inplace in (False, True):
        logits = leaf * 1
        loss = D.cross_entropy(logits, targets("some ignored"), vocab_start=start, inplace_backward=inplace)
        kept = logits.detach().clone()
        found.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        assert torch.equal(kept, logits) != (inplace and stop > start)
    assert torch.equal(*found)
    assert stop == start or torch.equal(logits, found[1])
    with pytest.raises(RuntimeError, match="second backward through logits"):
        torch.autograd.grad(loss, leaf)
    with pytest.raises(RuntimeError, match="a leaf that requires a gradient"):
        D.cross_entropy(leaf, targets("each"), vocab_start=start, inplace_backward=True)


def test_in_place(four):
    four.run(in_place_case, (0, 5, 5, 9, 13))


def shapes_case(rank, size, cut):
    """More dimensions, one dimension, shifted targets, a K-dimensional layer, int32, a module's mean of nothing."""
    start, stop = bounds(rank, size, cut)
    part = slice(start, stop)
    digests = []
    for shape in ((V,), (0, V), (2, V, 3), (2, V, 3, 2)):
        x, dim = normal(*shape, seed=1), 0 if len(shape) == 1 else 1
        y = torch.randint(0, V, (*shape[:dim], *shape[dim + 1 :]), generator=torch.Generator().manual_seed(1))
        for q in (y, y.int(), normal(*shape, seed=2).softmax(dim)):
            for reduction in ("mean", "none"):
                cut_dim = (slice(None),) * dim + (part,)
                leaves = [x, q] if q.is_floating_point() else [x]
                ours = lambda a, b=q: D.cross_entropy(a, b, vocab_start=start, reduction=reduction)  # noqa: B023, E731
                plain = lambda a, b=q: torch.nn.functional.cross_entropy(  # noqa: E731
                    a,
                    b if b.is_floating_point() else b.long(),
                    reduction=reduction,  # noqa: B023
                )
                digests.append(three_ways(ours, plain, leaves, [cut_dim] * len(leaves), torch.float64))
    x, w, y = normal(2, 4, DIM, seed=1), normal(V, DIM, seed=2), targets("some ignored")[:8].view(2, 4)
    for a, b in ((x, y), (x[0], y[0])):
        for reduction in ("mean", "none"):
            options = {"shift": True, "reduction": reduction}
            ours = lambda x, w: D.linear_cross_entropy(x, w, b, vocab_start=start, **options)  # noqa: B023, E731
            plain = lambda x, w: F.linear_cross_entropy(x, w, b, **options)  # noqa: B023, E731
            digests.append(three_ways(ours, plain, [a, w], [None, part], torch.float64))
    w, b, y = normal(V, 3, DIM, seed=2), normal(V, 3, seed=3), torch.arange(12).view(4, 3)
    ours = lambda a, c, d: D.linear_cross_entropy(a, c, y, linear_bias=d, vocab_start=start)  # noqa: E731
    plain = lambda a, c, d: F.linear_cross_entropy(a, c, y, linear_bias=d)  # noqa: E731
    digests.append(three_ways(ours, plain, [normal(4, DIM), w, b], [None, part, part], torch.float64))
    w = normal(V, DIM, seed=2)
    ours = lambda a, c: D.linear_cross_entropy(a, c, torch.tensor(9), vocab_start=start, reduction="none")  # noqa: E731
    plain = lambda a, c: F.linear_cross_entropy(a, c, torch.tensor(9), reduction="none")  # noqa: E731
    digests.append(three_ways(ours, plain, [normal(DIM), w], [None, part], torch.float64))
    return tuple(digests)


def test_shapes(group):
    for cut in CUTS[group.size][:2]:
        same_everywhere(group.run(shapes_case, cut))


def special_case(rank, size, cut, linear):
    """Infinities, NaN, and logits so large or so far apart that the sum of the maximum and the tail loses digits."""
    start, stop = bounds(rank, size, cut)
    part, inf, nan = slice(start, stop), float("inf"), float("nan")
    x = normal(9, V, seed=1).float()
    x[0, 3], x[1, 1], x[2], x[3, 4:] = nan, inf, -inf, -inf
    x[4], x[5], x[6, 9] = x[4] + 1e4, 30 * x[5], -inf
    x[7] = nan
    y = torch.tensor([0, 1, 2, 2, 12, int(x[5].argmax()), 0, -100, 5])
    expected_x = x.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(expected_x.double(), y, reduction="none")
    expected.sum().backward()
    mine = x[:, part].clone().requires_grad_()
    if linear:  # by a bias alone: rows differ no more
        digests = []
        for k in range(9):
            w, b = torch.zeros(stop - start, 2), x[k, part].clone().requires_grad_()
            loss = D.linear_cross_entropy(
                torch.ones(1, 2), w, y[k, None], linear_bias=b, vocab_start=start, reduction="sum"
            )
            loss.backward()
            torch.testing.assert_close(loss.double(), expected[k].detach(), rtol=1e-5, atol=1e-10, equal_nan=True)
            wanted = expected_x.grad[k, part] if y[k] >= 0 else torch.zeros(stop - start)
            torch.testing.assert_close(b.grad, wanted, rtol=1e-5, atol=1e-12, equal_nan=True)
            digests.append(digest(torch.nan_to_num(loss)))
        return tuple(digests)
    loss = D.cross_entropy(mine, y, vocab_start=start, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-10, equal_nan=True)
    wanted = expected_x.grad[:, part].clone()
    wanted[7] = 0  # an ignored row is not read
    torch.testing.assert_close(mine.grad, wanted, rtol=1e-5, atol=1e-12, equal_nan=True)
    return digest(torch.nan_to_num(loss))


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_special_numbers(four, linear):
    for cut in CUTS[4]:
        same_everywhere(four.run(special_case, cut, linear))


def log_probs_case(rank, size, cut, dtype, options, with_top, chunked):
    start, stop = bounds(rank, size, cut)
    part = slice(start, stop)
    y = targets("each" if "ignore_index" in options else "some ignored").view(N, 1)
    top = torch.randint(0, V, (N, 1, 4), generator=torch.Generator().manual_seed(3)) if with_top else None
    options = {"outputs": tuple(n for n in F.LogProbs._fields if n != "top_log_prob"), **options}
    if options.get("temperature") == "each":
        options["temperature"] = (normal(N, 1, seed=9).abs() + 0.5).to(dtype)

    def ours(x, w, b):
        return D.linear_log_probs(x, w, y, linear_bias=b, top_ids=top, vocab_start=start, **options)

    def plain(x, w, b):
        return F.linear_log_probs(x, w, y, linear_bias=b, top_ids=top, **options)

    leaves = [normal(N, 1, DIM, seed=1, scale=2.0), normal(V, DIM, seed=2), normal(V, seed=3)]
    leaves[1][3] = leaves[1][8] = leaves[1][0]  # ties
    leaves[2][3] = leaves[2][8] = leaves[2][0] = 9.0
    return three_ways(ours, plain, leaves, [None, part, part], dtype)


LOG_PROBS = [
    {},
    {"outputs": ("log_prob",)},
    {"outputs": ("entropy",)},
    {"outputs": ("argmax", "mean_logit", "log_sum_sq_probs")},
    {"softcap": 3.0, "temperature": 0.7},
    {"temperature": "each"},
    {"ignore_index": 5},
]


@pytest.mark.parametrize("options", LOG_PROBS, ids=str)
def test_log_probs(four, options):
    for k, cut in enumerate(CUTS[4]):
        dtype = (torch.float32, torch.float64)[k % 2]
        cut = (*cut, "reversed") if k == 1 else cut
        same_everywhere(four.run(log_probs_case, cut, dtype, options, k % 2 == 0, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_in_every_dtype(two, dtype):
    # In bfloat16 another logit may be the largest after rounding; ties are made exactly.
    options = {"outputs": ("log_prob", "entropy", "lse", "mean_logit")}
    for cut in CUTS[2]:
        same_everywhere(two.run(log_probs_case, cut, dtype, options, True, False))


def masked_part_case(rank, size, cut):
    """All classes of one part are -inf: it adds nothing, also not to sums over classes."""
    start, stop = bounds(rank, size, cut)
    bias = normal(V, seed=3)
    bias[:4] = -torch.inf
    outputs = ("log_prob", "entropy", "lse", "argmax", "log_sum_sq_probs")
    y = targets("each").clamp(min=4)
    x, w = normal(N, DIM, seed=1), normal(V, DIM, seed=2)
    given = {"outputs": outputs, "vocab_start": start}

    def ours(x, w):
        return D.linear_log_probs(x, w, y, linear_bias=bias[start:stop].to(x.dtype), **given)

    plain = lambda x, w: F.linear_log_probs(x, w, y, linear_bias=bias.to(x.dtype), outputs=outputs)  # noqa: E731
    return three_ways(ours, plain, [x, w], [None, slice(start, stop)], torch.float64)


def test_a_part_without_a_chance(four):
    for cut in CUTS[4][:2]:
        same_everywhere(four.run(masked_part_case, cut))


EMBEDDING = [
    {},
    {"padding_idx": 0},
    {"padding_idx": 6},
    {"padding_idx": -1},
    {"padding_idx": 9},
    {"scale_grad_by_freq": True},
    {"scale_grad_by_freq": True, "padding_idx": 3},
    {"max_norm": 1.5},
    {"max_norm": 1.0, "norm_type": 1.0, "padding_idx": 4},
]


def embedding_case(rank, size, cut, dtype, options, ids_dtype):
    start, stop = bounds(rank, size, cut)
    part = slice(start, stop)
    ids = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(2)).to(ids_dtype)
    ids[0] = torch.tensor([0, 3, 6, 9, 12, 4, 12])

    def plain(w):
        return torch.nn.functional.embedding(ids, w if "max_norm" not in options else w * 1, **options)

    def ours(w):
        return D.embedding(ids, w if "max_norm" not in options else w * 1, vocab_start=start, **options)

    return three_ways(ours, plain, [normal(V, DIM, seed=1)], [part], dtype)


@pytest.mark.parametrize("options", EMBEDDING, ids=str)
def test_embedding(four, options):
    for k, cut in enumerate(CUTS[4]):
        cut = (*cut, "reversed") if k == 1 else cut
        same_everywhere(four.run(embedding_case, cut, torch.float32, options, (torch.int64, torch.int32)[k % 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_in_every_dtype(two, dtype):
    for cut in CUTS[2]:
        same_everywhere(two.run(embedding_case, cut, dtype, {"padding_idx": 12}, torch.int64))


def sparse_case(rank, size, cut, padding):
    start, stop = bounds(rank, size, cut)
    ids, table = torch.tensor([[0, 4, 4], [12, 6, 0]]), normal(V, DIM, seed=1)
    whole = table.clone().requires_grad_()
    torch.nn.functional.embedding(ids, whole, padding).square().sum().backward()
    mine = table[start:stop].clone().requires_grad_()
    D.embedding(ids, mine, padding, sparse=True, vocab_start=start).square().sum().backward()
    assert mine.grad.is_sparse and mine.grad.shape == mine.shape
    assert torch.equal(mine.grad.to_dense(), whole.grad[start:stop])
    torch.optim.SGD([mine], lr=0.1).step()
    with pytest.raises(RuntimeError, match="scale_grad_by_freq is not supported for a sparse gradient"):
        D.embedding(ids, mine, sparse=True, scale_grad_by_freq=True, vocab_start=start)


@pytest.mark.parametrize("padding", [None, 4, 12])
def test_sparse_gradients(four, padding):
    for cut in CUTS[4]:
        four.run(sparse_case, cut, padding)


def max_norm_case(rank, size, cut):
    start, stop = bounds(rank, size, cut)
    ids, whole = torch.tensor([0, 4, 4, 12]), normal(V, DIM, seed=1)
    mine = whole[start:stop].clone()
    torch.nn.functional.embedding(ids, whole, max_norm=0.5)
    D.embedding(ids, mine, max_norm=0.5, vocab_start=start)
    assert torch.equal(mine, whole[start:stop])


def test_only_rows_that_are_looked_up_are_rescaled(four):
    for cut in CUTS[4]:
        four.run(max_norm_case, cut)


def tied_case(rank, size, cut):
    """One table looked up and used as output layer: its gradient is the sum of both uses."""
    start, stop = bounds(rank, size, cut)
    ids = targets("each")

    def ours(w):
        hidden = torch.tanh(D.embedding(ids, w, vocab_start=start))
        return D.linear_cross_entropy(hidden, w, ids.roll(-1), vocab_start=start)

    def plain(w):
        return torch.nn.functional.cross_entropy(torch.tanh(w[ids]) @ w.t(), ids.roll(-1))

    return three_ways(ours, plain, [normal(V, DIM, seed=1)], [slice(start, stop)], torch.float64)


def test_tied_weights(group):
    for cut in CUTS[group.size]:
        same_everywhere(group.run(tied_case, cut))


def collectives_case(rank, size, cut):
    """Two forward and one backward for the input, whatever the number of chunks; none where nobody asks for it."""
    import os

    from torch.distributed.tensor.debug import CommDebugMode

    start, stop = bounds(rank, size, cut)
    rows = 300
    x, w = normal(rows, DIM).requires_grad_(), normal(V, DIM)[start:stop].clone().requires_grad_()
    logits = normal(rows, V)[:, start:stop].clone().requires_grad_()
    y, top = torch.arange(rows) % V, torch.zeros(rows, 2, dtype=torch.int64)
    calls = {
        "embedding": (lambda: D.embedding(y, w, padding_idx=-1, max_norm=1.0, vocab_start=start), 0),
        "cross_entropy": (lambda: D.cross_entropy(logits, y, label_smoothing=0.1, vocab_start=start), 0),
        "linear_cross_entropy": (lambda: D.linear_cross_entropy(x, w, y, softcap=2.0, vocab_start=start), 1),
        "frozen input": (lambda: D.linear_cross_entropy(x.detach(), w, y, vocab_start=start), 0),
        "linear_log_probs": (
            lambda: sum(r.sum() for r in D.linear_log_probs(
                x, w, y, outputs=F.LogProbs._fields, top_ids=top, vocab_start=start) if r.requires_grad), 1,
        ),
    }  # fmt: skip
    os.environ["FASTLLM_LOSS_WORKSPACE"] = "1"
    try:
        for name, (call, backward) in calls.items():
            with CommDebugMode() as forward_counts:
                output = call()
            assert forward_counts.get_total_counts() == 2, (name, forward_counts.get_comm_counts())
            with CommDebugMode() as backward_counts:
                output.sum().backward()
            assert backward_counts.get_total_counts() == backward, (name, backward_counts.get_comm_counts())
    finally:
        del os.environ["FASTLLM_LOSS_WORKSPACE"]


def test_collectives(group):
    group.run(collectives_case, CUTS[group.size][1])


def chunks_case(rank, size, cut):
    """Many chunks are one; and no tensor of all rows times all classes is made."""
    import os

    from torch.utils._python_dispatch import TorchDispatchMode

    start, stop = bounds(rank, size, cut)
    rows = 300
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == stop - start and t.shape[1] > size:
                    largest = max(largest, t.shape[0])
            return result

    x, w = normal(rows, DIM).requires_grad_(), normal(V, DIM)[start:stop].clone().requires_grad_()
    y = torch.arange(rows) % V

    def run():
        loss = D.linear_cross_entropy(x, w, y, label_smoothing=0.1, vocab_start=start)
        lp = D.linear_log_probs(x, w, y, outputs=("log_prob", "entropy"), vocab_start=start)
        total = loss + lp.log_prob.mean() + lp.entropy.mean()
        return total.detach(), *torch.autograd.grad(total, (x, w))

    one = run()
    os.environ["FASTLLM_LOSS_WORKSPACE"] = "1"
    try:
        with Sizes():
            many = run()
    finally:
        del os.environ["FASTLLM_LOSS_WORKSPACE"]
    torch.testing.assert_close(one, many)
    assert largest <= 64, largest


def test_chunks(two):
    two.run(chunks_case, (0, 6, 13))


def errors_case(rank, size):
    """Everyone raises, and the group is whole afterwards."""
    start, stop = bounds(rank, size, CUTS[2][0])
    table, x, y = normal(V, DIM)[start:stop].clone().requires_grad_(), normal(N, DIM), targets("each")
    for wrong, message in (
        (lambda: D.embedding(torch.tensor([0, 13]), table, vocab_start=start), r"input must be in \[0, 13\).*got 13 at position 1"),
        (lambda: D.embedding(torch.tensor([-1]), table, vocab_start=start), "got -1 at position 0"),
        (lambda: D.linear_cross_entropy(x, table, y + 5, vocab_start=start), "target must be in .* got 13 at position 8"),
        (lambda: D.linear_log_probs(x, table, y - 1, vocab_start=start), "target must be in .* got -1 at position 0"),
        (
            lambda: D.linear_log_probs(x, table, y, top_ids=y[:, None] + 9, vocab_start=start),
            "top_ids must be in .* got 13 at position 4",
        ),
    ):  # fmt: skip
        with pytest.raises(IndexError, match=message):
            wrong()
    for first, cover in (
        (rank * 6, r"\[0, 7\), \[6, 12\)"),
        (rank * 8, r"\[0, 7\), \[8, 14\)"),
        (start + 1, r"\[1, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"vocab_start .* without gaps and overlaps, got the rows .*{cover}"):
            D.embedding(y, table, vocab_start=first)
    for value, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(kind, match="vocab_start must be"):
            D.linear_cross_entropy(x, table, y, vocab_start=value)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup or None, got int"):
        D.embedding(y, table, vocab_start=start, group=3)
    with pytest.raises(AssertionError, match=r"padding_idx must be in \[-13, 13\), got 13"):
        D.embedding(y, table, 13, vocab_start=start)
    single, w13 = dist.new_group([0]), torch.ones(V)
    if rank == 1:
        with pytest.raises(RuntimeError, match="group must hold this process, rank 1"):
            D.embedding(y, table, vocab_start=0, group=single)
    for wrong, kind, message in (
        (lambda: D.linear_cross_entropy(x, table, y[:5], vocab_start=start), ValueError, "target must be of shape"),
        (lambda: D.linear_cross_entropy(x[:, :3], table, y, vocab_start=start), RuntimeError, "input must be of shape"),
        (lambda: D.linear_cross_entropy(x, table, y, linear_bias=x[0], vocab_start=start), RuntimeError, "linear_bias must be"),
        (lambda: D.linear_cross_entropy(x, table, y, weight=w13, vocab_start=start), RuntimeError, "weight must be of shape"),
        (lambda: D.cross_entropy(x, y[:5], vocab_start=start), ValueError, "target must be of shape"),
        (lambda: D.cross_entropy(x, y, reduction="max", vocab_start=start), ValueError, "reduction must be one of"),
        (lambda: D.linear_log_probs(x, table, y, outputs=("loss",), vocab_start=start), ValueError, "outputs must be among"),
        (lambda: D.embedding(x, table, vocab_start=start), RuntimeError, "input must be int64 or int32"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            wrong()
    calls = (
        lambda: D.embedding(y, table, vocab_start=start).square().sum(),
        lambda: D.linear_cross_entropy(x, table, y, vocab_start=start),
        lambda: D.linear_log_probs(x, table, y, vocab_start=start).log_prob.sum(),
        lambda: D.cross_entropy(x @ table.t(), y, vocab_start=start),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="second derivatives .* are not implemented"):
            torch.autograd.grad(call(), table, create_graph=True)
    dist.barrier()


def test_errors(two):
    two.run(errors_case)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="embedding: group must be initialised: call .*init_process_group first"):
        D.embedding(torch.tensor([0]), torch.ones(2, 2), vocab_start=0)


def modes_case(rank, size, cut):
    """No gradients, autocast, torch.compile, and a group of some of the processes."""
    start, stop = bounds(rank, size, cut)
    x, w, y = normal(N, DIM).float(), normal(V, DIM).float(), targets("some ignored")
    mine = w[start:stop].clone().requires_grad_()
    with torch.no_grad():
        quiet = D.linear_cross_entropy(x, mine, y, vocab_start=start)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, torch.nn.functional.cross_entropy(x @ w.t(), y))
    with torch.autocast("cpu", torch.bfloat16):
        whole = w.clone().requires_grad_()
        pairs = (
            (D.linear_cross_entropy(x, mine, y, vocab_start=start), F.linear_cross_entropy(x, whole, y)),
            (
                D.linear_log_probs(x, mine, y, vocab_start=start).log_prob.sum(),
                F.linear_log_probs(x, whole, y).log_prob.sum(),
            ),
            (
                D.cross_entropy(torch.nn.functional.linear(x, mine), y, vocab_start=start),
                F.cross_entropy(torch.nn.functional.linear(x, whole), y),
            ),
        )
    for ours, plain in pairs:
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
        (g,), (e,) = torch.autograd.grad(ours, mine), torch.autograd.grad(plain, whole)
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, e[start:stop], rtol=2e-2, atol=2e-3)
    if rank == 0:  # compiling takes seconds: one traces, all call
        torch._dynamo.reset()

    def function(x, w):
        hidden = torch.tanh(D.embedding(y.clamp(min=0), w, vocab_start=start) + x)
        return D.linear_cross_entropy(hidden, w, y, vocab_start=start) * 2

    compiled = torch.compile(function, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, mine), function(x, mine))
    torch.testing.assert_close(*(torch.autograd.grad(f(x, mine), mine) for f in (compiled, function)))


def test_modes(two):
    two.run(modes_case, (0, 6, 13))


def groups_case(rank, size):
    """Two pairs of processes, each with a vocabulary of its own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    y, w = targets("each"), normal(V, DIM, seed=rank // 2)
    start, stop = ((0, 5), (5, 13))[rank % 2]
    loss = D.linear_cross_entropy(normal(N, DIM), w[start:stop], y, vocab_start=start, group=pairs[rank // 2])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(normal(N, DIM) @ w.t(), y))


def test_groups(four):
    four.run(groups_case)


def placed_case(rank, size, dims):
    """The plain functions on DTensors, over one and two mesh dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("data", "vocab")[-len(dims) :])
    two = len(dims) == 2
    x, w, b, y = normal(8, DIM), normal(V, DIM, seed=2), normal(V, seed=3), targets("each")[:8]
    table = [Replicate(), Shard(0)] if two else [Shard(0)]
    batches = [[Replicate(), Replicate()], [Shard(0), Replicate()]] if two else [[Replicate()]]
    weight = torch.rand(V, dtype=torch.float64)
    torch.manual_seed(0)

    def leaves(placements):
        if placements is None:
            return [t.clone().requires_grad_() for t in (x, w, b)]
        return [
            x.clone().requires_grad_() if placements == "plain" else place(x, placements),
            place(w, table),
            place(b, table),
        ]

    def place(tensor, placements):
        return distribute_tensor(tensor.clone(), mesh, placements).requires_grad_(tensor.is_floating_point())

    def whole(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def compare(function):
        """``function(x, w, b, y)`` with every placement of the batch against plain tensors."""
        plain = leaves(None)
        expected = function(*plain, y)
        incoming = normal(*expected.shape, seed=4)
        gradients = torch.autograd.grad(expected, plain, incoming, allow_unused=True)
        for placements in ["plain", *batches]:
            mine = leaves(placements)
            value = function(*mine, y if placements == "plain" else place(y, placements))
            assert isinstance(value, DTensor) == (placements != "plain")
            torch.testing.assert_close(whole(value), expected)
            found = torch.autograd.grad(whole(value), mine, incoming, allow_unused=True)
            for leaf, g, e in zip(mine, found, gradients, strict=True):
                assert (g is None) == (e is None)
                if g is not None:
                    torch.testing.assert_close(whole(g), e)
                    assert not isinstance(leaf, DTensor) or g.shape == leaf.shape

    compare(lambda x, w, b, y: F.embedding(y, w, padding_idx=-1))
    for options in ({"reduction": "none"}, {"num_items": 5.0, "label_smoothing": 0.1}, {"reduction": "sum"}):
        compare(lambda x, w, b, y: F.linear_cross_entropy(x, w, y, linear_bias=b, weight=weight, **options))  # noqa: B023
    for field in ("log_prob", "entropy"):
        compare(lambda x, w, b, y: getattr(F.linear_log_probs(x, w, y, linear_bias=b, outputs=(field,)), field))  # noqa: B023
    # Everything replicated: every process has all of it.
    same = [Replicate()] * len(dims)
    table, batches = same, [same]
    compare(lambda x, w, b, y: F.linear_cross_entropy(x, w, y, linear_bias=b))
    compare(lambda x, w, b, y: F.embedding(y, w))
    # Logits.
    logits, placements = normal(8, V), [Shard(0), Shard(1)] if two else [Shard(-1)]
    batch = [Shard(0), Replicate()] if two else [Replicate()]
    plain, mine = logits.clone().requires_grad_(), place(logits, placements)
    expected = F.cross_entropy(plain, y, weight, reduction="none")
    value = F.cross_entropy(mine, place(y, batch), weight, reduction="none")
    torch.testing.assert_close(whole(value), expected)
    incoming = normal(8, seed=4)
    (g,), (e,) = torch.autograd.grad(whole(value), mine, incoming), torch.autograd.grad(expected, plain, incoming)
    torch.testing.assert_close(whole(g), e)


def test_placed_tensors(two):
    two.run(placed_case, (2,))


def test_placed_tensors_of_two_dimensions(four):
    four.run(placed_case, (2, 2))


def refused_case(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    place = lambda t, *p: distribute_tensor(t, mesh, p)  # noqa: E731
    x, w, y = normal(8, 6), normal(V, 6), targets("each")[:8]
    partial = DTensor.from_local(w, mesh, [Partial()])
    cut = place(w, Shard(0))
    for wrong, message in (
        (lambda: F.embedding(y, place(w, Shard(1))), r"embedding: weight must be Shard\(0\) over one .* got S"),
        (lambda: F.embedding(y, partial), r"embedding: weight must be Shard\(0\) .* got P"),
        (lambda: F.linear_cross_entropy(x, place(w, Shard(1)), y), r"linear_weight must be Shard\(0\)"),
        (lambda: F.linear_log_probs(x, place(w, Shard(1)), y), r"linear_weight must be Shard\(0\)"),
        (lambda: F.cross_entropy(place(x, Shard(0)), y), "target must be a DTensor, as input, whose batch is sharded"),
        (lambda: F.linear_cross_entropy(place(x, Shard(0)), cut, y), "input must be Replicate over the mesh's dimension 0, got"),
        (lambda: F.linear_cross_entropy(place(x, Shard(1)), cut, y), "input must be Replicate over"),
        (lambda: F.linear_cross_entropy(x, cut, place(y, Shard(0))), "target must be placed"),
        (lambda: F.linear_cross_entropy(x, cut, y, linear_bias=normal(V).requires_grad_()), "linear_bias must be a DTensor"),
        (lambda: F.linear_cross_entropy(x, cut, y, linear_bias=place(normal(V), Replicate())), "linear_bias must be sharded over"),
        (
            lambda: F.linear_cross_entropy(place(x, Shard(0)), place(w, Replicate()), place(y, Shard(0))),
            "num_items must tell the divisor of the mean",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            wrong()


def test_other_placements_are_refused(two):
    two.run(refused_case)


def plan_case(rank, size, name):
    """A model by its plan: losses, gradients and logits of the whole; a tied table stays one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    import fastllm
    from fastllm import models

    def make():
        torch.manual_seed(1)
        if name == "mlp":
            return models.MLPLanguageModel(V, 6, 8, context_length=2).double()
        if name == "layers":
            model = torch.nn.ModuleDict(
                {"table": fastllm.Embedding(V, 6), "loss": fastllm.LinearCrossEntropyLoss(6, V)}
            )
            model["loss"].linear.weight = model["table"].weight
            return model.double()
        return models.TransformerLanguageModel(V, 8, 2, 2, context_length=8, tie_weights=name == "tied").double()

    def loss(model):
        ids = targets("each")[:8].view(2, 4)
        if name == "layers":
            return model["loss"](model["table"](ids.flatten()), ids.flatten().roll(-1))
        return model.loss(ids, ids.roll(-1))

    whole, cut = make(), make()
    mesh = init_device_mesh("cpu", (size,))
    parallelize_module(cut, mesh, fastllm.distributed.plan(cut))
    assert [n for n, _ in cut.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for model in (whole, cut):
        loss(model).backward()
    torch.testing.assert_close(loss(cut), loss(whole))
    for (n, a), (_, b) in zip(cut.named_parameters(), whole.named_parameters(), strict=True):
        assert hasattr(a, "full_tensor") == n.startswith(("embedding", "table", "loss", "output")), n
        torch.testing.assert_close(a.grad.full_tensor() if hasattr(a, "full_tensor") else a.grad, b.grad)
    if name != "layers":
        ids = targets("each")[:4]
        torch.testing.assert_close(cut(ids), whole(ids))
        assert torch.equal(cut.generate(ids, 5, temperature=0.0), whole.generate(ids, 5, temperature=0.0))


@pytest.mark.parametrize("name", ["mlp", "tied", "untied", "layers"])
def test_plan(group, name):
    group.run(plan_case, name)


def waiting_case(rank, size):
    """Told that the host may read no numbers, none are read; an assertion of the device finds a wrong id."""
    from fastllm.distributed import shard

    start, stop = ((0, 6), (6, 13))[rank]
    x, w, b = normal(N, DIM), normal(V, DIM)[start:stop].clone(), normal(V)[start:stop].clone()
    logits, y, top = normal(N, V)[:, start:stop].clone(), targets("some ignored"), torch.zeros(N, 3, dtype=torch.int64)
    leaves = [t.requires_grad_() for t in (x, w, b, logits)]
    q, temperature = normal(N, V).softmax(1)[:, start:stop].clone(), torch.ones(N)
    smooth = {"label_smoothing": 0.1, "softcap": 2.0, "lse_square_scale": 0.1, "weight": b.detach().abs()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "may_look", lambda device: False)
        with Waits():
            for options in (
                {},
                smooth,
                {"num_items": 5, "all_ignored": "zero"},
                {"num_items": torch.tensor(5.0)},
                {"reduction": "none"},
            ):
                D.linear_cross_entropy(x, w, y, linear_bias=b, vocab_start=start, **options).sum().backward()
                D.cross_entropy(logits, y, vocab_start=start, **options).sum().backward()
            D.cross_entropy(logits, q, vocab_start=start, label_smoothing=0.1).backward()
            given = {"outputs": F.LogProbs._fields, "top_ids": top, "temperature": temperature, "softcap": 3.0}
            found = D.linear_log_probs(x, w, y, linear_bias=b, vocab_start=start, **given)
            sum(value.sum() for value in found if value.requires_grad).backward()
            D.embedding(y.clamp(min=0), w, -1, vocab_start=start).sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)
        with pytest.raises(RuntimeError, match="target holds an id outside the vocabulary"):
            D.linear_cross_entropy(x, w, y + V, vocab_start=start)


def test_nothing_waits_for_a_gpu(two):
    two.run(waiting_case)


def page_case(rank, size):
    page = Path(__file__).resolve().parent.parent / "docs" / "several-processes.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    exec("".join(blocks), {})


def test_the_code_of_the_page_runs(two):
    two.run(page_case)


def test_a_model_without_a_vocabulary_has_no_plan():
    with pytest.raises(
        ValueError, match="plan: model must hold an Embedding or an output layer of fastllm, got Linear"
    ):
        D.plan(torch.nn.Linear(2, 2))
