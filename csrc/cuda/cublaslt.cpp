// cuBLASLt's product with bias and ReLU in its epilogue: the output is written once and not read again.
//
// What cuBLASLt's ReLU makes of NaN is not documented ("max(x, 0)"; fmaxf would drop it) and has not been seen: this
// path is taken on request alone. DRELU_BGRAD, which would mask the hidden gradient of relu_mlp and sum its bias
// gradient, is not used: it reads a bit mask whose layout is not documented, which only RELU_AUX writes, in forward,
// where nothing but the hidden activation is saved; making the mask anew would read that activation, as the pass does
// which masks with it directly.
#include "cublaslt.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

namespace fastllm::cuda {
namespace {

// --- cuBLASLt's declarations, as in versions 12 and 13 ----------------------------------------------------------

constexpr int kCompute32F = 68, kReal32F = 0, kReal16F = 2, kReal16BF = 14;  // cublasComputeType_t, cudaDataType
constexpr int kTransA = 3, kEpilogue = 7, kBiasPointer = 8, kBiasType = 26;  // cublasLtMatmulDescAttributes_t
constexpr int kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;  // preferences
constexpr int32_t kTransposed = 1;                            // cublasOperation_t
constexpr uint32_t kEpilogueRelu = 2, kEpilogueReluBias = 6;  // cublasLtEpilogue_t
constexpr int kNotSupported = 15;                             // cublasStatus_t

using Handle = void*;
using Descriptor = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

struct Functions {
  int (*cublasLtCreate)(Handle*);
  const char* (*cublasLtGetStatusName)(int);
  int (*cublasLtMatmulDescCreate)(Descriptor*, int compute, int scale);
  int (*cublasLtMatmulDescDestroy)(Descriptor);
  int (*cublasLtMatmulDescSetAttribute)(Descriptor, int attribute, const void*, size_t);
  int (*cublasLtMatrixLayoutCreate)(Descriptor*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*cublasLtMatrixLayoutDestroy)(Descriptor);
  int (*cublasLtMatmulPreferenceCreate)(Descriptor*);
  int (*cublasLtMatmulPreferenceDestroy)(Descriptor);
  int (*cublasLtMatmulPreferenceSetAttribute)(Descriptor, int attribute, const void*, size_t);
  int (*cublasLtMatmulAlgoGetHeuristic)(Handle, Descriptor operation, Descriptor a, Descriptor b, Descriptor c,
                                        Descriptor d, Descriptor preference, int wanted, Heuristic*, int* found);
  int (*cublasLtMatmul)(Handle, Descriptor operation, const void* alpha, const void* a, Descriptor, const void* b,
                        Descriptor, const void* beta, const void* c, Descriptor, void* d, Descriptor, const Algorithm*,
                        void* workspace, size_t workspace_bytes, cudaStream_t);
};

void* open_library() {
  for (const int mode : {RTLD_NOW | RTLD_NOLOAD, int{RTLD_NOW}})  // the one that PyTorch has loaded comes first
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (void* library = dlopen(name, mode)) return library;
  return nullptr;
}

const Functions* load_functions() {
  static Functions found{};
  void* library = open_library();
  if (library == nullptr) return nullptr;
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    void* address = dlsym(library, name);
    std::memcpy(&function, &address, sizeof(address));
    complete = complete && address != nullptr;
  };
#define FASTLLM_FIND(name) find(found.name, #name)
  FASTLLM_FIND(cublasLtCreate);
  FASTLLM_FIND(cublasLtGetStatusName);
  FASTLLM_FIND(cublasLtMatmulDescCreate);
  FASTLLM_FIND(cublasLtMatmulDescDestroy);
  FASTLLM_FIND(cublasLtMatmulDescSetAttribute);
  FASTLLM_FIND(cublasLtMatrixLayoutCreate);
  FASTLLM_FIND(cublasLtMatrixLayoutDestroy);
  FASTLLM_FIND(cublasLtMatmulPreferenceCreate);
  FASTLLM_FIND(cublasLtMatmulPreferenceDestroy);
  FASTLLM_FIND(cublasLtMatmulPreferenceSetAttribute);
  FASTLLM_FIND(cublasLtMatmulAlgoGetHeuristic);
  FASTLLM_FIND(cublasLtMatmul);
#undef FASTLLM_FIND
  return complete ? &found : nullptr;
}

const Functions* lt() {
  static const Functions* functions = load_functions();
  return functions;
}

// --- one product -------------------------------------------------------------------------------------------------

// The first failure of several calls.
struct Steps {
  Status status = 0;
  void lt(int result) {
    if (status == 0 && result != 0) status = 1000 + result;
  }
  void cuda(cudaError_t result) {
    if (status == 0) status = result;
  }
};

uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return static_cast<uint32_t>(address & (~address + 1) & 0xff ? address & (~address + 1) : 256);
}

