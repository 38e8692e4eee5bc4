"""Chooses what the kernels run on: the CPU, a GPU (FASTLLM_TEST_DEVICE=cuda), or CUDA kernels emulated on the CPU.

``FASTLLM_TEST_NODES=python`` puts the autograd nodes in Python, which serve without the compiled extension, in the place
of those in C++.
"""

import os

import torch

if os.environ.get("FASTLLM_CUDA_HOST") == "1":
    import cuda_host

    cuda_host.enable()

if os.environ.get("FASTLLM_TEST_DEVICE") == "cuda" and torch.cuda.is_available():
    torch.set_default_device("cuda")

if os.environ.get("FASTLLM_TEST_NODES") == "python":
    import fastllm

    fastllm.operations.implement_in_python(fastllm.operations.OPERATIONS, override=True)
