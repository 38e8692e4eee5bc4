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

template <class T>
FASTLLM_INLINE void store(T* p, vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    std::memcpy(p, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, bf16>) {
    const vec_u32 bits = reinterpret_cast<vec_u32>(v);
    const vec_u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vec_u32 quiet = (bits >> 16) | 0x40u;
    const vec_u16 h = __builtin_convertvector(v != v ? quiet : rounded, vec_u16);
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

// The first n < lanes items; the other lanes hold `fill`. Nothing beyond them is read.
template <class T>
FASTLLM_INLINE vec<acc_t<T>> load_partial(const T* p, int64_t n, acc_t<T> fill) {
  T buffer[lanes<T>];
  const T padding = from_acc<T>(fill);
  for (int i = 0; i < lanes<T>; ++i) buffer[i] = padding;
  for (int i = 0; i < lanes<T>; ++i)
    if (i < n) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
FASTLLM_INLINE void store_partial(T* p, vec<acc_t<T>> v, int64_t n) {
  T buffer[lanes<T>];
  store(buffer, v);
  for (int i = 0; i < lanes<T>; ++i)
    if (i < n) p[i] = buffer[i];
}

// --- arithmetic -------------------------------------------------------------------------------------------------

template <class V>
FASTLLM_INLINE V max(V a, V b) {  // b where either is NaN or they are equal: keep NaN by a sum beside it
  return a > b ? a : b;
}

template <class V>
FASTLLM_INLINE auto reduce_add(V v) {  // fixed order
  constexpr int n = sizeof(V) / sizeof(v[0]);
  std::remove_cvref_t<decltype(v[0])> a[n];
  std::memcpy(a, &v, sizeof v);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

template <class V>
FASTLLM_INLINE auto reduce_max(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  std::remove_cvref_t<decltype(v[0])> a[n];
  std::memcpy(a, &v, sizeof v);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
}

// exp(x), relative error below 2 units in the last place on [-87.3, 88.3]; 0 below, inf above 88.73; NaN stays NaN.
// x = n ln2 + r with |r| <= ln2/2 (ln2 in two parts), exp(r) by its Taylor-like minimax polynomial of degree 6.
FASTLLM_INLINE vec_f32 exp(vec_f32 x) {
  const vec_f32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const vec_f32 clamped_low = x < -87.33654f ? splat(-87.33654f) : x;
  const vec_f32 clamped = clamped_low > 88.72283f ? splat(88.72283f) : clamped_low;
  const vec_f32 shifted = clamped * 1.44269504f + magic;
  const vec_f32 n = shifted - magic;
  const vec_f32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vec_f32 p = splat(1.98756915e-4f);
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345190e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000000e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors, so that n = 128 does not overflow the exponent field.
  const vec_i32 i = reinterpret_cast<vec_i32>(shifted) - 0x4b400000;
  const vec_i32 half = i >> 1;
  const vec_f32 a = reinterpret_cast<vec_f32>((half + 127) << 23);
  const vec_f32 b = reinterpret_cast<vec_f32>((i - half + 127) << 23);
  const vec_f32 y = p * a * b;
  const vec_f32 low = x < -87.33654f ? vec_f32{} : y;
  return x > 88.72283f ? splat(std::numeric_limits<float>::infinity()) : low;
}

FASTLLM_INLINE vec_f64 exp(vec_f64 x) {
  vec_f64 y;
  for (int i = 0; i < lanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

}  // namespace
}  // namespace fastllm::cpu
