// Indices checked on the host before a kernel sees them: it waits for the device, so only where it is asked for.
#pragma once
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

#include "../common.h"

namespace fastllm::cuda {

// With FASTLLM_CHECK=1, and always where kernels are played on the host.
inline bool checks_indices() {
#ifdef FASTLLM_CUDA_HOST
  return true;
#else
  static const bool asked = [] {
    const char* text = std::getenv("FASTLLM_CHECK");
    return text != nullptr && std::string_view(text) == "1";
  }();
  return asked;
#endif
}

// IndexError for the first of `indices` (int64 or int32) that is neither in [0, bound) nor ignore_index; without
// checks_indices() the kernels' device-side assertion is left to stop it.
inline void check_indices(const char* op, const std::string& expected, const Tensor& indices, int64_t bound,
                          std::optional<int64_t> ignore_index) {
  if (!checks_indices()) return;
  const Tensor flat = indices.to(c10::Device(at::kCPU), at::kLong).reshape({-1}).contiguous();
  const int64_t* values = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const bool inside = (values[i] >= 0 && values[i] < bound) || values[i] == ignore_index;
    TORCH_CHECK_INDEX(inside, op, ": ", expected, ", got ", values[i], " at position ", i);
  }
}

}  // namespace fastllm::cuda
