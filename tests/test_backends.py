"""The switch, the report, and what happens where the compiled operations are missing."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from helpers import run_python

import fastllm
import fastllm.functional as F
from fastllm import _native

x = torch.randn(3, 4, requires_grad=True)
t = torch.randn(3, 4)
OURS, EAGER = "Node", "Mse"


def node():
    return F.mse_loss(x, t).grad_fn.name()


def test_auto_takes_the_compiled_operation():
    assert fastllm.backends.get_backend() == "auto"
    assert OURS in node()


def test_use_backend_nests_and_restores():
    with fastllm.use_backend("eager"):
        assert EAGER in node()
        with fastllm.use_backend("cpu"):
            assert OURS in node()
        assert EAGER in node()
        with pytest.raises(KeyError), fastllm.use_backend("auto"):
            raise KeyError
        assert EAGER in node()
    assert OURS in node()


def test_use_backend_is_of_one_thread():
    seen = []
    with fastllm.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(node()))
        thread.start()
        thread.join()
    assert OURS in seen[0]


def test_set_backend():
    try:
        fastllm.set_backend("eager")
        assert EAGER in node()
        with fastllm.use_backend("cpu"):
            assert OURS in node()
    finally:
        fastllm.set_backend("auto")


@pytest.mark.skipif(fastllm.backends.TABLE["cuda"].missing is None, reason="this build has CUDA C++ kernels")
def test_a_backend_that_is_not_there_is_an_error():
    with pytest.raises(RuntimeError, match=r"cuda.*not built.*nvcc"):
        fastllm.set_backend("cuda")
    with pytest.raises(RuntimeError, match=r"cuda.*not built.*nvcc"), fastllm.use_backend("cuda"):
        pass
    assert OURS in node()


def test_a_backend_of_another_device_refuses_the_call():
    code = """
import torch, fastllm, fastllm.functional as F
try:
    with fastllm.use_backend("triton"):
        F.mse_loss(torch.ones(3), torch.ones(3))
except RuntimeError as error:
    print(error)
