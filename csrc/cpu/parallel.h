// Threads for kernels that know no torch: the loop is handed to PyTorch's own thread pool (csrc/ops/parallel.cpp), so
// that torch.set_num_threads holds and no second pool competes for the cores.
#pragma once
#include <cstdint>
#include <type_traits>

namespace fastllm {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on disjoint ranges that cover [0, n), each of at least `grain` items but the last.
void parallel_run(int64_t n, int64_t grain, RangeFn fn, void* context);
int num_threads();
int thread_index();  // of the caller inside a parallel_for, below num_threads()

namespace {  // internal linkage: a copy per instruction set, never merged by the linker

// How a range is cut must never show in the result: f may depend on its items only.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(static_cast<int64_t>(0), n);
    return;
  }
  auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
  };
  parallel_run(n, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace fastllm
