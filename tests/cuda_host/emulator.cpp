// Fibers, barriers and memory checks behind cuda_runtime.h of this folder.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#ifndef __x86_64__
#error "the fibers' switch is written for x86-64"
#endif

extern "C" void cuda_host_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace cuda_host {

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 4096;  // bytes around shared memory that nothing may change
constexpr int kBarriers = 16;
constexpr int kIdleSweeps = 10000;  // in which every thread only polls: then nothing will change any more

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  unsigned linear = 0;
  bool done = false;
  const bool* announced = nullptr;  // what await_cluster waits for
  const bool* wakes = nullptr;      // runs again when this is true; null: at once
};

// Threads that wait for each other. Who arrives last sets the flag of this round, and opens the next.
struct Barrier {
  int arrived = 0;
  std::unique_ptr<bool> open = std::make_unique<bool>(false);
  std::vector<std::unique_ptr<bool>> old;
};

struct Warp {
  Barrier barrier;
  uint64_t given[32], published[2][32];
  int round = 0;
};

struct Launch;

}  // namespace

struct Block {
  dim3 index;
  Launch* launch;
  int rank;
  std::vector<char> memory;
  char* shared;
  Barrier barriers[kBarriers];
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
};

namespace {

struct Launch {
  int64_t grid;
  int threads, cluster;
  size_t shared;
  const std::function<void()>* body;
  std::vector<std::unique_ptr<Block>> blocks;  // of the running cluster
  Barrier cluster_barrier;
};

struct Range {
  const char *begin, *end;
  bool writable;
};

std::vector<Range> ranges;
std::vector<char*> stacks;
std::string failure;
bool failed = false;
bool progress = false;  // since the last sweep over all threads
uint64_t clusters_made = 0;
void* scheduler = nullptr;
Launch* launch = nullptr;
Fiber* fiber() { return static_cast<Fiber*>(current); }

char* stack(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[i];
}

void to_scheduler() { cuda_host_switch(&fiber()->stack_pointer, scheduler); }

void entry() {
  (*launch->body)();
  fiber()->done = true;
  progress = true;
  to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& f, size_t number) {
  auto* top = reinterpret_cast<uint64_t*>(stack(number) + kStack);
  *--top = 0;  // the return address of entry, which does not return; keeps the stack's alignment
  *--top = reinterpret_cast<uint64_t>(&entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  f.stack_pointer = top;
}

// Returns the flag that is set when all have arrived.
const bool* arrive(Barrier& barrier, int expected) {
  const bool* mine = barrier.open.get();
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    *barrier.open = true;
    barrier.old.push_back(std::move(barrier.open));  // waiting threads still look at it
    barrier.open = std::make_unique<bool>(false);
    if (barrier.old.size() > 64) {
      // Whoever waited for a round that old has passed it: no one can be 32 rounds behind.
      barrier.old.erase(barrier.old.begin(), barrier.old.begin() + 32);
    }
  }
  progress = true;
  return mine;
}

void wait(Barrier& barrier, int expected) {
  fiber()->wakes = arrive(barrier, expected);
  to_scheduler();
}

void make_cluster(int64_t first) {
  ++clusters_made;
  launch->blocks.clear();
  launch->cluster_barrier = Barrier();
  size_t number = 0;
  for (int rank = 0; rank < launch->cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->index = dim3{static_cast<unsigned>(first + rank), 0, 0};
    block->launch = launch;
    block->rank = rank;
    // Fresh shared memory holds NaN in every dtype; guards on both sides hold another pattern.
    block->memory.assign(launch->shared + 2 * kGuard + 1024, '\x5a');
    char* start = block->memory.data() + kGuard;
    block->shared = start + (1024 - reinterpret_cast<uintptr_t>(start) % 1024) % 1024;
    std::memset(block->shared, 0xff, launch->shared);
    block->warps = std::vector<Warp>(launch->threads / 32);
    block->fibers = std::vector<Fiber>(launch->threads);
    for (int t = 0; t < launch->threads; ++t) {
      Fiber& f = block->fibers[t];
      f.index = dim3{static_cast<unsigned>(t), 0, 0};
      f.linear = t;
      f.block = block.get();
      prepare(f, number++);
    }
    launch->blocks.push_back(std::move(block));
  }
}

void check_guards() {
  for (const auto& block : launch->blocks) {
    const char *begin = block->memory.data(), *end = begin + block->memory.size();
    const auto intact = [](const char* from, const char* to) {
      return std::all_of(from, to, [](char c) { return c == '\x5a'; });
    };
    if (!intact(begin, block->shared) || !intact(block->shared + launch->shared, end)) {
      failed = true;
      failure = "shared memory written outside its " + std::to_string(launch->shared) + " bytes";
    }
  }
}

std::string where_threads_wait() {
  int waiting = 0, done = 0;
  for (const auto& block : launch->blocks)
    for (const Fiber& f : block->fibers) (f.done ? done : waiting) += 1;
  return std::to_string(waiting) + " threads wait at a barrier or exchange that others do not reach (" +
         std::to_string(done) + " have ended)";
}

void run_cluster(std::minstd_rand& random) {
  std::vector<Fiber*> order;
  for (const auto& block : launch->blocks)
    for (Fiber& f : block->fibers) order.push_back(&f);
  size_t left = order.size();
  int idle = 0;
  while (left > 0 && !failed) {
    progress = false;
    const auto held = random() & random();  // warps that fall behind: they would stay in step, as if barriers held them
    std::shuffle(order.begin(), order.begin() + static_cast<int64_t>(left), random);
    for (size_t i = 0; i < left && !failed;) {
      Fiber* f = order[i];
      const bool waits = f->wakes != nullptr && !*f->wakes;
      if (waits || (held >> (f->linear / 32 + 5 * f->block->rank) % 31 & 1)) {
        ++i;
        continue;
      }
      f->wakes = nullptr;
      current = f;
      cuda_host_switch(&scheduler, f->stack_pointer);
      if (f->done)
        std::swap(order[i], order[--left]);
      else
        ++i;
    }
    bool polls = false;
    for (size_t i = 0; i < left; ++i) polls |= order[i]->wakes == nullptr || *order[i]->wakes;
    idle = progress ? 0 : idle + 1;
    if (left > 0 && !failed && (!polls || idle > kIdleSweeps)) {
      failed = true;
      failure = where_threads_wait();
    }
  }
  current = nullptr;
}

}  // namespace

