#include "backend.h"

#include <torch/library.h>

#include <atomic>
#include <unordered_map>

namespace fastllm::backend {
namespace {

std::atomic<int64_t> process_choice{kAuto};
thread_local int64_t thread_choice = -1;
std::atomic<bool> process_invariant{false};
thread_local bool backward_invariant = false;

// A kernel operation in the namespaces of the backends.
struct Servers {
  c10::OperatorHandle cuda, triton;
};
std::unordered_map<c10::OperatorHandle, Servers> servers;  // filled once, when the module is imported

template <c10::DispatchKey key>
void pass_on(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
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

bool batch_invariant() { return backward_invariant || process_invariant.load(std::memory_order_relaxed); }
void set_batch_invariant(bool invariant) { process_invariant.store(invariant, std::memory_order_relaxed); }

// Also an operation: the emulated CUDA layer of the tests is a library of its own.
TORCH_LIBRARY(fastllm_mode, m) {
  m.def("batch_invariant() -> bool", [] { return batch_invariant(); });
}

void route(const std::vector<std::string>& kernels) {
  const auto handle = [](const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  };
  // Registrations last as long as the process.
  static torch::Library cuda(torch::Library::IMPL, "fastllm", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  static torch::Library xpu(torch::Library::IMPL, "fastllm", c10::DispatchKey::XPU, __FILE__, __LINE__);
  for (const std::string& name : kernels) {
    servers.emplace(handle("fastllm::" + name),
                    Servers{handle("fastllm_cuda::" + name), handle("fastllm_triton::" + name)});
    cuda.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&pass_on<c10::DispatchKey::CUDA>>());
    xpu.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&pass_on<c10::DispatchKey::XPU>>());
  }
}

void save(torch::autograd::AutogradContext* ctx) {
  if (const int64_t choice = current(); choice != kAuto) ctx->saved_data["backend"] = choice;
  if (batch_invariant()) ctx->saved_data["batch_invariant"] = true;
}

Restored::Restored(torch::autograd::AutogradContext* ctx) : before_(thread_choice), was_invariant_(backward_invariant) {
  const auto saved = ctx->saved_data.find("backend");
  if (saved != ctx->saved_data.end()) thread_choice = saved->second.toInt();
  backward_invariant = backward_invariant || ctx->saved_data.count("batch_invariant") != 0;
}
Restored::~Restored() {
  thread_choice = before_;
  backward_invariant = was_invariant_;
}

}  // namespace fastllm::backend
