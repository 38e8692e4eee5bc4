"""Signatures, warnings and exception types of PyTorch's functions, on every backend that this machine has."""

import inspect
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import fastllm
import fastllm.functional as F

pytestmark = pytest.mark.contract

BACKENDS = ["auto", "eager"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (F.embedding, TF.embedding),
        (F.mse_loss, TF.mse_loss),
        (F.cross_entropy, TF.cross_entropy),
        (fastllm.Embedding, nn.Embedding),
        (fastllm.LinearReLU, nn.Linear),
        (fastllm.MSELoss, nn.MSELoss),
        (fastllm.CrossEntropyLoss, nn.CrossEntropyLoss),
    ],
    ids=lambda f: f.__module__.split(".")[0] + "." + f.__name__,
)
def test_torch_arguments_first_and_additions_by_keyword(ours, theirs):
    a, b = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(a)[: len(b)] == list(b)
    assert all(a[name].default == b[name].default and a[name].kind == b[name].kind for name in b)
    assert all(p.kind is p.KEYWORD_ONLY for name, p in a.items() if name not in b)


def test_linear_cross_entropy_is_called_as_torch_calls_it():
    ours = inspect.signature(F.linear_cross_entropy).parameters
    assert list(ours) == [
        *("input", "linear_weight", "target", "linear_bias", "weight", "reduction", "ignore_index"),
        *("label_smoothing", "lse_square_scale", "softcap", "num_items", "all_ignored", "shift"),
    ]
    assert [p.kind for p in ours.values()][3:] == [inspect.Parameter.KEYWORD_ONLY] * 10
    theirs = getattr(TF, "linear_cross_entropy", None)  # PyTorch 2.13
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    for name, p in inspect.signature(theirs).parameters.items():
        if name not in ("ignore_index", "options"):
            assert ours[name].kind == p.kind and ours[name].default == p.default


def test_per_token_statistics_take_options_by_keyword():
    options = ["ignore_index", "temperature", "softcap", "outputs", "top_ids"]
    for function, tensors, keywords in (
        (F.log_probs, ["input", "target"], options),
        (F.linear_log_probs, ["input", "linear_weight", "target"], ["linear_bias", *options]),
    ):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == tensors + keywords
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in keywords)
    assert F.LogProbs._fields == (
        *("log_prob", "entropy", "lse", "argmax", "mean_logit", "log_sum_sq_probs", "top_log_prob"),
    )


