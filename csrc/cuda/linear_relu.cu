// The passes around the products of linear_relu and relu_mlp: bias and ReLU, and in backward mask and bias gradient.
//
// Forward: bias and ReLU in one pass over the product, where PyTorch may take two. Backward: one pass reads the
// incoming gradient and the output, writes the masked gradient and leaves sums over rows for the bias (3 items moved
// for each element, in place as many); PyTorch's mask and sum move 4 in two passes.
//
// Rows of any length are walked 16 bytes at a time: a few rows, laid end to end, make one folded row of whole vectors.
// A thread keeps to one vector of the folded row, so that the columns of its items never change: it holds their bias,
// or their sums, in registers. Sums are added in an order that depends on the shape alone.
#include "common.cuh"
#include "linear_relu.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeight = kThreads / kWarp;  // folded rows that a block walks side by side, a warp each
constexpr int kInFlight = 4;               // vectors that a thread loads before it uses the first
constexpr int64_t kMaxBlocks = 1056;       // fixed, for the sums' order depends on it

int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// How a matrix is folded for vectors of `width` items, and cut for blocks.
struct Fold {
  int64_t count;   // items
  int64_t vector;  // items of a vector
  int64_t rows;    // of the matrix, that make one folded row
  int64_t width;   // items of a folded row
  int64_t groups;  // of kWarp vectors side by side
  int64_t slices;  // of folded rows; a block works on one group in one slice
  int64_t height;  // folded rows of a slice
};

Fold fold(int64_t rows, int64_t columns, int64_t vector) {
  Fold f{};
  f.count = rows * columns;
  f.vector = vector;
  if (f.count == 0) return f;
  f.rows = vector / greatest_common_divisor(columns, vector);
  f.rows *= ceil_div(kWarp, f.rows * columns / vector);  // at least a warp's vectors
  f.width = f.rows * columns;
  f.groups = ceil_div(f.width / vector, kWarp);
  const int64_t folded = ceil_div(f.count, f.width);
  const int64_t wanted = ceil_div(folded, kHeight * kInFlight), most = ceil_div(kMaxBlocks, f.groups);
  f.height = ceil_div(folded, wanted < most ? wanted : most);
  f.slices = ceil_div(folded, f.height);
  return f;
}

// The vectors of this thread: items of a folded row from `column` on, at `first`, `first` + `step`, ... below `limit`.
struct Walk {
  int64_t column, first, step, limit;
};
FASTLLM_DEVICE Walk walk(const Fold& f) {
  const int64_t group = blockIdx.x % f.groups, slice = blockIdx.x / f.groups;
  const int64_t column = (group * kWarp + threadIdx.x % kWarp) * f.vector, row = slice * f.height + threadIdx.x / kWarp;
  const int64_t end = (slice + 1) * f.height * f.width, limit = end < f.count ? end : f.count;
  return {column, row * f.width + column, kHeight * f.width, column < f.width ? limit : 0};
}

template <class A>
FASTLLM_DEVICE A relu(A x) {
  return x <= A(0) ? A(0) : x;  // NaN stays
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) bias_relu_rows(T* y, const T* bias, int64_t columns, Fold f) {
  using A = Acc<T>;
  const Walk w = walk(f);
  A b[N];
#pragma unroll
  for (int j = 0; j < N; ++j) b[j] = bias != nullptr ? load_acc(bias + (w.column + j) % columns) : A(0);
  for (int64_t from = w.first; from < w.limit; from += kInFlight * w.step) {
    Vec<T, N> v[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = from + k * w.step;
      if (i >= w.limit || i + N > f.count) break;
      v[k] = load_vec<N>(y + i);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = from + k * w.step;
      if (i >= w.limit) break;
      if (i + N <= f.count) {
#pragma unroll
        for (int j = 0; j < N; ++j) v[k].items[j] = narrow<T>(relu(widen(v[k].items[j]) + b[j]));
        store_vec_cached(y + i, v[k]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < N; ++j)  // the last folded row may be short
        if (i + j < f.count) store(y + i + j, narrow<T>(relu(load_acc(y + i + j) + b[j])));
    }
  }
}

template <class T>
FASTLLM_DEVICE T masked(T dy, T y) {
  return widen(y) <= 0 ? T{} : dy;
}

// Adds what the warps of a block hold for the same columns; partial is (slices, width).
template <class T, int N>
FASTLLM_DEVICE void store_sums(const Acc<T> (&sums)[N], const Fold& f, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr int kRow = kWarp * N;
  A* scratch = reinterpret_cast<A*>(shared_memory());  // (kHeight, kRow)
#pragma unroll
  for (int j = 0; j < N; ++j) scratch[threadIdx.x / kWarp * kRow + j * kWarp + threadIdx.x % kWarp] = sums[j];
  sync_block();
  const int64_t group = blockIdx.x % f.groups, slice = blockIdx.x / f.groups;
  for (int i = threadIdx.x; i < kRow; i += kThreads) {
    const int64_t column = group * kRow + i;
    if (column >= f.width) break;
    const int from = i % N * kWarp + i / N;
    A sum = 0;
#pragma unroll
    for (int h = 0; h < kHeight; ++h) sum += scratch[h * kRow + from];
    store(partial + slice * f.width + column, sum);
  }
}

template <class T, int N, bool with_mask, bool with_sums>
__global__ void __launch_bounds__(kThreads, 3) mask_rows(const T* dy, const T* y, T* dz, Acc<T>* partial, Fold f) {
  using A = Acc<T>;
  const Walk w = walk(f);
  A sums[N] = {};
  for (int64_t from = w.first; from < w.limit; from += kInFlight * w.step) {
    Vec<T, N> d[kInFlight], m[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = from + k * w.step;
      if (i >= w.limit || i + N > f.count) break;
      d[k] = load_vec<N>(dy + i);
      if constexpr (with_mask) m[k] = load_vec<N>(y + i);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = from + k * w.step;
      if (i >= w.limit) break;
      if (i + N <= f.count) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if constexpr (with_mask) d[k].items[j] = masked(d[k].items[j], m[k].items[j]);
          if constexpr (with_sums) sums[j] += widen(d[k].items[j]);
        }
        if constexpr (with_mask) store_vec_cached(dz + i, d[k]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (i + j >= f.count) break;
        T value = load(dy + i + j);
        if constexpr (with_mask) store(dz + i + j, value = masked(value, load(y + i + j)));
        if constexpr (with_sums) sums[j] += widen(value);
      }
    }
  }
  if constexpr (with_sums) store_sums<T>(sums, f, partial);
}

