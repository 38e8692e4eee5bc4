// The product relu(a b^T + bias) of bfloat16 and float16 matrices on Hopper: TMA, wgmma, persistent blocks.
//
// Bias and ReLU are applied to the float32 sums in registers: the output is written once and never read. One warpgroup
// copies tiles of both operands (bulk tensor copies, a ring of stages with a pair of transaction barriers each), two
// multiply them, 64 rows each, straight from shared memory. A block walks over output tiles, so that the copies for its
// next tile go on while this one is stored. A stage is given back when the product after the one that read it is under
// way, which keeps the tensor cores fed.
//
// Where tiles are many, two blocks of a cluster work on tiles one above the other: they need the same tile of b, of
// which each copies one half into both. A multiprocessor then asks L2 for 32 KB instead of 48 for each step of 128 x
// 256 x 64.
#include "gemm.cuh"
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define FASTLLM_HOPPER
#endif

namespace fastllm::cuda {
namespace {

constexpr int kRows = 128, kInner = 64;  // of a tile
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr int kSlice = 64;          // columns that a warp stores at a time
constexpr int kPitch = kSlice + 8;  // of its rows in shared memory: 16 bytes more, against bank conflicts
constexpr int kWarpRows = 16, kConsumerWarps = 8;

// N: columns of a tile; Blocks: of a cluster.
template <int N, int Blocks>
struct Ring {
  static constexpr int kStages = N == 256 ? 4 : 6;
  static constexpr int kLeft = kRows * kInner * 2, kShare = N / Blocks * kInner * 2;  // bytes
  static constexpr int kStage = kLeft + Blocks * kShare;
  static constexpr int kStaging = kStages * kStage;
  static constexpr int kBarriers = kStaging + kConsumerWarps * kWarpRows * kPitch * 2;
  static constexpr size_t kShared = kBarriers + 2 * kStages * sizeof(uint64_t);
  static_assert(kShared <= (227 << 10) && kShare % 1024 == 0);

  char* memory;
  uint64_t *full, *empty;  // a barrier each stage: its tiles have come; the cluster's consumers have left it
  int stage = 0, parity = 0;

  FASTLLM_DEVICE explicit Ring(char* shared) : memory(shared) {
    full = reinterpret_cast<uint64_t*>(shared + kBarriers);
    empty = full + kStages;
  }
  FASTLLM_DEVICE void init() const {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, Blocks * kConsumerWarps);
    }
    mbarrier_init_done();
  }
  FASTLLM_DEVICE char* left() const { return memory + stage * kStage; }
  FASTLLM_DEVICE char* right() const { return left() + kLeft; }
  FASTLLM_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Grid {
  int64_t row_tiles, column_tiles;  // a cluster's tiles, one above the other, count as one
  int64_t steps;                    // tiles along the inner dimension
};

// Calls f(row, column) with the first row and column of each tile of this block.
template <int N, int Blocks, class F>
FASTLLM_DEVICE void for_each_tile(const Grid& grid, const F& f) {
  for (int64_t t = blockIdx.x / Blocks; t < grid.row_tiles * grid.column_tiles; t += gridDim.x / Blocks) {
    const Tile tile = tile_at(t, grid.row_tiles, grid.column_tiles);
    f((tile.row * Blocks + blockIdx.x % Blocks) * kRows, tile.column * N);
  }
}

template <int N, int Blocks>
FASTLLM_DEVICE void copy_tiles(Ring<N, Blocks> ring, const TensorMap* a, const TensorMap* b, const Grid& grid) {
  for_each_tile<N, Blocks>(grid, [&](int64_t row, int64_t column) {
    for (int64_t step = 0; step < grid.steps; ++step) {
      uint64_t* full = ring.full + ring.stage;
      mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
      mbarrier_expect(full, ring.kStage);
      tma_load(ring.left(), a, row, step * kInner, full);
      if constexpr (Blocks == 1) {
        tma_load(ring.right(), b, column, step * kInner, full);
      } else {
        const int share = cluster_rank();
        tma_load_to_cluster(ring.right() + share * ring.kShare, b, column + share * (N / Blocks), step * kInner, full,
                            (1 << Blocks) - 1);
      }
      ring.advance();
    }
  });
}

// Bias and ReLU on the 16 rows of sums that a warp holds, which then go out 64 columns at a time, 16 bytes a thread.
template <class T, int N>
FASTLLM_DEVICE void store_rows(const float (&sums)[N / 2], const Product& p, int64_t row, int64_t column, T* staged) {
  const int lane = threadIdx.x % kWarp;
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int slice = 0; slice < N / kSlice; ++slice) {
#pragma unroll
    for (int j = 0; j < kSlice / 8; ++j) {
      const int i = (slice * kSlice / 8 + j) * 4, across = j * 8 + lane % 4 * 2;
      const int64_t c = column + slice * kSlice + across;
      Vec<T, 2> added{};
      if (bias != nullptr && c < p.columns) added = load_vec<2>(bias + c);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<T, 2> pair;
        pair.items[0] = narrow<T>(relu_if(p.relu, sums[i + 2 * half] + widen(added.items[0])));
        pair.items[1] = narrow<T>(relu_if(p.relu, sums[i + 2 * half + 1] + widen(added.items[1])));
        store_vec(staged + (lane / 4 + 8 * half) * kPitch + across, pair);
      }
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const int r = i * 4 + lane / 8, across = lane % 8 * 8;
      const int64_t c = column + slice * kSlice + across;
      const auto out = load_vec<8>(staged + r * kPitch + across);
      if (row + r < p.rows && c < p.columns) store_vec_cached(static_cast<T*>(p.c) + (row + r) * p.columns + c, out);
    }
    sync_warp();
  }
}

