// Vectors of the widest register of the instruction set being compiled, written with the compiler's vector extension so
// that one source serves AVX-512 (16 floats), AVX2 (8) and the base line (4).
//
// vec<float> accumulates float, bfloat16 and float16; vec<double> accumulates double. load<T>/store<T> convert: the
// only rounding is the one at the store (to nearest, ties to even).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "types.h"
#ifdef FASTLLM_X86
#include <immintrin.h>
#endif

#define FASTLLM_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define FASTLLM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTLLM_VECTOR_BYTES 32
#else
#define FASTLLM_VECTOR_BYTES 16
#endif

namespace fastllm::cpu {
namespace {  // internal linkage: a copy per instruction set, never merged by the linker

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kVectorBytes = FASTLLM_VECTOR_BYTES;
typedef float vec_f32 __attribute__((vector_size(kVectorBytes)));
typedef double vec_f64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t vec_i32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vec_u32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t vec_i64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vec_u16 __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
using vec = std::conditional_t<std::is_same_v<A, double>, vec_f64, vec_f32>;
template <class A>
using mask = std::conditional_t<std::is_same_v<A, double>, vec_i64, vec_i32>;
// Lanes of the accumulator of storage type T.
template <class T>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(acc_t<T>));

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class A>
FASTLLM_INLINE vec<A> splat(A value) {
  return value - vec<A>{};
}

// --- scalar conversions -----------------------------------------------------------------------------------------

FASTLLM_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FASTLLM_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

FASTLLM_INLINE float to_acc(float x) { return x; }
FASTLLM_INLINE double to_acc(double x) { return x; }
FASTLLM_INLINE float to_acc(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
FASTLLM_INLINE float to_acc(f16 x) {
  // Exponent and mantissa shifted into place, then re-biased by an exact multiplication: right for subnormals too.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t bits = float_to_bits(bits_to_float(rest) * 0x1p112f);
  if ((x.bits & 0x7c00u) == 0x7c00u) bits = rest | 0x7f800000u;
  return bits_to_float(bits | sign);
}

template <class T>
FASTLLM_INLINE T from_acc(acc_t<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
    const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000u;
    const uint32_t bits = float_to_bits(x) & 0x7fffffffu;
    uint32_t half;
    if (bits > 0x7f800000u) {
      half = 0x7e00u;  // NaN
    } else if (bits >= 0x477ff000u) {
      half = 0x7c00u;  // rounds to infinity
    } else if (bits < 0x38800000u) {
      // Subnormal: adding 0.5 makes the float unit round to a multiple of 2^-24.
      half = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u;
    } else {
      half = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
    }
    return f16{static_cast<uint16_t>(half | sign)};
  } else {
    return x;
  }
}

// --- loads and stores -------------------------------------------------------------------------------------------

template <class T>
FASTLLM_INLINE vec<acc_t<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, bf16>) {
    vec_u16 h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<vec_f32>(__builtin_convertvector(h, vec_u32) << 16);
  } else {
#if defined(__AVX512F__)
    return reinterpret_cast<vec_f32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<vec_f32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    vec_f32 v;
    for (int i = 0; i < lanes<f16>; ++i) v[i] = to_acc(p[i]);
    return v;
#endif
  }
}

FASTLLM_INLINE vec_u16 to_bf16(vec_f32 v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vec_u16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));  // subnormals become 0
#endif
  const vec_u32 bits = reinterpret_cast<vec_u32>(v);
  const vec_u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vec_u32 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? quiet : rounded, vec_u16);
}

template <class T>
FASTLLM_INLINE void store(T* p, vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    std::memcpy(p, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, bf16>) {
    const vec_u16 h = to_bf16(v);
    std::memcpy(p, &h, sizeof h);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
    for (int i = 0; i < lanes<f16>; ++i) p[i] = from_acc<f16>(v[i]);
#endif
  }
}

// The first n <= lanes items; the other lanes hold `fill`. Nothing beyond them is read.
template <class T>
FASTLLM_INLINE vec<acc_t<T>> load_partial(const T* p, int64_t n, acc_t<T> fill) {
#if defined(__AVX512F__)
  const auto bits = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<vec_f32>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), bits, p));
  } else if constexpr (std::is_same_v<T, bf16>) {
    const __m512i h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(bits, p));
    const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
    return reinterpret_cast<vec_f32>(_mm512_mask_blend_ps(bits, _mm512_set1_ps(fill), v));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i bits = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    const __m256 v = _mm256_maskload_ps(p, bits);
    return reinterpret_cast<vec_f32>(_mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(bits)));
  }
#endif
  T buffer[lanes<T>];
  const T padding = from_acc<T>(fill);
  for (int i = 0; i < lanes<T>; ++i) buffer[i] = padding;
  for (int i = 0; i < lanes<T>; ++i)
    if (i < n) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
