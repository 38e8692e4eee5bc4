// Products by cuBLASLt with bias and ReLU in their epilogue. The library is the one that PyTorch has loaded, found at
// run time: nothing is linked against it and none of its headers is needed.
#pragma once
#include "gemm.h"

namespace fastllm::cuda {

constexpr int64_t kCublasLtWorkspace = int64_t{32} << 20;  // bytes

#ifdef FASTLLM_CUDA_HOST
inline bool cublaslt_available() { return false; }
inline Status cublaslt_linear_relu(const Product&, void*, Stream) { return 1; }
inline const char* cublaslt_status_text(Status) { return "no cuBLASLt"; }
#else
bool cublaslt_available();
// c = relu(a b^T + bias), b turned. The status is CUDA's, or 1000 and more where it is cuBLASLt's.
// The first call of a shape asks for an algorithm; with FASTLLM_AUTOTUNE=1 it times eight and waits for the device,
// unless the stream is being captured.
Status cublaslt_linear_relu(const Product& product, void* workspace, Stream stream);
const char* cublaslt_status_text(Status status);
#endif

}  // namespace fastllm::cuda
