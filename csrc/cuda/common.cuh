// Shared by all kernels: accumulators, reductions, tails of unaligned rows, the launch.
#pragma once
#include <atomic>
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
    return greater_of(a, b);
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

// The largest power of two, at most 16, that divides how far rows of `other` lie from rows of `p`, in bytes.
inline int common_width(const void* p, int64_t p_bytes, const void* other, int64_t other_bytes) {
  const uint64_t apart = (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(other)) |
                         static_cast<uint64_t>(p_bytes - other_bytes) | 16;
  return static_cast<int>(apart & -apart);
}

// --- launch -----------------------------------------------------------------------------------------------------

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks of a cluster; more than 1 needs sm_90
};

#ifdef __CUDACC__
// A failure that is returned must not stay behind as the runtime's last error: PyTorch would report it after its own
// next kernel.
inline Status returned(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// What a kernel must be allowed before it runs in this shape.
template <class Kernel>
cudaError_t allow_shape(Kernel kernel, const Shape& shape) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  constexpr int kClusterWithoutAsking = 8;
  cudaError_t status = cudaSuccess;
  if (shape.shared > kSharedWithoutAsking)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
  if (status == cudaSuccess && shape.cluster > kClusterWithoutAsking)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

// `attribute` must outlive the result.
inline cudaLaunchConfig_t config_of(const Shape& shape, cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.attrs = attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return config;
}
#endif

// Whether the current device has room for one cluster of this shape. The hardware places a cluster within a group of
// multiprocessors, which is small on a part of a GPU (MIG). The device is asked once.
template <auto kernel>
bool cluster_fits(const Shape& shape) {
#ifndef __CUDACC__
  return shape.cluster <= cuda_host::largest_cluster();
#else
  constexpr int kDevices = 64, kClusters = 32;  // whose answers are kept
  enum : signed char { kUnknown, kFits, kDoesNotFit };
  static std::atomic<signed char> answers[kDevices][kClusters];
  int device = 0, clusters = 0;
  if (returned(cudaGetDevice(&device)) != cudaSuccess) return false;
  std::atomic<signed char>* answer =
      device < kDevices && shape.cluster < kClusters ? &answers[device][shape.cluster] : nullptr;
  if (answer != nullptr && *answer != kUnknown) return *answer == kFits;
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = config_of(shape, &attribute);
  cudaError_t status = allow_shape(kernel, shape);
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  const bool fits = returned(status) == cudaSuccess && clusters > 0;
  if (answer != nullptr) *answer = fits ? kFits : kDoesNotFit;
  return fits;
#endif
}

// Runs kernel(args...); an empty grid runs nothing. Blocks lie along x.
template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), const Shape& shape, [[maybe_unused]] Stream stream, Args... args) {
  if (shape.blocks == 0) return 0;
#ifndef __CUDACC__
  return cuda_host::run(shape.blocks, shape.threads, shape.shared, shape.cluster,
                        [&] { kernel(static_cast<Params>(args)...); });
#else
  if (shape.blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shape(kernel, shape);
  if (status != cudaSuccess) return returned(status);
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config = config_of(shape, &attribute);
  config.stream = stream;
  return returned(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastllm::cuda
