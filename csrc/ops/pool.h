// A bounded pool of large CPU blocks for results, gradients and workspaces.
//
// PyTorch's CPU allocator returns every large block to the system; the next one is mapped afresh and each of its pages
// faults on first touch, ten times dearer than writing it. The pool keeps freed blocks, up to a limit, and hands them
// out again. Blocks come from anonymous mappings advised to use huge pages.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastllm::pool {

struct Stats {
  int64_t limit;   // most idle bytes that are kept; 0 turns the pool off
  int64_t idle;    // bytes kept, in no tensor now
  int64_t in_use;  // bytes of the pool's blocks that live tensors hold
  int64_t hits;    // requests served from a kept block
  int64_t misses;  // requests that took fresh memory
};

// An uninitialised, contiguous CPU tensor; from the pool where it is large enough to gain.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);
// The same with the strides of `like` where it is non-overlapping and dense, contiguous otherwise.
at::Tensor empty_like(const at::Tensor& like);

void set_limit(int64_t bytes);
Stats stats();
void clear();  // returns every idle block to the system

}  // namespace fastllm::pool
