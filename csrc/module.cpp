// fastllm._C: importing it registers the operations; it calls them, tells what was built, and steers the choice of
// backend and the memory pool.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "ops/backend.h"
#include "ops/calls.h"
#include "ops/declared.h"
#include "ops/gemm.h"
#include "ops/pool.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastllm's compiled operations (torch.ops.fastllm), backend switch and memory pool";
  m.def("cpu_capability", [] { return fastllm::cpu::isa_name(fastllm::cpu::current_isa()); });
  m.def("float32_gemm_library", &fastllm::float32_gemm_library);
  m.def("complete_declarations", [](const std::vector<std::tuple<std::string, bool, std::vector<bool>, int64_t>>& rules,
                                    const std::vector<std::string>& kernels) {
    std::vector<fastllm::AutocastRule> autocast;
    for (const auto& [operation, lower_precision, casts, flag] : rules)
      autocast.push_back({operation, lower_precision, casts, flag});
    fastllm::complete_declarations(autocast, kernels);
    fastllm::find_operations();
  });
  fastllm::define_calls(m);
  m.def("current_backend", &fastllm::backend::current);
  m.def("set_process_backend", &fastllm::backend::set_for_process);
  m.def("set_thread_backend", &fastllm::backend::set_for_thread);
  m.def("batch_invariant", &fastllm::backend::batch_invariant);
  m.def("set_batch_invariant", &fastllm::backend::set_batch_invariant);
  m.def("pool_limit", [] { return fastllm::pool::stats().limit; });
  m.def("set_pool_limit", [](int64_t bytes) {
    if (bytes < 0) throw py::value_error("set_pool_limit: bytes must be >= 0, got " + std::to_string(bytes));
    fastllm::pool::set_limit(bytes);
  });
  m.def("pool_clear", &fastllm::pool::clear);
  m.def("pool_stats", [] {
    const auto s = fastllm::pool::stats();
    py::dict d;
    d["limit"] = s.limit;
    d["idle"] = s.idle;
    d["in_use"] = s.in_use;
    d["hits"] = s.hits;
    d["misses"] = s.misses;
    return d;
  });
}
