#pragma once
#include "isa.h"
#include "types.h"

namespace fastllm::cpu {

struct EmbeddingGradient {
  DType dtype;
  const void* grad_output;  // (count, features) contiguous
  const void* ids;          // (count) int64 or int32, in [0, rows)
  bool ids_are_int32;
  int64_t count, rows, features;
  int64_t padding_idx;  // a row without gradient, or -1
  bool scale_by_frequency;
  void* grad;       // (rows, features): every row is written
  int64_t* starts;  // workspace, rows + 1; like the next two used where positions are sorted
  int64_t* order;   // workspace, count
  int64_t* chunks;  // workspace, 2 * embedding_chunks(count)
  void* partial;    // workspace, acc: embedding_chunks(count) * features, or kEmbeddingPieces * rows * stride
};

// Ids of one row beyond this number are summed in chunks of it, so that a frequent id is not one thread's work alone.
// Fixed: the result does not depend on the number of threads.
constexpr int64_t kEmbeddingChunk = 256;
inline int64_t embedding_chunks(int64_t count) { return 2 * (count / kEmbeddingChunk) + 1; }

// So few ids are compared with each other instead of sorted.
constexpr int64_t kFewIds = 128;

// Many ids of a small table are not sorted either: each of a fixed number of pieces of the positions is added up in a
// table of its own, whose rows are whole vectors of any instruction set and stay in a core's cache.
constexpr int64_t kEmbeddingPieces = 4;
inline int64_t embedding_stride(int64_t features) { return (features + 15) / 16 * 16; }
inline bool embedding_in_pieces(const EmbeddingGradient& g) {
  return !g.scale_by_frequency && g.rows * embedding_stride(g.features) <= 32768 && g.count >= 1024 &&
         g.count >= kEmbeddingPieces * g.rows;
}

struct EmbeddingKernels {
  // output[i] = weight[ids[i]]; `rows` rows of row_bytes bytes.
  void (*forward)(const void* weight, int64_t rows, const void* ids, bool ids_are_int32, void* output, int64_t count,
                  int64_t row_bytes);
  void (*backward)(const EmbeddingGradient&);
};

// Position of the first id outside [0, rows), or -1.
int64_t check_ids(const void* ids, bool ids_are_int32, int64_t count, int64_t rows);

}  // namespace fastllm::cpu

FASTLLM_DECLARE_KERNELS(EmbeddingKernels, embedding)