torch.manual_seed(0)
x = torch.randn(3, 4)
y = torch.tensor([0, 1, 2])
table = torch.randn(5, 4)
q = torch.rand(3, 5)
deep = torch.randn(5, 2, 4)
# op, arguments, options: both must return the same number, or fail with the same type, with the same warnings
CALLS = [
    ("mse_loss", (x, x + 1), {"reduction": "elementwise_mean"}),
    ("mse_loss", (x, x + 1), {"reduction": "avg"}),
    ("mse_loss", (x, x + 1), {"reduction": "avg", "weight": torch.rand(3, 4)}),
    ("mse_loss", (x, x + 1), {"reduction": "elementwise_mean", "weight": torch.rand(3, 4)}),
    ("mse_loss", (x, x + 1), {"weight": torch.rand(4)}),
    ("mse_loss", (x, x + 1, False), {}),
    ("mse_loss", (x, x + 1, None, False), {}),
    ("mse_loss", (x, x + 1, True, True), {"reduction": "avg"}),
    ("mse_loss", (x, x[0]), {}),
    ("mse_loss", (x, torch.randn(5, 4)), {}),
    ("mse_loss", (x, x.double()), {}),
    ("mse_loss", (x, torch.tensor(1.0, dtype=torch.float64)), {}),
    ("mse_loss", (x, x.cfloat()), {}),
    *(("mse_loss", (x[:1], x), {"weight": torch.rand(1, 4), "reduction": r}) for r in ("none", "mean", "sum")),
    ("mse_loss", (x, x + 1), {"weight": torch.rand(3, 4).double()}),
    ("mse_loss", (x, x + 1), {"weight": torch.ones(3, 4, dtype=torch.int64)}),
    ("mse_loss", (x, x + 1), {"weight": torch.rand(3, 4, device="meta")}),
    ("cross_entropy", (x, y), {"reduction": "elementwise_mean"}),
    ("cross_entropy", (x, y), {"reduction": "avg"}),
    ("cross_entropy", (x, y, None, False), {}),
    ("cross_entropy", (x, y, None, None, 1, False), {}),
    ("cross_entropy", (x, y.to(torch.uint8)), {}),
    ("cross_entropy", (x, torch.rand(3, 4)), {"ignore_index": 2}),
    *(("cross_entropy", (x[:, :0], torch.zeros(3, 0)), {"reduction": r}) for r in ("none", "mean", "sum")),
    ("cross_entropy", (x[0, :0], torch.zeros(0)), {}),
    ("cross_entropy", (torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)), {"reduction": "none"}),
    ("cross_entropy", (x[0, 0], x[0, 0]), {}),
    ("cross_entropy", (x[0, 0], y[0]), {}),
    ("cross_entropy", (x[0, 0], y[:1]), {}),
    ("cross_entropy", (x, torch.rand(3, 4)), {"weight": torch.rand(4).double()}),
    ("cross_entropy", (x, torch.rand(3, 4)), {"weight": torch.ones(4, dtype=torch.int64)}),
    ("cross_entropy", (x, y), {"ignore_index": 1.5}),
    ("cross_entropy", (x, y), {"ignore_index": None}),
    ("cross_entropy", (x, y), {"ignore_index": True}),
    ("cross_entropy", (x, y), {"ignore_index": np.int64(1)}),
    ("cross_entropy", (x, y), {"label_smoothing": "much"}),
    ("cross_entropy", (x, y), {"label_smoothing": None}),
    ("cross_entropy", (x, y), {"label_smoothing": 1}),
    ("cross_entropy", (x, y), {"label_smoothing": np.float32(0.5)}),
    ("cross_entropy", (x, y), {"reduction": ["mean"]}),
    ("embedding", (y, table, 1.0), {}),
    ("embedding", (y, table, True), {}),
    ("embedding", (y, table), {"sparse": 1}),
    ("embedding", (y, table), {"scale_grad_by_freq": None}),
    ("embedding", (y, table[0]), {"max_norm": 1.0}),
    ("embedding", (y, table.to_sparse()), {}),
    ("embedding", (y[:0], table[:0], 0), {}),
    ("embedding", (y, table, -5), {}),
    ("embedding", (y, table, -6), {}),
    ("embedding", (y, table, 5), {}),
    ("linear_cross_entropy", (x, table, y), {"reduction": "elementwise_mean"}),
    ("linear_cross_entropy", (x, table, y), {"reduction": "avg"}),
    ("linear_cross_entropy", (x, table, q), {}),
    ("linear_cross_entropy", (x, table, q), {"ignore_index": None}),
    ("linear_cross_entropy", (x, table, q), {"ignore_index": -5}),
    ("linear_cross_entropy", (x, table, y), {"linear_bias": torch.rand(1)}),
    ("linear_cross_entropy", (x, torch.randn(5, 6), y), {}),
    ("linear_cross_entropy", (x, table[0], y), {}),
    ("linear_cross_entropy", (x[0], table, y[0]), {}),
    ("linear_cross_entropy", (x[None], table, y[None]), {}),
    ("linear_cross_entropy", (x[0], table, y[:1]), {}),
    ("linear_cross_entropy", (x[0], table, y[:1]), {"reduction": "none"}),
    ("linear_cross_entropy", (x[0], table, y[:2]), {}),
    ("linear_cross_entropy", (x, table, y[0]), {}),
    ("linear_cross_entropy", (x, table, q.double()), {}),
    ("linear_cross_entropy", (x, table[:0], torch.zeros(3, 0)), {}),
    ("linear_cross_entropy", (x, table, y), {"label_smoothing": "much"}),
    ("linear_cross_entropy", (x, deep, torch.ones(3, 2, dtype=torch.int64)), {"linear_bias": deep[..., 0]}),
    ("linear_cross_entropy", (x, deep, torch.ones(3, 2, dtype=torch.int64)), {"linear_bias": deep[0, :, 0]}),
    ("linear_cross_entropy", (x, deep, torch.ones(3, 2, dtype=torch.int64)), {"reduction": "avg"}),
    ("linear_cross_entropy", (x, deep, torch.rand(3, 5, 2)), {"ignore_index": 3}),
    ("linear_cross_entropy", (x[0], deep, torch.ones(2, dtype=torch.int64)), {}),
]


