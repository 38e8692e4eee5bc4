#include "backend.h"

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fastllm::backend {
namespace {

std::atomic<int64_t> process_choice{kAuto};
thread_local int64_t thread_choice = -1;

constexpr std::array<std::string_view, 5> kSuffixes = {"_forward", "_backward", "_backward_", "_correct_", "_scale_"};

bool is_plain(std::string_view name) {
  return std::any_of(kSuffixes.begin(), kSuffixes.end(),
                     [&](std::string_view suffix) { return name.ends_with(suffix); });
}

std::string plain_name(const c10::OperatorName& name) { return name.name.substr(name.name.find("::") + 2); }

// A plain operation as the backends declare it.
struct Servers {
  c10::OperatorHandle cuda, triton;
};
std::unordered_map<c10::OperatorHandle, Servers> servers;  // filled once, when the module is imported

template <c10::DispatchKey key>
void route(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const Servers& known = servers.at(op);
  const int64_t choice = current();
  const c10::OperatorHandle* server = nullptr;
  if (choice != kTriton && known.cuda.hasKernelForDispatchKey(key))
    server = &known.cuda;
  else if (choice != kCuda && known.triton.hasKernelForDispatchKey(key))
    server = &known.triton;
  TORCH_CHECK_NOT_IMPLEMENTED(
      server != nullptr, op.operator_name().name, ": no ",
      choice == kCuda     ? "CUDA C++ kernel"
      : choice == kTriton ? "Triton kernel"
                          : "kernel",
      " is registered for ", key,
      " tensors; print(fastllm.info()) tells what is built, and backend \"eager\" serves any tensor");
  server->redispatchBoxed(keys, stack);
}

}  // namespace

int64_t current() { return thread_choice >= 0 ? thread_choice : process_choice.load(std::memory_order_relaxed); }
void set_for_process(int64_t choice) { process_choice.store(choice, std::memory_order_relaxed); }
void set_for_thread(int64_t choice) { thread_choice = choice; }

void declare_namespaces() {
  auto& dispatcher = c10::Dispatcher::singleton();
  std::vector<c10::FunctionSchema> plain;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames())
    if (name.name.rfind("fastllm::", 0) == 0 && is_plain(name.name))
      plain.push_back(dispatcher.findSchemaOrThrow(name.name.c_str(), "").schema());
  static std::vector<torch::Library> libraries;  // a library that is destroyed takes its declarations along
  libraries.reserve(4);
  const auto open = [&](torch::Library::Kind kind, const char* space, std::optional<c10::DispatchKey> key) -> auto& {
    return libraries.emplace_back(kind, space, key, __FILE__, __LINE__);
  };
  for (const char* space : {"fastllm_cuda", "fastllm_triton"}) {
    auto& library = open(torch::Library::FRAGMENT, space, std::nullopt);
    for (const auto& schema : plain) library.def(schema.cloneWithName(plain_name(schema.operator_name()), ""));
  }
  auto& cuda = open(torch::Library::IMPL, "fastllm", c10::DispatchKey::CUDA);
  auto& xpu = open(torch::Library::IMPL, "fastllm", c10::DispatchKey::XPU);
  for (const auto& schema : plain) {
    const std::string name = plain_name(schema.operator_name());
    const auto handle = [&](const char* space) { return dispatcher.findSchemaOrThrow((space + name).c_str(), ""); };
    servers.emplace(handle("fastllm::"), Servers{handle("fastllm_cuda::"), handle("fastllm_triton::")});
    cuda.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&route<c10::DispatchKey::CUDA>>());
    xpu.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&route<c10::DispatchKey::XPU>>());
  }
}

void save(torch::autograd::AutogradContext* ctx) {
  if (const int64_t choice = current(); choice != kAuto) ctx->saved_data["backend"] = choice;
}

Restored::Restored(torch::autograd::AutogradContext* ctx) : before_(thread_choice) {
  const auto saved = ctx->saved_data.find("backend");
  if (saved != ctx->saved_data.end()) thread_choice = saved->second.toInt();
}
Restored::~Restored() { thread_choice = before_; }

}  // namespace fastllm::backend
