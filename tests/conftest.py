"""Chooses what the kernels run on: see tests/cuda_host."""

import os

if os.environ.get("FASTLLM_CUDA_HOST") == "1":
    import cuda_host

    cuda_host.enable()
