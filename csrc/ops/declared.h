// What the declarations in fastllm/operations leave to C++: autocast, the refusal of derivatives, routing to a backend.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastllm {

// How autocast casts the arguments of a public operation (fastllm/operations/declaration.py, `Autocast`).
struct AutocastRule {
  std::string operation;
  bool lower_precision;     // else float32
  std::vector<bool> casts;  // of each argument
  int64_t flag;             // index of a bool argument that is set, or -1
};

// Once, when the module has been imported; kernel operations by name.
void complete_declarations(const std::vector<AutocastRule>& rules, const std::vector<std::string>& kernels);

}  // namespace fastllm
