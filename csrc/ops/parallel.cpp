#include "../cpu/parallel.h"

#include <ATen/Parallel.h>

namespace fastllm {

void parallel_run(int64_t n, int64_t grain, RangeFn fn, void* context) {
  at::parallel_for(0, n, grain, [fn, context](int64_t begin, int64_t end) { fn(context, begin, end); });
}

int num_threads() { return at::get_num_threads(); }

int thread_index() { return at::get_thread_num(); }

}  // namespace fastllm
