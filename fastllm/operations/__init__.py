"""The operations, one file each: schema, fake kernels, autocast rule, FLOPs, and checks and autograd node in Python.

Importing this package declares ``torch.ops.fastllm.*`` and the namespaces of the GPU backends. Where the compiled
extension is built, it registers checks, autograd nodes and CPU kernels in C++ under these names; elsewhere
:func:`fastllm.operations.declaration.implement_in_python` registers the Python functions.
"""

from fastllm.operations import cross_entropy, embedding, linear_cross_entropy, linear_relu, mse_loss, relu_mlp
from fastllm.operations.declaration import DTYPES, LIBRARY, complete_in_extension, declare, implement_in_python
from fastllm.operations.flops import register

__all__ = ["DTYPES", "KERNELS", "LIBRARY", "NAMES", "OPERATIONS", "complete_in_extension", "implement_in_python"]

OPERATIONS = tuple(
    module.OPERATION for module in (embedding, linear_relu, relu_mlp, mse_loss, cross_entropy, linear_cross_entropy)
)
NAMES = tuple(operation.name for operation in OPERATIONS)
KERNELS = tuple(kernel for operation in OPERATIONS for kernel in operation.kernels)

declare(OPERATIONS)
register({declared.name: declared.flops for declared in (*OPERATIONS, *KERNELS)})
