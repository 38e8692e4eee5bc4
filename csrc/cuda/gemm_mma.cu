// The product of bfloat16 and float16 matrices by mma.sync (sm_80 and newer), with an epilogue.
//
// Bias and ReLU are applied to the float32 sums in registers, and the hidden gradient of relu_mlp is masked and summed
// for its bias where it leaves the block: the output is written once and never read (a pass of its own reads and writes
// it again). Operands go to shared memory by asynchronous copies, kStages tiles ahead of the multiplication. Rows of
// shared memory are swizzled in pieces of 16 bytes so that ldmatrix meets no bank twice.
#include "gemm.cuh"
#include "tensor_core.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kInner = 32;       // of a tile
constexpr int kStages = 3;       // two blocks of 48 KB fit a multiprocessor of every sm_8x
constexpr int kPiece = 8;        // items of 16 bytes
constexpr int kSmallRows = 512;  // up to this many rows, small tiles: more multiprocessors have one. Not timed

template <int M, int N>
struct Block {
  static constexpr int kRows = M, kColumns = N;
  static constexpr int kWarpsAcross = N == 128 ? 4 : 2, kWarpsDown = 2, kThreads = kWarpsAcross * kWarpsDown * kWarp;
  static constexpr int kWarpRows = M / kWarpsDown, kWarpColumns = N / kWarpsAcross;
  static constexpr int kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;
  static constexpr int kLeft = M * kInner, kStage = kLeft + N * kInner;  // items
  // The epilogue: the tile, its rows set apart by 16 bytes against bank conflicts, and sums of its columns.
  static constexpr int kPitch = N + kPiece, kPieces = N / kPiece, kLanesDown = kThreads / kPieces;
  static constexpr size_t kStaged = M * kPitch * 2;
  static constexpr size_t kShared = size_t{kStages} * kStage * 2;
  static_assert(kStaged + kLanesDown * N * sizeof(float) <= kShared);
};

// Where piece `piece` of row `row` lies, in items. Eight rows that ldmatrix reads at once cover all banks.
template <int Pieces>
FASTLLM_DEVICE int swizzled(int row, int piece) {
  static_assert(Pieces == 4 || Pieces % 8 == 0);
  const int turn = Pieces == 4 ? row / 2 % 4 : row % 8;
  return (row * Pieces + (piece ^ turn)) * kPiece;
}

// Starts the copy of a tile (Rows, 8 Pieces) of a row-major matrix; zeros outside of it.
template <int Rows, int Pieces, int Threads, bool vectors, class T>
FASTLLM_DEVICE void load_tile(T* to, const T* from, int64_t from_row, int64_t row, int64_t column, int64_t rows,
                              int64_t columns) {
#pragma unroll
  for (int i = 0; i < Rows * Pieces / Threads; ++i) {
    const int piece = (threadIdx.x + i * Threads) % Pieces, r = (threadIdx.x + i * Threads) / Pieces;
    const int64_t c = column + piece * kPiece, left = row + r < rows ? columns - c : 0;
    const int count = left < 0 ? 0 : left < kPiece ? static_cast<int>(left) : kPiece;
    const T* source = count > 0 ? from + (row + r) * from_row + c : from;
    T* target = to + swizzled<Pieces>(r, piece);
    if constexpr (vectors) {
      copy_async(target, source, count * static_cast<int>(sizeof(T)));
    } else {
      Vec<T, kPiece> items;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) items.items[j] = j < count ? load(source + j) : T{};
      store_vec(target, items);
    }
  }
}

template <class T, class B, bool turned>
FASTLLM_DEVICE void multiply_tile(float (&sums)[B::kRowFragments][B::kColumnFragments][4], const T* stage) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_row = warp / B::kWarpsAcross * B::kWarpRows, first = warp % B::kWarpsAcross * B::kWarpColumns;
  const T* right = stage + B::kLeft;
