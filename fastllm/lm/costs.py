"""What a run will cost, known before it begins: parameters, products a word, memory; and how fast the machine multiplies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastllm.lm.checkpoint import MODELS
from fastllm.lm.options import Options

_LAYERS = {"mlp": "num_hidden_layers", "transformer": "num_layers"}
_STATES = {"adamw": 2, "sgd": 1}  # tensors of a parameter's size that the optimizer keeps, at most


@dataclass
class Costs:
    parameters: int
    flops: int  # a word, forward and backward; of products with matrices
    memory: int  # bytes at the peak of a step


def of(options: Options, config: dict) -> Costs:
    """Of a run with these options. Nothing of its sizes is allocated: the model runs with one and with two layers on
    tensors without numbers, and further layers cost as much as the second."""
    one, two = (_with_layers(options, config, count) for count in (1, 2))
    layers = config[_LAYERS[options.model]]
    return Costs(*(a + (layers - 1) * (b - a) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))


def _with_layers(options: Options, config: dict, layers: int) -> Costs:
    from torch.utils.flop_counter import FlopCounterMode

    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    sequences = -(-options.batch_size // options.accumulation)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = MODELS[options.model](**{**config, _LAYERS[options.model]: layers})
        ids = torch.zeros(sequences, options.sequence_length, dtype=torch.int64)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(ids, ids)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        activations = sum(size for storage, size in saved.items() if storage not in own)
        loss.backward()
    count = sum(p.numel() for p in model.parameters())
    vocabulary = config["vocab_size"] * config["embedding_dim"]
    # Beside parameters, gradients and states: the second gradient of a table, before it is added to the first.
    memory = 4 * count * (2 + _STATES[options.optimizer]) + 4 * vocabulary + activations
    return Costs(count, counter.get_total_flops() // ids.numel(), memory)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo does not tell how much memory is free")


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOPs a second of a product of square matrices: the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
