"""The operations, one file each: schema, fake kernels, autocast rule, FLOPs, and checks and autograd node in Python.

Importing this package declares ``torch.ops.fastllm.*`` and the namespaces of the GPU backends. Where the compiled
extension is built, it registers checks, autograd nodes and CPU kernels in C++ under these names; elsewhere
:func:`fastllm.operations.declaration.implement_in_python` registers the Python functions.
"""

from fastllm.operations import (
    cross_entropy,
    embedding,
    linear_cross_entropy,
    linear_relu,
    log_probs,
    mse_loss,
    relu_mlp,
)
from fastllm.operations.declaration import DTYPES, LIBRARY, complete_in_extension, declare, implement_in_python
from fastllm.operations.flops import register

__all__ = [
    "DTYPES",
    "FUNCTIONS",
    "KERNELS",
    "LIBRARY",
    "NAMES",
    "OPERATIONS",
    "complete_in_extension",
    "implement_in_python",
]

OPERATIONS = tuple(
    module.OPERATION
    for module in (embedding, linear_relu, relu_mlp, mse_loss, cross_entropy, linear_cross_entropy, log_probs)
)
NAMES = tuple(operation.name for operation in OPERATIONS if operation.schema is not None)
FUNCTIONS = (
    *NAMES,
    "log_probs",
    "linear_log_probs",
)  # what fastllm.functional offers; the last two share their kernels
KERNELS = tuple(kernel for operation in OPERATIONS for kernel in operation.kernels)

declare(OPERATIONS)
register({op.name: op.flops for op in (*OPERATIONS, *KERNELS) if op.schema is not None})
