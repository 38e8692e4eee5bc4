// A stable radix sort of pairs, by CUB: only the bits that a key has are looked at, 8 in a pass over the pairs.
#include "common.cuh"
#include "sort.h"

#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>
#else
#include <algorithm>
#include <vector>
#endif

namespace fastllm::cuda {

#ifdef __CUDACC__

Status sort_pairs_workspace(int64_t count, int bits, size_t* bytes) {
  cub::DoubleBuffer<uint32_t> keys, values;
  return returned(cub::DeviceRadixSort::SortPairs(nullptr, *bytes, keys, values, static_cast<int>(count), 0, bits));
}

Status sort_pairs(Pairs* pairs, int64_t count, int bits, void* workspace, size_t workspace_bytes, Stream stream) {
  cub::DoubleBuffer<uint32_t> keys(pairs->keys, pairs->spare_keys), values(pairs->values, pairs->spare_values);
  const Status status = returned(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, keys, values,
                                                                 static_cast<int>(count), 0, bits, stream));
  *pairs = {keys.Current(), values.Current(), keys.Alternate(), values.Alternate()};
  return status;
}

#else

namespace {

void sort_by_one_thread(Pairs pairs, int64_t count, uint32_t mask, void* workspace, size_t workspace_bytes) {
  if (threadIdx.x != 0) return;
  cuda_host::check_access(workspace, workspace_bytes, 16, true);
  for (uint32_t* p : {pairs.keys, pairs.values, pairs.spare_keys, pairs.spare_values})
    cuda_host::check_access(p, static_cast<size_t>(count) * sizeof(uint32_t), sizeof(uint32_t), true);
  std::vector<uint32_t> order(static_cast<size_t>(count));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return (pairs.keys[a] & mask) < (pairs.keys[b] & mask); });
  for (int64_t i = 0; i < count; ++i) {
    pairs.spare_keys[i] = pairs.keys[order[static_cast<size_t>(i)]];
    pairs.spare_values[i] = pairs.values[order[static_cast<size_t>(i)]];
  }
}

}  // namespace

Status sort_pairs_workspace(int64_t, int, size_t* bytes) {
  *bytes = 64;
  return 0;
}

Status sort_pairs(Pairs* pairs, int64_t count, int bits, void* workspace, size_t workspace_bytes, Stream stream) {
  const uint32_t mask = bits < 32 ? (1u << bits) - 1 : ~0u;
  const Status status = launch(sort_by_one_thread, {1, kWarp}, stream, *pairs, count, mask, workspace, workspace_bytes);
  *pairs = {pairs->spare_keys, pairs->spare_values, pairs->keys, pairs->values};
  return status;
}

#endif

}  // namespace fastllm::cuda
