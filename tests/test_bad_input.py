"""Bad arguments: PyTorch's exception type, and a message with operation and argument."""

import pytest
import torch
import torch.nn.functional as TF

import fastllm
import fastllm.functional as F

pytestmark = pytest.mark.contract

x = torch.randn(3, 4)
ids = torch.tensor([0, 1, 2])
table = torch.randn(5, 4)
w, b = torch.randn(6, 4), torch.randn(6)
meta = torch.empty(3, 4, device="meta")


def linear_relu(*args):
    return torch.relu(TF.linear(*args))


def relu_mlp(x, w, b, v, c):
    return TF.linear(torch.relu(TF.linear(x, w, b)), v, c)


def linear_cross_entropy(x, w, t, linear_bias=None, **kwargs):
    if x.dim() not in (1, 2):
        raise RuntimeError("expected input with dimensionality 1 or 2")
    return TF.cross_entropy(TF.linear(x, w, linear_bias), t, **kwargs)


THEIRS = {
    "embedding": TF.embedding,
    "linear_relu": linear_relu,
    "relu_mlp": relu_mlp,
    "mse_loss": TF.mse_loss,
    "cross_entropy": TF.cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}
BAD = [
    # embedding
    ("embedding", (ids.float(), table), {}),
    ("embedding", (ids.to(torch.uint8), table), {}),
    ("embedding", (ids.bool(), table), {}),
    ("embedding", (torch.tensor([5]), table), {}),
    ("embedding", (torch.tensor([-1]), table), {}),
    ("embedding", (ids, table[0]), {}),
    ("embedding", (ids, table[None]), {}),
    ("embedding", (ids, table, 5), {}),
    ("embedding", (ids, table, -6), {}),
    ("embedding", (ids, [1.0]), {}),
    ("embedding", ([0], table), {}),
    ("embedding", (torch.tensor([9]), table), {"max_norm": 1.0}),
    # linear_relu
    ("linear_relu", (x, torch.randn(6, 5)), {}),
    ("linear_relu", (x, w, torch.randn(5)), {}),
    ("linear_relu", (x, w, torch.randn(2, 6, 1)), {}),
    ("linear_relu", (x, w.double()), {}),
    ("linear_relu", (x, w, b.double()), {}),
    ("linear_relu", (x, w.long()), {}),
    ("linear_relu", (x, [1.0]), {}),
    ("linear_relu", (x, w, "bias"), {}),
    ("linear_relu", (x, torch.randn(2, 6, 4, 1)), {}),
    # relu_mlp
    ("relu_mlp", (x, torch.randn(6, 5), None, torch.randn(2, 6), None), {}),
    ("relu_mlp", (x, w, None, torch.randn(2, 5), None), {}),
    ("relu_mlp", (x, w, torch.randn(5), torch.randn(2, 6), None), {}),
    ("relu_mlp", (x, w, b, torch.randn(2, 6), torch.randn(3)), {}),
    ("relu_mlp", (x, w, b, torch.randn(2, 6).double(), None), {}),
    ("relu_mlp", (x, w.half(), b, torch.randn(2, 6), None), {}),
    ("relu_mlp", (x, w, b, None, None), {}),
    # mse_loss
    ("mse_loss", (x, torch.randn(5, 4)), {}),
    ("mse_loss", (x, x), {"reduction": "avg"}),
    ("mse_loss", (x, x), {"weight": torch.rand(4)}),
    ("mse_loss", (x, x), {"weight": torch.rand(4, 3)}),
    ("mse_loss", (x, x, None, None, 1), {}),
    ("mse_loss", (x, 3.0), {}),
    # cross_entropy
    ("cross_entropy", (x, torch.tensor([0, 1])), {}),
    ("cross_entropy", (x, torch.tensor([0, 1, 4])), {}),
    ("cross_entropy", (x, torch.tensor([0, 1, -1])), {}),
    ("cross_entropy", (x, torch.tensor([[0, 1, 2]])), {}),
    ("cross_entropy", (x, torch.tensor([[0], [1], [2]])), {}),
    ("cross_entropy", (x, torch.tensor(0)), {}),
    ("cross_entropy", (x, torch.tensor([0.0, 1.0, 2.0])), {}),
    ("cross_entropy", (x, torch.tensor([True, False, True])), {}),
    ("cross_entropy", (x, torch.ones(3, 4, dtype=torch.int64)), {}),
    ("cross_entropy", (x, torch.rand(3, 4)), {"ignore_index": 2}),
    ("cross_entropy", (x, ids), {"reduction": "avg"}),
    ("cross_entropy", (x, ids), {"weight": torch.rand(5)}),
    ("cross_entropy", (x, ids), {"weight": torch.rand(4, 1)}),
    ("cross_entropy", (x, ids), {"weight": torch.rand(4).double()}),
    ("cross_entropy", (x, ids), {"label_smoothing": 1.1}),
    ("cross_entropy", (x[0], torch.tensor([0, 1])), {}),
    ("cross_entropy", (torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)), {}),
    ("cross_entropy", (torch.randn(2, 4, 3), torch.zeros(3, 3, dtype=torch.int64)), {}),
    ("cross_entropy", (torch.randn(2, 4, 3, 5), torch.zeros(2, 3, dtype=torch.int64)), {}),
    ("cross_entropy", (x, [0, 1, 2]), {}),
    ("cross_entropy", (x.long(), ids), {}),
    # linear_cross_entropy
    ("linear_cross_entropy", (x, torch.randn(6, 5), ids), {}),
    ("linear_cross_entropy", (x, w, torch.tensor([0, 1])), {}),
    ("linear_cross_entropy", (x, w, torch.tensor([0, 1, 6])), {}),
    ("linear_cross_entropy", (x, w, ids.float()), {}),
    ("linear_cross_entropy", (x, w, ids), {"linear_bias": torch.randn(5)}),
    ("linear_cross_entropy", (x, w, ids), {"weight": torch.rand(5)}),
    ("linear_cross_entropy", (x, w, ids), {"reduction": "avg"}),
    ("linear_cross_entropy", (x, w, ids), {"label_smoothing": 2.0}),
    ("linear_cross_entropy", (x, w.double(), ids), {}),
    ("linear_cross_entropy", (torch.randn(2, 3, 4), w, ids), {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "args", "kwargs"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_same_exception_as_torch(op, args, kwargs):
    with pytest.raises(Exception) as theirs:
        THEIRS[op](*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(F, op)(*args, **kwargs)
    assert ours.type is theirs.type, (ours.value, theirs.value)


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "message"),
    [
        ("embedding", (ids.float(), table), {}, "embedding: input must be int64 or int32 ids, got"),
        (
            "embedding",
            (torch.tensor([7]), table),
            {},
            r"embedding: input must hold ids in \[0, 5\).*got 7 at",
        ),
        ("linear_relu", (x, torch.randn(6, 5)), {}, r"linear_relu: input must be of shape \(\*, 5\).*got \[3, 4\]"),
        ("relu_mlp", (x, w, b, torch.randn(2, 5), None), {}, r"relu_mlp: weight2 must be of shape \(\*, 6\).*\[2, 5\]"),
        ("mse_loss", (x, x), {"reduction": "avg"}, "mse_loss: reduction must be one of .* got 'avg'"),
        (
            "cross_entropy",
            (x, torch.tensor([0, 9, 1])),
            {},
            r"cross_entropy: target must be in \[0, 4\).*got 9 at pos",
        ),
        ("cross_entropy", (x, ids), {"softcap": -1.0}, "cross_entropy: softcap must be positive or None, got -1"),
        ("cross_entropy", (x, ids.bool()), {}, "cross_entropy: target must be int64 or int32 class indices, got"),
        (
            "linear_cross_entropy",
            (x, w, ids[:2]),
            {},
            "linear_cross_entropy: target must have input's batch size 3",
        ),
    ],
)
def test_messages(op, args, kwargs, message):
    with pytest.raises(Exception, match=message):
        getattr(F, op)(*args, **kwargs)


@pytest.mark.parametrize("position", range(2))
@pytest.mark.parametrize("op", ["embedding", "linear_relu", "mse_loss", "cross_entropy", "linear_cross_entropy"])
def test_mixed_devices(op, position):
    """A tensor without numbers beside one with them."""
    arguments = {
        "embedding": [ids, table],
        "linear_relu": [x, w],
        "mse_loss": [x, x],
        "cross_entropy": [x, ids],
        "linear_cross_entropy": [x, w, ids],
    }[op]
    arguments[position] = arguments[position].to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        getattr(F, op)(*arguments).item()


@pytest.mark.filterwarnings("ignore")
def test_bad_index_is_found_before_anything_is_written():
    logits = torch.randn(3, 4, requires_grad=True) * 1.0
    copy = logits.detach().clone()
    with pytest.raises(IndexError):
        F.cross_entropy(logits, torch.tensor([0, 1, 7]), inplace_backward=True)
    assert torch.equal(logits, copy)
    weights = torch.full((5, 4), 9.0)
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([0, 7]), weights, max_norm=1.0)


