// Embedding lookup, and its dense gradient in one write of the table.
//
// Eager PyTorch zeroes the gradient of the whole table, then adds rows in the table's dtype, one id after the other.
// Here positions are sorted by id (a stable counting sort), and each row of the gradient is written once: zeros, or the
// sum of its positions' gradients, kept in the accumulator and rounded at the store. Traffic: the incoming gradient
// once and the table once. Few ids are not sorted: the table is zeroed as one stretch, and their rows written after.
// Nor are many ids of a small table: pieces of the positions are added up in tables of accumulators, then the tables.
#include "embedding.h"

#include "parallel.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kStreamBytes = int64_t{16} << 20;   // outputs beyond this size go past the caches
constexpr int64_t kCachedBytes = int64_t{256} << 10;  // a table of this size stays in a core's cache

FASTLLM_INLINE bool aligned(const void* p, int64_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

FASTLLM_INLINE void copy_bytes(char* to, const char* from, int64_t n, bool streaming) {
  constexpr int64_t w = kVectorBytes;
  if (n < w) {
    std::memcpy(to, from, static_cast<size_t>(n));
    return;
  }
  int64_t i = 0;
  if (streaming && aligned(to, w)) {
    for (; i + w <= n; i += w) {
      vec_f32 v;
      std::memcpy(&v, from + i, w);
      stream(reinterpret_cast<float*>(to + i), v);
    }
  } else {
    for (; i + w <= n; i += w) {
      vec_f32 v;
      std::memcpy(&v, from + i, w);
      std::memcpy(to + i, &v, w);
    }
  }
  if (i < n) {  // the last vector overlaps the one before
    vec_f32 v;
    std::memcpy(&v, from + n - w, w);
    std::memcpy(to + n - w, &v, w);
  }
}

// A function of its own: stores may alias whatever is read through a lambda's captures.
template <class Index>
void gather_rows(const char* weight, const Index* ids, char* output, int64_t begin, int64_t end, int64_t row_bytes,
                 bool cached, bool streaming) {
  for (int64_t i = begin; i < end; ++i) {
    if (!cached && i + 4 < end) {  // rows lie anywhere: begin fetching one a few steps ahead
      const char* next = weight + static_cast<int64_t>(ids[i + 4]) * row_bytes;
      for (int64_t line = 0; line < row_bytes && line < 512; line += 64) __builtin_prefetch(next + line);
    }
    copy_bytes(output + i * row_bytes, weight + static_cast<int64_t>(ids[i]) * row_bytes, row_bytes, streaming);
  }
  stream_fence();
}

template <class Index>
void gather(const char* weight, int64_t rows, const Index* ids, char* output, int64_t count, int64_t row_bytes) {
  const bool cached = rows * row_bytes <= kCachedBytes;
  const bool streaming = count * row_bytes > kStreamBytes;
  parallel_for(count, 32768 / (row_bytes + 1) + 1, [=](int64_t begin, int64_t end) {
    gather_rows(weight, ids, output, begin, end, row_bytes, cached, streaming);
  });
}

void forward_entry(const void* weight, int64_t rows, const void* ids, bool is_int32, void* output, int64_t count,
                   int64_t row_bytes) {
  if (is_int32)
    gather(static_cast<const char*>(weight), rows, static_cast<const int32_t*>(ids), static_cast<char*>(output), count,
           row_bytes);
  else
    gather(static_cast<const char*>(weight), rows, static_cast<const int64_t*>(ids), static_cast<char*>(output), count,
           row_bytes);
}

// starts[v] .. starts[v + 1]: where row v's positions stand in `order`, which keeps them ascending.
template <class Index>
void counting_sort(const Index* ids, int64_t count, int64_t rows, int64_t* starts, int64_t* order) {
  std::memset(starts, 0, static_cast<size_t>(rows + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) ++starts[ids[i]];
  int64_t total = 0;
  for (int64_t v = 0; v <= rows; ++v) {  // ends of the rows, moved down to their starts by the placing
    total += starts[v];
    starts[v] = total;
  }
  for (int64_t i = count; i-- > 0;) order[--starts[ids[i]]] = i;
}

// Vectors of a row summed at once, in registers: 128 bytes of the row with AVX2, so that 16-bit rows too are read in
// pairs of cache lines.
template <class T>
constexpr int kTile = sizeof(T) == 2 ? 8 : 4;

// The sums of a tile. Those of a whole tile of bfloat16 lie in pairs of vectors, even items before odd ones, where that
// unpacks faster; so do partial sums in memory.
template <class T>
using Tile = vec<acc_t<T>>[kTile<T>];

template <class T, bool kWhole>
FASTLLM_INLINE void add_tile(const T* from, int64_t width, Tile<T>& sum) {
  constexpr int w = lanes<T>;
  if constexpr (kWhole && in_pairs<T>) {
    for (int k = 0; k < kTile<T>; k += 2) {
      const Pair pair = load_pair(from + k * w);
      sum[k] += pair.even;
      sum[k + 1] += pair.odd;
    }
  } else {
    for (int k = 0; k < kTile<T>; ++k) {
      if (kWhole || (k + 1) * w <= width)
        sum[k] += load(from + k * w);
      else if (k * w < width)
        sum[k] += load_partial(from + k * w, width - k * w, acc_t<T>(0));
    }
  }
}

// Calls f<whole>(column, sums, width) for each tile of the sum over positions [first, last) of `order`, added in their
// order.
template <class T, class F>
FASTLLM_INLINE void sum_rows(const EmbeddingGradient& g, int64_t first, int64_t last, F f) {
  constexpr int64_t items = kTile<T> * lanes<T>;
  const T* grad_output = static_cast<const T*>(g.grad_output);
  const auto tile = [&]<bool kWhole>(int64_t c, int64_t width) __attribute__((always_inline)) {
    Tile<T> sum = {};
    for (int64_t p = first; p < last; ++p) {
      const T* from = grad_output + g.order[p] * g.features + c;
      // The row's next tile: rows lie anywhere, and to visit many at a time is no stream that the processor follows.
      for (int64_t line = 0; line < items * static_cast<int64_t>(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + items) + line);
      add_tile<T, kWhole>(from, width, sum);
    }
    f.template operator()<kWhole>(c, sum, width);
  };
  int64_t c = 0;
  for (; c + items <= g.features; c += items) tile.template operator()<true>(c, items);
  if (c < g.features) tile.template operator()<false>(c, g.features - c);
}

template <class T>
struct Row {
  T* to;
  bool streaming;

  template <bool kWhole>
  FASTLLM_INLINE void put(int64_t c, const Tile<T>& sum, acc_t<T> scale, int64_t width) const {
    constexpr int w = lanes<T>;
    if constexpr (kWhole && in_pairs<T>) {
      for (int k = 0; k < kTile<T>; k += 2) {
        const vec_u32 bits = pack_pair({sum[k] * scale, sum[k + 1] * scale});
        if (streaming)
          stream_pair(to + c + k * w, bits);
        else
          std::memcpy(to + c + k * w, &bits, sizeof bits);
      }
    } else {
      for (int k = 0; k < kTile<T>; ++k) {
        const vec<acc_t<T>> v = sum[k] * scale;
        if (!kWhole && (k + 1) * w > width) {
          if (k * w < width) store_partial(to + c + k * w, v, width - k * w);
        } else if (streaming) {
          stream(to + c + k * w, v);
        } else {
          store(to + c + k * w, v);
        }
      }
    }
  }
};

// Zero is the same bytes in every dtype: whole vectors of them.
template <class T>
void fill_zero(T* items, int64_t n, bool streaming) {
  constexpr int64_t w = kVectorBytes;
  char* to = reinterpret_cast<char*>(items);
  char* const end = reinterpret_cast<char*>(items + n);
  if (streaming && end - to >= w) {
    const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & (w - 1));
    std::memset(to, 0, static_cast<size_t>(head));
    for (to += head; to + w <= end; to += w) stream(reinterpret_cast<float*>(to), vec_f32{});
  }
  std::memset(to, 0, static_cast<size_t>(end - to));
}

int64_t chunks_of(int64_t count) { return (count + kEmbeddingChunk - 1) / kEmbeddingChunk; }

template <class T>
void write_row(const EmbeddingGradient& g, int64_t v, bool streaming, const acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  T* to = static_cast<T*>(g.grad) + v * g.features;
  const Row<T> row{to, streaming && aligned(to, in_pairs<T> ? kVectorBytes : stream_alignment<T>)};
  const int64_t first = g.starts[v], last = g.starts[v + 1];
  if (v == g.padding_idx) {
    fill_zero(to, g.features, streaming);
    return;
  }
  const A scale = g.scale_by_frequency ? A(1) / static_cast<A>(last - first) : A(1);
  if (partial == nullptr) {
    sum_rows<T>(g, first, last, [&]<bool kWhole>(int64_t c, const Tile<T>& sum, int64_t width) {
      row.template put<kWhole>(c, sum, scale, width);
    });
    return;
  }
  const int64_t chunks = chunks_of(last - first);
  const auto tile = [&]<bool kWhole>(int64_t c, int64_t width) {
    Tile<T> sum = {};
    for (int64_t n = 0; n < chunks; ++n) {
      const A* from = partial + n * g.features + c;
      for (int k = 0; k * w < width; ++k)
        sum[k] += kWhole || (k + 1) * w <= width ? load(from + k * w) : load_partial(from + k * w, width - k * w, A(0));
    }
    row.template put<kWhole>(c, sum, scale, width);
  };
  constexpr int64_t items = kTile<T> * w;
  int64_t c = 0;
  for (; c + items <= g.features; c += items) tile.template operator()<true>(c, items);
  if (c < g.features) tile.template operator()<false>(c, g.features - c);
}

// Lists the chunks of frequent rows as pairs (first, last) of positions in `order`, ascending.
int64_t list_chunks(const EmbeddingGradient& g) {
  int64_t n = 0;
  for (int64_t v = 0; v < g.rows; ++v) {
    const int64_t first = g.starts[v], last = g.starts[v + 1];
    if (last - first <= kEmbeddingChunk || v == g.padding_idx) continue;
    for (int64_t p = first; p < last; p += kEmbeddingChunk, ++n) {
      g.chunks[2 * n] = p;
      g.chunks[2 * n + 1] = p + kEmbeddingChunk < last ? p + kEmbeddingChunk : last;
    }
  }
  return n;
}

int64_t find_chunk(const int64_t* chunks, int64_t n, int64_t first) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (chunks[2 * middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// First row of piece k of n pieces of about equal work: a row costs its own write and the reads of its positions.
int64_t piece_begin(const EmbeddingGradient& g, int64_t k, int64_t n) {
  const int64_t goal = (g.rows + g.count) * k / n;
  if (k == n) return g.rows;
  int64_t low = 0, high = g.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (middle + g.starts[middle] < goal)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Rows of at most kFewIds ids: each at the first position of its id, from all positions of it in order.
template <class T, class Index>
void write_few(EmbeddingGradient g) {
  const Index* ids = static_cast<const Index*>(g.ids);
  T* grad = static_cast<T*>(g.grad);
  const int64_t items = g.rows * g.features;
  const bool streaming = items * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  parallel_for(items, int64_t{1} << 19, [=](int64_t begin, int64_t end) {
    fill_zero(grad + begin, end - begin, streaming);
    stream_fence();
  });
  int64_t order[kFewIds];
  g.order = order;
  bool done[kFewIds] = {};
  for (int64_t i = 0; i < g.count; ++i) {
    if (done[i] || ids[i] == g.padding_idx) continue;
    int64_t n = 0;
    for (int64_t k = i; k < g.count; ++k) {
      if (ids[k] != ids[i]) continue;
      order[n++] = k;
      done[k] = true;
    }
    const acc_t<T> scale = g.scale_by_frequency ? acc_t<T>(1) / static_cast<acc_t<T>>(n) : acc_t<T>(1);
    const Row<T> row{grad + ids[i] * g.features, false};
    sum_rows<T>(g, 0, n, [&]<bool kWhole>(int64_t c, const Tile<T>& sum, int64_t width) {
      row.template put<kWhole>(c, sum, scale, width);
    });
  }
}

// sums[ids[i]] += from[i] for positions [begin, end); rows of sums are `stride` apart, a multiple of the vector.
template <class T, class Index>
void add_rows(const Index* ids, const T* from, acc_t<T>* sums, int64_t begin, int64_t end, int64_t features,
              int64_t stride) {
  constexpr int w = lanes<T>;
  const int64_t whole = features / w * w, rest = features - whole;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = from + i * features;
    acc_t<T>* to = sums + ids[i] * stride;
    for (int64_t c = 0; c < whole; c += w) store(to + c, load(to + c) + load(row + c));
    if (rest > 0) store(to + whole, load(to + whole) + load_partial(row + whole, rest, acc_t<T>(0)));
  }
}

template <class T, class Index>
void write_small(const EmbeddingGradient& g) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  const int64_t stride = embedding_stride(g.features), table = g.rows * stride;
  A* partial = static_cast<A*>(g.partial);
  parallel_for(kEmbeddingPieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::memset(partial + k * table, 0, static_cast<size_t>(table) * sizeof(A));
      add_rows(static_cast<const Index*>(g.ids), static_cast<const T*>(g.grad_output), partial + k * table,
               g.count * k / kEmbeddingPieces, g.count * (k + 1) / kEmbeddingPieces, g.features, stride);
    }
  });
  parallel_for(g.rows, 16384 / stride + 1, [&](int64_t begin, int64_t end) {
    const int64_t features = g.features;
    for (int64_t v = begin; v < end; ++v) {
      T* to = static_cast<T*>(g.grad) + v * features;
      const A* from = partial + v * stride;
      if (v == g.padding_idx) {
        fill_zero(to, features, false);
        continue;
      }
      for (int64_t c = 0; c < features; c += w) {
        vec<A> sum = load(from + c);
        for (int64_t k = 1; k < kEmbeddingPieces; ++k) sum += load(from + k * table + c);
        if (features - c < w)
          store_partial(to + c, sum, features - c);
        else
          store(to + c, sum);
      }
    }
  });
}

