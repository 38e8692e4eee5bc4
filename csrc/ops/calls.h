// The way from Python to an operation: a function for each operation of `torch.ops.fastllm`, for plain arguments.
//
// torch.ops converts arguments by the operation's schema and passes them boxed: 2 us warm and 6 us between other
// operations on the machine of docs/performance.md, as much as PyTorch's own functions take altogether. These functions
// convert by the C++ signature and call the same operation through the same dispatcher. Arguments of any other kind
// (a NumPy integer, a symbolic number, a tensor subclass) and calls that a torch function mode wants to see are passed
// on to torch.ops.
#pragma once
#include <pybind11/pybind11.h>

namespace fastllm {

void define_calls(pybind11::module_& m);

// Once, when the operations are declared and before a call.
void find_operations();

}  // namespace fastllm
