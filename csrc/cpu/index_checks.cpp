// The scans of class indices and ids before a kernel trusts them. Built once, with base-line flags.
#include "cross_entropy.h"
#include "embedding.h"

namespace fastllm::cpu {
namespace {

template <class Index, class Weight>
int64_t scan(const Index* target, int64_t rows, int64_t classes, int64_t ignore_index, const Weight* weight,
             double* divisor) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = target[i];
    if (y == ignore_index) continue;
    if (y < 0 || y >= classes) return i;
    sum += weight == nullptr ? 1.0 : static_cast<double>(weight[y]);
  }
  *divisor = sum;
  return -1;
}

template <class Weight>
int64_t scan_any(const void* target, bool is_int32, int64_t rows, int64_t classes, int64_t ignore_index,
                 const void* weight, double* divisor) {
  const Weight* w = static_cast<const Weight*>(weight);
  return is_int32 ? scan(static_cast<const int32_t*>(target), rows, classes, ignore_index, w, divisor)
                  : scan(static_cast<const int64_t*>(target), rows, classes, ignore_index, w, divisor);
}

// Blocks without a branch inside: an id outside [0, rows) is negative or makes rows - 1 - id so.
template <class Index>
int64_t scan_ids(const Index* ids, int64_t count, int64_t rows) {
  constexpr int64_t kBlock = 512;
  const uint64_t last = static_cast<uint64_t>(rows) - 1;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    uint64_t signs = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
      signs |= id | (last - id);
    }
    if (static_cast<int64_t>(signs) >= 0) continue;
    for (int64_t i = begin; i < end; ++i)
      if (ids[i] < 0 || ids[i] >= rows) return i;
  }
  return -1;
}

}  // namespace

int64_t check_ids(const void* ids, bool ids_are_int32, int64_t count, int64_t rows) {
  return ids_are_int32 ? scan_ids(static_cast<const int32_t*>(ids), count, rows)
                       : scan_ids(static_cast<const int64_t*>(ids), count, rows);
}

int64_t check_targets(const void* target, bool is_int32, int64_t rows, int64_t classes, int64_t ignore_index,
                      DType dtype, const void* weight, double* divisor) {
  return dtype == DType::kF64 ? scan_any<double>(target, is_int32, rows, classes, ignore_index, weight, divisor)
                              : scan_any<float>(target, is_int32, rows, classes, ignore_index, weight, divisor);
}

}  // namespace fastllm::cpu