// cuBLASLt counts columns first: a row-major c (rows, columns) is its (columns, rows), b its first operand, turned.
struct Problem {
  const Product& p;
  Handle handle;
  Descriptor operation = nullptr, a = nullptr, b = nullptr, c = nullptr;
  Steps steps;

  Problem(const Product& product, Handle h) : p(product), handle(h) {
    const Functions& f = *lt();
    const int type = p.dtype == DType::kBF16 ? kReal16BF : kReal16F;
    const uint32_t epilogue = p.bias != nullptr ? kEpilogueReluBias : kEpilogueRelu;
    steps.lt(f.cublasLtMatmulDescCreate(&operation, kCompute32F, kReal32F));
    set(kTransA, kTransposed);
    set(kEpilogue, epilogue);
    if (p.bias != nullptr) {
      set(kBiasPointer, p.bias);
      set(kBiasType, int32_t{type});
    }
    steps.lt(f.cublasLtMatrixLayoutCreate(&a, type, p.inner, p.columns, p.b_row));
    steps.lt(f.cublasLtMatrixLayoutCreate(&b, type, p.inner, p.rows, p.a_row));
    steps.lt(f.cublasLtMatrixLayoutCreate(&c, type, p.columns, p.rows, p.columns));
  }
  ~Problem() {
    if (operation != nullptr) lt()->cublasLtMatmulDescDestroy(operation);
    for (Descriptor layout : {a, b, c})
      if (layout != nullptr) lt()->cublasLtMatrixLayoutDestroy(layout);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  template <class V>
  void set(int attribute, const V& value) {
    if (steps.status == 0) steps.lt(lt()->cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)));
  }

  // Up to `wanted` algorithms, the most promising first.
  int ask(Heuristic* found, int wanted) {
    const Functions& f = *lt();
    Descriptor preference = nullptr;
    int count = 0;
    steps.lt(f.cublasLtMatmulPreferenceCreate(&preference));
    const auto prefer = [&](int attribute, auto value) {
      if (steps.status == 0)
        steps.lt(f.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
    };
    prefer(kMaxWorkspace, static_cast<uint64_t>(kCublasLtWorkspace));
    prefer(kAlignmentA, alignment_of(p.b));
    prefer(kAlignmentB, alignment_of(p.a));
    prefer(kAlignmentC, alignment_of(p.c));
    prefer(kAlignmentD, alignment_of(p.c));
    if (steps.status == 0)
      steps.lt(f.cublasLtMatmulAlgoGetHeuristic(handle, operation, a, b, c, c, preference, wanted, found, &count));
    if (preference != nullptr) f.cublasLtMatmulPreferenceDestroy(preference);
    if (steps.status == 0 && count == 0) steps.status = 1000 + kNotSupported;
    return count;
  }

  int multiply(const Algorithm& algorithm, void* workspace, Stream stream) const {
    const float one = 1, zero = 0;
    return lt()->cublasLtMatmul(handle, operation, &one, p.b, a, p.a, b, &zero, p.c, c, p.c, c, &algorithm, workspace,
                                kCublasLtWorkspace, stream);
  }
};

