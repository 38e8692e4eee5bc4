"""Chooses what the kernels run on: the CPU, a GPU (FASTLLM_TEST_DEVICE=cuda), or CUDA kernels played on the CPU."""

import os

import torch

if os.environ.get("FASTLLM_CUDA_HOST") == "1":
    import cuda_host

    cuda_host.enable()

if os.environ.get("FASTLLM_TEST_DEVICE") == "cuda" and torch.cuda.is_available():
    torch.set_default_device("cuda")
