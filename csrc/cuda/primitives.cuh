// The instructions that kernels use by name: memory access, warp and cluster exchange, fast exponentials.
//
// Kernels reach global memory through load and store alone. The host build (tests/cuda_host) gives every function here
// a plain form that checks bounds and alignment, and plays warps and clusters.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace fastllm::cuda {

// 16 bytes of items as they lie in memory, in 32-bit registers: items of 16 bits are compared, widened and rounded two
// at a time, and never moved apart.
struct alignas(16) Words {
  unsigned word[4];
};
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));  // items of 16 bytes

}  // namespace fastllm::cuda

#ifndef __CUDACC__
#include "host_primitives.h"
#else
#undef NDEBUG  // an index out of range must stop the kernel
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

namespace fastllm::cuda {

#define FASTLLM_DEVICE __device__ __forceinline__
#define FASTLLM_DEVICE_ASSERT(condition, message) assert((condition) && message)

constexpr unsigned kFullWarp = 0xffffffffu;

// --- memory -----------------------------------------------------------------------------------------------------

template <class T>
FASTLLM_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
FASTLLM_DEVICE void store(T* p, T value) {
  *p = value;
}

// N items at once: 16 bytes or fewer, aligned to their size. Streaming accesses pass the caches first: data that is
// touched once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T items[N];
};

template <int Bytes>
struct RawOf;
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<4> {
  using type = unsigned;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};
template <class V>
using Raw = typename RawOf<sizeof(V)>::type;

template <int N, class T>
FASTLLM_DEVICE Vec<T, N> load_vec(const T* p) {
  const Raw<Vec<T, N> > raw = *reinterpret_cast<const Raw<Vec<T, N> >*>(p);
  return reinterpret_cast<const Vec<T, N>&>(raw);
}
template <int N, class T>
FASTLLM_DEVICE Vec<T, N> load_vec_streaming(const T* p) {
  const Raw<Vec<T, N> > raw = __ldcs(reinterpret_cast<const Raw<Vec<T, N> >*>(p));
  return reinterpret_cast<const Vec<T, N>&>(raw);
}
template <int N, class T>
FASTLLM_DEVICE void store_vec(T* p, const Vec<T, N>& value) {
  *reinterpret_cast<Raw<Vec<T, N> >*>(p) = reinterpret_cast<const Raw<Vec<T, N> >&>(value);
}
template <int N, class T>
FASTLLM_DEVICE void store_vec_streaming(T* p, const Vec<T, N>& value) {
  __stcs(reinterpret_cast<Raw<Vec<T, N> >*>(p), reinterpret_cast<const Raw<Vec<T, N> >&>(value));
}
// To global memory and, what the compiler does not promise of store_vec, as one instruction: for results that the next
// kernel reads.
template <int N, class T>
FASTLLM_DEVICE void store_vec_cached(T* p, const Vec<T, N>& value) {
  const auto& raw = reinterpret_cast<const Raw<Vec<T, N> >&>(value);
  if constexpr (sizeof(raw) == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
  else if constexpr (sizeof(raw) == 8)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(raw.x), "r"(raw.y)
                 : "memory");
  else
    *reinterpret_cast<Raw<Vec<T, N> >*>(p) = raw;
}

// The block's dynamic shared memory; kernels have no other.
FASTLLM_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char fastllm_shared[];
  return fastllm_shared;
}

// --- numbers ----------------------------------------------------------------------------------------------------

FASTLLM_DEVICE float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
FASTLLM_DEVICE float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
FASTLLM_DEVICE float widen(float x) { return x; }
FASTLLM_DEVICE double widen(double x) { return x; }

template <class T>
FASTLLM_DEVICE T narrow(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, f16>)
    return f16{__half_as_ushort(__float2half_rn(x))};
  else
    return static_cast<T>(x);
}
template <class T>
FASTLLM_DEVICE T narrow(double x) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16{__bfloat16_as_ushort(__double2bfloat16(x))};
  else if constexpr (std::is_same_v<T, f16>)
    return f16{__half_as_ushort(__double2half(x))};
  else
    return static_cast<T>(x);
}

