// embedding: rows of a table, and the table's gradient in one write.
//
// PyTorch clears the gradient of the whole table, writes float32 partial sums, reads them back and scatters; atomics
// would add in any order. Here positions are sorted by row (embedding_sort.cu), and each row of the gradient is stored
// once: V D items written, N D read, the same bits every time.
//
// The sorted positions are cut into chunks of fixed length, so a frequent row costs no thread more than a rare one. A
// row whose positions lie in one chunk is summed and stored; of a row that crosses chunks each chunk leaves its part in
// the accumulator's dtype. The second kernel adds those parts in order, beside clearing the rows that no position
// names, which for a large vocabulary is most of the traffic.
#include <initializer_list>

#include "common.cuh"
#include "embedding.h"
#include "embedding_sort.h"

namespace fastllm::cuda {
namespace {

constexpr int kInFlight = 4;  // accesses that a thread has under way before it uses the first

// Threads work in teams of 2^log2 neighbours.
int log2_ceil(int64_t value) {
  int log2 = 0;
  while ((int64_t{1} << log2) < value) ++log2;
  return log2;
}

// Bytes of the widest access, 16 at most, that fits all of these addresses and lengths.
int access_bytes(std::initializer_list<uint64_t> numbers) {
  uint64_t all = 16;
  for (const uint64_t number : numbers) all |= number;
  return static_cast<int>(all & (~all + 1));
}
uint64_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// --- rows of the table ------------------------------------------------------------------------------------------

constexpr int kGatherThreads = 256;

// Each team copies one row, in words of N 16-bit items.
template <int N, class Index>
__global__ void __launch_bounds__(kGatherThreads) gather(const uint16_t* table, const Index* ids, uint16_t* output,
                                                         int64_t count, int64_t rows, int64_t words, int log2) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  const int64_t position = thread >> log2, lanes = int64_t{1} << log2;
  if (position >= count) return;
  const int64_t row = load(ids + position);
  const bool inside = row >= 0 && row < rows;
  FASTLLM_DEVICE_ASSERT(inside, "embedding: input holds an id that is not a row of weight");
  if (!inside) return;
  const uint16_t* from = table + row * words * N;
  uint16_t* to = output + position * words * N;
  for (int64_t w = thread & (lanes - 1); w < words; w += kInFlight * lanes) {
    Vec<uint16_t, N> v[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (w + k * lanes < words) v[k] = load_vec<N>(from + (w + k * lanes) * N);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (w + k * lanes < words) store_vec_streaming(to + (w + k * lanes) * N, v[k]);
  }
}

// A warp to 2 KiB of a long row; narrow rows share a warp.
int gather_team(int64_t words) {
  if (words <= kWarp) return log2_ceil(words);
  const int log2 = log2_ceil(ceil_div(words, kInFlight));
  return log2 < 5 ? 5 : log2 > 8 ? 8 : log2;
}

template <int N, class Index>
Status run_gather(const EmbeddingGather& g, Stream stream) {
  const int64_t words = g.row_bytes / (2 * N);
  const int team = gather_team(words);
  const int64_t blocks = words == 0 ? 0 : ceil_div(g.count << team, kGatherThreads);
  return launch(gather<N, Index>, {blocks, kGatherThreads}, stream, static_cast<const uint16_t*>(g.weight),
                static_cast<const Index*>(g.ids), static_cast<uint16_t*>(g.output), g.count, g.rows, words, team);
}

template <class Index>
Status forward(const EmbeddingGather& g, Stream stream) {
  switch (access_bytes({address(g.weight), address(g.output), static_cast<uint64_t>(g.row_bytes)})) {
    case 16: return run_gather<8, Index>(g, stream);
    case 8: return run_gather<4, Index>(g, stream);
    case 4: return run_gather<2, Index>(g, stream);
    default: return run_gather<1, Index>(g, stream);
  }
}

// --- the table's gradient ---------------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kBlocks = 8;                 // of a multiprocessor at least
constexpr int64_t kClearBytes = 32 << 10;  // of the gradient, that one warp clears

template <class T>
struct Gradient {
  const T* grad_output;       // (count, features)
  const uint32_t* row_of;     // (count) ascending; `rows` where there is no gradient
  const uint32_t* positions;  // (count) ascending within a row
  T* grad;                    // (rows, features)
  Acc<T>* partial;            // (chunks, 2, stride): of the row at the chunk's begin, and of one that begins inside
  int64_t count, rows, features, stride, chunk;
  int64_t slices;  // teams beside each other in a row
  int log2;        // of a team's threads
  int together;    // rows that one warp clears
  bool by_frequency;
};

// Sums of N columns.
template <class T, int N>
struct Columns {
  Acc<T> items[N];
  static constexpr int kWidth = N < kVec<Acc<T>> ? N : kVec<Acc<T>>;  // of an access to sums

