// A row of cross_entropy in the registers of one block or of the blocks of a cluster: read once, its gradient written
// once.
#pragma once
#include "cross_entropy_softmax.cuh"

namespace fastllm::cuda {
namespace {

// Kernels whose threads need few registers an element.
template <class T, bool general>
constexpr bool kLean = !general && sizeof(T) < 8;
// Threads of a block, at most; blocks that a multiprocessor, with its 65536 registers, runs side by side; groups that a
// thread holds. 256 threads of 64 logits each hold as much as 512 of 32, and half as many run what a row costs beside
// its logits.
template <class T, bool general>
constexpr int kHoldingThreads = kLean<T, general> || sizeof(T) == 8 ? 256 : 512;
template <class T, bool general>
constexpr int kHoldingBlocks = kLean<T, general> ? 2 : 1;
template <class T, bool general>
constexpr int kHeld = (kLean<T, general> ? 64 : 32) / kVec<T>;

template <class T>
constexpr int64_t kHeldByBlock = int64_t{kHoldingThreads<T, false>} * kHeld<T, false> * kVec<T>;  // logits
static_assert(kHeldByBlock<float> == kHoldingThreads<float, true> * kHeld<float, true> * kVec<float>);

// Where a thread's part of the row lies: groups first, first + stride, ...
struct Part {
  int cluster, first, stride;
  bool edges;  // this block minds what lies outside groups
};

// Against which number a warp takes its exponentials, as 2^(z log2(e) - shift): one product and sum, and no rounding of
// z - max. What the rounding of `shift` costs is the same factor for all of them: exp(z - max) is what comes out over
// what comes out of max, so that exp(0) is exactly 1.
struct Exponent {
  float shift, of_max;

  FASTLLM_DEVICE explicit Exponent(float max) : shift(kLog2E<float> * max), of_max((*this)(max)) {}
  FASTLLM_DEVICE float operator()(float z) const { return exp2_fast(std::fma(z, kLog2E<float>, -shift)); }
};

// By lean kernels. bfloat16 and float16 keep the exponentials in the place of the logits. Those of float32 are taken
// again for the gradient: both beside each other would halve the threads that fit, and a second one hides behind twice
// the bytes.
//
// The one barrier that all threads pass, in merge_row, lies between their reads of logits and their writes of the
// gradient, which may take the logits' place.
template <class T>
FASTLLM_DEVICE void hold_lean_row(const Rows<T>& r, const Row<T>& row, const Part& part) {
  constexpr int N = kVec<T>, K = kHeld<T, false>;
  constexpr bool keeps = sizeof(T) == 2;
  constexpr float kFar = 1 << 20;  // from here on the rounding of `shift` counts in whole powers of 2
  const int first = part.first, stride = part.stride;
  const T* logits = row.logits + row.head + int64_t{first} * N;
  Words x[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * stride >= row.groups) break;
    x[k] = load_words_streaming(logits + int64_t{k} * stride * N);
  }
  const int edge = part.edges ? edge_column(r, row) : -1;
  float z_edge = edge >= 0 ? load_acc(row.logits + edge) : -kInfinity<float>;
  const float z_class = logit_of_class<false>(r, row);
  Slope<float> slope = open_slope(r, row);

