#include "gemm.cuh"
namespace fastllm::cuda {
bool gemm_wgmma_runs() { return false; }
bool gemm_wgmma_serves(const Product&) { return false; }
Status gemm_wgmma(const Product&, Stream) { return 1; }
}  // namespace fastllm::cuda
