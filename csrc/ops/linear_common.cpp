#include "linear_common.h"

#include <ATen/ExpandUtils.h>

#include "../cpu/linear_relu.h"
#include "../cpu/parallel.h"
#include "../cpu/row_product.h"
#include "gemm.h"

FASTLLM_DEFINE_DISPATCH(LinearReluKernels, linear_relu)
FASTLLM_DEFINE_DISPATCH(RowProductKernels, row_product)

namespace fastllm {

void check_linear(const char* op, const char* input_name, const Tensor& input, const char* weight_name,
                  const Tensor& weight, const char* bias_name, const OptionalTensor& bias) {
  check_given(op, input_name, input);
  check_given(op, weight_name, weight);
  TORCH_CHECK(input.dim() >= 1, op, ": ", input_name, " must have at least 1 dimension, got ", input.dim());
  TORCH_CHECK(weight.dim() == 2, op, ": ", weight_name, " must be 2-D (out_features, in_features), got ", weight.dim(),
              "-D ", weight.sym_sizes());
  TORCH_CHECK(input.sym_size(-1) == weight.sym_size(1), op, ": ", input_name, " must be of shape (*, ",
              weight.sym_size(1), ") for ", weight_name, " ", weight.sym_sizes(), ", got ", input.sym_sizes());
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), op, ": ", weight_name, " must have ", input_name,
              "'s dtype ", input.scalar_type(), ", got ", weight.scalar_type());
  TORCH_CHECK(input.device() == weight.device(), op, ": ", weight_name, " must be on ", input_name, "'s device ",
              input.device(), ", got ", weight.device());
  TORCH_CHECK(is_served_dtype(input.scalar_type()), op, ": ", input_name,
              " must be float32, float64, bfloat16 or float16, got ", input.scalar_type());
  if (!defined(bias)) return;
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": ", bias_name, " must be of shape (",
              weight.sym_size(0), ",), got ", bias->sym_sizes());
  TORCH_CHECK(bias->scalar_type() == input.scalar_type(), op, ": ", bias_name, " must have ", input_name, "'s dtype ",
              input.scalar_type(), ", got ", bias->scalar_type());
  TORCH_CHECK(bias->device() == input.device(), op, ": ", bias_name, " must be on ", input_name, "'s device ",
              input.device(), ", got ", bias->device());
}

bool broadcasts_bias(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!defined(bias) || !weight.defined() || !input.defined() || weight.dim() != 2 || input.dim() == 0) return false;
  if (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)) return false;
  std::vector<c10::SymInt> output = input.sym_sizes().vec();
  output.back() = weight.sym_size(0);
  return at::is_expandable_to(bias->sym_sizes(), output);
}

namespace {

// oneDNN adds the bias to the float32 sums of a bfloat16 product, before the only rounding. (Its ReLU makes 0 of NaN.)
OptionalTensor try_onednn_bf16(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!op.has_value() || input.scalar_type() != at::kBFloat16 || !onednn_serves_bf16()) return std::nullopt;
  static const auto call = op->typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
                                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>)>();
  return call.call(input.contiguous(), weight.contiguous(), bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

namespace {

// A matrix or, `turned`, its transpose, without the view that would say so.
struct Operand {
  const Tensor& matrix;
  bool turned;
  int64_t size(int64_t d) const { return matrix.size(turned ? 1 - d : d); }
  int64_t stride(int64_t d) const { return matrix.stride(turned ? 1 - d : d); }
};

void describe(cpu::Product* s, const Tensor& c, Operand a, Operand b, const Tensor& bias, bool relu) {
  s->dtype = dtype_tag(a.matrix);
  s->a = data(a.matrix);
  s->a_row = a.stride(0);
  s->a_inner = a.stride(1);
  s->b = data(b.matrix);
  s->b_inner = b.stride(0);
  s->b_column = b.size(1) > 1 ? b.stride(1) : 1;
  s->bias = bias.defined() ? data(bias) : nullptr;
  s->relu = relu;
  s->c = c.mutable_data_ptr();
  s->c_row = c.stride(0);
  s->c_column = c.size(1) > 1 ? c.stride(1) : 1;
  s->rows = a.size(0);
  s->inner = a.size(1);
  s->columns = b.size(1);
}

bool run_small(const Tensor& c, Operand a, Operand b, const Tensor& bias, bool relu, const Tensor& column_sums) {
  const bool turned = b.size(1) > 1 && b.stride(1) != 1;
  if (!cpu::is_small_product(a.size(0), a.size(1), b.size(1), turned)) return false;
  if (a.size(1) == 0 || c.numel() == 0) return false;  // the kernel visits no row: column_sums would stay as they are
  cpu::SmallProduct s{};
  describe(&s, c, a, b, bias, relu);
  s.column_sums = column_sums.defined() ? column_sums.mutable_data_ptr() : nullptr;
  cpu::linear_relu().small_product(s);
  return true;
}

}  // namespace

bool try_small_product(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& bias, bool relu,
                       const Tensor& column_sums) {
  return run_small(c, {a, false}, {b, false}, bias, relu, column_sums);
}

bool try_row_product(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& bias, bool relu) {
  if (!backend::batch_invariant()) return false;
  cpu::RowProduct s{};
  describe(&s, c, {a, false}, {b, false}, bias, relu);
  const Tensor workspace = pool::empty({num_threads() * cpu::row_product().workspace(s)}, at::kByte);
  s.workspace = workspace.mutable_data_ptr();
  cpu::row_product().multiply(s);
  return true;
}

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu) {
  const int64_t rows = input.size(0), columns = weight.size(0);
  const Tensor b = defined(bias) ? bias->contiguous() : Tensor();
  const DType dtype = dtype_tag(input);
  const auto& kernels = cpu::linear_relu();
  if (backend::batch_invariant()) {
    const Tensor y = pool::empty({rows, columns}, input.scalar_type());
    try_row_product(y, input, weight.t(), b, relu);
    return y;
  }
  if (!cpu::is_small_product(rows, input.size(1), columns, true)) {
    if (const OptionalTensor z = try_onednn_bf16(input, weight, bias)) {
      if (relu) kernels.bias_relu(dtype, z->mutable_data_ptr(), nullptr, rows, columns);
      return *z;
    }
  }
  const Tensor y = pool::empty({rows, columns}, input.scalar_type());
  if (y.numel() == 0 || run_small(y, {input, false}, {weight, true}, b, relu, Tensor())) return y;
  // float32 and float64 add the bias in the pass that takes the ReLU. bfloat16 and float16 would round before it: there
  // the product is added to rows that hold the bias already. Without ReLU that saves the pass, whatever the dtype.
  const bool late_bias = relu && (dtype == DType::kF32 || dtype == DType::kF64);
  const bool early_bias = b.defined() && !late_bias;
  if (early_bias) kernels.fill_rows(dtype, y.mutable_data_ptr(), data(b), rows, columns);
  gemm_out(y, input, weight.t(), early_bias ? 1 : 0);
  if (relu) kernels.bias_relu(dtype, y.mutable_data_ptr(), b.defined() && late_bias ? data(b) : nullptr, rows, columns);
  return y;
}

