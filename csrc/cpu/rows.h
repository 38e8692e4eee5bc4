// Walks over a row that several kernels share: its maximum, its soft cap, and stores that may go past the caches.
#pragma once
#include "simd.h"

namespace fastllm::cpu {
namespace {  // internal linkage: a copy per instruction set, never merged by the linker

template <class T>
FASTLLM_INLINE acc_t<T> row_max(const T* x, int64_t n) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  vec<A> m0 = splat(-kInfinity<A>), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  if constexpr (in_pairs<T>) {
    for (; i + 4 * w <= n; i += 4 * w) {
      const Pair a = load_pair(x + i), b = load_pair(x + i + 2 * w);
      m0 = max(a.even, m0);
      m1 = max(a.odd, m1);
      m2 = max(b.even, m2);
      m3 = max(b.odd, m3);
    }
  }
  for (; i + 4 * w <= n; i += 4 * w) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + w), m1);
    m2 = max(load(x + i + 2 * w), m2);
    m3 = max(load(x + i + 3 * w), m3);
  }
  for (; i + w <= n; i += w) m0 = max(load(x + i), m0);
  if (i < n) m1 = max(load_partial(x + i, n - i, -kInfinity<A>), m1);
  return reduce_max(max(max(m0, m1), max(m2, m3)));
}

template <class T>
void softcapped(const T* x, acc_t<T>* z, double cap, int64_t n) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  const A c = static_cast<A>(cap);
  int64_t i = 0;
  for (; i + w <= n; i += w) store(z + i, tanh_of(load(x + i) / c) * c);
  if (i < n) store_partial(z + i, tanh_of(load_partial(x + i, n - i, A(0)) / c) * c, n - i);
}

// dz/dx of z = cap tanh(x / cap): 4 e / (1 + e)^2 with e = exp(-2 |x| / cap), which keeps its digits near the cap.
template <class T>
FASTLLM_INLINE vec<acc_t<T>> cap_slope(vec<acc_t<T>> x, acc_t<T> cap) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, double>) {  // as PyTorch takes it: the yardstick of the other dtypes
    const vec<A> tanh = tanh_of(x / cap);
    return 1 - tanh * tanh;
  } else {
    const vec<A> e = exp_nonpositive(-magnitude(x) * (2 / cap));
    return 4 * e / ((1 + e) * (1 + e));
  }
}

template <class T>
void fill_zero(T* x, int64_t n) {
  std::memset(x, 0, static_cast<size_t>(n) * sizeof(T));
}

// Gradients beyond this size go past the caches, which could not hold them; unless they overwrite the logits, whose
// lines are in the cache.
constexpr int64_t kStreamBytes = int64_t{64} << 20;

template <class T>
struct Sink {
  T* to;
  bool streaming;
  FASTLLM_INLINE void put(int64_t i, vec<acc_t<T>> v) const {
    if (streaming)
      stream(to + i, v);
    else
      store(to + i, v);
  }
  FASTLLM_INLINE void put_pair(int64_t i, Pair v) const {
    const vec_u32 bits = pack_pair(v);
    if (streaming)
      stream_pair(to + i, bits);
    else
      std::memcpy(to + i, &bits, sizeof bits);
  }
  // Items before the first whole cache line: one written half past the caches and half through them costs a read.
  FASTLLM_INLINE int64_t head() const {
    if (!streaming) return 0;
    return static_cast<int64_t>((-reinterpret_cast<uintptr_t>(to) & 63) / sizeof(T));
  }
};

// to[i] = value(i, lanes) over a row, or value(i, fewer) at its ends; with kPairs pair(i) for 2 lanes items from i on.
template <bool kPairs, class T, class F, class P>
FASTLLM_INLINE void write_row(Sink<T> sink, int64_t n, F value, P pair) {
  constexpr int w = lanes<T>;
  int64_t i = sink.head();
  if (i > n) i = n;
  for (int64_t j = 0; j < i; j += w) {
    const int64_t size = i - j < w ? i - j : w;
    store_partial(sink.to + j, value(j, size), size);
  }
  if constexpr (kPairs)
    for (; i + 2 * w <= n; i += 2 * w) sink.put_pair(i, pair(i));
  else
    for (; i + w <= n; i += w) sink.put(i, value(i, static_cast<int64_t>(w)));
  for (; i < n; i += w) {
    const int64_t size = n - i < w ? n - i : w;
    store_partial(sink.to + i, value(i, size), size);
  }
}

template <class A>
FASTLLM_INLINE A with_plain_nan(A x) {
  return x != x ? std::numeric_limits<A>::quiet_NaN() : x;
}

}  // namespace
}  // namespace fastllm::cpu