"""
    said = run_python(code, {"TRITON_INTERPRET": "0"}).stdout
    assert "mse_loss: backend 'triton' cannot" in said or "backend 'triton' cannot be used" in said


def test_unknown_names():
    with pytest.raises(ValueError, match="'gpu'"):
        fastllm.set_backend("gpu")
    result = run_python("import fastllm", {"FASTLLM_BACKEND": "gpu"})
    assert result.returncode != 0 and "FASTLLM_BACKEND" in result.stderr


def test_environment_variable():
    code = "import torch, fastllm.functional as F; x=torch.ones(3,requires_grad=True); print(F.mse_loss(x,x*2).grad_fn)"
    assert EAGER in run_python(code, {"FASTLLM_BACKEND": "eager"}).stdout
    assert "CppFunction" in run_python(code, {"FASTLLM_BACKEND": "cpu"}).stdout


def test_a_forced_backend_never_falls_back():
    with fastllm.use_backend("cpu"), pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve.*meta"):
        F.linear_relu(t.to("meta"), t.to("meta"))


def test_a_backend_that_the_environment_forces_is_refused_at_the_call():
    code = "import torch, fastllm.functional as F; x = torch.ones(3); F.mse_loss(x, x)"
    result = run_python(code, {"FASTLLM_BACKEND": "cuda"})
    assert result.returncode != 0
    assert "RuntimeError: mse_loss: backend 'cuda' cannot serve this call" in result.stderr


def test_a_backend_says_which_operation_it_lacks():
    partial = dataclasses.replace(fastllm.backends.TABLE["cpu"], operations=frozenset({"mse_loss"}))
    assert partial.refusal("mse_loss", t) is None
    assert "no embedding" in partial.refusal("embedding", t)


ARGUMENTS = {
    "embedding": lambda: [torch.tensor([0, 2]), torch.randn(3, 4)],
    "linear_relu": lambda: [torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)],
    "relu_mlp": lambda: [torch.randn(3, 4), torch.randn(2, 4), torch.randn(2), torch.randn(5, 2), torch.randn(5)],
    "mse_loss": lambda: [torch.randn(3, 4), torch.randn(3, 4)],
    "cross_entropy": lambda: [torch.randn(3, 4), torch.tensor([0, 1, 3]), torch.rand(4)],
    "linear_cross_entropy": lambda: [torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 3])],
}


def traced(function, *arguments, dynamic=None):
    """Names of the functions in the one graph that torch.compile makes of a call."""
    names = []

    def look(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=look, fullgraph=True, dynamic=dynamic)(*arguments)
    return names


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", fastllm.backends.OPERATIONS)
def test_compiled_code_calls_the_compiled_operation(op, dynamic):
    ours = f"fastllm.{op}.default"
    arguments = ARGUMENTS[op]()
    assert ours in traced(getattr(F, op), *arguments, dynamic=dynamic)
    with fastllm.use_backend("eager"):
        assert not any("fastllm" in name for name in traced(getattr(F, op), *arguments, dynamic=dynamic))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_compiled_transform_takes_the_definition(transform):
    def grad(x, t):
        return torch.func.grad(lambda x: F.mse_loss(x, t))(x)

    def vmap(x, t):
        return torch.func.vmap(F.mse_loss)(x, t)

    def jvp(x, t):
        return torch.func.jvp(lambda x: F.mse_loss(x, t), (x,), (t,))[1]

    function = {"grad": grad, "vmap": vmap, "jvp": jvp}[transform]
    a = x.detach()
    assert not any("fastllm" in name for name in traced(function, a, t))
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(a, t), function(a, t))


def test_compiled_code_follows_the_switch():
    def inside(x, t):
        with fastllm.use_backend("eager"):
            return F.mse_loss(x, t)

    assert not any("fastllm" in name for name in traced(inside, x, t))
    assert fastllm.backends.get_backend() == "auto"
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: F.mse_loss(x, t), backend="eager", fullgraph=True)
    assert OURS in compiled(x, t).grad_fn.name()
    with fastllm.use_backend("eager"):
        assert EAGER in compiled(x, t).grad_fn.name()
    try:
        fastllm.set_backend("eager")
        assert EAGER in compiled(x, t).grad_fn.name()
    finally:
        fastllm.set_backend("auto")
    assert OURS in compiled(x, t).grad_fn.name()


def test_compiled_code_does_not_choose_among_kernels():
    """Its graph holds operations; a choice inside it would be gone when they run."""
    if fastllm.backends.TABLE["triton"].missing is not None:
        pytest.skip("no Triton")

    def inside(x, t):
        with fastllm.use_backend("triton"):
            return F.mse_loss(x, t)

    with pytest.raises(Exception, match="around the call of the compiled function"):
        torch.compile(inside, fullgraph=True, backend="eager")(x, t)
    fastllm.backends._chosen.name = None


class Logged(torch.Tensor):
    """Records which functions it was given to."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


POSITIONS = [(op, i) for op, make in ARGUMENTS.items() for i in range(len(make()))]


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize(("op", "position"), POSITIONS)
def test_a_subclass_in_any_argument_takes_the_definition(op, position, backend):
    """A subclass that overrides torch.nn.functional sees those calls, and no operation that it cannot know."""
    arguments = ARGUMENTS[op]()
    expected = getattr(F, op)(*arguments)
    arguments[position] = arguments[position].as_subclass(Logged)
    Logged.seen = []
    with fastllm.use_backend(backend):
        output = getattr(F, op)(*arguments)
    known = {"linear_relu": "linear", "relu_mlp": "linear", "linear_cross_entropy": "cross_entropy"}.get(op, op)
    assert type(output) is Logged
    seen = list(Logged.seen)
    assert known in seen
    assert not any(name.endswith(".default") for name in seen)
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)


def test_fake_tensors_take_the_compiled_operation():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        a = mode.from_tensor(x)
        assert OURS in F.mse_loss(a, mode.from_tensor(t)).grad_fn.name()


