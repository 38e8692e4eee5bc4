// The plain form of csrc/cuda/tensor_core.cuh. A copy is done at the last moment that the program allows, and until
// then its target holds NaN: a wait that is missing or too early shows in the result.
#pragma once
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

namespace fastllm::cuda {

// What a thread has under way; empty at a thread's first use.
template <class Work>
Work& under_way() {
  static std::unordered_map<const void*, Work> all;
  static uint64_t generation = 0;
  if (generation != cuda_host::generation()) all.clear();
  generation = cuda_host::generation();
  return all[cuda_host::current];
}

inline void check_shared(const void* p, size_t bytes, size_t alignment) {
  const char *b = static_cast<const char*>(p), *begin = cuda_host::shared_memory();
  if (b < begin || b + bytes > begin + cuda_host::shared_size() || reinterpret_cast<uintptr_t>(p) % alignment != 0)
    cuda_host::fail("%zu bytes at %td of shared memory: outside or not aligned", bytes, b - begin);
}

// --- asynchronous copies ----------------------------------------------------------------------------------------

struct Copies {
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

inline void copy_async(void* shared, const void* global, int bytes) {
  check_shared(shared, 16, 16);
  if (bytes < 0 || bytes > 16) cuda_host::fail("copy_async: %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) cuda_host::fail("copy_async: misaligned source");
  if (bytes > 0) cuda_host::check_access(global, bytes, 2, false);
  std::memset(shared, 0xff, 16);
  under_way<Copies>().open.push_back({shared, global, bytes});
}
inline void copy_async_commit() {
  Copies& mine = under_way<Copies>();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int Pending>
void copy_async_wait() {
  Copies& mine = under_way<Copies>();
  for (; mine.groups.size() > Pending; mine.groups.pop_front())
    for (const auto& copy : mine.groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

// --- matrices ---------------------------------------------------------------------------------------------------

inline unsigned item_pair(const void* first, const void* second) {
  uint16_t low, high;
  std::memcpy(&low, first, 2);
  std::memcpy(&high, second, 2);
  return static_cast<unsigned>(low) | static_cast<unsigned>(high) << 16;
}
inline void load_matrices(unsigned (&r)[4], const void* row, bool turned = false) {
  check_shared(row, 16, 16);
  const uint64_t* rows = cuda_host::exchange(reinterpret_cast<uint64_t>(row));
  const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
  for (int j = 0; j < 4; ++j) {
    const auto at = [&](int i, int column) { return reinterpret_cast<const char*>(rows[8 * j + i]) + 2 * column; };
    r[j] = turned ? item_pair(at(2 * t, g), at(2 * t + 1, g)) : item_pair(at(g, 2 * t), at(g, 2 * t + 1));
  }
}
inline void load_matrices_turned(unsigned (&r)[4], const void* row) { load_matrices(r, row, true); }

template <class T>
float low_item(uint64_t pair) {
  return widen(T{static_cast<uint16_t>(pair)});
}
template <class T>
float high_item(uint64_t pair) {
  return widen(T{static_cast<uint16_t>(pair >> 16)});
}

template <class T>
void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
  float rows[2][16], columns[2][16];  // inner 4 q to 4 q + 3 of this lane's rows and columns, at 4 q
  const auto spread = [](float* to, uint64_t pair, int inner) {
    to[inner] = low_item<T>(pair);
    to[inner + 1] = high_item<T>(pair);
  };
  for (int half = 0; half < 2; ++half) {  // inner 0 to 7, then 8 to 15
    const uint64_t* given = cuda_host::exchange(a[2 * half] | static_cast<uint64_t>(a[2 * half + 1]) << 32);
    for (int q = 0; q < 4; ++q) {
      spread(rows[0], given[4 * g + q], 8 * half + 2 * q);
      spread(rows[1], given[4 * g + q] >> 32, 8 * half + 2 * q);
    }
  }
  const uint64_t* given = cuda_host::exchange(b0 | static_cast<uint64_t>(b1) << 32);
  for (int c = 0; c < 2; ++c)
    for (int q = 0; q < 4; ++q) {
      const uint64_t pair = given[4 * (2 * t + c) + q];
      spread(columns[c], pair, 2 * q);
      spread(columns[c], pair >> 32, 8 + 2 * q);
    }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
}

}  // namespace fastllm::cuda