template <class T>
void backward(const EmbeddingGradient& g) {
  using A = acc_t<T>;
  if (embedding_in_pieces(g)) {
    if (g.ids_are_int32)
      write_small<T, int32_t>(g);
    else
      write_small<T, int64_t>(g);
    return;
  }
  if (g.count <= kFewIds) {
    if (g.ids_are_int32)
      write_few<T, int32_t>(g);
    else
      write_few<T, int64_t>(g);
    return;
  }
  if (g.ids_are_int32)
    counting_sort(static_cast<const int32_t*>(g.ids), g.count, g.rows, g.starts, g.order);
  else
    counting_sort(static_cast<const int64_t*>(g.ids), g.count, g.rows, g.starts, g.order);
  const int64_t chunks = list_chunks(g);
  A* partial = static_cast<A*>(g.partial);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      sum_rows<T>(g, g.chunks[2 * k], g.chunks[2 * k + 1],
                  [&]<bool kWhole>(int64_t c, const Tile<T>& sum, int64_t width) {
                    constexpr int w = lanes<T>;
                    A* to = partial + k * g.features + c;
                    for (int i = 0; i * w < width; ++i)
                      store_partial(to + i * w, sum[i], width - i * w < w ? width - i * w : w);
                  });
  });
  const bool streaming = g.rows * g.features * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto write = [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end;) {
      int64_t absent = v;  // a run of rows that no id names, zeroed as one stretch
      while (absent < end && g.starts[absent] == g.starts[absent + 1]) ++absent;
      if (absent > v) {
        fill_zero(static_cast<T*>(g.grad) + v * g.features, (absent - v) * g.features, streaming);
        v = absent;
        continue;
      }
      const bool frequent = g.starts[v + 1] - g.starts[v] > kEmbeddingChunk;
      const int64_t k = frequent ? find_chunk(g.chunks, chunks, g.starts[v]) : 0;
      write_row<T>(g, v, streaming, frequent ? partial + k * g.features : nullptr);
      ++v;
    }
  };
  if ((g.rows + g.count) * g.features < 32768) {
    write(0, g.rows);
    return;
  }
  const int64_t pieces = 8 * num_threads();
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) write(piece_begin(g, k, pieces), piece_begin(g, k + 1, pieces));
    stream_fence();
  });
}

void backward_entry(const EmbeddingGradient& g) { FASTLLM_SWITCH_DTYPE(g.dtype, backward<T>(g)) }

}  // namespace

extern const EmbeddingKernels embedding_kernels;
const EmbeddingKernels embedding_kernels = {forward_entry, backward_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