OPTIONS = {  # that follow the tensors of an operation: the plain kinds, and others of the same value
    "embedding": ([-1, True, False], [np.int64(-1), True, False]),
    "linear_relu": ([], []),
    "relu_mlp": ([], []),
    "mse_loss": ([None, 1], [None, np.int64(1)]),
    "cross_entropy": ([1, 3, 0.5, 0.25, 2.0, False], [np.int64(1), torch.tensor(3), np.float64(0.5), 0.25, 2, False]),
    "linear_cross_entropy": ([None, None, 2, -100, 0.0, 1.0, None, False], [None, None, 2, -100, 0, 1, None, False]),
}
needs_extension = pytest.mark.skipif(_native.MISSING is not None, reason=str(_native.MISSING))


@needs_extension
@pytest.mark.parametrize("op", fastllm.backends.OPERATIONS)
def test_both_ways_to_an_operation(op):
    """Called from C or through torch.ops: the same results, and the same errors, for arguments of any kind."""
    direct, traceable = fastllm.backends._DIRECT[op], fastllm.backends._TRACEABLE[op]
    tensors = ARGUMENTS[op]()
    assert fastllm.backends.native(op, *(tensors[::-1] if op == "embedding" else tensors)) is direct
    if op == "embedding":
        tensors[1] = torch.nn.Parameter(tensors[1])
    else:
        tensors[0].requires_grad_()
    expected = traceable(*tensors, *OPTIONS[op][0])
    for options in OPTIONS[op]:
        output = direct(*tensors, *options)
        assert torch.equal(output, expected) and output.grad_fn.name() == expected.grad_fn.name()
    for bad in (tensors[:1], [*tensors, *OPTIONS[op][0], 1], ["x", *tensors[1:], *OPTIONS[op][0]]):
        errors = []
        for call in (direct, traceable):
            with pytest.raises(Exception) as error:
                call(*bad)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
    if op == "cross_entropy":
        with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0.0 and 1.0, got 2"):
            direct(*tensors, 1, -100, 2.0, 0.0, None, False)
        with pytest.raises(IndexError, match=r"target must be in \[0, 4\)"):
            direct(tensors[0], tensors[1] + 1, None, 1, -100, 0.0, 0.0, None, False)
        with pytest.raises(ValueError, match="64 bits"):
            direct(*tensors, 1, 2**70, 0.0, 0.0, None, False)


@needs_extension
def test_a_torch_function_mode_sees_the_operation():
    seen = []

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Look():
        F.mse_loss(x, t)
    assert torch.ops.fastllm.mse_loss.default in seen


@needs_extension
def test_what_the_direct_call_does_not_serve():
    from torch.autograd import forward_ad

    serves = fastllm.backends._serves
    assert serves(x, t, None, torch.nn.Parameter(t), torch.tensor([1])) and serves(x.half().t(), x.bfloat16())
    nested = torch.nested.nested_tensor([t[0], t[1, :2]])
    for tensor in (t.to_sparse(), nested, t.as_subclass(Logged), [1.0]):
        assert not serves(tensor) and not serves(x, tensor)
    for tensor in (None, t.int(), t.to(torch.complex64), t.to("meta")):
        assert not serves(tensor)
    inside = []
    torch.func.vmap(lambda a: inside.append(serves(x, t)) or a)(t)
    torch.func.grad(lambda a: inside.append(serves(x, t)) or a.sum())(t)
    torch.func.functionalize(lambda a: inside.append(serves(x, t)) or a)(t)
    with forward_ad.dual_level():
        inside.append(serves(x, t))
    for name in ("eager", "cpu"):
        with fastllm.use_backend(name):
            inside.append(serves(x, t))
    assert inside == [False] * 6 and serves(x, t)


def test_arguments_that_are_no_tensors():
    with pytest.raises(TypeError, match="linear_relu: arguments must be tensors, got one of type list"):
        F.linear_relu(t, [1.0])
    with pytest.raises(TypeError, match="linear_relu: arguments must be tensors, got one of type str"):
        F.linear_relu(t, torch.randn(2, 4), "bias")


def test_auto_serves_other_devices_and_dtypes_by_the_definition():
    z = torch.randn(3, 4, dtype=torch.complex64)
    torch.testing.assert_close(F.linear_relu(t.to("meta"), torch.empty(2, 4, device="meta")).shape, torch.Size([3, 2]))
    with pytest.raises(RuntimeError):
        F.linear_relu(z, z)  # PyTorch has no ReLU of complex numbers


