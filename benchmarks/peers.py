"""Other libraries' operations, on the arguments of a case: what each has, by the case's operation.

Liger-Kernel 0.8.5, cut-cross-entropy 25.1.1 and Quack 0.6.5 are for GPUs (``pip install --no-deps liger-kernel
cut-cross-entropy``; ``pip install quack-kernels``). One that is not installed, or fails, is a line of the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as TF

Operations = dict[str, Callable]


def torchs_own() -> Operations:
    """PyTorch 2.13's loss, in chunks of its own choice."""
    if not hasattr(TF, "linear_cross_entropy"):
        raise ImportError("this torch has no linear_cross_entropy")
    return {"linear_cross_entropy": TF.linear_cross_entropy}


def liger() -> Operations:
    """Its cross-entropy writes the gradient over the logits, so it stands beside ours in place."""
    from liger_kernel.ops import LigerEmbeddingFunction
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

    def embedding(ids, weight):
        return LigerEmbeddingFunction.apply(weight, ids)

    return {
        "cross_entropy in place": liger_cross_entropy,
        "linear_cross_entropy": liger_fused_linear_cross_entropy,
        "embedding zipf": embedding,
        "embedding uniform": embedding,
    }


def cut_cross_entropy() -> Operations:
    """As called by default: it leaves out gradients below the precision of the dtype."""
    from cut_cross_entropy import linear_cross_entropy

    return {"linear_cross_entropy": linear_cross_entropy}


def quack() -> Operations:
    from quack.cross_entropy import cross_entropy
    from quack.linear_cross_entropy import chunked_linear_cross_entropy
    from quack.mlp import mlp_func

    return {
        "cross_entropy": cross_entropy,
        "cross_entropy in place": lambda x, y: cross_entropy(x, y, inplace_backward=True),
        "linear_cross_entropy": chunked_linear_cross_entropy,
        "relu_mlp": lambda x, w1, b1, w2, b2: mlp_func(x, w1, w2, "relu", b1, b2),
    }


PEERS = {"torch's own": torchs_own, "Liger": liger, "CCE": cut_cross_entropy, "Quack": quack}
# torch.compile of the eager code is a peer that every operation has.
NAMES = ("compile", *PEERS)


def missing(names: set[str]) -> dict[str, str]:
    """Of the peers asked for, those that cannot be imported here, and why."""
    found = {}
    for name in PEERS:
        if name in names:
            try:
                PEERS[name]()
            except Exception as error:  # an import may fail in any way
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return found
