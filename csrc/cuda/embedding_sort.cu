// embedding: positions sorted by their ids, for the table's gradient.
//
// Pairs are 32-bit numbers, so a pass of the sort moves 16 bytes a position where int64 ids would move 32. Positions of
// padding_idx, and of ids out of range, take the row behind the last: they end up behind all others and are not summed.
#include "common.cuh"
#include "embedding_sort.h"
#include "sort.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;

int bit_width(int64_t value) {
  int bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

template <class Index>
struct Ids {
  const Index* ids;
  int64_t count, rows, padding_idx;

  FASTLLM_DEVICE uint32_t row(int64_t position) const {
    const int64_t id = load(ids + position);
    const bool inside = id >= 0 && id < rows;
    FASTLLM_DEVICE_ASSERT(inside, "embedding: input holds an id that is not a row of weight");
    return static_cast<uint32_t>(inside && id != padding_idx ? id : rows);
  }
};

template <class Index>
__global__ void __launch_bounds__(kThreads) write_pairs(Ids<Index> ids, uint32_t* rows, uint32_t* positions) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= ids.count) return;
  store(rows + i, ids.row(i));
  store(positions + i, static_cast<uint32_t>(i));
}

template <class Index>
Status sort(const EmbeddingGradient& g, Stream stream, SortedPositions* sorted) {
  const Ids<Index> ids{static_cast<const Index*>(g.ids), g.count, g.rows, g.padding_idx};
  Pairs pairs{g.pairs, g.pairs + g.count, g.pairs + 2 * g.count, g.pairs + 3 * g.count};
  Status status =
      launch(write_pairs<Index>, {ceil_div(g.count, kThreads), kThreads}, stream, ids, pairs.keys, pairs.values);
  if (status == 0) status = sort_pairs(&pairs, g.count, bit_width(g.rows), g.sorting, g.sorting_bytes, stream);
  *sorted = {pairs.keys, pairs.values};
  return status;
}

}  // namespace

Status embedding_sorting_bytes(int64_t count, int64_t rows, size_t* bytes) {
  return sort_pairs_workspace(count, bit_width(rows), bytes);
}

Status sort_positions(const EmbeddingGradient& g, Stream stream, SortedPositions* sorted) {
  return g.ids_are_int32 ? sort<int32_t>(g, stream, sorted) : sort<int64_t>(g, stream, sorted);
}

}  // namespace fastllm::cuda