def outcome(function, arguments, options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*arguments, **options)
        except Exception as error:
            result = error
    return result, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "arguments", "options"), CALLS)
def test_same_result_warning_or_exception_as_torch(op, arguments, options, backend):
    if not hasattr(TF, op):
        pytest.skip(f"this torch has no {op}")
    expected, warned = outcome(getattr(TF, op), arguments, options)
    with fastllm.use_backend(backend):
        found, our_warnings = outcome(getattr(F, op), arguments, options)
    assert our_warnings == warned
    if isinstance(expected, Exception):
        assert type(found) is type(expected), (found, expected)
    else:
        torch.testing.assert_close(found, expected, equal_nan=True)


class Index:
    def __index__(self):
        return 1


# Index objects, which PyTorch's embedding compares before it converts them, are accepted for all alike.
INTEGERS = [
    1, np.int64(1), np.int8(1), np.uint8(1), np.array(1), np.array(1, dtype=np.int16), torch.tensor(1), torch.tensor([1]),
    np.array([1]), np.array(1.0), np.float32(1), torch.tensor(1.0), torch.tensor(1.0, requires_grad=True), torch.zeros(2).int(),
    True, np.bool_(True), np.array(True), 1.0, "1", [1], 2**70, np.uint64(2**63),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_as_torch_takes_them(value, backend):
    with fastllm.use_backend(backend):
        for name, ours, theirs in (
            ("ignore_index", F.cross_entropy, TF.cross_entropy),
            ("padding_idx", F.embedding, TF.embedding),
            ("ignore_index", lambda x, y, **o: F.linear_cross_entropy(x, table, y, **o), _linear_cross_entropy),
        ):
            arguments = (y, table) if name == "padding_idx" else (x, y)
            expected, _ = outcome(theirs, arguments, {name: value})
            found, _ = outcome(ours, arguments, {name: value})
            if isinstance(expected, Exception):
                several = isinstance(value, torch.Tensor) and value.numel() > 1
                kind = TypeError if several or isinstance(value, (str, list)) else type(expected)
                assert type(found) is kind, (found, expected)
            else:
                torch.testing.assert_close(found, expected)


def _linear_cross_entropy(x, y, **options):
    return TF.cross_entropy(TF.linear(x, table), y, **options)


def test_integers_of_objects_and_of_bool_tensors():
    torch.testing.assert_close(F.cross_entropy(x, y, ignore_index=Index()), TF.cross_entropy(x, y, ignore_index=1))
    weight = table.clone().requires_grad_()
    F.embedding(y, weight, Index()).sum().backward()
    assert weight.grad[1].count_nonzero() == 0
    for name, call in (
        ("ignore_index", lambda v: F.cross_entropy(x, y, ignore_index=v)),
        ("padding_idx", lambda v: F.embedding(y, table, v)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be int, got tensor.True. of type Tensor"):
            call(torch.tensor(True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize(("op", "arguments"), [("cross_entropy", (x, y)), ("linear_cross_entropy", (x, table, y))])
def test_softcap_must_be_positive(op, arguments, softcap, backend):
    with fastllm.use_backend(backend), pytest.raises(ValueError, match=f"^{op}: softcap must be positive or None"):
        getattr(F, op)(*arguments, softcap=softcap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_norm_checks_every_id_before_it_writes(backend):
    weight = 3 * torch.ones(5, 4)
    for ids in (torch.tensor([[0, 1], [2, 5]]), torch.tensor([0, 1, 2, -1], dtype=torch.int32)):
        with fastllm.use_backend(backend), pytest.raises(IndexError, match=r"\[0, 5\).*got (5|-1) at position 3"):
            F.embedding(ids, weight, max_norm=1.0)
        assert torch.equal(weight, 3 * torch.ones(5, 4))
    with fastllm.use_backend(backend):
        output = F.embedding(torch.tensor([1, 1]), weight, max_norm=1.0)
    torch.testing.assert_close(output.norm(dim=1), torch.ones(2))
    assert torch.equal(weight[0], torch.full((4,), 3.0)) and weight[1].norm() < 1.001


def test_types_of_the_additional_options():
    for op, arguments in (("cross_entropy", (x, y)), ("linear_cross_entropy", (x, table, y))):
        for options in ({"softcap": "3"}, {"lse_square_scale": None}, {"lse_square_scale": "0"}):
            with pytest.raises(TypeError, match=f"^{op}: {next(iter(options))} must be float, got .* of type"):
                getattr(F, op)(*arguments, **options)


BIASES = [torch.tensor(0.5), torch.randn(1), torch.randn(1, 6), torch.randn(3, 6), torch.randn(3, 1)]


@pytest.mark.parametrize("bias", BIASES, ids=lambda b: str(tuple(b.shape)))
def test_linear_expands_its_bias(bias):
    """Whatever PyTorch's linear broadcasts, for matrices and batches of them; and no more."""
    w, v = torch.randn(6, 4), torch.randn(6, 6)
    for rows in (x, x[None]):
        leaf = bias.clone().requires_grad_()
        expected = torch.relu(TF.linear(rows, w, leaf))
        for found, wanted in (
            (F.linear_relu(rows, w, leaf), expected),
            (F.relu_mlp(rows, w, leaf, v, None), TF.linear(expected, v)),
            (F.relu_mlp(rows, w, None, v, leaf), TF.linear(torch.relu(TF.linear(rows, w)), v, leaf)),
        ):
            torch.testing.assert_close(found, wanted)
            grads = [torch.autograd.grad(output.sum(), leaf, retain_graph=True)[0] for output in (found, wanted)]
            torch.testing.assert_close(*grads)
    deep = torch.randn(2, 3, 6)
    with pytest.raises(RuntimeError, match=r"^linear_relu: bias must be of shape \(6,\), got \[2, 3, 6\]"):
        F.linear_relu(x, w, deep)
    for arguments in ((x, w, deep, v, None), (x, w, None, v, deep)):
        with pytest.raises(RuntimeError, match=r"^relu_mlp: bias[12] must be of shape \(6,\), got \[2, 3, 6\]"):
            F.relu_mlp(*arguments)


def test_second_layer_of_one_dimension():
    w, v = torch.randn(6, 4), torch.randn(6)
    torch.testing.assert_close(F.relu_mlp(x, w, None, v, None), TF.linear(torch.relu(TF.linear(x, w)), v))


def test_sparse_and_nested_tensors_are_for_eager():
    w = torch.randn(6, 4)
    nested = torch.nested.nested_tensor([x, x[:2]])
    for arguments in ((x, w.to_sparse()), (x.to_sparse(), w), (nested, w)):
        found, expected = F.linear_relu(*arguments), torch.relu(TF.linear(*arguments))
        for a, b in zip(found.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(a.to_dense(), b.to_dense())
        with fastllm.use_backend("cpu"), pytest.raises(RuntimeError, match="serves dense tensors"):
            F.linear_relu(*arguments)


def test_symbolic_tracing_sees_one_call():
    for module, arguments in (
        (fastllm.Embedding(5, 4), (y,)),
        (fastllm.LinearReLU(4, 6), (x,)),
        (fastllm.ReLUMLP(4, 6), (x,)),
        (fastllm.MSELoss(), (x, x + 1)),
        (fastllm.CrossEntropyLoss(), (x, y)),
        (fastllm.LinearCrossEntropyLoss(4, 5), (x, y)),
    ):
        traced = torch.fx.symbolic_trace(module)
        called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert len(called) == 1 and called[0].__module__ == "fastllm.functional"
        torch.testing.assert_close(traced(*arguments), module(*arguments))
