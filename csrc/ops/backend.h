// Which backend serves the kernel operations (`*_forward`, `*_backward`, ...) on tensors of an accelerator.
//
// Every backend registers kernels under the kernel operations' names in a namespace of its own: `fastllm_cuda` (C++)
// and `fastllm_triton` (Python). On CUDA and XPU tensors the operations of `fastllm` are one boxed function that passes
// the call on to the chosen namespace.
#pragma once
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastllm::backend {

enum Choice : int64_t { kAuto = 0, kCpu = 1, kCuda = 2, kTriton = 3, kEager = 4 };  // fastllm.backends.NAMES

// This thread's choice, or the process's where the thread has none (-1).
int64_t current();
void set_for_process(int64_t choice);
void set_for_thread(int64_t choice);

// Passes kernel operations on CUDA and XPU tensors on to the chosen backend. Once, when the module has been imported.
void route(const std::vector<std::string>& kernels);

// Whether a row's numbers must not depend on the other rows (fastllm.batch_invariant): in this process, or in the
// backward pass that runs.
bool batch_invariant();
void set_batch_invariant(bool invariant);

// A backward pass runs in threads of the autograd engine: it takes the backend of its forward pass along, and whether
// that was batch-invariant.
void save(torch::autograd::AutogradContext* ctx);

class Restored {
 public:
  explicit Restored(torch::autograd::AutogradContext* ctx);
  ~Restored();
  Restored(const Restored&) = delete;
  Restored& operator=(const Restored&) = delete;

 private:
  int64_t before_;
  bool was_invariant_;
};

}  // namespace fastllm::backend