  FASTLLM_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < N; ++j) items[j] = 0;
  }
  FASTLLM_DEVICE void add(const Vec<T, N>& values) {
#pragma unroll
    for (int j = 0; j < N; ++j) items[j] += widen(values.items[j]);
  }
  FASTLLM_DEVICE void add(const Columns& other) {
#pragma unroll
    for (int j = 0; j < N; ++j) items[j] += other.items[j];
  }
  FASTLLM_DEVICE static Columns load_from(const Acc<T>* p) {
    Columns sums;
#pragma unroll
    for (int j = 0; j < N; j += kWidth) {
      const Vec<Acc<T>, kWidth> part = load_vec<kWidth>(p + j);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums.items[j + i] = part.items[i];
    }
    return sums;
  }
  FASTLLM_DEVICE void store_to(Acc<T>* p) const {
#pragma unroll
    for (int j = 0; j < N; j += kWidth) {
      Vec<Acc<T>, kWidth> part;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) part.items[i] = items[j + i];
      store_vec(p + j, part);
    }
  }
  // The only rounding.
  FASTLLM_DEVICE void finish(const Gradient<T>& g, int64_t row, int64_t column, int64_t occurrences) const {
    const Acc<T> scale = g.by_frequency ? 1 / static_cast<Acc<T>>(occurrences) : Acc<T>(1);
    Vec<T, N> values;
#pragma unroll
    for (int j = 0; j < N; ++j) values.items[j] = narrow<T>(items[j] * scale);
    store_vec_streaming(g.grad + row * g.features + column, values);
  }
};

// What a team works on: a chunk of positions, and N columns for each of its threads.
template <class T, int N>
struct Unit {
  int64_t chunk, begin, end, column;
  bool active;

