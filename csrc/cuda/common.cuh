// Shared by all kernels: accumulators, reductions, tails of unaligned rows, the launch.
#pragma once
#include <limits>

#include "primitives.cuh"

namespace fastllm::cuda {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;  // in which sums of T are kept

constexpr int kWarp = 32;
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));  // items of a 16-byte access

template <class T>
FASTLLM_DEVICE Acc<T> load_acc(const T* p) {
  return widen(load(p));
}

template <class A>
constexpr A kLog2E = static_cast<A>(1.442695040888963407359924681001892137L);
// e^x. The product's rounding costs |x| 2^-24 of relative error: subtract a maximum first.
template <class A>
FASTLLM_DEVICE A exp_fast(A x) {
  return exp2_fast(x * kLog2E<A>);
}

// --- reductions, in a fixed order -------------------------------------------------------------------------------

struct Sum {
  template <class A>
  FASTLLM_DEVICE A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {  // NaN is dropped: sums carry it
  template <class A>
  FASTLLM_DEVICE A operator()(A a, A b) const {
    return a > b ? a : b;
  }
};

template <class A, class Op>
FASTLLM_DEVICE A reduce_warp(A value, Op op) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = op(value, shuffle_xor(value, lanes));
  return value;
}

// For every thread of the block; `scratch` (32 items) is shared memory that no one reads before the next barrier.
// blockDim.x is a multiple of 32, the block has one dimension. Every thread must come here.
template <class A, class Op>
FASTLLM_DEVICE A reduce_block(A value, A identity, Op op, A* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = reduce_warp(value, op);
  if (lane == 0) scratch[warp] = value;
  sync_block();
  value = reduce_warp(lane < warps ? scratch[lane] : identity, op);
  sync_block();
  return value;
}

// --- rows that start anywhere -----------------------------------------------------------------------------------

// Items from p to the next 16-byte boundary.
template <class T>
FASTLLM_DEVICE int64_t items_to_boundary(const T* p) {
  return static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
}

// --- launch -----------------------------------------------------------------------------------------------------

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks of a cluster; more than 1 needs sm_90
};

// Runs kernel(args...); an empty grid runs nothing. Blocks lie along x.
template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), const Shape& shape, [[maybe_unused]] Stream stream, Args... args) {
  if (shape.blocks == 0) return 0;
#ifndef __CUDACC__
  return cuda_host::run(shape.blocks, shape.threads, shape.shared, shape.cluster,
                        [&] { kernel(static_cast<Params>(args)...); });
#else
  if (shape.blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.shared > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
    if (status != cudaSuccess) return status;
  }
  if (shape.cluster > 8) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastllm::cuda
