// Kernels that keep or break a rule, to see what the emulator says: tests/test_cuda_host.py.
#include <cstring>

#include "../../csrc/cuda/common.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 64;

// data[i] = data[n - 1 - i] by way of shared memory; n = kThreads.
__global__ void reverse(float* data, bool with_barrier) {
  float* kept = reinterpret_cast<float*>(shared_memory());
  kept[threadIdx.x] = load(data + threadIdx.x);
  if (with_barrier) sync_block();
  store(data + threadIdx.x, kept[kThreads - 1 - threadIdx.x]);
}

// Two rounds through one word of shared memory: the second write must wait for all reads of the first.
__global__ void twice(float* data, bool with_barrier) {
  float* word = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) *word = 1;
  sync_block();
  const float first = *word;
  if (with_barrier) sync_block();
  if (threadIdx.x == 0) *word = 2;
  sync_block();
  store(data + threadIdx.x, 10 * first + *word);
}

__global__ void read_at(float* data, int64_t offset) {
  if (threadIdx.x == 0) store(data, load(data + offset));
}
__global__ void read_four_at(float* data, int64_t offset) {
  if (threadIdx.x == 0) store(data, load_vec<4>(data + offset).items[0]);
}
__global__ void write_shared_at(float*, int64_t offset) {
  if (threadIdx.x == 0) shared_memory()[offset] = 1;
}
__global__ void barrier_for_some(float*) {
  if (threadIdx.x < 32) sync_block();
}
__global__ void exchange_for_some(float*) {
  if (threadIdx.x % 2 == 0) shuffle_xor(1, 1);
}
__global__ void wait_for_ever(float*) {
  for (;;) cuda_host::yield();
}

// Warp functions by their definitions; writes 1 where one of them is wrong.
__global__ void warp_functions(float* data) {
  const int lane = threadIdx.x % kWarp;
  bool right = shuffle_xor(lane, 5) == (lane ^ 5) && shuffle(lane, 7) == 7;
  right &= shuffle_up(lane, 3) == (lane < 3 ? lane : lane - 3);
  right &= ballot(lane % 3 == 0) == 0x49249249u;
  right &= reduce_warp(static_cast<double>(lane), Sum()) == 496;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  right &= reduce_block(static_cast<double>(threadIdx.x), -1.0, Max(), scratch) == kThreads - 1;
  if (!right) store(data, 1.f);
}

// Every block of the cluster adds up what the others hold.
__global__ void sum_of_cluster(float* data, int blocks, bool with_barrier) {
  float* mine = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) *mine = static_cast<float>(blockIdx.x + 1);
  if (with_barrier) sync_cluster();
  float sum = 0;
  for (int rank = 0; rank < blocks; ++rank) sum += *map_shared(mine, rank);
  sync_cluster();
  if (threadIdx.x == 0) store(data + blockIdx.x, sum);
}

__global__ void conversions(float* data) {
  // To nearest, ties to even: 1 + 2^-8 lies between 1 and 1 + 2^-7 in bfloat16, 1 + 3 2^-8 between the next two.
  const float halves[] = {1 + 0x1p-8f, 1 + 3 * 0x1p-8f, 3e38f * 10, -0.f};
  const float expected[] = {1, 1 + 0x1p-6f, __builtin_inff(), -0.f};
  bool right = true;
  for (int i = 0; i < 4; ++i) right &= widen(narrow<bf16>(halves[i])) == expected[i];
  const float nan = widen(narrow<bf16>(__builtin_nanf("")));
  right &=
      nan != nan && widen(narrow<f16>(65520.f)) == __builtin_inff() && widen(narrow<f16>(0.1f)) == 0.0999755859375f;
  if (threadIdx.x == 0 && !right) store(data, 1.f);
}

}  // namespace
}  // namespace fastllm::cuda

using namespace fastllm::cuda;

extern "C" __attribute__((visibility("default"))) const char* selftest_failure() { return cuda_host::last_failure(); }

extern "C" __attribute__((visibility("default"))) int selftest(const char* name, float* data, int64_t count,
                                                               int64_t number) {
  cuda_host::clear_ranges();
  cuda_host::allow(data, count * sizeof(float), true);
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const Shape one{1, kThreads, 512};
  if (is("reverse")) return launch(reverse, one, nullptr, data, number != 0);
  if (is("twice")) return launch(twice, one, nullptr, data, number != 0);
  if (is("read_at")) return launch(read_at, one, nullptr, data, number);
  if (is("read_four_at")) return launch(read_four_at, one, nullptr, data, number);
  if (is("write_shared_at")) return launch(write_shared_at, one, nullptr, data, number);
  if (is("barrier_for_some")) return launch(barrier_for_some, one, nullptr, data);
  if (is("exchange_for_some")) return launch(exchange_for_some, one, nullptr, data);
  if (is("wait_for_ever")) return launch(wait_for_ever, one, nullptr, data);
  if (is("warp_functions")) return launch(warp_functions, one, nullptr, data);
  if (is("conversions")) return launch(conversions, one, nullptr, data);
  if (is("threads")) return launch(read_at, {1, static_cast<int>(number), 0}, nullptr, data, int64_t{0});
  if (is("sum_of_cluster") || is("sum_without_barrier"))
    return launch(sum_of_cluster, {count, kThreads, 512, static_cast<int>(number)}, nullptr, data,
                  static_cast<int>(number), is("sum_of_cluster"));
  return -1;
}
