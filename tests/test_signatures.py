"""Signatures, warnings and exception types of PyTorch's functions, on every backend that this machine has."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import fastllm
import fastllm.functional as F

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
        *("label_smoothing", "lse_square_scale", "softcap"),
    ]
    assert [p.kind for p in ours.values()][3:] == [inspect.Parameter.KEYWORD_ONLY] * 7
    theirs = getattr(TF, "linear_cross_entropy", None)  # PyTorch 2.13
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    for name, p in inspect.signature(theirs).parameters.items():
        if name not in ("ignore_index", "options"):
            assert ours[name].kind == p.kind and ours[name].default == p.default


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
    ("cross_entropy", (x, y), {"reduction": "elementwise_mean"}),
    ("cross_entropy", (x, y), {"reduction": "avg"}),
    ("cross_entropy", (x, y, None, False), {}),
    ("cross_entropy", (x, y, None, None, 1, False), {}),
    ("cross_entropy", (x, y.to(torch.uint8)), {}),
    ("cross_entropy", (x, torch.rand(3, 4)), {"ignore_index": 2}),
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
        torch.testing.assert_close(found, expected)


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
