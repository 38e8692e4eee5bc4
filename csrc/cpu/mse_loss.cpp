// Mean squared error, loss and gradient in one pass.
//
// Eager PyTorch reads input and target, writes the squares, reads them for the sum, then reads input and target again
// and writes the gradient: 7 streams and a fresh temporary. Here: two reads, one write. Differences and sums are
// float32 for bfloat16 and float16 (float64 for float64), so float16 does not overflow where the loss itself is finite.
#include "mse_loss.h"

#include "parallel.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Adds weight * (x - t)^2 over [begin, end) and writes grad = 2 weight (x - t) scale where asked.
template <class T, bool kGrad, bool kWeight>
acc_t<T> square_block(const T* x, const T* t, const T* w, T* grad, acc_t<T> scale, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int n = lanes<T>;
  vec<A> sum0{}, sum1{};
  const vec<A> twice = splat<A>(2 * scale);
  int64_t i = begin;
  for (; i + 2 * n <= end; i += 2 * n) {
    const vec<A> d0 = load(x + i) - load(t + i);
    const vec<A> d1 = load(x + i + n) - load(t + i + n);
    const vec<A> e0 = kWeight ? d0 * load(w + i) : d0;
    const vec<A> e1 = kWeight ? d1 * load(w + i + n) : d1;
    sum0 += d0 * e0;
    sum1 += d1 * e1;
    if constexpr (kGrad) {
      store(grad + i, e0 * twice);
      store(grad + i + n, e1 * twice);
    }
  }
  A tail = 0;
  for (; i < end; ++i) {
    const A d = to_acc(x[i]) - to_acc(t[i]);
    const A e = kWeight ? d * to_acc(w[i]) : d;
    tail += d * e;
    if constexpr (kGrad) grad[i] = from_acc<T>(e * (2 * scale));
  }
  return reduce_add(sum0 + sum1) + tail;
}

template <class T>
acc_t<T> sum_block(const T* x, int64_t begin, int64_t end) {
  vec<acc_t<T>> sum{};
  int64_t i = begin;
  for (; i + lanes<T> <= end; i += lanes<T>) sum += load(x + i);
  acc_t<T> tail = 0;
  for (; i < end; ++i) tail += to_acc(x[i]);
  return reduce_add(sum) + tail;
}

// Sums block(begin, end) over fixed blocks: partials in parallel, then in order.
template <class F>
double two_stage(int64_t n, double* partial, F block) {
  const int64_t blocks = mse_blocks(n);
  parallel_for(blocks, 4, [=](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = (b + 1) * kMseBlock;
      partial[b] = block(b * kMseBlock, end < n ? end : n);
    }
  });
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b];
  return sum;
}

template <class T>
double divisor(const T* w, int64_t n, int64_t reduction, double* partial) {
  if (reduction != kMean) return 1;
  if (w == nullptr) return static_cast<double>(n);
  return two_stage(n, partial, [=](int64_t b, int64_t e) { return sum_block(w, b, e); });
}

template <class T, bool kWeight>
void forward(const T* x, const T* t, const T* w, T* output, T* grad, int64_t n, int64_t reduction, double* partial) {
  using A = acc_t<T>;
  if (reduction == kNone) {
    parallel_for(n, 32768, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A d = to_acc(x[i]) - to_acc(t[i]);
        output[i] = from_acc<T>(kWeight ? d * d * to_acc(w[i]) : d * d);
      }
    });
    return;
  }
  const double by = divisor<T>(kWeight ? w : nullptr, n, reduction, partial);
  const A scale = static_cast<A>(1 / by);
  const double sum =
      grad != nullptr
          ? two_stage(n, partial,
                      [=](int64_t b, int64_t e) { return square_block<T, true, kWeight>(x, t, w, grad, scale, b, e); })
          : two_stage(n, partial, [=](int64_t b, int64_t e) {
              return square_block<T, false, kWeight>(x, t, w, grad, scale, b, e);
            });
  *output = from_acc<T>(static_cast<A>(sum / by));
}

template <class T, bool kWeight>
void backward(const T* g, const T* x, const T* t, const T* w, T* grad, int64_t n, int64_t reduction, double* partial) {
  using A = acc_t<T>;
  if (reduction == kNone) {
    parallel_for(n, 32768, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A d = to_acc(x[i]) - to_acc(t[i]);
        grad[i] = from_acc<T>(2 * (kWeight ? d * to_acc(w[i]) : d) * to_acc(g[i]));
      }
    });
    return;
  }
  const A scale = static_cast<A>(to_acc(*g) / divisor<T>(kWeight ? w : nullptr, n, reduction, partial));
  parallel_for(mse_blocks(n), 4, [=](int64_t first, int64_t last) {
    const int64_t end = last * kMseBlock;
    square_block<T, true, kWeight>(x, t, w, grad, scale, first * kMseBlock, end < n ? end : n);
  });
}

void forward_entry(DType dtype, const void* x, const void* t, const void* w, void* output, void* grad, int64_t n,
                   int64_t reduction, void* partial) {
  FASTLLM_SWITCH_DTYPE(dtype, {
    auto run = w != nullptr ? forward<T, true> : forward<T, false>;
    run(static_cast<const T*>(x), static_cast<const T*>(t), static_cast<const T*>(w), static_cast<T*>(output),
        static_cast<T*>(grad), n, reduction, static_cast<double*>(partial));
  })
}

void backward_entry(DType dtype, const void* g, const void* x, const void* t, const void* w, void* grad, int64_t n,
                    int64_t reduction, void* partial) {
  FASTLLM_SWITCH_DTYPE(dtype, {
    auto run = w != nullptr ? backward<T, true> : backward<T, false>;
    run(static_cast<const T*>(g), static_cast<const T*>(x), static_cast<const T*>(t), static_cast<const T*>(w),
        static_cast<T*>(grad), n, reduction, static_cast<double*>(partial));
  })
}

}  // namespace

extern const MseLossKernels mse_loss_kernels;
const MseLossKernels mse_loss_kernels = {forward_entry, backward_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
