// The plain form of csrc/cuda/hopper.cuh. Copies end when a thread asks their barrier, products when a thread waits for
// them: as late as the program allows. Until then the target of a copy holds NaN, so that a stage that is read too
// early or given back too soon shows in the result.
#pragma once
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

namespace fastllm::cuda {

// --- transaction barriers ---------------------------------------------------------------------------------------

struct Transactions {
  int32_t bytes;    // expected and not yet copied
  uint8_t count;    // arrivals that end a phase
  uint8_t pending;  // of the phase that runs
  uint8_t phase;
  uint8_t tag;
};
static_assert(sizeof(Transactions) == sizeof(uint64_t));
constexpr uint8_t kInitialized = 0xb7;

// The barrier that lies there in block `rank`.
inline uint64_t* barrier_of(uint64_t* barrier, int rank) {
  check_shared(barrier, 8, 8);
  return static_cast<uint64_t*>(cuda_host::map_shared(barrier, rank));
}
inline Transactions& transactions(uint64_t* barrier) {
  auto& t = *reinterpret_cast<Transactions*>(barrier);
  if (t.tag != kInitialized) cuda_host::fail("a barrier that nobody initialized");
  return t;
}
inline void end_phase_if_complete(Transactions& t) {
  cuda_host::made_progress();
  if (t.pending != 0 || t.bytes != 0) return;
  t.pending = t.count;
  t.phase ^= 1;
}

inline void mbarrier_init(uint64_t* barrier, int count) {
  check_shared(barrier, 8, 8);
  const auto c = static_cast<uint8_t>(count);
  *reinterpret_cast<Transactions*>(barrier) = {0, c, c, 0, kInitialized};
}
inline void mbarrier_init_done() {}
inline void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  Transactions& t = transactions(barrier_of(barrier, rank));
  if (t.pending == 0) cuda_host::fail("more arrivals than the barrier's count");
  --t.pending;
  end_phase_if_complete(t);
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_at(barrier, cuda_host::cluster_rank()); }
inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  check_shared(barrier, 8, 8);
  transactions(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}

// --- bulk tensor copies -----------------------------------------------------------------------------------------

constexpr int kTileBytes = 128;  // of a row

struct TensorMap {
  const char* base;
  int64_t rows, columns, row_items;
  int tile_rows;
};
inline Status make_tensor_map(TensorMap* map, DType, const void* base, int64_t rows, int64_t columns, int64_t row_items,
                              int tile_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || row_items % 8 != 0 || tile_rows > 256) return 1;
  *map = {static_cast<const char*>(base), rows, columns, row_items, tile_rows};
  return 0;
}

struct BulkCopy {
  char* tile;
  TensorMap map;
  int64_t row, column;

  void run() const {
    for (int r = 0; r < map.tile_rows; ++r)
      for (int piece = 0; piece < 8; ++piece) {
        char* to = tile + r * kTileBytes + (piece ^ (r % 8)) * 16;
        const int64_t c = column + piece * 8, left = row + r < map.rows ? map.columns - c : 0;
        const int64_t bytes = left < 0 ? 0 : left < 8 ? left * 2 : 16;
        const char* from = map.base + ((row + r) * map.row_items + c) * 2;
        if (bytes > 0) cuda_host::check_access(from, bytes, 2, false);
        std::memset(to, 0, 16);
        if (bytes > 0) std::memcpy(to, from, bytes);
      }
  }
};

struct BulkCopies {
  uint64_t generation = 0;
  std::unordered_map<uint64_t*, std::vector<BulkCopy>> of;  // each barrier
};
inline BulkCopies& bulk_copies() {
  static BulkCopies all;
  if (all.generation != cuda_host::generation()) all.of.clear();
  all.generation = cuda_host::generation();
  return all;
}

