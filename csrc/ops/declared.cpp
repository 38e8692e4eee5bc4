#include "declared.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <memory>
#include <unordered_map>

#include "backend.h"

namespace fastllm {
namespace {

std::unordered_map<c10::OperatorHandle, AutocastRule> rules_of;  // filled once, when the module is imported

template <c10::DeviceType device>
void autocast(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const AutocastRule& rule = rules_of.at(op);
  const at::ScalarType dtype = rule.lower_precision ? at::autocast::get_autocast_dtype(device) : at::kFloat;
  const size_t first = stack->size() - rule.casts.size();
  for (size_t i = 0; i < rule.casts.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (rule.casts[i] && value.isTensor()) value = at::autocast::cached_cast(dtype, value.toTensor(), device);
  }
  if (rule.flag >= 0) (*stack)[first + static_cast<size_t>(rule.flag)] = true;
  op.callBoxed(stack);
}

// Registers for one key. The registrations last as long as the process.
template <class Register>
void under(c10::DispatchKey key, Register register_all) {
  static std::vector<std::unique_ptr<torch::Library>> libraries;
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "fastllm", key, __FILE__, __LINE__));
  register_all(*libraries.back());
}

template <c10::DeviceType device>
void register_autocast(c10::DispatchKey key, const std::vector<AutocastRule>& rules) {
  under(key, [&](torch::Library& library) {
    for (const AutocastRule& rule : rules)
      library.impl(rule.operation.c_str(), torch::CppFunction::makeFromBoxedFunction<&autocast<device>>());
  });
}

}  // namespace

void complete_declarations(const std::vector<AutocastRule>& rules, const std::vector<std::string>& kernels) {
  for (const AutocastRule& rule : rules)
    rules_of.emplace(c10::Dispatcher::singleton().findSchemaOrThrow(("fastllm::" + rule.operation).c_str(), ""), rule);
  register_autocast<c10::DeviceType::CPU>(c10::DispatchKey::AutocastCPU, rules);
  register_autocast<c10::DeviceType::CUDA>(c10::DispatchKey::AutocastCUDA, rules);
  register_autocast<c10::DeviceType::XPU>(c10::DispatchKey::AutocastXPU, rules);
  under(c10::DispatchKey::Autograd, [&](torch::Library& library) {
    for (const std::string& kernel : kernels)
      library.impl(kernel.c_str(), torch::autograd::autogradNotImplementedFallback());
  });
  backend::route(kernels);
}

}  // namespace fastllm