  FASTLLM_DEVICE Unit(const Gradient<T>& g, int64_t block) {
    const int64_t thread = block * kThreads + threadIdx.x, team = thread >> g.log2;
    chunk = team / g.slices;
    begin = chunk * g.chunk;
    end = begin + g.chunk < g.count ? begin + g.chunk : g.count;
    column = (((team % g.slices) << g.log2) + (thread & ((1 << g.log2) - 1))) * N;
    active = begin < g.count && column < g.features;
  }
  FASTLLM_DEVICE Acc<T>* partial(const Gradient<T>& g, int64_t start) const {
    return g.partial + (2 * chunk + (start != begin)) * g.stride + column;
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) sum_chunks(Gradient<T> g) {
  const Unit<T, N> unit(g, blockIdx.x);
  if (!unit.active) return;
  const uint32_t none = static_cast<uint32_t>(g.rows);
  uint32_t row = load(g.row_of + unit.begin);
  const bool continued = unit.begin > 0 && load(g.row_of + unit.begin - 1) == row;
  const bool at_end = unit.end == g.count;
  const uint32_t next = at_end ? none : load(g.row_of + unit.end);
  int64_t start = unit.begin;  // of this row's positions in the chunk
  Columns<T, N> sum;
  sum.clear();
  const auto put = [&](int64_t stop) {
    if ((start == unit.begin && continued) || (stop == unit.end && !at_end && next == row))
      sum.store_to(unit.partial(g, start));
    else
      sum.finish(g, row, unit.column, stop - start);
  };
  for (int64_t i = unit.begin; i < unit.end; i += kInFlight) {
    uint32_t rows[kInFlight];
    Vec<T, N> values[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      rows[k] = i + k < unit.end ? load(g.row_of + i + k) : none;
      if (rows[k] < none)
        values[k] = load_vec_streaming<N>(g.grad_output + static_cast<int64_t>(load(g.positions + i + k)) * g.features +
                                          unit.column);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (rows[k] != row) {
        put(i + k);
        row = rows[k];
        start = i + k;
        sum.clear();
      }
      if (row >= none) return;
      sum.add(values[k]);
    }
  }
  put(unit.end);
}

// First place in [low, high) of the ascending `rows` that holds `row` or more.
FASTLLM_DEVICE int64_t lower_bound(const uint32_t* rows, int64_t low, int64_t high, int64_t row) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load(rows + middle) < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A row that begins in this team's chunk and goes on behind it.
template <class T, int N>
FASTLLM_DEVICE void add_parts(const Gradient<T>& g, int64_t block) {
  const Unit<T, N> unit(g, block);
  if (!unit.active || unit.end == g.count) return;
  const int64_t row = load(g.row_of + unit.end);
  if (row >= g.rows || load(g.row_of + unit.end - 1) != row) return;
  const int64_t first = lower_bound(g.row_of, unit.begin, unit.end, row);
  if (first == unit.begin && first > 0 && load(g.row_of + first - 1) == row) return;
  const int64_t last = lower_bound(g.row_of, unit.end, g.count, row + 1);
  Columns<T, N> sum = Columns<T, N>::load_from(unit.partial(g, first));
  const int64_t parts = (last - 1) / g.chunk - unit.chunk;  // in the chunks behind
  const Acc<T>* part = unit.partial(g, unit.begin) + 2 * g.stride;
  for (int64_t i = 0; i < parts; i += kInFlight, part += 2 * kInFlight * g.stride) {
    Columns<T, N> more[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (i + k < parts) more[k] = Columns<T, N>::load_from(part + 2 * k * g.stride);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (i + k < parts) sum.add(more[k]);
  }
  sum.finish(g, row, unit.column, last - first);
}

// `count` zeros, by one warp. Rows lie anywhere: 16-byte stores between the boundaries.
template <class T>
FASTLLM_DEVICE void clear(T* to, int64_t count) {
  constexpr int N = kVec<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t to_boundary = items_to_boundary(to), head = to_boundary < count ? to_boundary : count;
  const int64_t tail = head + (count - head) / N * N;
  const Vec<T, N> zeros{};
  if (lane < head) store(to + lane, T{});
#pragma unroll 4
  for (int64_t i = head + lane * N; i < tail; i += kWarp * N) store_vec_streaming(to + i, zeros);
  if (tail + lane < count) store(to + tail + lane, T{});
}

// Of `together` rows those that no position names; neighbours are cleared as one stretch.
template <class T>
FASTLLM_DEVICE void clear_absent(const Gradient<T>& g, int64_t first) {
  const int64_t row = first + threadIdx.x % kWarp;
  bool absent = false;
  if (row < first + g.together && row < g.rows) {
    const int64_t place = lower_bound(g.row_of, 0, g.count, row);
    absent = place == g.count || load(g.row_of + place) != row;
  }
  const unsigned mask = ballot(absent);
  for (int begin = 0; begin < g.together; ++begin) {
    int end = begin;
    while (end < g.together && (mask >> end & 1)) ++end;
    if (end == begin) continue;
    clear(g.grad + (first + begin) * g.features, (end - begin) * g.features);
    begin = end;
  }
}

// `adding` blocks add parts, `clearing` blocks clear, in turn while there are both: chains of parts begin early, and
// the many blocks that find nothing to add leave no gap in the stores.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) finish_rows(Gradient<T> g, int64_t adding, int64_t clearing) {
  const int64_t both = adding < clearing ? adding : clearing, block = blockIdx.x;
  const int64_t index = block < 2 * both ? block / 2 : block - both;
  if (block < 2 * both ? block % 2 == 0 : adding > clearing) {
    add_parts<T, N>(g, index);
  } else {
    const int64_t warp = index * (kThreads / kWarp) + threadIdx.x / kWarp;
    clear_absent(g, warp * g.together);
  }
}

int64_t chunk_length(int64_t count) {
  // Of more positions longer chunks: the chain of a frequent row's parts stays short.
  int64_t length = 32;
  while (length < 256 && count > 2048 * length) length *= 2;
  return length;
}
int64_t partial_stride(int64_t features) { return ceil_div(features, 4) * 4; }

// Teams for N columns a thread; the blocks that they fill.
template <class T, int N>
int64_t divide(Gradient<T>* g) {
  const int64_t vectors = g->features / N;
  g->log2 = log2_ceil(vectors < kWarp ? vectors : kWarp);
  g->slices = ceil_div(vectors, int64_t{1} << g->log2);
  return ceil_div((ceil_div(g->count, g->chunk) * g->slices) << g->log2, kThreads);
}

template <class T, int N>
Status run_sums(Gradient<T> g, Stream stream) {
  constexpr int kParts = N < 4 ? N : 4;  // columns, of which parts in the accumulator's dtype are read
  const int64_t summing = divide<T, N>(&g);
  const Status status = launch(sum_chunks<T, N>, {summing, kThreads}, stream, g);
  if (status != 0) return status;
  const int64_t adding = g.count > g.chunk ? divide<T, kParts>(&g) : 0;
  const int64_t clearing = ceil_div(ceil_div(g.rows, g.together), kThreads / kWarp);
  return launch(finish_rows<T, kParts>, {adding + clearing, kThreads}, stream, g, adding, clearing);
}

template <class T>
Status backward(const EmbeddingGradient& e, Stream stream) {
  constexpr int size = static_cast<int>(sizeof(T));
  SortedPositions sorted{};
  if (e.count > 0) {
    const Status status = sort_positions(e, stream, &sorted);
    if (status != 0) return status;
  }
  const int64_t row_bytes = e.features * size, fitting = row_bytes > 0 ? kClearBytes / row_bytes : 1;
  Gradient<T> g{};
  g.grad_output = static_cast<const T*>(e.grad_output);
  g.row_of = sorted.rows;
  g.positions = sorted.positions;
  g.grad = static_cast<T*>(e.grad);
  g.partial = static_cast<Acc<T>*>(e.partial);
  g.count = e.count;
  g.rows = e.rows;
  g.features = e.features;
  g.stride = partial_stride(e.features);
  g.chunk = chunk_length(e.count);
  g.together = static_cast<int>(fitting < 1 ? 1 : fitting > kWarp ? kWarp : fitting);
  g.by_frequency = e.scale_by_frequency;
  const int bytes = access_bytes({address(e.grad_output), address(e.grad), static_cast<uint64_t>(row_bytes)});
  if constexpr (size <= 2)
    if (bytes == 16) return run_sums<T, 16 / size>(g, stream);
  if constexpr (size <= 4)
    if (bytes >= 4 * size) return run_sums<T, 4>(g, stream);
  if (bytes >= 2 * size) return run_sums<T, 2>(g, stream);
  return run_sums<T, 1>(g, stream);
}

}  // namespace

Status embedding_forward(const EmbeddingGather& arguments, Stream stream) {
  return arguments.ids_are_int32 ? forward<int32_t>(arguments, stream) : forward<int64_t>(arguments, stream);
}

int64_t embedding_partials(int64_t count, int64_t features) {
  const int64_t chunks = ceil_div(count, chunk_length(count));
  return chunks > 1 ? 2 * chunks * partial_stride(features) : 0;
}

Status embedding_backward(const EmbeddingGradient& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return backward<T>(arguments, stream))
  return 1;
}

}  // namespace fastllm::cuda