dim3 block_index() { return current->block->index; }
dim3 block_size() { return dim3{static_cast<unsigned>(launch->threads)}; }
dim3 grid_size() { return dim3{static_cast<unsigned>(launch->grid)}; }

int run(int64_t blocks, int threads, size_t shared, int cluster, const std::function<void()>& body) {
  Launch mine{blocks, threads, cluster, shared, &body, {}, {}};
  failed = false;
  failure.clear();
  if (threads < 1 || threads > 1024 || threads % 32 != 0 || cluster < 1 || cluster > largest_cluster() ||
      blocks % cluster != 0 || shared > (227 << 10) || blocks > 0x7fffffff) {
    failure = "a launch that no GPU accepts: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
              " threads in clusters of " + std::to_string(cluster) + " with " + std::to_string(shared) +
              " bytes of shared memory";
    return 1;
  }
  launch = &mine;
  static std::minstd_rand random(1);
  std::vector<int64_t> firsts;
  for (int64_t first = 0; first < blocks; first += cluster) firsts.push_back(first);
  std::shuffle(firsts.begin(), firsts.end(), random);
  for (const int64_t first : firsts) {
    make_cluster(first);
    run_cluster(random);
    if (!failed) check_guards();
    if (failed) break;
  }
  launch = nullptr;
  return failed ? 1 : 0;
}

int largest_cluster() {
  const char* text = std::getenv("FASTLLM_CUDA_HOST_CLUSTER");
  return text == nullptr ? 16 : std::atoi(text);
}

const char* last_failure() { return failure.c_str(); }

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  failed = true;
  failure = text;
  if (current != nullptr)
    failure +=
        " (block " + std::to_string(current->block->index.x) + ", thread " + std::to_string(current->index.x) + ")";
  to_scheduler();  // which drops this fiber, like all others
  std::abort();
}

void allow(const void* begin, size_t bytes, bool writable) {
  const char* b = static_cast<const char*>(begin);
  ranges.push_back({b, b + bytes, writable});
}
uint64_t generation() { return clusters_made; }
void clear_ranges() { ranges.clear(); }

void check_access(const void* p, size_t bytes, size_t alignment, bool write) {
  const char* b = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
    fail("misaligned %s of %zu bytes at address %% 16 = %zu", write ? "store" : "load", bytes,
         static_cast<size_t>(reinterpret_cast<uintptr_t>(p) % 16));
  for (const Range& r : ranges)
    if (b >= r.begin && b + bytes <= r.end && (!write || r.writable)) return;
  for (const auto& block : launch->blocks)
    if (b >= block->shared && b + bytes <= block->shared + launch->shared) return;
  fail("%s of %zu bytes outside every tensor of this call", write ? "store" : "load", bytes);
}

char* shared_memory() { return current->block->shared; }
size_t shared_size() { return launch->shared; }
int cluster_rank() { return current->block->rank; }
void* map_shared(void* p, int rank) {
  if (rank < 0 || rank >= launch->cluster) fail("map_shared: rank %d of a cluster of %d", rank, launch->cluster);
  return launch->blocks[rank]->shared + (static_cast<char*>(p) - current->block->shared);
}
void sync_block() { wait(current->block->barriers[0], launch->threads); }
void sync_cluster() { wait(launch->cluster_barrier, launch->threads * launch->cluster); }
void announce_to_cluster() {
  if (fiber()->announced != nullptr) fail("a second announce_to_cluster without await_cluster");
  fiber()->announced = arrive(launch->cluster_barrier, launch->threads * launch->cluster);
}
void await_cluster() {
  if (fiber()->announced == nullptr) fail("await_cluster without announce_to_cluster");
  fiber()->wakes = std::exchange(fiber()->announced, nullptr);
  to_scheduler();
}
void sync_some(int barrier, int threads) {
  if (barrier < 0 || barrier >= kBarriers || threads % 32 != 0) fail("no such barrier: %d of %d", barrier, threads);
  wait(current->block->barriers[barrier], threads);
}
void yield() { to_scheduler(); }
void made_progress() { progress = true; }

const uint64_t* exchange(uint64_t value) {
  const unsigned linear = fiber()->linear;
  Warp& warp = current->block->warps[linear / 32];
  warp.given[linear % 32] = value;
  const int round = warp.round;
  if (warp.barrier.arrived == 31) {
    std::copy(warp.given, warp.given + 32, warp.published[round % 2]);
    ++warp.round;
  }
  wait(warp.barrier, 32);
  // No lane can be two exchanges ahead of another.
  return warp.published[round % 2];
}

}  // namespace cuda_host
