#pragma once
#include "embedding.h"

namespace fastllm::cuda {

// Positions in the order of their rows, ascending within a row.
struct SortedPositions {
  const uint32_t* rows;       // (count); g.rows, behind all others, at a position that gives no gradient
  const uint32_t* positions;  // (count)
};

Status sort_positions(const EmbeddingGradient& g, Stream stream, SortedPositions* sorted);

}  // namespace fastllm::cuda
