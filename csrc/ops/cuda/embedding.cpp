// embedding on CUDA: the plain operations of the backend `cuda`. Kernels: csrc/cuda/embedding.cu.
#include "../../cuda/embedding.h"

#include "call.h"
#include "checks.h"

namespace fastllm::cuda {
namespace {

constexpr int64_t kMax = (int64_t{1} << 31) - 1;  // positions and rows are sorted as 32-bit numbers

void check_range(const Tensor& ids, int64_t rows) {
  check_indices("embedding", "input must hold ids in [0, " + std::to_string(rows) + "), the rows of weight", ids, rows,
                std::nullopt);
}

Tensor forward(const Tensor& weight, const Tensor& input) {
  const Call call("embedding", weight);
  const Tensor ids = input.contiguous(), table = weight.contiguous();
  check_range(ids, table.size(0));
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(table.size(1));
  const Tensor output = call.empty(shape, table.scalar_type());
  call.check(embedding_forward({call.in(table), call.in(ids), ids.scalar_type() == at::kInt, call.out(output),
                                ids.numel(), table.size(0), table.size(1) * table.element_size()},
                               call.stream()));
  return output;
}

Tensor backward(const Tensor& grad_output, const Tensor& input, int64_t rows, int64_t padding_idx,
                bool scale_grad_by_freq) {
  const Call call("embedding_backward", grad_output);
  const int64_t count = input.numel(), features = grad_output.size(-1);
  TORCH_CHECK(count <= kMax && rows <= kMax, "embedding_backward: input and weight must have fewer than 2^31 ids and ",
              "rows, got ", count, " and ", rows);
  const Tensor ids = input.contiguous(), from = grad_output.contiguous();
  check_range(ids, rows);
  const Tensor grad = call.empty({rows, features}, from.scalar_type());
  if (grad.numel() == 0) return grad;
  size_t sorting_bytes = 0;
  if (count > 0) call.check(embedding_sorting_bytes(count, rows, &sorting_bytes));
  const Tensor pairs = call.empty({4 * count}, at::kInt);
  const Tensor partial = call.empty({embedding_partials(count, features)}, acc_dtype(from.scalar_type()));
  const Tensor sorting = call.empty({static_cast<int64_t>(sorting_bytes)}, at::kByte);
  call.check(
      embedding_backward({dtype_tag(from), call.in(from), call.in(ids), ids.scalar_type() == at::kInt, count, rows,
                          features, padding_idx, scale_grad_by_freq, call.out(grad),
                          static_cast<uint32_t*>(call.out(pairs)), call.out(partial), call.out(sorting), sorting_bytes},
                         call.stream()));
  return grad;
}

TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_KEY, m) {
  m.impl("embedding_forward", forward);
  m.impl("embedding_backward", backward);
}

}  // namespace
}  // namespace fastllm::cuda
