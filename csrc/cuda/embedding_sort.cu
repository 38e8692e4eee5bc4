// embedding: positions sorted by their ids, for the table's gradient.
//
// Pairs are 32-bit numbers, so a pass of the sort moves 16 bytes a position where int64 ids would move 32. Positions of
// padding_idx, and of ids out of range, take the row behind the last: they end up behind all others and are not summed.
//
// Few positions (a small batch, where launches are what a step costs) are sorted by one block in shared memory: one
// launch instead of a dozen. Row and position share a 32-bit word there.
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

  FASTLLM_DEVICE uint32_t row(int64_t position) const { return row_of(load(ids + position)); }
  FASTLLM_DEVICE uint32_t row_of(int64_t id) const {
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

// --- in one block -----------------------------------------------------------------------------------------------

constexpr int kRounds = 16;  // words of a thread
constexpr int64_t kBlockCount = 1024 * kRounds;
constexpr int kDigitBits = 6, kDigits = 1 << kDigitBits;

// Words as (row, position); those of no position are all ones. `counters` holds kDigits for each warp, digit by digit.
struct BlockSort {
  uint32_t *words, *counters, *totals;
  int rounds, warps, warp, lane;

  FASTLLM_DEVICE BlockSort(uint32_t* memory, int rounds_of_a_thread)
      : words(memory),
        counters(words + rounds_of_a_thread * blockDim.x),
        totals(counters + kDigits * blockDim.x / kWarp),
        rounds(rounds_of_a_thread),
        warps(blockDim.x / kWarp),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp) {}

  FASTLLM_DEVICE uint32_t& counter(uint32_t digit) const { return counters[digit * warps + warp]; }

  FASTLLM_DEVICE uint32_t scan_warp(uint32_t value) const {
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const uint32_t below = shuffle_up(value, lanes);
      if (lane >= lanes) value += below;
    }
    return value;
  }

  // Each counter becomes the sum of those before it; a thread has two.
  FASTLLM_DEVICE void scan_counters() const {
    uint32_t* mine = counters + 2 * threadIdx.x;
    const uint32_t first = mine[0], both = first + mine[1];
    const uint32_t up_to_here = scan_warp(both);
    if (lane == kWarp - 1) totals[warp] = up_to_here;
    sync_block();
    const uint32_t warps_up_to = scan_warp(lane < warps ? totals[lane] : 0);
    const uint32_t warps_before = shuffle(warps_up_to, warp == 0 ? 0 : warp - 1);
    const uint32_t before = up_to_here - both + (warp == 0 ? 0 : warps_before);
    mine[0] = before;
    mine[1] = before + first;
    sync_block();
  }

  // One stable pass by the digit at `shift`. A warp's words are neighbours; so are the lanes' in a round: a word comes
  // behind those of its digit in the warps before, in the rounds before and in the lanes before.
  FASTLLM_DEVICE void pass(int shift) const {
    uint32_t word[kRounds], rank[kRounds];
    const int first = warp * rounds * kWarp + lane;
    for (int digit = lane; digit < kDigits; digit += kWarp) counter(digit) = 0;
    sync_warp();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (r >= rounds) break;
      word[r] = words[first + r * kWarp];
      const uint32_t digit = word[r] >> shift & (kDigits - 1);
      unsigned same = kFullWarp;  // lanes of this digit
#pragma unroll
      for (int b = 0; b < kDigitBits; ++b) {
        const bool bit = digit >> b & 1;
        const unsigned set = ballot(bit);
        same &= bit ? set : ~set;
      }
      rank[r] = counter(digit) + count_bits(same & ((1u << lane) - 1));
      sync_warp();
      if (same >> lane == 1) counter(digit) = rank[r] + 1;  // the last of them
      sync_warp();
    }
    sync_block();
    scan_counters();
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (r < rounds) words[counter(word[r] >> shift & (kDigits - 1)) + rank[r]] = word[r];
    sync_block();
  }
};

template <class Index>
__global__ void __launch_bounds__(1024)
    sort_block(Ids<Index> ids, int rounds, int row_bits, int position_bits, uint32_t* rows, uint32_t* positions) {
  const BlockSort block(reinterpret_cast<uint32_t*>(shared_memory()), rounds);
  const int threads = blockDim.x, count = static_cast<int>(ids.count);
  constexpr int kInFlight = 4;
  for (int i = threadIdx.x; i < rounds * threads; i += kInFlight * threads) {
    Index id[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (i + k * threads < count) id[k] = load(ids.ids + i + k * threads);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int position = i + k * threads;
      if (position < rounds * threads)
        block.words[position] = position < count ? ids.row_of(id[k]) << position_bits | position : ~0u;
    }
  }
  sync_block();
  for (int shift = 0; shift < row_bits; shift += kDigitBits) block.pass(position_bits + shift);
  for (int i = threadIdx.x; i < count; i += threads) {
    const uint32_t word = block.words[i];
    store(rows + i, word >> position_bits);
    store(positions + i, word & ((1u << position_bits) - 1));
  }
}

bool fits_block(int64_t count, int64_t rows) {
  return count <= kBlockCount && bit_width(rows) + bit_width(count - 1) <= 32;
}

template <class Index>
Status run_block(const Ids<Index>& ids, uint32_t* rows, uint32_t* positions, Stream stream) {
  int threads = kWarp;
  while (threads < 1024 && 4 * threads < ids.count) threads *= 2;
  const int rounds = static_cast<int>(ceil_div(ids.count, threads));
  const size_t shared = (static_cast<size_t>(rounds) * threads + kDigits * threads / kWarp + kWarp) * sizeof(uint32_t);
  return launch(sort_block<Index>, {1, threads, shared}, stream, ids, rounds, bit_width(ids.rows),
                bit_width(ids.count - 1), rows, positions);
}

// --- on the whole device ----------------------------------------------------------------------------------------

template <class Index>
Status sort(const EmbeddingGradient& g, Stream stream, SortedPositions* sorted) {
  const Ids<Index> ids{static_cast<const Index*>(g.ids), g.count, g.rows, g.padding_idx};
  Pairs pairs{g.pairs, g.pairs + g.count, g.pairs + 2 * g.count, g.pairs + 3 * g.count};
  *sorted = {pairs.keys, pairs.values};
  if (fits_block(g.count, g.rows)) return run_block(ids, pairs.keys, pairs.values, stream);
  Status status =
      launch(write_pairs<Index>, {ceil_div(g.count, kThreads), kThreads}, stream, ids, pairs.keys, pairs.values);
  if (status == 0) status = sort_pairs(&pairs, g.count, bit_width(g.rows), g.sorting, g.sorting_bytes, stream);
  *sorted = {pairs.keys, pairs.values};
  return status;
}

}  // namespace

Status embedding_sorting_bytes(int64_t count, int64_t rows, size_t* bytes) {
  *bytes = 0;
  return fits_block(count, rows) ? 0 : sort_pairs_workspace(count, bit_width(rows), bytes);
}

Status sort_positions(const EmbeddingGradient& g, Stream stream, SortedPositions* sorted) {
  return g.ids_are_int32 ? sort<int32_t>(g, stream, sorted) : sort<int64_t>(g, stream, sorted);
}

}  // namespace fastllm::cuda
