// sm_80's matrix instructions and asynchronous copies by name. The host build plays them: host_tensor_core.h.
#pragma once
#include "primitives.cuh"

#ifndef __CUDACC__
#include "host_tensor_core.h"
#else

namespace fastllm::cuda {

FASTLLM_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, of which `bytes` (0 to 16) are read and the rest becomes 0. Both ends aligned
// to
// 16. The copy ends at a wait of the same thread.
FASTLLM_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
FASTLLM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of this thread but the last `Pending` have ended.
template <int Pending>
FASTLLM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit items; lane 8 j + i points to row i of matrix j (16 bytes). Register j of lane L gets
// items 2 (L % 4) and + 1 of row L / 4 of matrix j; turned: of its column L / 4.
FASTLLM_DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FASTLLM_DEVICE void load_matrices_turned(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, 16 x 8 x 16. With g = lane / 4 and t = lane % 4: d holds rows g (0, 1) and g + 8 (2, 3), columns 2t and +
// 1; a rows g (0, 2) and g + 8 (1, 3), inner 2t and + 1 (0, 1) or + 8 (2, 3); b column g, inner 2t (b0) and + 8 (b1).
template <class T>
FASTLLM_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastllm::cuda
#endif
