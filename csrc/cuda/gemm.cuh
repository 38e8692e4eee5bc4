// What the products of this folder share: the order of tiles, the epilogue's arithmetic.
#pragma once
#include "common.cuh"
#include "gemm.h"

namespace fastllm::cuda {

constexpr int kGroupRows = 8;  // tile rows whose tiles are in flight together, so that they share operands in L2

struct Tile {
  int64_t row, column;
};

// Tile `index` of row_tiles x column_tiles, in groups of kGroupRows tile rows, each column by column.
FASTLLM_DEVICE Tile tile_at(int64_t index, int64_t row_tiles, int64_t column_tiles) {
  const int64_t group = index / (kGroupRows * column_tiles), first = group * kGroupRows;
  const int64_t left = row_tiles - first, height = left < kGroupRows ? left : kGroupRows;
  const int64_t within = index - group * kGroupRows * column_tiles;
  return {first + within % height, within / height};
}

FASTLLM_DEVICE float relu_if(bool wanted, float x) { return wanted && x <= 0 ? 0.f : x; }  // NaN stays

inline bool in_whole_vectors(const void* p, int64_t row_items) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_items % 8 == 0;
}

}  // namespace fastllm::cuda
