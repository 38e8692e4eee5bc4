// Plays CUDA on the host: the kernels of csrc/cuda, compiled by the host compiler against this folder, run thread by
// thread. Threads of a block are fibers that switch at barriers and warp exchanges, in an order shuffled by a seed, so
// that a missing barrier shows in the result. One cluster of blocks lives at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaError_t = int;
constexpr int cudaSuccess = 0;

namespace cuda_host {

struct Block;
struct Thread {
  dim3 index;
  Block* block;
};
extern Thread* current;  // the thread that runs

dim3 block_index();
dim3 block_size();
dim3 grid_size();

// Runs `body` as every thread of the grid; a status other than 0 where a rule was broken: last_failure() says which.
int run(int64_t blocks, int threads, size_t shared, int cluster, const std::function<void()>& body);
// Differs from cluster to cluster of blocks: what threads have under way ends with theirs.
uint64_t generation();
const char* last_failure();
// Blocks of the largest cluster that the emulated device has room for: FASTLLM_CUDA_HOST_CLUSTER, or 16.
int largest_cluster();

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Global memory that the next launches may touch; clear_ranges() ends that.
void allow(const void* begin, size_t bytes, bool writable);
void clear_ranges();
// Fails unless [p, p + bytes) lies in one allowed range or in shared memory of the running cluster, at `alignment`.
void check_access(const void* p, size_t bytes, size_t alignment, bool write);

char* shared_memory();
size_t shared_size();
void* map_shared(void* p, int rank);
int cluster_rank();
void sync_block();
void sync_cluster();
void announce_to_cluster();
void await_cluster();
// A barrier of `threads` threads of the block, numbered.
void sync_some(int barrier, int threads);
// Lets other threads run: for loops that wait for memory to change. Whoever changes it reports progress.
void yield();
void made_progress();
// Every lane of the warp gives 8 bytes and gets those of all lanes.
const uint64_t* exchange(uint64_t value);

}  // namespace cuda_host

#define threadIdx (cuda_host::current->index)
#define blockIdx (cuda_host::block_index())
#define blockDim (cuda_host::block_size())
#define gridDim (cuda_host::grid_size())