Tensor linear_definition(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  constexpr int64_t kRows = 128;
  if (!backend::batch_invariant() || input.dim() == 0 || weight.dim() != 2 ||
      input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || input.numel() == 0)
    return at::linear(input, weight, bias);
  const Tensor rows = as_rows(input);
  const int64_t n = rows.size(0), past = (kRows - n % kRows) % kRows;
  std::vector<Tensor> blocks = at::constant_pad_nd(rows, {0, 0, 0, past}).split(kRows);
  for (Tensor& block : blocks) block = at::linear(block, weight, bias);
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight.size(0);
  return at::cat(blocks).narrow(0, 0, n).reshape(shape);
}

MaskedGradient mask_gradient(const Tensor& dy, const OptionalTensor& y, bool need_bias, bool in_place) {
  const Tensor from = dy.contiguous();
  const int64_t rows = from.size(0), columns = from.size(1);
  const bool masked = defined(y);
  MaskedGradient result;
  result.dz = !masked || in_place ? from : pool::empty(from.sizes(), from.scalar_type());
  if (!masked && !need_bias) return result;
  const int64_t blocks = cpu::column_blocks(rows);
  const DType dtype = dtype_tag(from);
  Tensor partial;
  if (need_bias) partial = pool::empty({blocks, columns}, acc_dtype(from.scalar_type()));
  const Tensor output = masked ? y->contiguous() : Tensor();
  cpu::linear_relu().mask(dtype, data(from), masked ? data(output) : nullptr,
                          masked ? result.dz.mutable_data_ptr() : nullptr, rows, columns,
                          need_bias ? partial.mutable_data_ptr() : nullptr);
  if (need_bias) {
    result.bias = pool::empty({columns}, from.scalar_type());
    cpu::linear_relu().finish_sums(dtype, data(partial), blocks, columns, result.bias.mutable_data_ptr());
  }
  return result;
}

Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = pool::empty({a.size(0), b.size(1)}, a.scalar_type());
  if (out.numel() > 0 && !try_small_product(out, a, b, Tensor(), false)) gemm_out(out, a, b);
  return out;
}

void row_product_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.numel() == 0 || try_row_product(out, a, b, Tensor(), false)) return;
  if (!try_small_product(out, a, b, Tensor(), false)) gemm_out(out, a, b);
}

Tensor row_product(const Tensor& a, const Tensor& b) {
  const Tensor out = pool::empty({a.size(0), b.size(1)}, a.scalar_type());
  row_product_out(out, a, b);
  return out;
}

Tensor product_of_turned(const Tensor& a, const Tensor& b) {
  const Tensor out = pool::empty({a.size(1), b.size(1)}, a.scalar_type());
  if (out.numel() == 0 || run_small(out, {a, true}, {b, false}, Tensor(), false, Tensor())) return out;
  gemm_out(out, a.t(), b);
  return out;
}

Tensor as_rows(const Tensor& input) {
  if (input.dim() == 2) return input;
  if (input.dim() == 1) return input.unsqueeze(0);
  c10::SymInt rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows = rows * input.sym_size(d);
  return input.reshape_symint({rows, input.sym_size(-1)});
}

}  // namespace fastllm
