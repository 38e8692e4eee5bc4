// mse_loss: loss and gradient in one pass over input and target.
//
// PyTorch writes differences, squares and gradient in kernels of their own (7 items moved for each element); here input
// and target are read once and the gradient is written while they are in registers (3 items). Each block leaves one
// partial sum, a single block adds those in order: the same bits every time, on every GPU.
#include "common.cuh"
#include "mse_loss.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;          // vectors that a thread loads before it uses the first
constexpr int64_t kMaxBlocks = 1056;  // eight on each of 132 multiprocessors; fixed, for the sums' order depends on it

// What one pass makes: of all elements a sum, the gradient of the sum, or both; of each element its loss or its
// gradient.
enum class Pass { kSum, kSumAndGrad, kSumGrad, kEach, kEachGrad };
constexpr bool makes_sum(Pass p) { return p == Pass::kSum || p == Pass::kSumAndGrad; }
constexpr bool makes_grad(Pass p) { return p == Pass::kSumAndGrad || p == Pass::kSumGrad || p == Pass::kEachGrad; }
constexpr bool is_reduced(Pass p) { return p != Pass::kEach && p != Pass::kEachGrad; }

template <class T>
struct Arrays {
  const T *input, *target, *weight, *incoming;
  T *output, *grad;
};

// N elements from i on; returns the sum of their losses. scale is 2 incoming / divisor where the loss is reduced.
template <Pass pass, bool weighted, int N, class T>
FASTLLM_DEVICE Acc<T> elements_at(const Arrays<T>& a, int64_t i, const Vec<T, N>& x, const Vec<T, N>& t, Acc<T> scale) {
  using A = Acc<T>;
  Vec<T, N> w, incoming, result;
  if constexpr (weighted) w = load_vec_streaming<N>(a.weight + i);
  if constexpr (pass == Pass::kEachGrad) incoming = load_vec_streaming<N>(a.incoming + i);
  A sum = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const A d = widen(x.items[j]) - widen(t.items[j]);
    A wd = d;
    if constexpr (weighted) wd *= widen(w.items[j]);
    if constexpr (pass == Pass::kEachGrad) scale = 2 * widen(incoming.items[j]);
    if constexpr (makes_grad(pass)) result.items[j] = narrow<T>(wd * scale);
    if constexpr (pass == Pass::kEach) result.items[j] = narrow<T>(wd * d);
    sum += wd * d;
  }
  if constexpr (makes_grad(pass)) store_vec_streaming(a.grad + i, result);
  if constexpr (pass == Pass::kEach) store_vec_streaming(a.output + i, result);
  return sum;
}

// The sum over this thread's share of `vectors` vectors of N elements; `place` says where a vector begins.
template <Pass pass, bool weighted, int N, class T, class Place>
FASTLLM_DEVICE Acc<T> share_of(const Arrays<T>& a, int64_t vectors, const Place& place, Acc<T> scale) {
  Acc<T> sum = 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t v = first; v < vectors; v += kInFlight * stride) {
    Vec<T, N> x[kInFlight], t[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (v + k * stride >= vectors) break;
      x[k] = load_vec_streaming<N>(a.input + place(v + k * stride));
      t[k] = load_vec_streaming<N>(a.target + place(v + k * stride));
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (v + k * stride >= vectors) break;
      sum += elements_at<pass, weighted>(a, place(v + k * stride), x[k], t[k], scale);
    }
  }
  return sum;
}

// Whole vectors begin behind `head` elements. All blocks share what lies outside them, too: where the arrays are not
// aligned alike that is everything.
template <class T, Pass pass, bool weighted>
__global__ void __launch_bounds__(kThreads)
    elements(Arrays<T> a, const Acc<T>* divisor, bool correct, int64_t count, int64_t head, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr int N = kVec<T>;
  A scale = 2;
  if constexpr (is_reduced(pass) && makes_grad(pass)) {
    const A incoming = a.incoming != nullptr ? load_acc(a.incoming) : A(1);
    if (correct && incoming == A(1)) return;
    scale *= incoming;
    if (divisor != nullptr) scale /= load(divisor);
  }
  const int64_t vectors = (count - head) / N, outside = count - vectors * N;
  A sum = share_of<pass, weighted, N>(a, vectors, [&](int64_t v) { return head + v * N; }, scale);
  sum += share_of<pass, weighted, 1>(a, outside, [&](int64_t i) { return i < head ? i : i + vectors * N; }, scale);
  if constexpr (makes_sum(pass)) {
    sum = reduce_block(sum, A(0), Sum(), reinterpret_cast<A*>(shared_memory()));
    if (threadIdx.x == 0) store(partial + blockIdx.x, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish(const Acc<T>* partial, int64_t blocks, const Acc<T>* divisor, T* output) {
  using A = Acc<T>;
  A sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) sum += load(partial + b);
  sum = reduce_block(sum, A(0), Sum(), reinterpret_cast<A*>(shared_memory()));
  if (threadIdx.x == 0) store(output, narrow<T>(divisor != nullptr ? sum / load(divisor) : sum));
}

// Vectors where every array lies at one distance from a 16-byte boundary; else all elements are outside vectors.
template <class T>
int64_t head_of(const MseLoss& m) {
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const void* arrays[] = {m.input, m.target, m.weight, m.reduced ? nullptr : m.output, m.reduced ? nullptr : m.incoming,
                          m.grad};
  for (const void* p : arrays)
    if (p != nullptr && offset(p) != offset(m.input)) return m.count;
  const int64_t to_boundary = static_cast<int64_t>((16 - offset(m.input)) % 16 / sizeof(T));
  return to_boundary < m.count ? to_boundary : m.count;
}

template <class T, Pass pass>
Status run_pass(const MseLoss& m, Stream stream) {
  using A = Acc<T>;
  const Arrays<T> a{static_cast<const T*>(m.input),    static_cast<const T*>(m.target), static_cast<const T*>(m.weight),
                    static_cast<const T*>(m.incoming), static_cast<T*>(m.output),       static_cast<T*>(m.grad)};
  const int64_t blocks = mse_loss_blocks(m.count);
  A* partial = static_cast<A*>(m.partial);
  const A* divisor = static_cast<const A*>(m.divisor);
  constexpr size_t kScratch = kWarp * sizeof(A);
  const auto kernel = m.weight != nullptr ? elements<T, pass, true> : elements<T, pass, false>;
  const Status status =
      launch(kernel, {blocks, kThreads, kScratch}, stream, a, divisor, m.correct, m.count, head_of<T>(m), partial);
  if (status != 0 || !makes_sum(pass)) return status;
  return launch(finish<T>, {1, kThreads, kScratch}, stream, partial, blocks, divisor, static_cast<T*>(m.output));
}

template <class T>
Status run(const MseLoss& m, Stream stream) {
  if (!m.reduced)
    return m.grad != nullptr ? run_pass<T, Pass::kEachGrad>(m, stream) : run_pass<T, Pass::kEach>(m, stream);
  if (m.output == nullptr) return run_pass<T, Pass::kSumGrad>(m, stream);
  return m.grad != nullptr ? run_pass<T, Pass::kSumAndGrad>(m, stream) : run_pass<T, Pass::kSum>(m, stream);
}

}  // namespace

int64_t mse_loss_blocks(int64_t count) {
  const int64_t wanted = ceil_div(count, kThreads * kInFlight * 4);
  return wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks;
}

Status mse_loss(const MseLoss& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return run<T>(arguments, stream))
  return 1;
}

}  // namespace fastllm::cuda