// One thread a column and `height` rows side by side.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_sums(const Acc<T>* partial, int64_t count, int64_t columns, int width, T* out) {
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(shared_memory());
  const int height = kThreads / width, lane = threadIdx.x % width, first = threadIdx.x / width;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * width + lane;
  A sum = 0;
  if (column < columns)
    for (int64_t row = first; row < count; row += height) sum += load(partial + row * columns + column);
  scratch[threadIdx.x] = sum;
  sync_block();
  if (first != 0 || column >= columns) return;
  for (int h = 1; h < height; ++h) sum += scratch[h * width + lane];
  store(out + column, narrow<T>(sum));
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
Fold fold_of(const MaskGradient& m) {
  const bool wide = is_aligned(m.dy) && is_aligned(m.y) && is_aligned(m.dz);
  return fold(m.rows, m.columns, wide ? kVec<T> : 1);
}

template <class T, int N>
Status run_mask(const MaskGradient& m, const Fold& f, Stream stream) {
  using A = Acc<T>;
  const bool with_mask = m.y != nullptr, with_sums = m.partial != nullptr;
  const auto kernel = !with_mask  ? mask_rows<T, N, false, true>
                      : with_sums ? mask_rows<T, N, true, true>
                                  : mask_rows<T, N, true, false>;
  const size_t shared = with_sums ? kThreads * N * sizeof(A) : 0;
  return launch(kernel, {f.groups * f.slices, kThreads, shared}, stream, static_cast<const T*>(m.dy),
                static_cast<const T*>(m.y), static_cast<T*>(m.dz), static_cast<A*>(m.partial), f);
}

template <class T, int N>
Status run_bias_relu(const BiasRelu& b, Stream stream) {
  const Fold f = fold(b.rows, b.columns, N);
  return launch(bias_relu_rows<T, N>, {f.groups * f.slices, kThreads}, stream, static_cast<T*>(b.y),
                static_cast<const T*>(b.bias), b.columns, f);
}

template <class T>
Status run_finish(const ColumnSums& c, Stream stream) {
  using A = Acc<T>;
  int width = 1;
  while (width < kWarp && width < c.columns) width *= 2;
  return launch(finish_sums<T>, {ceil_div(c.columns, width), kThreads, kThreads * sizeof(A)}, stream,
                static_cast<const A*>(c.partial), c.count, c.columns, width, static_cast<T*>(c.out));
}

}  // namespace

Status bias_relu(const BiasRelu& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return is_aligned(arguments.y) ? run_bias_relu<T, kVec<T> >(arguments, stream)
                                                                       : run_bias_relu<T, 1>(arguments, stream))
  return 1;
}

int64_t mask_sums(const MaskGradient& arguments) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, {
    const Fold f = fold_of<T>(arguments);
    return f.slices * f.rows;
  })
  return 0;
}

Status mask_gradient(const MaskGradient& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, {
    const Fold f = fold_of<T>(arguments);
    return f.vector > 1 ? run_mask<T, kVec<T> >(arguments, f, stream) : run_mask<T, 1>(arguments, f, stream);
  })
  return 1;
}

Status finish_column_sums(const ColumnSums& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return run_finish<T>(arguments, stream))
  return 1;
}

}  // namespace fastllm::cuda
