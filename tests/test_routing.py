"""Which kernels a plain operation reaches on tensors of an accelerator, without one: the dispatcher is told their key."""

import pytest
import torch
from helpers import run_python

import fastllm

if fastllm._native.MISSING is not None:
    pytest.skip(fastllm._native.MISSING, allow_module_level=True)

ROUTES = """
import warnings
import torch, fastllm
warnings.filterwarnings("ignore", message="Warning only once for all operators")
libraries = []
for space in {spaces}:
    library = torch.library.Library("fastllm_" + space, "IMPL")
    library.impl("embedding_forward", lambda w, i, s=space: print("reached", s) or w[i], "{key}", allow_override=True)
    libraries.append(library)
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.{key})
fastllm._native.extension.set_thread_backend(fastllm.backends.NAMES.index("{choice}"))
out = torch.ops.fastllm.embedding_forward.default.redispatch(keys, torch.arange(6.0).view(3, 2), torch.tensor([2]))
assert out.tolist() == [[4.0, 5.0]]
"""


def reached(choice, spaces, key="CUDA"):
    run = run_python(ROUTES.format(choice=choice, spaces=spaces, key=key))
    return run.stdout.split()[-1] if run.returncode == 0 else run.stderr


BOTH = ("cuda", "triton")


@pytest.mark.parametrize(("choice", "server"), [("auto", "cuda"), ("cuda", "cuda"), ("triton", "triton")])
def test_the_chosen_backend_is_reached(choice, server):
    assert reached(choice, BOTH) == server


def test_xpu_tensors_take_triton():
    assert reached("auto", ("triton",), "XPU") == "triton"


@pytest.mark.skipif(fastllm._native.BUILD.get("cuda") is not None, reason="this build has CUDA C++ kernels")
def test_a_backend_without_a_kernel_is_named():
    assert reached("auto", ("triton",)) == "triton"
    assert "no CUDA C++ kernel is registered for CUDA" in reached("cuda", ("triton",))


def test_plain_operations_are_declared_for_every_backend():
    spaces = {}
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        spaces.setdefault(space, set()).add(name)
    assert spaces["fastllm_cuda"] == spaces["fastllm_triton"]
    assert spaces["fastllm_cuda"] < spaces["fastllm"]