FASTLLM_INLINE void store_partial(T* p, vec<acc_t<T>> v, int64_t n) {
#if defined(__AVX512F__)
  const auto bits = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, bits, reinterpret_cast<__m512>(v));
    return;
  } else if constexpr (std::is_same_v<T, bf16>) {
    _mm256_mask_storeu_epi16(p, bits, reinterpret_cast<__m256i>(to_bf16(v)));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {  // by halves: a masked store takes tens of cycles on AMD's processors
    const __m256 whole = reinterpret_cast<__m256>(v);
    if (n == 8) {
      _mm256_storeu_ps(p, whole);
      return;
    }
    __m128 rest = _mm256_castps256_ps128(whole);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      p += 4;
      rest = _mm256_extractf128_ps(whole, 1);
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      p += 2;
      rest = _mm_movehl_ps(rest, rest);
    }
    if (n & 1) _mm_store_ss(p, rest);
    return;
  }
#endif
  T buffer[lanes<T>];
  store(buffer, v);
  for (int i = 0; i < lanes<T>; ++i)
    if (i < n) p[i] = buffer[i];
}

// A whole vector, or the first `n` lanes of one; lanes that are not loaded are 0.
template <class T>
FASTLLM_INLINE vec<acc_t<T>> load_some(const T* p, int64_t n) {
  return n == lanes<T> ? load(p) : load_partial(p, n, acc_t<T>(0));
}
template <class T>
FASTLLM_INLINE void store_some(T* p, vec<acc_t<T>> v, int64_t n) {
  if (n == lanes<T>)
    store(p, v);
  else
    store_partial(p, v, n);
}

// --- arithmetic -------------------------------------------------------------------------------------------------

// b where either is NaN: keep NaN by a sum beside it.
template <class V>
FASTLLM_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vec_f32>)
    return reinterpret_cast<V>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, vec_f32>)
    return reinterpret_cast<V>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#endif
  return a > b ? a : b;
}

// Folds the lanes by halves, a fixed order.
template <class V, class F>
FASTLLM_INLINE auto fold(V v, F f) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vec_f32>) {
    const __m512 x = reinterpret_cast<__m512>(v);
    const V a = f(v, reinterpret_cast<V>(_mm512_shuffle_f32x4(x, x, 0x4e)));
    const V b =
        f(a, reinterpret_cast<V>(_mm512_shuffle_f32x4(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(a), 0xb1)));
    const V c = f(b, reinterpret_cast<V>(_mm512_permute_ps(reinterpret_cast<__m512>(b), 0x4e)));
    const V d = f(c, reinterpret_cast<V>(_mm512_permute_ps(reinterpret_cast<__m512>(c), 0xb1)));
    return d[0];
  }
#endif
  std::remove_cvref_t<decltype(v[0])> a[n];
  std::memcpy(a, &v, sizeof v);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = f(a[i], a[i + width]);
  return a[0];
}

template <class V>
FASTLLM_INLINE auto reduce_add(V v) {
  return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class V>
FASTLLM_INLINE auto reduce_max(V v) {
  return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// exp(x) for x <= 0 or barely above (a logit less its row's maximum or log-sum-exp), where nothing can overflow.
// Relative error below one unit in the last place on [-87.3, 0]; 0 at -104 and below, without AVX-512 at -87.7; NaN
// stays NaN.
//
// x = n ln2 + r with |r| <= ln2/2 (ln2 in two parts); exp(r) = 1 + r (1 + r q(r)), q of degree 4 fitted to least
// relative error (3.6e-9); 2^n by the exponent field.
constexpr float kLowest = kVectorBytes == 64 ? -104.0f : -88.0f;  // -88: n = -127, whose exponent field is 0
constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits

// y 2^n, of shifted = n + kMagic.
FASTLLM_INLINE vec_f32 times_power_of_two(vec_f32 y, vec_f32 n, vec_f32 shifted) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec_f32>(_mm512_scalef_ps(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n)));
#else
  return y * reinterpret_cast<vec_f32>(reinterpret_cast<vec_u32>(shifted) << 23);
#endif
}

FASTLLM_INLINE vec_f32 exp_nonpositive(vec_f32 x) {
  const vec_f32 clamped = max(splat(kLowest), x);
  const vec_f32 shifted = clamped * 1.44269504f + kMagic;
  const vec_f32 n = shifted - kMagic;
  const vec_f32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vec_f32 q = splat(1.3814539e-3f);
  q = q * r + 8.3687450e-3f;
  q = q * r + 4.1668390e-2f;
  q = q * r + 1.6666521e-1f;
  q = q * r + 4.9999994e-1f;
  q = q * r + 1.0f;
  return times_power_of_two(q * r + 1.0f, n, shifted);
}

