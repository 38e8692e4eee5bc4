"""The switch, the report, and what happens where the compiled operations are missing."""

import threading

import pytest
import torch
from helpers import run_python

import fastllm
import fastllm.functional as F

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


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_is_not_there_is_an_error(name):
    with pytest.raises(RuntimeError, match=name):
        fastllm.set_backend(name)
    with pytest.raises(RuntimeError, match=name), fastllm.use_backend(name):
        pass
    assert OURS in node()


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
    with fastllm.use_backend("cpu"):
        for bad, word in ((t.to("meta"), "meta"), (t.to(torch.complex64), "complex64"), (t.long(), "int64")):
            with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot serve.*{word}"):
                F.linear_relu(bad, bad)


def test_auto_serves_other_dtypes_and_subclasses_by_the_definition():
    class Logged(torch.Tensor):
        pass

    y = torch.randn(3, 4).as_subclass(Logged)
    assert type(F.mse_loss(y, t)) is Logged
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
    assert set(report["operations"]) == set(fastllm.backends.OPERATIONS)
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
def test_without_the_compiled_operations(setup, reason):
    """One warning with what is missing and the command that mends it; everything works on eager."""
    result = run_python(BROKEN.format(setup=setup))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 fastllm"), result.stdout
    assert reason in result.stdout and "pip install --no-build-isolation" in result.stdout
    assert "refused" in result.stdout