#pragma unroll
  for (int step = 0; step < kInner / 16; ++step) {
    unsigned a[B::kRowFragments][4], b[B::kColumnFragments / 2][4];
#pragma unroll
    for (int i = 0; i < B::kRowFragments; ++i)
      load_matrices(a[i], stage + swizzled<kInner / kPiece>(first_row + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < B::kColumnFragments / 2; ++j) {
      if constexpr (turned)
        load_matrices(b[j], right + swizzled<kInner / kPiece>(first + j * 16 + lane % 8 + lane / 16 * 8,
                                                              step * 2 + lane / 8 % 2));
      else
        load_matrices_turned(
            b[j], right + swizzled<B::kPieces>(step * 16 + lane % 16, (first + j * 16) / kPiece + lane / 16));
    }
#pragma unroll
    for (int i = 0; i < B::kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < B::kColumnFragments; ++j)
        multiply<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// Bias and ReLU on the sums, which then lie in shared memory row by row, rounded.
template <class T, class B>
FASTLLM_DEVICE void stage_output(float (&sums)[B::kRowFragments][B::kColumnFragments][4], const Product& p,
                                 int64_t column, T* staged) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_row = warp / B::kWarpsAcross * B::kWarpRows + lane / 4;
  const int first = warp % B::kWarpsAcross * B::kWarpColumns + lane % 4 * 2;
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int j = 0; j < B::kColumnFragments; ++j) {
    const int64_t c = column + first + j * 8;
    const float bias0 = bias != nullptr && c < p.columns ? load_acc(bias + c) : 0.f;
    const float bias1 = bias != nullptr && c + 1 < p.columns ? load_acc(bias + c + 1) : 0.f;
#pragma unroll
    for (int i = 0; i < B::kRowFragments; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<T, 2> pair;
        pair.items[0] = narrow<T>(relu_if(p.relu, sums[i][j][2 * half] + bias0));
        pair.items[1] = narrow<T>(relu_if(p.relu, sums[i][j][2 * half + 1] + bias1));
        store_vec(staged + (first_row + i * 16 + half * 8) * B::kPitch + first + j * 8, pair);
      }
  }
}

// The staged tile into c, masked by the hidden activation; every thread keeps to 8 columns, whose sums it takes.
template <class T, class B>
FASTLLM_DEVICE void store_output(const Product& p, Tile tile, const T* staged, bool vectors, float* scratch) {
  const int piece = threadIdx.x % B::kPieces, first = threadIdx.x / B::kPieces;
  const int64_t column = tile.column * B::kColumns + piece * kPiece, left = p.columns - column;
  const int count = left < 0 ? 0 : left < kPiece ? static_cast<int>(left) : kPiece;
  const T* hidden = static_cast<const T*>(p.hidden);
  T* c = static_cast<T*>(p.c);
  float sums[kPiece] = {};
  for (int r = first; r < B::kRows && tile.row * B::kRows + r < p.rows && count > 0; r += B::kLanesDown) {
    const int64_t at = (tile.row * B::kRows + r) * p.columns + column;
    Vec<T, kPiece> out = load_vec<kPiece>(staged + r * B::kPitch + piece * kPiece), mask;
    if (hidden != nullptr) {
      if (vectors)
        mask = load_vec<kPiece>(hidden + at);
      else
#pragma unroll
        for (int j = 0; j < kPiece; ++j) mask.items[j] = j < count ? load(hidden + at + j) : T{};
    }
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      if (hidden != nullptr && widen(mask.items[j]) <= 0) out.items[j] = T{};
      sums[j] += widen(out.items[j]);
    }
    if (vectors)
      store_vec_cached(c + at, out);
    else
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        if (j < count) store(c + at + j, out.items[j]);
  }
  if (p.sums == nullptr) return;