// Words: float32, bfloat16 and float16.
template <class T>
FASTLLM_DEVICE Words load_words_streaming(const T* p) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
  return {{raw.x, raw.y, raw.z, raw.w}};
}
template <class T>
FASTLLM_DEVICE void widen_words(const Words& x, float (&z)[kVec<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, bf16>) {
      z[2 * i] = __uint_as_float(x.word[i] << 16);
      z[2 * i + 1] = __uint_as_float(x.word[i] & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, f16>) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(x.word[i]));
      z[2 * i] = pair.x;
      z[2 * i + 1] = pair.y;
    } else {
      z[i] = __uint_as_float(x.word[i]);
    }
  }
}
template <class V>
FASTLLM_DEVICE Words words_of(const V& group) {
  static_assert(sizeof(V) == sizeof(Words));
  return reinterpret_cast<const Words&>(group);
}
// Item by item; a NaN gives way to the other number.
template <class T>
FASTLLM_DEVICE unsigned greater_of_words(unsigned a, unsigned b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 high =
        __hmax2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const unsigned&>(high);
  } else if constexpr (std::is_same_v<T, f16>) {
    const __half2 high = __hmax2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const unsigned&>(high);
  } else {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
}
template <class T, int N, class A>
FASTLLM_DEVICE Vec<T, N> narrow_items(const A (&x)[N]) {
  Vec<T, N> items;
  if constexpr (sizeof(T) == 2 && N % 2 == 0 && std::is_same_v<A, float>) {
    unsigned (&words)[N / 2] = reinterpret_cast<unsigned (&)[N / 2]>(items);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = reinterpret_cast<const unsigned&>(pair);
      } else {
        const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        words[i] = reinterpret_cast<const unsigned&>(pair);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) items.items[i] = narrow<T>(x[i]);
  }
  return items;
}

// 2^x: one instruction in float32, relative error 2^-22.
FASTLLM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTLLM_DEVICE double exp2_fast(double x) { return exp2(x); }

// A product that is rounded: no addition is fused with it.
FASTLLM_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
FASTLLM_DEVICE double times(double a, double b) { return __dmul_rn(a, b); }

// The greater; a NaN gives way to the other number.
FASTLLM_DEVICE float greater_of(float a, float b) { return fmaxf(a, b); }
FASTLLM_DEVICE double greater_of(double a, double b) { return fmax(a, b); }

// The greater, the lesser; NaN where one of the two is.
FASTLLM_DEVICE float greater_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FASTLLM_DEVICE float lesser_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FASTLLM_DEVICE double greater_or_nan(double a, double b) { return a > b || a != a ? a : b; }
FASTLLM_DEVICE double lesser_or_nan(double a, double b) { return a < b || a != a ? a : b; }

// --- threads ----------------------------------------------------------------------------------------------------

FASTLLM_DEVICE void sync_block() { __syncthreads(); }
FASTLLM_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
FASTLLM_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kFullWarp, value, lanes);
}
template <class T>
FASTLLM_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}
template <class T>
FASTLLM_DEVICE T shuffle_up(T value, int lanes) {
  return __shfl_up_sync(kFullWarp, value, lanes);
}
FASTLLM_DEVICE unsigned ballot(bool vote) { return __ballot_sync(kFullWarp, vote); }
FASTLLM_DEVICE int count_bits(unsigned mask) { return __popc(mask); }

// --- clusters of blocks (sm_90 and newer) -----------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
FASTLLM_DEVICE int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Every thread of every block of the cluster; orders their shared-memory accesses.
FASTLLM_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// A barrier in two halves that orders no memory: whoever has waited knows that all blocks of the cluster run, so that
// their shared memory may be written. One after the other, and no sync_cluster between.
FASTLLM_DEVICE void announce_to_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
FASTLLM_DEVICE void await_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
// Where the shared memory of block `rank` holds what `p` is in this block's.
template <class T>
FASTLLM_DEVICE T* map_shared(T* p, int rank) {
  T* mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return mapped;
}
#else
FASTLLM_DEVICE int cluster_rank() { return 0; }
FASTLLM_DEVICE void sync_cluster() { __syncthreads(); }
FASTLLM_DEVICE void announce_to_cluster() {}
FASTLLM_DEVICE void await_cluster() {}
template <class T>
FASTLLM_DEVICE T* map_shared(T* p, int) {
  return p;
}
#endif

}  // namespace fastllm::cuda
#endif
