"""The products of linear_relu and relu_mlp on backend cuda, way by way, played on the CPU."""

import os

import pytest
import torch
import torch.nn.functional as TF
from helpers import check_against_float64

import fastllm
import fastllm.functional as F

if os.environ.get("FASTLLM_CUDA_HOST") != "1":
    pytest.skip("needs the host build: FASTLLM_CUDA_HOST=1", allow_module_level=True)

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def backend():
    torch.manual_seed(0)
    with fastllm.use_backend("cuda"):
        yield


@pytest.fixture
def way(monkeypatch):
    return lambda name: monkeypatch.setenv("FASTLLM_CUDA_GEMM", name)


def inputs(dtype, *shapes, offset=0, grad=True):
    """Random tensors whose memory starts ``offset`` items after a 16-byte boundary."""
    made = []
    for shape in shapes:
        count = torch.Size(shape).numel()
        room = torch.randn(count + offset).to(dtype) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        made.append(room[offset:].view(shape).detach().requires_grad_(grad))
    return made


def reference(x, w, b=None):
    return torch.relu(TF.linear(x, w, b))


def reference_mlp(x, w1, b1, w2, b2):
    return TF.linear(torch.relu(TF.linear(x, w1, b1)), w2, b2)


def check(m, n, k, dtype, bias=True, offset=0):
    x, w, b = inputs(dtype, (m, k), (n, k), (n,), offset=offset)
    check_against_float64(F.linear_relu, reference, [x, w, b if bias else None])


def check_mlp(m, h, k, n, dtype, bias=True, offset=0):
    x, w1, b1, w2, b2 = inputs(dtype, (m, k), (h, k), (h,), (n, h), (n,), offset=offset)
    check_against_float64(F.relu_mlp, reference_mlp, [x, w1, b1 if bias else None, w2, b2 if bias else None])


# Around the edges of tiles of 64 x 64 x 32; more than 512 rows take tiles of 128 x 128.
SIZES = [(1, 8, 8), (63, 72, 40), (64, 64, 32), (65, 136, 104), (130, 8, 200), (513, 136, 40), (640, 128, 72)]
ODD = [(1, 1, 1), (3, 65, 33), (66, 9, 31), (65, 64, 7), (520, 67, 34)]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", SIZES + ODD, ids=str)
def test_mma(way, size, dtype):
    way("mma")
    check(*size, dtype, bias=size[0] % 2 == 1)
    m, n, k = size
    check_mlp(m, n, k, 24 if size in SIZES else 5, dtype, bias=size[0] % 2 == 1)


@pytest.mark.parametrize("name", ["plain", "mma"])
@pytest.mark.parametrize("offset", [1, 4])
def test_views_that_start_anywhere(way, name, offset):
    way(name)
    check(67, 72, 40, torch.bfloat16, offset=offset)
    check_mlp(67, 72, 40, 24, torch.bfloat16, offset=offset)


def mlp_inputs(dtype, m, h, k, n):
    dy, hidden, x, w1, w2 = inputs(dtype, (m, n), (m, h), (m, k), (h, k), (n, h), grad=False)
    return dy, hidden.relu(), x, w1, w2


def test_a_way_that_cannot_be_taken_is_refused(way):
    x, w = inputs(torch.float32, (4, 8), (8, 8), grad=False)
    way("fast")
    with pytest.raises(RuntimeError, match="linear_relu: FASTLLM_CUDA_GEMM must be plain, library, mma or wgmma, got fast"):
        F.linear_relu(x, w)
    way("mma")
    with pytest.raises(RuntimeError, match="FASTLLM_CUDA_GEMM=mma needs bfloat16 or float16"):
        F.linear_relu(x, w)
    way("library")
    with pytest.raises(RuntimeError, match="needs cuBLASLt, which was not found"):
        F.linear_relu(x.bfloat16(), w.bfloat16())