template <class T, int N, int Blocks>
FASTLLM_DEVICE void multiply_tiles(Ring<N, Blocks> ring, const Product& p, const Grid& grid) {
  const int consumer = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x / kWarp - kWarpgroup / kWarp;
  const int half = consumer * (kRows / 2);
  T* staged = reinterpret_cast<T*>(ring.memory + ring.kStaging) + warp * kWarpRows * kPitch;
  const auto leave = [&](int stage) {
    const int lane = threadIdx.x % kWarp;
    if (lane < Blocks) mbarrier_arrive_at(ring.empty + stage, lane);
  };
  for_each_tile<N, Blocks>(grid, [&](int64_t row, int64_t column) {
    float sums[N / 2];
    int last = 0;
    for (int64_t step = 0; step < grid.steps; ++step) {
      mbarrier_wait(ring.full + ring.stage, ring.parity);
      const uint64_t left = matrix_descriptor(ring.left() + half * kInner * 2), right = matrix_descriptor(ring.right());
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kInner / 16; ++k)
        wgmma<T, N>(sums, left + k * kNextInner, right + k * kNextInner, step > 0 || k > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) leave(last);
      last = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
    hold(sums);
    leave(last);
    store_rows<T, N>(sums, p, row + half + warp % 4 * kWarpRows, column, staged);
  });
}

template <class T, int N, int Blocks>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_wgmma(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, Product p, Grid grid) {
#ifdef FASTLLM_HOPPER
  const Ring<N, Blocks> ring(shared_memory());
  if (threadIdx.x == 0) ring.init();
  sync_cluster();
  if (threadIdx.x < kWarpgroup) {
    give_registers<40>();
    if (threadIdx.x == 0) copy_tiles(ring, &a, &b, grid);
    sync_cluster();  // no block ends while another copies into it or arrives at its barriers
  } else {
    take_registers<232>();
    multiply_tiles<T>(ring, p, grid);
    sync_cluster();
  }
#else
  __trap();  // gemm_wgmma_runs() told that this target has no such kernel
#endif
}

int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  if (returned(cudaGetDevice(&device)) != cudaSuccess) return 1;
  return returned(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) == cudaSuccess ? count : 1;
#else
  return 4;  // played: several tiles a block
#endif
}

template <class T, int N, int Blocks>
Status run_tiles(const Product& p, Stream stream) {
  const Grid grid{ceil_div(p.rows, Blocks * kRows), ceil_div(p.columns, N), ceil_div(p.inner, kInner)};
  TensorMap a, b;
  Status status = make_tensor_map(&a, p.dtype, p.a, p.rows, p.inner, p.a_row, kRows);
  if (status == 0) status = make_tensor_map(&b, p.dtype, p.b, p.columns, p.inner, p.b_row, N / Blocks);
  if (status != 0) return status;
  const int64_t wanted = grid.row_tiles * grid.column_tiles, most = multiprocessors() / Blocks;
  const Shape shape{(wanted < most ? wanted : most) * Blocks, kThreads, Ring<N, Blocks>::kShared, Blocks};
  return launch(multiply_wgmma<T, N, Blocks>, shape, stream, a, b, p, grid);
}

// Wide tiles and clusters where they give every multiprocessor work.
template <class T>
Status run(const Product& p, Stream stream) {
  const bool wide = ceil_div(p.rows, 2 * kRows) * ceil_div(p.columns, 256) >= multiprocessors() / 2;
  return wide && p.rows > kRows ? run_tiles<T, 256, 2>(p, stream) : run_tiles<T, 128, 1>(p, stream);
}

}  // namespace

bool gemm_wgmma_runs() {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  if (returned(cudaGetDevice(&device)) != cudaSuccess) return false;
  returned(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  returned(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  // Built for sm_90 without its "a" the kernel is a trap, which needs next to no registers.
  cudaFuncAttributes attributes{};
  return returned(cudaFuncGetAttributes(&attributes, multiply_wgmma<bf16, 256, 2>)) == cudaSuccess &&
         attributes.numRegs > 100;
#else
  return true;
#endif
}

bool gemm_wgmma_serves(const Product& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return (p.dtype == DType::kBF16 || p.dtype == DType::kF16) && p.b_turned && p.hidden == nullptr &&
         p.sums == nullptr && in_whole_vectors(p.a, p.a_row) && in_whole_vectors(p.b, p.b_row) &&
         in_whole_vectors(p.c, p.columns) && (reinterpret_cast<uintptr_t>(p.bias) % 4 == 0) && p.rows < kMost &&
         p.columns < kMost && p.inner < kMost;
}

Status gemm_wgmma(const Product& p, Stream stream) {
  return p.dtype == DType::kBF16 ? run<bf16>(p, stream) : run<f16>(p, stream);
}

}  // namespace fastllm::cuda
