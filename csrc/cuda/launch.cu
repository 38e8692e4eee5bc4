#include "launch.h"
#include "primitives.cuh"

namespace fastllm::cuda {

const char* status_text(Status status) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return status == 0 ? "no error" : cuda_host::last_failure();
#endif
}

}  // namespace fastllm::cuda
