#pragma once
#include "launch.h"

namespace fastllm::cuda {

// Flat arrays of `count` items of `dtype`, in one memory order. "acc" is the accumulator of dtype.
struct MseLoss {
  DType dtype;
  int64_t count;
  const void *input, *target, *weight;  // weight may be null
  bool reduced;                         // mean or sum, else none
  const void* divisor;                  // acc, one; null counts as 1
  const void* incoming;                 // gradient of the output: one item (null: 1), or `count` without reduction
  bool correct;                         // write no gradient where `incoming` is 1
  void* output;                         // one item, or `count` without reduction; null: no loss
  void* grad;                           // count; null: no gradient. Without reduction: this or output
  void* partial;                        // acc, mse_loss_blocks(count), where the loss is reduced
};

int64_t mse_loss_blocks(int64_t count);
Status mse_loss(const MseLoss& arguments, Stream stream);

}  // namespace fastllm::cuda
