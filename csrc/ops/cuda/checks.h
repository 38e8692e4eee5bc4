// Indices that come from outside: looked at on the host where that is asked for.
#pragma once
#include <cstdlib>
#include <optional>
#include <string>

#include "../common.h"

namespace fastllm::cuda {

// With FASTLLM_CHECK=1, for it waits for the device; always where the kernels run on the host.
inline bool checks_indices() {
#ifdef FASTLLM_CUDA_HOST
  return true;
#else
  static const bool asked = [] {
    const char* value = std::getenv("FASTLLM_CHECK");
    return value != nullptr && std::string(value) == "1";
  }();
  return asked;
#endif
}

// IndexError that names an index outside [0, bound).
inline void check_indices(const char* op, const std::string& expected, const Tensor& indices, int64_t bound,
                          std::optional<int64_t> ignore_index = std::nullopt) {
  if (!checks_indices()) return;
  Tensor outside = indices.lt(0).logical_or_(indices.ge(bound));
  if (ignore_index.has_value()) outside.logical_and_(indices.ne(*ignore_index));
  const Tensor found = outside.flatten().nonzero();
  if (found.numel() == 0) return;
  const int64_t position = found[0].item<int64_t>();
  TORCH_CHECK_INDEX(false, op, ": ", expected, ", got ", indices.flatten()[position].item<int64_t>(), " at position ",
                    position);
}

}  // namespace fastllm::cuda
