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

template <class T>
struct Arrays {
  const T *input, *target, *weight, *incoming;
  T *output, *grad;
  bool reduced;
};

// The terms of one element; scale is 2 incoming / divisor where the loss is reduced.
template <class T>
FASTLLM_DEVICE Acc<T> element(const Arrays<T>& a, int64_t i, Acc<T> x, Acc<T> t, Acc<T> w, Acc<T> scale, T* grad) {
  const Acc<T> d = x - t, wd = w * d;
  if (a.grad != nullptr) {
    const Acc<T> s = a.reduced || a.incoming == nullptr ? scale : 2 * load_acc(a.incoming + i);
    *grad = narrow<T>(wd * s);
  }
  return wd * d;
}

template <class T>
FASTLLM_DEVICE Acc<T> one(const Arrays<T>& a, int64_t i, Acc<T> scale) {
  T grad{};
  const Acc<T> w = a.weight != nullptr ? load_acc(a.weight + i) : Acc<T>(1);
  const Acc<T> loss = element(a, i, load_acc(a.input + i), load_acc(a.target + i), w, scale, &grad);
  if (a.grad != nullptr) store(a.grad + i, grad);
  if (!a.reduced && a.output != nullptr) store(a.output + i, narrow<T>(loss));
  return loss;
}

// Elements [0, head) and the last ones, outside whole vectors, are the first block's.
template <class T>
__global__ void __launch_bounds__(kThreads)
    elements(Arrays<T> a, const Acc<T>* divisor, bool correct, int64_t count, int64_t head, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr int N = kVec<T>;
  A scale = 2;
  if (a.reduced && a.grad != nullptr) {
    const A incoming = a.incoming != nullptr ? load_acc(a.incoming) : A(1);
    if (correct && incoming == A(1)) return;
    scale *= incoming;
    if (divisor != nullptr) scale /= load(divisor);
  }
  A sum = 0;
  const int64_t vectors = (count - head) / N, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t v = first; v < vectors; v += kInFlight * stride) {
    Vec<T, N> x[kInFlight], t[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (v + k * stride >= vectors) break;
      x[k] = load_vec_streaming<N>(a.input + head + (v + k * stride) * N);
      t[k] = load_vec_streaming<N>(a.target + head + (v + k * stride) * N);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (v + k * stride >= vectors) break;
      const int64_t i = head + (v + k * stride) * N;
      Vec<T, N> w, grad, loss;
      if (a.weight != nullptr) w = load_vec_streaming<N>(a.weight + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A one_weight = a.weight != nullptr ? widen(w.items[j]) : A(1);
        const A term = element(a, i + j, widen(x[k].items[j]), widen(t[k].items[j]), one_weight, scale, &grad.items[j]);
        loss.items[j] = narrow<T>(term);
        sum += term;
      }
      if (a.grad != nullptr) store_vec_streaming(a.grad + i, grad);
      if (!a.reduced && a.output != nullptr) store_vec_streaming(a.output + i, loss);
    }
  }
  if (blockIdx.x == 0) {
    const int64_t tail = head + vectors * N;
    for (int64_t i = threadIdx.x; i < head; i += kThreads) sum += one(a, i, scale);
    for (int64_t i = tail + threadIdx.x; i < count; i += kThreads) sum += one(a, i, scale);
  }
  if (partial == nullptr) return;
  sum = reduce_block(sum, A(0), Sum(), reinterpret_cast<A*>(shared_memory()));
  if (threadIdx.x == 0) store(partial + blockIdx.x, sum);
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

template <class T>
Status run(const MseLoss& m, Stream stream) {
  using A = Acc<T>;
  const Arrays<T> a{static_cast<const T*>(m.input),
                    static_cast<const T*>(m.target),
                    static_cast<const T*>(m.weight),
                    static_cast<const T*>(m.incoming),
                    static_cast<T*>(m.output),
                    static_cast<T*>(m.grad),
                    m.reduced};
  // Vectors where every array lies at one distance from a 16-byte boundary; else all elements are "head".
  const auto offset = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const void* arrays[] = {m.input, m.target, m.weight, m.reduced ? nullptr : m.output, m.grad};
  bool together = true;
  for (const void* p : arrays) together = together && (p == nullptr || offset(p) == offset(m.input));
  const int64_t to_boundary = static_cast<int64_t>((16 - offset(m.input)) % 16 / sizeof(T));
  const int64_t head = together && to_boundary < m.count ? to_boundary : m.count;
  const int64_t blocks = mse_loss_blocks(m.count);
  A* partial = m.reduced && m.output != nullptr ? static_cast<A*>(m.partial) : nullptr;
  const A* divisor = static_cast<const A*>(m.divisor);
  const Status status =
      launch(elements<T>, {blocks, kThreads, kWarp * sizeof(A)}, stream, a, divisor, m.correct, m.count, head, partial);
  if (status != 0 || partial == nullptr) return status;
  return launch(finish<T>, {1, kThreads, kWarp * sizeof(A)}, stream, partial, blocks, divisor,
                static_cast<T*>(m.output));
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
