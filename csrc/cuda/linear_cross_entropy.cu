// What linear_cross_entropy needs beside library products and the row kernel of cross_entropy: the bias gradient, and
// the late scale of gradients.
//
// The bias gradient reads a chunk's gradient of the logits once, 16 bytes a thread, and sums in float32: a warp walks
// down 512 bytes of columns, the warps of a block share its rows. Each block of rows leaves a row of partial sums; all
// chunks' are added in order and rounded once: no atomics, the same bits every time.
//
// The scale reads the incoming gradient on the device. Where it is 1, as in most training steps, nothing moves.
#include "common.cuh"
#include "linear_cross_entropy.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kFewBlocks = 512;  // fewer blocks than that leave multiprocessors idle: then rows are cut
constexpr int64_t kLeastRows = 64;   // of a block
constexpr int64_t kMaxBlocks = 1056;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_columns(const T* matrix, int64_t rows, int64_t columns, int64_t stride,
                                                        int64_t strips, int64_t rows_of_block, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr int N = kVec<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t strip = blockIdx.x % strips, part = blockIdx.x / strips;
  const int64_t column = (strip * kWarp + lane) * N;
  const int64_t begin = part * rows_of_block, end = begin + rows_of_block < rows ? begin + rows_of_block : rows;
  A sum[N] = {};
  if (column + N <= columns) {
#pragma unroll 4
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      const Vec<T, N> x = load_vec<N>(matrix + row * stride + column);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += widen(x.items[j]);
    }
  } else {
    for (int64_t row = begin + warp; row < end; row += kWarps)
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (column + j < columns) sum[j] += load_acc(matrix + row * stride + column + j);
  }
  A* sums = reinterpret_cast<A*>(shared_memory());  // (warps, lanes N)
#pragma unroll
  for (int j = 0; j < N; ++j) sums[(warp * kWarp + lane) * N + j] = sum[j];
  sync_block();
  for (int c = threadIdx.x; c < kWarp * N; c += kThreads) {
    A total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w * kWarp * N + c];
    if (strip * kWarp * N + c < columns) store(partial + part * columns + strip * kWarp * N + c, total);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_columns(const Acc<T>* partial, int64_t blocks, int64_t columns, T* output) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  Acc<T> sum = 0;
#pragma unroll 4
  for (int64_t b = 0; b < blocks; ++b) sum += load(partial + b * columns + column);
  store(output + column, narrow<T>(sum));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale(T* x, int64_t count, int64_t head, const void* factor, bool factor_is_acc) {
  using A = Acc<T>;
  constexpr int N = kVec<T>;
  const A f = factor_is_acc ? load(static_cast<const A*>(factor)) : load_acc(static_cast<const T*>(factor));
  if (f == A(1)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t groups = (count - head) / N, stride = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t v = first; v < groups; v += stride) {
    Vec<T, N> group = load_vec_streaming<N>(x + head + v * N);
#pragma unroll
    for (int j = 0; j < N; ++j) group.items[j] = narrow<T>(widen(group.items[j]) * f);
    store_vec_streaming<N>(x + head + v * N, group);
  }
  const int64_t edge = first < head ? first : first + groups * N;
  if (edge < count) store(x + edge, narrow<T>(load_acc(x + edge) * f));
}

template <class T>
int64_t strips_of(int64_t columns) {
  return ceil_div(columns, kWarp * kVec<T>);
}

template <class T>
Status run_columns(const void* matrix, int64_t rows, int64_t columns, int64_t stride, void* partial, Stream stream) {
  const int64_t parts = column_sum_blocks(rows, columns), strips = strips_of<T>(columns);
  const Shape shape{parts * strips, kThreads, kThreads * kVec<T> * sizeof(Acc<T>)};
  return launch(sum_columns<T>, shape, stream, static_cast<const T*>(matrix), rows, columns, stride, strips,
                ceil_div(rows, parts), static_cast<Acc<T>*>(partial));
}

}  // namespace

int64_t column_sum_blocks(int64_t rows, int64_t columns) {
  const int64_t wanted = ceil_div(kFewBlocks, strips_of<bf16>(columns) + 1), most = ceil_div(rows, kLeastRows);
  return wanted < most ? wanted : most < 1 ? 1 : most;
}

Status column_sums(DType dtype, const void* matrix, int64_t rows, int64_t columns, int64_t stride, void* partial,
                   Stream stream) {
  FASTLLM_SWITCH_DTYPE(dtype, return run_columns<T>(matrix, rows, columns, stride, partial, stream))
  return 1;
}

Status finish_column_sums(DType dtype, const void* partial, int64_t blocks, int64_t columns, void* output,
                          Stream stream) {
  const Shape shape{ceil_div(columns, kThreads), kThreads};
  FASTLLM_SWITCH_DTYPE(dtype, return launch(finish_columns<T>, shape, stream, static_cast<const Acc<T>*>(partial),
                                            blocks, columns, static_cast<T*>(output)))
  return 1;
}

Status scale_unless_one(DType dtype, void* x, int64_t count, const void* factor, bool factor_is_acc, Stream stream) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(x) % 16;
  FASTLLM_SWITCH_DTYPE(dtype, {
    const int64_t to_boundary = static_cast<int64_t>((16 - past) % 16 / sizeof(T));
    const int64_t head = to_boundary < count ? to_boundary : count;
    const int64_t wanted = ceil_div(count, kThreads * 4 * kVec<T>);
    return launch(scale<T>, {wanted < kMaxBlocks ? wanted : kMaxBlocks, kThreads}, stream, static_cast<T*>(x), count,
                  head, factor, factor_is_acc);
  })
  return 1;
}

}  // namespace fastllm::cuda