// Milliseconds of a few products in a row; negative where the algorithm fails.
float time_of(const Problem& problem, const Algorithm& algorithm, void* workspace, Stream stream, Steps& steps) {
  constexpr int kRepeats = 5;
  cudaEvent_t begin = nullptr, end = nullptr;
  steps.cuda(cudaEventCreate(&begin));
  steps.cuda(cudaEventCreate(&end));
  bool runs = steps.status == 0 && problem.multiply(algorithm, workspace, stream) == 0;
  if (steps.status == 0) steps.cuda(cudaEventRecord(begin, stream));
  for (int i = 0; i < kRepeats; ++i) runs = runs && problem.multiply(algorithm, workspace, stream) == 0;
  float time = -1;
  if (steps.status == 0) steps.cuda(cudaEventRecord(end, stream));
  if (steps.status == 0) steps.cuda(cudaEventSynchronize(end));
  if (steps.status == 0) steps.cuda(cudaEventElapsedTime(&time, begin, end));
  if (begin != nullptr) cudaEventDestroy(begin);
  if (end != nullptr) cudaEventDestroy(end);
  return runs ? time : -1;
}

bool may_time(Stream stream) {
  const char* asked = std::getenv("FASTLLM_AUTOTUNE");
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusActive;
  return asked != nullptr && std::strcmp(asked, "1") == 0 && cudaStreamIsCapturing(stream, &capture) == cudaSuccess &&
         capture == cudaStreamCaptureStatusNone;
}

// The heuristic's first algorithm, or the fastest of eight.
Algorithm choose(Problem& problem, void* workspace, Stream stream) {
  constexpr int kCandidates = 8;
  std::array<Heuristic, kCandidates> found{};
  const bool timed = may_time(stream);
  const int count = problem.ask(found.data(), timed ? kCandidates : 1);
  int best = 0;
  float best_time = -1;
  for (int i = 0; timed && i < count && problem.steps.status == 0; ++i) {
    const float time = time_of(problem, found[i].algorithm, workspace, stream, problem.steps);
    if (found[i].state != 0 || time < 0 || (best_time >= 0 && time >= best_time)) continue;
    best = i;
    best_time = time;
  }
  return found[best].algorithm;
}

using Key = std::tuple<int, DType, int64_t, int64_t, int64_t, int64_t, int64_t, bool, uint32_t, uint32_t, uint32_t>;

std::mutex mutex;
std::map<int, Handle> handles;  // of each device; they last as long as the process
std::map<Key, Algorithm> algorithms;

}  // namespace

bool cublaslt_available() { return lt() != nullptr; }

const char* cublaslt_status_text(Status status) {
  return status < 1000 ? status_text(status) : lt()->cublasLtGetStatusName(status - 1000);
}

Status cublaslt_linear_relu(const Product& p, void* workspace, Stream stream) {
  int device = 0;
  if (const cudaError_t failed = cudaGetDevice(&device); failed != cudaSuccess) return failed;
  const std::lock_guard lock(mutex);
  Handle& handle = handles[device];
  if (handle == nullptr)
    if (const int failed = lt()->cublasLtCreate(&handle); failed != 0) return 1000 + failed;
  Problem problem(p, handle);
  const Key key{device,
                p.dtype,
                p.rows,
                p.columns,
                p.inner,
                p.a_row,
                p.b_row,
                p.bias != nullptr,
                alignment_of(p.a),
                alignment_of(p.b),
                alignment_of(p.c)};
  auto known = algorithms.find(key);
  if (known == algorithms.end()) {
    const Algorithm chosen = choose(problem, workspace, stream);
    if (problem.steps.status != 0) return problem.steps.status;
    known = algorithms.emplace(key, chosen).first;
  }
  if (problem.steps.status == 0) problem.steps.lt(problem.multiply(known->second, workspace, stream));
  return problem.steps.status;
}

}  // namespace fastllm::cuda