  unsigned top[4] = {kMinusInfinityWord<T>, kMinusInfinityWord<T>, kMinusInfinityWord<T>, kMinusInfinityWord<T>};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * stride >= row.groups) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i] = greater_of_words<T>(top[i], x[k].word[i]);
  }
  const unsigned one = greater_of_words<T>(greater_of_words<T>(top[0], top[1]), greater_of_words<T>(top[2], top[3]));
  float z_top[N];
  widen_words<T>(Words{{one, one, one, one}}, z_top);
  Stats<float> s;
  s.max = reduce_warp(greater_of(greater_of(z_top[0], z_top[1]), z_edge), Max());
  float base = base_of(s.max);
  if (std::abs(base) >= kFar) {  // the maximum is taken off first: differences are exact, or their exponentials 0
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (first + k * stride >= row.groups) break;
      float z[N];
      widen_words<T>(x[k], z);
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] -= base;
      x[k] = words_of(narrow_items<T>(z));
    }
    z_edge -= base;
    base = 0;
  }
  const Exponent exponent(base);
  float kept[keeps ? K * N : 1], sum[4] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * stride >= row.groups) break;
    float z[N];
    widen_words<T>(x[k], z);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float e = exponent(z[j]);
      if constexpr (keeps) kept[k * N + j] = e;
      sum[j % 4] += e;
    }
  }
  const float e_edge = exponent(z_edge);
  s.sum = reduce_warp((sum[0] + sum[1]) + (sum[2] + sum[3]) + e_edge, Sum()) / exponent.of_max;

  const Stats<float> all = merge_row<false>(s, reinterpret_cast<Stats<float>*>(shared_memory()), part.cluster);
  finish_row<false>(r, row, all, z_class, part.edges && threadIdx.x == 0, &slope);
  if (r.grad == nullptr) return;

  T* grad = grad_of(r, row);
  const float factor = exp_fast(s.max - all.max) * slope.factor / exponent.of_max;
  bool y_is_here = false;
  const int y_group = row.y_group();
  for_width(r.grad_width, [&](auto wide) {
    T* to = grad + row.head + int64_t{first} * N;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int group = first + k * stride;
      if (group >= row.groups) break;
      float g[N];
      if constexpr (!keeps) widen_words<T>(x[k], g);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = (keeps ? kept[keeps ? k * N + j : 0] : exponent(g[j])) * factor;
      store_group<decltype(wide)::value>(to + int64_t{k} * stride * N, narrow_items<T>(g), r.grad_width);
      y_is_here |= group == y_group;
    }
  });
  if (y_is_here) store(grad + row.y, gradient_at_class<false>(r, row, slope, z_class));
  if (edge >= 0)
    store(grad + edge, edge == row.y ? gradient_at_class<false>(r, row, slope, z_class) : narrow<T>(e_edge * factor));
}

// By the others, in the same order.
template <bool general, class T>
FASTLLM_DEVICE void hold_row(const Rows<T>& r, const Row<T>& row, const Part& part) {
  using A = Acc<T>;
  constexpr int N = kVec<T>, K = kHeld<T, general>;
  const int first = part.first, stride = part.stride;
  const T* logits = row.logits + row.head + int64_t{first} * N;
  Vec<T, N> x[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * stride < row.groups) {
      x[k] = load_vec_streaming<N>(logits + int64_t{k} * stride * N);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) x[k].items[j] = kMinusInfinity<T>;
    }
  }
  const int edge = part.edges ? edge_column(r, row) : -1;
  const A z_class = logit_of_class<general>(r, row);
  // The last: the edge.
  A z[K * N + 1];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) z[k * N + j] = logit<general>(r, x[k].items[j]);
  z[K * N] = edge >= 0 ? logit<general>(r, load(row.logits + edge)) : -kInfinity<A>;

  Stats<A> s;
  if constexpr (general) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (first + k * stride >= row.groups) break;
      add_columns(r, row, row.head + (first + k * stride) * N, reinterpret_cast<const A(&)[N]>(z[k * N]), s);
    }
    if (edge >= 0) add_columns(r, row, edge, reinterpret_cast<const A(&)[1]>(z[K * N]), s);
  } else {
    A e[K * N + 1];
#pragma unroll
    for (int i = 0; i <= K * N; ++i) e[i] = z[i];
    add_exponentials(s, e);
  }
  s = merge_row<general>(merge_warp<general>(s), reinterpret_cast<Stats<A>*>(shared_memory()), part.cluster);
  Slope<A> slope = open_slope(r, row);
  finish_row<general>(r, row, s, z_class, part.edges && threadIdx.x == 0, &slope);
  if (r.grad == nullptr) return;

  T* grad = grad_of(r, row);
  bool y_is_here = false;
  for_width(r.grad_width, [&](auto wide) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int group = first + k * stride, column = row.head + group * N;
      if (group >= row.groups) break;
      store_group<decltype(wide)::value>(
          grad + column, gradient_of<general>(r, row, slope, column, reinterpret_cast<const A(&)[N]>(z[k * N])),
          r.grad_width);
      y_is_here |= group == row.y_group();
    }
  });
  if (y_is_here) store(grad + row.y, gradient_at_class<general>(r, row, slope, z_class));
  if (edge >= 0) store(grad + edge, edge_gradient<general>(r, row, slope, edge, z[K * N]));
}

}  // namespace
}  // namespace fastllm::cuda
