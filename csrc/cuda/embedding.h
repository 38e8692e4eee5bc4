#pragma once
#include "launch.h"

namespace fastllm::cuda {

struct EmbeddingGather {
  const void* weight;  // (rows, row_bytes)
  const void* ids;     // (count) int64 or int32; one outside [0, rows) stops the device
  bool ids_are_int32;
  void* output;  // (count, row_bytes)
  int64_t count, rows, row_bytes;
};

Status embedding_forward(const EmbeddingGather& arguments, Stream stream);

// "acc" is the accumulator of dtype.
struct EmbeddingGradient {
  DType dtype;
  const void* grad_output;  // (count, features)
  const void* ids;          // as above
  bool ids_are_int32;
  int64_t count, rows, features;  // count and rows below 2^31
  int64_t padding_idx;            // a row without gradient, or -1
  bool scale_by_frequency;
  void* grad;       // (rows, features): every row is written
  uint32_t* pairs;  // workspace, 4 * count
  void* partial;    // workspace, acc, embedding_partials(count, features)
  void* sorting;    // workspace of the size that embedding_sorting_bytes tells
  size_t sorting_bytes;
};

int64_t embedding_partials(int64_t count, int64_t features);
Status embedding_sorting_bytes(int64_t count, int64_t rows, size_t* bytes);
Status embedding_backward(const EmbeddingGradient& arguments, Stream stream);

}  // namespace fastllm::cuda
