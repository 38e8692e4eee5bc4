// How many rows of logits linear_cross_entropy holds at once; fastllm/operations/chunks.py holds the same rule.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "common.h"

namespace fastllm {

// Rows of a chunk: even chunks within FASTLLM_LOSS_WORKSPACE, or `otherwise`, bytes of logits, but 64 rows at least;
// even ones are rounded up to whole `multiple`s. All rows where chunks save no memory: several need `beside` bytes
// more.
inline int64_t chunk_rows(int64_t rows, int64_t row_bytes, int64_t otherwise, int64_t beside, int64_t multiple) {
  constexpr int64_t kLeast = 64;
  int64_t limit = otherwise;
  if (const char* text = std::getenv("FASTLLM_LOSS_WORKSPACE")) {
    char* end = nullptr;
    limit = std::strtoll(text, &end, 10);
    TORCH_CHECK_VALUE(end != text && *end == '\0' && limit > 0,
                      "FASTLLM_LOSS_WORKSPACE: expected a number of bytes > 0, got '", text, "'");
  }
  row_bytes = std::max<int64_t>(row_bytes, 1);
  const int64_t most = std::max(limit / row_bytes / kLeast * kLeast, kLeast);
  if (rows * row_bytes <= most * row_bytes + beside) return rows;
  const int64_t chunks = (rows + most - 1) / most, even = (rows + chunks - 1) / chunks;
  return std::min(most, (even + multiple - 1) / multiple * multiple);
}

}  // namespace fastllm