// The same to 2.8e-6 + 1.4e-8 |x|, for results that are rounded to 11 bits or fewer; exact at 0. With r = x / ln2 - n
// (one rounding where the product is fused, so that only the constant's error grows with x), exp(x) = 2^n 2^r.
FASTLLM_INLINE vec_f32 exp_nonpositive_coarse(vec_f32 x) {
#if defined(__FMA__)
  const vec_f32 clamped = max(splat(kLowest), x);
  const vec_f32 shifted = clamped * 1.44269504f + kMagic;
  const vec_f32 n = shifted - kMagic;
  const vec_f32 r = clamped * 1.44269504f - n;
  vec_f32 q = splat(9.5828073e-3f);
  q = q * r + 5.5906899e-2f;
  q = q * r + 2.4024102e-1f;
  q = q * r + 6.9312412e-1f;
  return times_power_of_two(q * r + 1.0f, n, shifted);
#else
  return exp_nonpositive(x);
#endif
}

FASTLLM_INLINE vec_f64 exp_nonpositive(vec_f64 x) {
  vec_f64 y;
  for (int i = 0; i < lanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

template <class V>
FASTLLM_INLINE V magnitude(V x) {
  using Bits = std::conditional_t<std::is_same_v<V, vec_f64>, vec_i64, vec_i32>;
  return reinterpret_cast<V>(reinterpret_cast<Bits>(x) & (reinterpret_cast<Bits>(-V{}) ^ -1));
}

// tanh x = (1 - e) / (1 + e) with e = exp(-2 |x|), and the sign of x; below 1/2, where that cancels, x + x^3 p(x^2), p
// of degree 4 fitted to least relative error (4.2e-9). NaN stays NaN.
FASTLLM_INLINE vec_f32 tanh_of(vec_f32 x) {
  const vec_f32 size = magnitude(x), e = exp_nonpositive(-2.0f * size), quotient = (1.0f - e) / (1.0f + e);
  const vec_f32 far = x < 0.0f ? -quotient : quotient;
  const vec_f32 square = x * x;
  vec_f32 p = splat(-6.6474816e-3f);
  p = p * square + 2.1297988e-2f;
  p = p * square - 5.3899191e-2f;
  p = p * square + 1.3332964e-1f;
  p = p * square - 3.3333328e-1f;
  return size < 0.5f ? x + x * square * p : far;
}

FASTLLM_INLINE vec_f64 tanh_of(vec_f64 x) {
  vec_f64 y;
  for (int i = 0; i < lanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

// exp as precise as results of storage type T can show.
template <class T>
FASTLLM_INLINE vec<acc_t<T>> exp_of(vec<acc_t<T>> x) {
  if constexpr (sizeof(T) == 2)
    return exp_nonpositive_coarse(x);
  else
    return exp_nonpositive(x);
}

// Items 2i and 2i + 1 of bfloat16 in lane i of two vectors: a shift and a mask unpack them, where lanes in order cost a
// shuffle each way. Where an instruction rounds to bfloat16 (its result is in order), this gains nothing.
struct Pair {
  vec_f32 even, odd;
};
template <class T>
#if defined(__AVX512BF16__)
constexpr bool in_pairs = false;
#else
constexpr bool in_pairs = std::is_same_v<T, bf16>;
#endif

FASTLLM_INLINE Pair load_pair(const bf16* p) {
  vec_u32 bits;
  std::memcpy(&bits, p, sizeof bits);
  return {reinterpret_cast<vec_f32>(bits << 16), reinterpret_cast<vec_f32>(bits & 0xffff0000u)};
}

// Rounded, both. A NaN must end in 16 zero bits, as those do that the processor makes or bfloat16 held.
FASTLLM_INLINE vec_u32 pack_pair(Pair v) {
  const vec_u32 even = reinterpret_cast<vec_u32>(v.even), odd = reinterpret_cast<vec_u32>(v.odd);
  const vec_u32 low = (even + (((even >> 16) & 1u) + 0x7fffu)) >> 16;
  return low | ((odd + (((odd >> 16) & 1u) + 0x7fffu)) & 0xffff0000u);
}

// A store past the caches, for lines that nothing reads again soon: it saves the read that an ordinary store begins
// with. p is aligned to the stored vector; stream_fence() must follow before another thread reads.
template <class T>
FASTLLM_INLINE void stream(T* p, vec<acc_t<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) >= 4) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
  } else if constexpr (std::is_same_v<T, bf16>) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(to_bf16(v)));
  } else {
    store(p, v);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
  } else if constexpr (std::is_same_v<T, bf16>) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(to_bf16(v)));
  } else {
    store(p, v);
  }
#else
  store(p, v);
#endif
}

FASTLLM_INLINE void stream_pair(bf16* p, vec_u32 v) {
  stream(reinterpret_cast<float*>(p), reinterpret_cast<vec_f32>(v));
}

FASTLLM_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Bytes to which stream() wants its address aligned, for storage type T.
template <class T>
constexpr int stream_alignment = static_cast<int>(sizeof(T)) * lanes<T>;

}  // namespace
}  // namespace fastllm::cpu
