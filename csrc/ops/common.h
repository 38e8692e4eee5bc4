// What every operation's torch-facing file shares: the dtype tag, saved state of a node, second derivatives.
#pragma once
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../cpu/types.h"
#include "backend.h"
#include "pool.h"

namespace fastllm {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

inline bool is_served_dtype(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

inline DType dtype_tag(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kF32;
    case at::kDouble: return DType::kF64;
    case at::kBFloat16: return DType::kBF16;
    case at::kHalf: return DType::kF16;
    default: TORCH_CHECK(false, "fastllm: no kernel for dtype ", t.scalar_type());
  }
}

// The dtype in which sums over `t` are kept.
inline at::ScalarType acc_dtype(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

inline bool defined(const OptionalTensor& t) { return t.has_value() && t->defined(); }
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const OptionalTensor& t) { return t.has_value() && requires_grad(*t); }

// Python's None arrives as an undefined tensor.
inline void check_given(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a tensor, got None");
}

// True where tensors hold numbers: no fake tensors, no mode that records what is called. Only then may a node look at
// values or hand a saved buffer over.
template <class... Tensors>
bool is_concrete(const Tensors&... tensors) {
  return !c10::impl::dispatch_mode_enabled() && (!at::isTensorSubclassLike(tensors) && ...);
}

// The number in a 0-dim tensor that holds one; on the CPU without a call through the dispatcher.
inline double number_in(const Tensor& t) {
  if (!t.is_cpu() || t.is_neg() || t._is_zerotensor()) return t.item<double>();
  switch (t.scalar_type()) {
    case at::kFloat: return *t.const_data_ptr<float>();
    case at::kDouble: return *t.const_data_ptr<double>();
    default: return t.item<double>();
  }
}

// Whether an incoming gradient is known to be 1; that of a device is not waited for.
inline bool is_one(const Tensor& g) { return g.is_cpu() && number_in(g) == 1.0; }

// A tensor where it is needed, else the undefined one, which costs nothing to save.
inline Tensor where_needed(bool needed, const Tensor& t) { return needed ? t : Tensor(); }

// --- gradients formed in forward, for an incoming gradient of 1 --------------------------------------------------
//
// They lie in saved_data, so that backward finds them without unpacking the saved inputs, whose change in place is then
// no error: nothing reads them. The engine releases saved inputs, but not saved_data: backward calls drop_formed.

inline void keep_formed(AutogradContext* ctx, const char* name, const Tensor& grad) { ctx->saved_data[name] = grad; }
inline bool has_formed(AutogradContext* ctx, const char* name) { return ctx->saved_data.count(name) != 0; }

// The engine clones a gradient that a node still holds, so it is moved out, unless the graph is kept for another
// backward.
inline Tensor take_formed(AutogradContext* ctx, const char* name) {
  const auto it = ctx->saved_data.find(name);
  Tensor grad = it->second.toTensor();
  if (torch::autograd::get_current_graph_task_keep_graph()) return grad.clone();
  ctx->saved_data.erase(it);
  return grad;
}

// At the end of a backward that did not take it.
inline void drop_formed(AutogradContext* ctx, const char* name) {
  if (!torch::autograd::get_current_graph_task_keep_graph()) ctx->saved_data.erase(name);
}

// Gradients that can themselves be differentiated (create_graph=True): the definition, in PyTorch's own differentiable
// operations, is run on `inputs` and differentiated. Inputs that need none get an undefined gradient.
template <class Definition>
variable_list differentiate(Definition definition, const variable_list& inputs, const std::vector<bool>& needed,
                            const Tensor& grad_output) {
  at::AutoGradMode enable(true);
  variable_list arguments, wanted;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool need = needed[i] && inputs[i].defined() && inputs[i].requires_grad();
    // An alias that is not a leaf: first derivatives stop at it, second ones pass through it to the caller's graph.
    arguments.push_back(need ? inputs[i].view_as(inputs[i]) : inputs[i]);
    if (need) wanted.push_back(arguments.back());
  }
  if (wanted.empty()) return variable_list(inputs.size());
  const Tensor output = definition(arguments);
  const variable_list found = torch::autograd::grad({output}, wanted, {grad_output}, /*retain_graph=*/true,
                                                    /*create_graph=*/true, /*allow_unused=*/true);
  variable_list grads(inputs.size());
  size_t next = 0;
  for (size_t i = 0; i < inputs.size(); ++i)
    if (needed[i] && inputs[i].defined() && inputs[i].requires_grad()) grads[i] = found[next++];
  return grads;
}

}  // namespace fastllm
