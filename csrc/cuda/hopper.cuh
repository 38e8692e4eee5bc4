// Hopper's instructions by name: transaction barriers, bulk tensor copies, warpgroup products (sm_90a). The host build
// plays them: host_hopper.h.
//
// A tile here is `rows` rows of 64 16-bit items (128 bytes), with TMA's 128-byte swizzle: piece p (16 bytes) of row r
// lies at r 128 + (p xor r % 8) 16. Tiles are aligned to 1024 bytes.
#pragma once
#include "common.cuh"
#include "tensor_core.cuh"

#ifndef __CUDACC__
#include "host_hopper.h"
#else
#include <cuda.h>

namespace fastllm::cuda {

// --- transaction barriers in shared memory: a phase ends when `count` arrivals and all expected bytes have come
// --------

FASTLLM_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// By the thread that initialized them, before the block's barrier.
FASTLLM_DEVICE void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
FASTLLM_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The barrier that lies there in block `rank` of the cluster.
FASTLLM_DEVICE void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// One arrival, which makes the phase wait for `bytes` of bulk copies too.
FASTLLM_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; the phase before a barrier's first counts as one of parity 1.
FASTLLM_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- bulk tensor copies
// -----------------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// A map of a row-major matrix, rows `row_items` apart, for tiles of `tile_rows`; zeros outside of the matrix.
inline Status make_tensor_map(TensorMap* map, DType dtype, const void* base, int64_t rows, int64_t columns,
                              int64_t row_items, int tile_rows) {
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const Status status = returned(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (found == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_items) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(tile_rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      map, dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<Status>(result);  // CUDA's two interfaces number these errors alike
}

// The tile whose first item is (row, column); its bytes, those outside of the matrix too, count for the barrier.
FASTLLM_DEVICE void tma_load(void* tile, const TensorMap* map, int64_t row, int64_t column, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(tile)),
      "l"(map), "r"(shared_address(barrier)), "r"(static_cast<int>(column)), "r"(static_cast<int>(row))
      : "memory");
}

// The same into every block of the cluster that `blocks` has a bit for, at the same place; each block's barrier there
// counts the bytes that it gets.
FASTLLM_DEVICE void tma_load_to_cluster(void* tile, const TensorMap* map, int64_t row, int64_t column,
                                        uint64_t* barrier, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(barrier)), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "h"(blocks)
      : "memory");
}

// --- products of a warpgroup (128 threads)
// ----------------------------------------------------------------------------

// A tile as wgmma's operand, whose inner index runs along the rows. The next 16 items of inner are kNextInner further.
FASTLLM_DEVICE uint64_t matrix_descriptor(const void* tile) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}
constexpr uint64_t kNextInner = 32 >> 4;

FASTLLM_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTLLM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups but the last `Pending` have ended.
template <int Pending>
FASTLLM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The compiler moves no use of `sums` across this.
template <int Count>
FASTLLM_DEVICE void hold(float (&sums)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums (64, N) = a (64, 16) b (N, 16)^T, added to them where asked. Item i of thread t lies in row
// t / 32 16 + t % 32 / 4 + i / 2 % 2 8 and column i / 4 8 + t % 4 2 + i % 2.
template <class T, int N>
FASTLLM_DEVICE void wgmma(float (&sums)[N / 2], uint64_t a, uint64_t b, bool add);

#define FASTLLM_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTLLM_SUMS16(i) FASTLLM_SUMS4(i), FASTLLM_SUMS4(i + 4), FASTLLM_SUMS4(i + 8), FASTLLM_SUMS4(i + 12)
#define FASTLLM_SUMS64(i) FASTLLM_SUMS16(i), FASTLLM_SUMS16(i + 16), FASTLLM_SUMS16(i + 32), FASTLLM_SUMS16(i + 48)
#define FASTLLM_NAMES64                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTLLM_NAMES128                                                                         \
  FASTLLM_NAMES64                                                                                \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTLLM_WGMMA(T, N, types, names, sums, a_name, b_name, add_name)                                      \
  template <>                                                                                                  \
  FASTLLM_DEVICE void wgmma<T, N>(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {                       \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32." types " {" names "}, " a_name ", " b_name ", add, 1, 1, 0, 0;\n}"                  \
                 : sums                                                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                \
  }
#define FASTLLM_SUMS128 FASTLLM_SUMS64(0), FASTLLM_SUMS64(64)
FASTLLM_WGMMA(bf16, 128, "bf16.bf16", FASTLLM_NAMES64, FASTLLM_SUMS64(0), "%64", "%65", "%66")
FASTLLM_WGMMA(f16, 128, "f16.f16", FASTLLM_NAMES64, FASTLLM_SUMS64(0), "%64", "%65", "%66")
FASTLLM_WGMMA(bf16, 256, "bf16.bf16", FASTLLM_NAMES128, FASTLLM_SUMS128, "%128", "%129", "%130")
FASTLLM_WGMMA(f16, 256, "f16.f16", FASTLLM_NAMES128, FASTLLM_SUMS128, "%128", "%129", "%130")
#undef FASTLLM_WGMMA
#undef FASTLLM_NAMES128
#undef FASTLLM_NAMES64
#undef FASTLLM_SUMS128
#undef FASTLLM_SUMS64
#undef FASTLLM_SUMS16
#undef FASTLLM_SUMS4

// Registers that a warpgroup gives back or takes; each warpgroup of the block once, in branches of one if.
template <int Registers>
FASTLLM_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
FASTLLM_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace fastllm::cuda
#endif