#pragma unroll
  for (int j = 0; j < kPiece; ++j) scratch[first * B::kColumns + piece * kPiece + j] = sums[j];
  sync_block();
  const int64_t mine = tile.column * B::kColumns + threadIdx.x;
  if (threadIdx.x >= B::kColumns || mine >= p.columns) return;
  float sum = 0;
  for (int h = 0; h < B::kLanesDown; ++h) sum += scratch[h * B::kColumns + threadIdx.x];
  store(static_cast<float*>(p.sums) + tile.row * p.columns + mine, sum);
}

template <class T, class B, bool turned, bool vectors>
__global__ void __launch_bounds__(B::kThreads, 2) multiply_mma(Product p, int64_t row_tiles, bool vector_output) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Tile tile = tile_at(blockIdx.x, row_tiles, (p.columns + B::kColumns - 1) / B::kColumns);
  const int64_t row = tile.row * B::kRows, column = tile.column * B::kColumns;
  const int64_t steps = (p.inner + kInner - 1) / kInner;
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  const auto load_stage = [&](int64_t step) {
    if (step < steps) {
      T* to = shared + step % kStages * B::kStage;
      const int64_t k = step * kInner;
      load_tile<B::kRows, kInner / kPiece, B::kThreads, vectors>(to, a, p.a_row, row, k, p.rows, p.inner);
      if constexpr (turned)
        load_tile<B::kColumns, kInner / kPiece, B::kThreads, vectors>(to + B::kLeft, b, p.b_row, column, k, p.columns,
                                                                      p.inner);
      else
        load_tile<kInner, B::kPieces, B::kThreads, vectors>(to + B::kLeft, b, p.b_row, k, column, p.inner, p.columns);
    }
    copy_async_commit();  // empty at the end, so that the waits count alike
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load_stage(s);
  float sums[B::kRowFragments][B::kColumnFragments][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // this step's tile is there, and everyone has left the one that is loaded next
    load_stage(step + kStages - 1);
    multiply_tile<T, B, turned>(sums, shared + step % kStages * B::kStage);
  }
  copy_async_wait<0>();
  sync_block();
  stage_output<T, B>(sums, p, column, shared);
  sync_block();
  store_output<T, B>(p, tile, shared, vector_output, reinterpret_cast<float*>(shared_memory() + B::kStaged));
}

using Small = Block<64, 64>;
using Large = Block<128, 128>;

bool vectors_of(const Product& p) { return in_whole_vectors(p.a, p.a_row) && in_whole_vectors(p.b, p.b_row); }
bool is_small(const Product& p) { return p.rows <= kSmallRows || !vectors_of(p); }

template <class T, class B, bool vectors>
Status run_tiles(const Product& p, Stream stream) {
  const int64_t row_tiles = ceil_div(p.rows, B::kRows);
  const bool vector_output = in_whole_vectors(p.c, p.columns) && in_whole_vectors(p.hidden, p.columns);
  const auto kernel = p.b_turned ? multiply_mma<T, B, true, vectors> : multiply_mma<T, B, false, vectors>;
  return launch(kernel, {row_tiles * ceil_div(p.columns, B::kColumns), B::kThreads, B::kShared}, stream, p, row_tiles,
                vector_output);
}

template <class T>
Status run(const Product& p, Stream stream) {
  if (!vectors_of(p)) return run_tiles<T, Small, false>(p, stream);
  return is_small(p) ? run_tiles<T, Small, true>(p, stream) : run_tiles<T, Large, true>(p, stream);
}

}  // namespace

int64_t gemm_mma_sums(const Product& p) { return ceil_div(p.rows, is_small(p) ? Small::kRows : Large::kRows); }

Status gemm_mma(const Product& p, Stream stream) {
  if (p.dtype == DType::kBF16) return run<bf16>(p, stream);
  if (p.dtype == DType::kF16) return run<f16>(p, stream);
  return 1;
}

bool gemm_mma_runs() {
#ifdef __CUDACC__
  int device = 0, major = 0;
  return returned(cudaGetDevice(&device)) == cudaSuccess &&
         returned(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) == cudaSuccess &&
         major >= 8;
#else
  return true;
#endif
}

}  // namespace fastllm::cuda