inline void tma_load_to_cluster(void* tile, const TensorMap* map, int64_t row, int64_t column, uint64_t* barrier,
                                unsigned short blocks) {
  const int bytes = map->tile_rows * kTileBytes;
  check_shared(tile, bytes, 1024);
  for (int rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    char* there = static_cast<char*>(cuda_host::map_shared(tile, rank));
    uint64_t* its = barrier_of(barrier, rank);
    transactions(its);
    std::memset(there, 0xff, bytes);
    bulk_copies().of[its].push_back({there, *map, row, column});
  }
}
inline void tma_load(void* tile, const TensorMap* map, int64_t row, int64_t column, uint64_t* barrier) {
  tma_load_to_cluster(tile, map, row, column, barrier, 1 << cuda_host::cluster_rank());
}

inline void mbarrier_wait(uint64_t* barrier, int parity) {
  check_shared(barrier, 8, 8);
  while (true) {
    Transactions& t = transactions(barrier);
    auto& copies = bulk_copies().of;
    if (const auto found = copies.find(barrier); found != copies.end()) {
      for (const BulkCopy& copy : found->second) {
        copy.run();
        t.bytes -= copy.map.tile_rows * kTileBytes;
      }
      copies.erase(found);
      end_phase_if_complete(t);
    }
    if (t.phase != parity) return;
    cuda_host::yield();
  }
}

// --- products of a warpgroup ------------------------------------------------------------------------------------

inline uint64_t matrix_descriptor(const void* tile) {
  check_shared(tile, kTileBytes, 16);
  const uint64_t address = static_cast<const char*>(tile) - cuda_host::shared_memory();
  return address >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
constexpr uint64_t kNextInner = 32 >> 4;

// 16 items of row `row` of a descriptor's tile: the swizzle is one of addresses.
template <class T>
void described_row(uint64_t descriptor, int row, float (&items)[16]) {
  const uint64_t eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) cuda_host::fail("wgmma: a descriptor without the 128-byte swizzle");
  const uint64_t start = ((descriptor & 0x3fff) << 4) + row / 8 * eight_rows + row % 8 * kTileBytes;
  for (int piece = 0; piece < 2; ++piece) {
    uint64_t address = start + piece * 16;
    address ^= (address >> 7 & 7) << 4;
    const char* from = cuda_host::shared_memory() + address;
    check_shared(from, 16, 16);
    uint16_t bits[8];
    std::memcpy(bits, from, 16);
    for (int i = 0; i < 8; ++i) items[piece * 8 + i] = widen(T{bits[i]});
  }
}

template <class T>
void multiply_described(float* sums, int columns, uint64_t a, uint64_t b, bool add) {
  const int thread = static_cast<int>(threadIdx.x % 128), lane = thread % 32;
  float left[2][16], right[16];
  for (int half = 0; half < 2; ++half) described_row<T>(a, thread / 32 * 16 + lane / 4 + 8 * half, left[half]);
  for (int j = 0; j < columns / 8; ++j)
    for (int c = 0; c < 2; ++c) {
      described_row<T>(b, j * 8 + lane % 4 * 2 + c, right);
      for (int half = 0; half < 2; ++half) {
        float sum = add ? sums[j * 4 + half * 2 + c] : 0.f;
        for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
        sums[j * 4 + half * 2 + c] = sum;
      }
    }
}

struct Products {
  struct One {
    void (*multiply)(float*, int, uint64_t, uint64_t, bool);
    float* sums;
    int columns;
    uint64_t a, b;
    bool add;
  };
  std::vector<One> open;
  std::deque<std::vector<One>> groups;
};

// The real instructions are those of whole warps: no lane passes before the others have come.
inline void wgmma_begin() { sync_warp(); }
template <class T, int N>
void wgmma(float (&sums)[N / 2], uint64_t a, uint64_t b, bool add) {
  under_way<Products>().open.push_back({multiply_described<T>, sums, N, a, b, add});
}
inline void wgmma_commit() {
  Products& mine = under_way<Products>();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int Pending>
void wgmma_wait() {
  Products& mine = under_way<Products>();
  for (; mine.groups.size() > Pending; mine.groups.pop_front())
    for (const auto& one : mine.groups.front()) one.multiply(one.sums, one.columns, one.a, one.b, one.add);
  sync_warp();
}
template <int Count>
void hold(float (&)[Count]) {}

template <int Registers>
void give_registers() {}
template <int Registers>
void take_registers() {}

}  // namespace fastllm::cuda