def test_eager_agrees_on_every_operation():
    from operations import small_cases

    for case in small_cases():
        ours = case.ours(*case.inputs)
        with fastllm.use_backend("eager"):
            torch.testing.assert_close(case.ours(*case.inputs), ours)


def test_info():
    report = fastllm.info()
    assert report["torch"] == torch.__version__
    assert set(report["operations"]) == set(fastllm.operations.FUNCTIONS)
    for served in report["operations"].values():
        accelerated = [b for b in ("cuda", "triton") if fastllm.backends.TABLE[b].missing is None]
        assert served == f"CPU tensors: cpu; CUDA tensors: {accelerated[0] if accelerated else 'eager'}"
    assert "have run on an H100" in report["gpu"]
    text = str(report)
    for word in ("instruction_set", "cpu", "cuda", "triton", "eager", "cross_entropy", "GPU"):
        assert word in text


def test_memory_pool():
    from fastllm import memory

    limit = memory.get_pool_limit()
    try:
        memory.empty_pool()
        assert memory.pool_stats()["idle"] == 0
        big, other = torch.randn(1000, 1000, requires_grad=True), torch.randn(1000, 1000)
        F.mse_loss(big, other).backward()
        in_use = memory.pool_stats()["in_use"]
        assert in_use >= 4_000_000
        big.grad = None
        stats = memory.pool_stats()
        assert stats["in_use"] < in_use and stats["idle"] >= 4_000_000
        hits = stats["hits"]
        F.mse_loss(big, other).backward()
        assert memory.pool_stats()["hits"] > hits
        memory.set_pool_limit(0)
        big.grad = None
        F.mse_loss(big, other).backward()
        big.grad = None
        assert memory.pool_stats()["idle"] == 0
        with pytest.raises(ValueError, match="bytes"):
            memory.set_pool_limit(-1)
    finally:
        memory.set_pool_limit(limit)


@pytest.mark.parametrize(
    ("built", "running", "same"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0+cpu", "2.13.1+cpu", True),
        ("2.13.0+cpu", "2.12.0+cpu", False),
        ("2.13.0+cpu", "2.13.0+cu130", False),
        ("2.13.0", "2.13.0+cpu", False),
        ("2.1.0+cpu", "2.13.0+cpu", False),
        ("2.14.0.dev20261101+cpu", "2.14.0.dev20261101+cpu", True),
        ("2.14.0.dev20261101+cpu", "2.14.0.dev20261102+cpu", False),
        ("2.14.0a0+gitabc", "2.14.0a0+gitdef", False),
    ],
)
def test_which_torch_may_load_the_extension(built, running, same):
    assert _native._same_release(built, running) is same


BROKEN = """
import sys, types, warnings
build = types.ModuleType("fastllm._build_info")
{setup}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastllm, fastllm.functional as F
    x = torch.ones(3, requires_grad=True)
    F.mse_loss(x, x * 2).backward()
    F.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))
ours = [str(w.message) for w in caught if str(w.message).startswith("fastllm")]
print(len(ours), *ours)
print(fastllm.info()["backends"]["cpu"])
try:
    with fastllm.use_backend("cpu"): pass
except RuntimeError as error: print("refused")
"""


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ('sys.modules["fastllm._build_info"] = None', "not built"),
        (
            'build.BUILD = {"torch": "1.0", "cxx_version": "g++", "isa": []}; sys.modules["fastllm._build_info"] = build',
            "built with torch 1.0",
        ),
        ('sys.modules["fastllm._C"] = None', "cannot be loaded"),
    ],
)
def test_without_the_compiled_operations(setup, reason, tmp_path):
    """One warning with what is missing and the command that mends it; everything works on eager."""
    result = run_python(BROKEN.format(setup=setup), {"FASTLLM_HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 fastllm"), result.stdout
    assert reason in result.stdout and "run `python -m fastllm build`" in result.stdout
    assert "refused" in result.stdout