def test_ignore_index_inside_and_outside_of_the_range():
    for ignored in (2, -1, 1000, -100):
        t = torch.tensor([0, ignored, 3])
        torch.testing.assert_close(
            F.cross_entropy(x, t, ignore_index=ignored), TF.cross_entropy(x, t, ignore_index=ignored)
        )


SERVED = [  # on the emulators in test-all only
    pytest.param(name, marks=[] if name == "cpu" else pytest.mark.slow)
    for name, backend in fastllm.backends.TABLE.items()
    if name != "eager" and not backend.missing
]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("op", fastllm.backends.OPERATIONS)
@pytest.mark.parametrize("backend", SERVED)
def test_unserved_dtype_under_a_named_backend(backend, op, dtype):
    """The operation's own error, whichever backend was asked for."""
    x, w, w2 = (torch.ones(s, dtype=dtype) for s in [(3, 4), (6, 4), (2, 6)])
    arguments = {
        "embedding": (ids, w),
        "linear_relu": (x, w),
        "relu_mlp": (x, w, None, w2, None),
        "mse_loss": (x, x),
        "cross_entropy": (x, ids),
        "linear_cross_entropy": (x, w, ids),
    }[op]
    if x.device.type not in fastllm.backends.TABLE[backend].device_types:
        pytest.skip(f"{backend} serves no {x.device.type} tensors here")
    with (
        fastllm.use_backend(backend),
        pytest.raises(RuntimeError, match=f"^{op}: .* must be float32, float64, bfloat16"),
    ):
        getattr(F, op)(*arguments)
