// The plain form of csrc/cuda/primitives.cuh.
#pragma once
#include <cmath>
#include <cstring>

namespace fastllm::cuda {

#define FASTLLM_DEVICE inline
#define FASTLLM_DEVICE_ASSERT(condition, message) \
  if (!(condition)) ::cuda_host::fail("device-side assert: %s", message)

constexpr unsigned kFullWarp = 0xffffffffu;

// --- memory -----------------------------------------------------------------------------------------------------

template <class T>
T load(const T* p) {
  cuda_host::check_access(p, sizeof(T), alignof(T), false);
  return *p;
}
template <class T>
void store(T* p, T value) {
  cuda_host::check_access(p, sizeof(T), alignof(T), true);
  *p = value;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T items[N];
};

template <int N, class T>
Vec<T, N> load_vec(const T* p) {
  static_assert(sizeof(T) * N <= 16);
  cuda_host::check_access(p, sizeof(T) * N, sizeof(T) * N, false);
  Vec<T, N> value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}
template <int N, class T>
Vec<T, N> load_vec_streaming(const T* p) {
  return load_vec<N>(p);
}
template <int N, class T>
void store_vec(T* p, const Vec<T, N>& value) {
  static_assert(sizeof(T) * N <= 16);
  cuda_host::check_access(p, sizeof(T) * N, sizeof(T) * N, true);
  std::memcpy(p, &value, sizeof(value));
}
template <int N, class T>
void store_vec_streaming(T* p, const Vec<T, N>& value) {
  store_vec(p, value);
}
template <int N, class T>
void store_vec_cached(T* p, const Vec<T, N>& value) {
  store_vec(p, value);
}

inline char* shared_memory() { return cuda_host::shared_memory(); }

// --- numbers ----------------------------------------------------------------------------------------------------

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(bf16 x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) { return same_bits<_Float16>(x.bits); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// To nearest, ties to even.
inline bf16 round_to_bf16(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  if (std::isnan(x)) return bf16{0x7fff};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T, class A>
T narrow(A x) {
  if constexpr (std::is_same_v<T, bf16>)
    return round_to_bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, f16>)
    return f16{same_bits<uint16_t>(static_cast<_Float16>(x))};
  else
    return static_cast<T>(x);
}

template <class T>
Words load_words_streaming(const T* p) {
  return same_bits<Words>(load_vec<kVec<T>>(p));
}
template <class T>
void widen_words(const Words& x, float (&z)[kVec<T>]) {
  const auto items = same_bits<Vec<T, kVec<T>>>(x);
  for (int i = 0; i < kVec<T>; ++i) z[i] = widen(items.items[i]);
}
template <class V>
Words words_of(const V& group) {
  return same_bits<Words>(group);
}
template <class T>
unsigned greater_of_words(unsigned a, unsigned b) {
  constexpr int N = 4 / sizeof(T);
  auto high = same_bits<Vec<T, N>>(a);
  const auto other = same_bits<Vec<T, N>>(b);
  for (int i = 0; i < N; ++i) {
    const float x = widen(high.items[i]), y = widen(other.items[i]);
    if (std::isnan(x) || y > x) high.items[i] = other.items[i];
  }
  return same_bits<unsigned>(high);
}
template <class T, int N, class A>
Vec<T, N> narrow_items(const A (&x)[N]) {
  Vec<T, N> items;
  for (int i = 0; i < N; ++i) items.items[i] = narrow<T>(x[i]);
  return items;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline double exp2_fast(double x) { return std::exp2(x); }

template <class A>
A times(A a, A b) {
  A product = a * b;
  asm("" : "+x"(product));
  return product;
}

inline float greater_of(float a, float b) { return std::fmax(a, b); }
inline double greater_of(double a, double b) { return std::fmax(a, b); }
template <class A>
A greater_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}
template <class A>
A lesser_or_nan(A a, A b) {
  return a < b || a != a ? a : b;
}

// --- threads ----------------------------------------------------------------------------------------------------

inline void sync_block() { cuda_host::sync_block(); }
inline void sync_warp() { cuda_host::exchange(0); }

template <class T>
uint64_t as_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
inline int lane_of_thread() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
T shuffle(T value, int lane) {
  return from_word<T>(cuda_host::exchange(as_word(value))[lane & 31]);
}
template <class T>
T shuffle_xor(T value, int lanes) {
  return shuffle(value, lane_of_thread() ^ lanes);
}
template <class T>
T shuffle_up(T value, int lanes) {
  const int lane = lane_of_thread();
  return shuffle(value, lane < lanes ? lane : lane - lanes);
}
inline unsigned ballot(bool vote) {
  const uint64_t* votes = cuda_host::exchange(vote);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(votes[lane]) << lane;
  return mask;
}
inline int count_bits(unsigned mask) { return __builtin_popcount(mask); }

// --- clusters ---------------------------------------------------------------------------------------------------

inline int cluster_rank() { return cuda_host::cluster_rank(); }
inline void sync_cluster() { cuda_host::sync_cluster(); }
inline void announce_to_cluster() { cuda_host::announce_to_cluster(); }
inline void await_cluster() { cuda_host::await_cluster(); }
template <class T>
T* map_shared(T* p, int rank) {
  return static_cast<T*>(cuda_host::map_shared(p, rank));
}

}  // namespace fastllm::cuda
