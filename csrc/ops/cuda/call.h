// One call of CUDA launchers from the torch-facing layer: device guard, current stream, allocation, errors.
//
// FASTLLM_CUDA_HOST builds this layer, and the kernels, for CPU tensors (tests/cuda_host): tensors that a call passes
// on are then the only memory that its kernels may touch, and fresh ones hold NaN.
#pragma once
#include "../../cuda/launch.h"
#include "../common.h"
#ifdef FASTLLM_CUDA_HOST
#include <ATen/native/Resize.h>

#include <cstring>

#include "cuda_runtime.h"
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastllm::cuda {

#ifdef FASTLLM_CUDA_HOST
#define FASTLLM_CUDA_KEY CPU
#else
#define FASTLLM_CUDA_KEY CUDA
#endif

// fastllm.batch_invariant.
#ifdef FASTLLM_CUDA_HOST
inline bool batch_invariant() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastllm_mode::batch_invariant", "").typed<bool()>();
  return op.call();
}
#else
inline bool batch_invariant() { return backend::batch_invariant(); }
#endif

class Call {
 public:
  // A call of `op` on the device of `like`.
#ifdef FASTLLM_CUDA_HOST
  Call(const char* op, const Tensor& like) : op_(op), device_(like.device()) {}
  ~Call() { cuda_host::clear_ranges(); }
  Stream stream() const { return nullptr; }
#else
  Call(const char* op, const Tensor& like) : op_(op), device_(like.device()), guard_(like.device()) {}
  Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // A fresh tensor that kernels will write.
  Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return poisoned(at::empty(sizes, at::TensorOptions().dtype(dtype).device(device_)));
  }
  Tensor empty_like(const Tensor& t) const { return poisoned(at::empty_like(t)); }
  // What an operation returns where a gradient is not asked for.
  Tensor none(at::ScalarType dtype) const { return at::empty({0}, at::TensorOptions().dtype(dtype).device(device_)); }

  const void* in(const Tensor& t) const {
    if (!t.defined()) return nullptr;
    allow(t, false);
    return t.const_data_ptr();
  }
  const void* in(const OptionalTensor& t) const { return t.has_value() ? in(*t) : nullptr; }
  void* out(const Tensor& t) const {
    if (!t.defined()) return nullptr;
    allow(t, true);
    return t.mutable_data_ptr();
  }

  // RuntimeError unless a launcher's status is success.
  void check(Status status) const { TORCH_CHECK(status == 0, op_, ": CUDA error ", status, ": ", status_text(status)); }

 private:
#ifdef FASTLLM_CUDA_HOST
  static Tensor poisoned(Tensor t) {
    if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xff, t.storage().nbytes());
    return t;
  }
  static void allow(const Tensor& t, bool writable) {
    if (t.numel() == 0) return;
    const size_t bytes = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size());
    cuda_host::allow(t.const_data_ptr(), bytes, writable);
  }
#else
  static Tensor poisoned(Tensor t) { return t; }
  static void allow(const Tensor&, bool) {}
#endif

  const char* op_;
  c10::Device device_;
#ifndef FASTLLM_CUDA_HOST
  c10::cuda::CUDAGuard guard_;
#endif
};

}  // namespace fastllm::cuda
