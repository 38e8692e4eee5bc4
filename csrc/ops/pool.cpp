#include "pool.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

namespace fastllm::pool {
namespace {

constexpr int64_t kSmallest = int64_t{1} << 19;  // below this glibc reuses memory well by itself
constexpr int64_t kHugePage = int64_t{1} << 21;

int64_t default_limit() {
  if (const char* text = std::getenv("FASTLLM_POOL_LIMIT")) {
    char* end = nullptr;
    const long long bytes = std::strtoll(text, &end, 10);
    TORCH_CHECK_VALUE(end != text && *end == '\0' && bytes >= 0,
                      "FASTLLM_POOL_LIMIT: expected a number of bytes >= 0, got '", text, "'");
    return bytes;
  }
  const int64_t ram = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  return std::min<int64_t>(ram / 8, int64_t{4} << 30);
}

class Pool final : public c10::Allocator {
 public:
  Pool() : limit_(default_limit()) {}

  c10::DataPtr allocate(size_t nbytes) override {
    const int64_t size = rounded(static_cast<int64_t>(nbytes));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // The smallest kept block that fits, unless a quarter of it would lie unused.
      auto it = idle_.lower_bound(size);
      if (it != idle_.end() && it->first <= size + size / 4) {
        void* block = it->second;
        in_use_[block] = it->first;
        idle_bytes_ -= it->first;
        in_use_bytes_ += it->first;
        idle_.erase(it);
        ++hits_;
        return wrap(block);
      }
    }
    void* block = map_block(size);
    std::lock_guard<std::mutex> lock(mutex_);
    in_use_[block] = size;
    in_use_bytes_ += size;
    ++misses_;
    return wrap(block);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Pool::release; }

  void copy_data(void* destination, const void* source, std::size_t count) const override {
    default_copy_data(destination, source, count);
  }

  void set_limit(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim(limit_);
  }
  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    trim(0);
  }
  bool enabled() const { return limit_ > 0; }
  Stats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {limit_, idle_bytes_, in_use_bytes_, hits_, misses_};
  }
  std::mutex& mutex() { return mutex_; }

 private:
  static int64_t rounded(int64_t n) { return (n + kHugePage - 1) / kHugePage * kHugePage; }

  static void* map_block(int64_t size) {
    // Over-mapped by one huge page and cut to its boundary.
    const int64_t mapped = size + kHugePage;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, base != MAP_FAILED, "fastllm: not enough memory for ", size, " bytes");
    const auto start = reinterpret_cast<uintptr_t>(base);
    const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > start) munmap(base, aligned - start);
    const uintptr_t tail = start + mapped - (aligned + size);
    if (tail > 0) munmap(reinterpret_cast<void*>(aligned + size), tail);
    madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    return reinterpret_cast<void*>(aligned);
  }

  c10::DataPtr wrap(void* block) { return {block, block, &Pool::release, c10::Device(c10::kCPU)}; }

  static void release(void* block);

  void give_back(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = in_use_.find(block);
    const int64_t size = it->second;
    in_use_.erase(it);
    in_use_bytes_ -= size;
    if (size > limit_) {
      munmap(block, size);
      return;
    }
    trim(limit_ - size);
    idle_.emplace(size, block);
    idle_bytes_ += size;
  }

  // Unmaps idle blocks, smallest first, until at most `bytes` are kept.
  void trim(int64_t bytes) {
    while (idle_bytes_ > bytes) {
      auto it = idle_.begin();
      munmap(it->second, it->first);
      idle_bytes_ -= it->first;
      idle_.erase(it);
    }
  }

  std::mutex mutex_;
  int64_t limit_;
  int64_t idle_bytes_ = 0, in_use_bytes_ = 0, hits_ = 0, misses_ = 0;
  std::multimap<int64_t, void*> idle_;
  std::map<void*, int64_t> in_use_;
};

// Never destroyed: tensors may outlive static destruction.
Pool& instance() {
  static Pool* pool = [] {
    auto* made = new Pool();
    // A fork while another thread holds the lock must not leave it locked in the child.
    pthread_atfork([] { instance().mutex().lock(); }, [] { instance().mutex().unlock(); },
                   [] { instance().mutex().unlock(); });
    return made;
  }();
  return *pool;
}

void Pool::release(void* block) { instance().give_back(block); }

bool pooled(int64_t nbytes) { return nbytes >= kSmallest && instance().enabled(); }

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const int64_t nbytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
  if (!pooled(nbytes)) return at::detail::empty_cpu(sizes, dtype);
  return at::detail::empty_generic(sizes, &instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

at::Tensor empty_like(const at::Tensor& like) {
  if (like.is_contiguous() || !like.is_non_overlapping_and_dense()) return empty(like.sizes(), like.scalar_type());
  const int64_t nbytes = like.numel() * static_cast<int64_t>(like.element_size());
  if (!pooled(nbytes)) return at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type());
  return at::detail::empty_strided_generic(like.sizes(), like.strides(), &instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type());
}

void set_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "set_pool_limit: bytes must be >= 0, got ", bytes);
  instance().set_limit(bytes);
}
Stats stats() { return instance().stats(); }
void clear() { instance().clear(); }

}  // namespace fastllm::pool
