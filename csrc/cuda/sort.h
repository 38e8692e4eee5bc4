#pragma once
#include "launch.h"

namespace fastllm::cuda {

// `count` pairs and as much room beside them; sorting may swap the two.
struct Pairs {
  uint32_t *keys, *values;
  uint32_t *spare_keys, *spare_values;
};

// Bytes that sort_pairs needs for a key of `bits` bits.
Status sort_pairs_workspace(int64_t count, int bits, size_t* bytes);
// Stable, ascending by the low `bits` bits of the keys; count < 2^31.
Status sort_pairs(Pairs* pairs, int64_t count, int bits, void* workspace, size_t workspace_bytes, Stream stream);

}  // namespace fastllm::cuda
