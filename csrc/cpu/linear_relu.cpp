// What surrounds the matrix products of linear + ReLU.
//
// Forward: bias and ReLU in one pass over the product, where it stands (eager: ReLU reads it and writes a second
// tensor). Backward: mask and bias gradient in one pass (eager: one pass writes the masked gradient, another reads it
// to sum). Only the output is kept for backward: it is positive exactly where the gradient passes.
#include "linear_relu.h"

#include "parallel.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // items worth a thread

template <class T>
FASTLLM_INLINE vec<acc_t<T>> load_some(const T* p, int64_t size) {
  return size == lanes<T> ? load(p) : load_partial(p, size, acc_t<T>(0));
}

template <class T>
FASTLLM_INLINE void store_some(T* p, vec<acc_t<T>> v, int64_t size) {
  if (size == lanes<T>)
    store(p, v);
  else
    store_partial(p, v, size);
}

// One vector of columns of kRows rows of c.
template <class T, int kRows, class B>
FASTLLM_INLINE void small_tile(const SmallProduct& s, const B* b, int64_t b_inner, int64_t i, int64_t j, int64_t size) {
  using A = acc_t<T>;
  const T* a = static_cast<const T*>(s.a) + i * s.a_row;
  vec<A> total[kRows] = {};
  // Sums of a few hundred terms join the total one by one: the error grows with their number, not with `inner`.
  for (int64_t begin = 0; begin < s.inner; begin += 256) {
    const int64_t end = begin + 256 < s.inner ? begin + 256 : s.inner;
    vec<A> sum[kRows] = {};
    for (int64_t p = begin; p < end; ++p) {
      const vec<A> v = load_some(b + p * b_inner + j, size);
      for (int k = 0; k < kRows; ++k) sum[k] += v * to_acc(a[k * s.a_row + p * s.a_inner]);
    }
    for (int k = 0; k < kRows; ++k) total[k] += sum[k];
  }
  const T* bias = static_cast<const T*>(s.bias);
  for (int k = 0; k < kRows; ++k) {
    vec<A> v = total[k];
    if (bias != nullptr) v += load_some(bias + j, size);
    if (s.relu) v = v <= 0 ? vec<A>{} : v;
    store_some(static_cast<T*>(s.c) + (i + k) * s.columns + j, v, size);
  }
}

template <class T, class B>
void small_rows(const SmallProduct& s, const B* b, int64_t b_inner) {
  constexpr int w = lanes<T>;
  for (int64_t j = 0; j < s.columns; j += w) {
    const int64_t size = s.columns - j < w ? s.columns - j : w;
    int64_t i = 0;
    for (; i + 8 <= s.rows; i += 8) small_tile<T, 8>(s, b, b_inner, i, j, size);
    for (; i < s.rows; ++i) small_tile<T, 1>(s, b, b_inner, i, j, size);
  }
}

template <class T>
void small_product(const SmallProduct& s) {
  const T* b = static_cast<const T*>(s.b);
  if (s.b_column == 1) return small_rows<T>(s, b, s.b_inner);
  acc_t<T> turned[kSmallTranspose];
  for (int64_t j = 0; j < s.columns; ++j)
    for (int64_t p = 0; p < s.inner; ++p) turned[p * s.columns + j] = to_acc(b[p * s.b_inner + j * s.b_column]);
  small_rows<T>(s, turned, s.columns);
}

void small_product_entry(const SmallProduct& s) { FASTLLM_SWITCH_DTYPE(s.dtype, small_product<T>(s)) }

// relu(NaN) is NaN: only what compares below zero, or equal, becomes zero.
template <class T>
void bias_relu(T* y, const T* bias, int64_t rows, int64_t columns) {
  constexpr int w = lanes<T>;
  parallel_for(rows, kGrain / (columns + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = y + r * columns;
      for (int64_t c = 0; c < columns; c += w) {
        const int64_t size = columns - c < w ? columns - c : w;
        vec<acc_t<T>> v = load_some(row + c, size);
        if (bias != nullptr) v += load_some(bias + c, size);
        store_some(row + c, v <= 0 ? vec<acc_t<T>>{} : v, size);
      }
    }
  });
}

template <class T>
void fill_rows(T* y, const T* bias, int64_t rows, int64_t columns) {
  parallel_for(rows, kGrain / (columns + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::memcpy(y + r * columns, bias, static_cast<size_t>(columns) * sizeof(T));
  });
}

// One block of rows and one stripe of columns [c, c + kTile vectors).
template <class T>
void mask_sum_tile(const T* dy, const T* y, T* dz, acc_t<T>* partial, int64_t first, int64_t last, int64_t c,
                   int64_t width, int64_t columns) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  for (int64_t k = 0; k < width; k += w) {
    const int64_t size = width - k < w ? width - k : w;
    vec<A> sum{};
    for (int64_t r = first; r < last; ++r) {
      const int64_t i = r * columns + c + k;
      vec<A> g = load_some(dy + i, size);
      if (y != nullptr) {
        g = load_some(y + i, size) <= 0 ? vec<A>{} : g;
        store_some(dz + i, g, size);
      }
      sum += g;
    }
    if (partial != nullptr) store_some(partial + c + k, sum, size);
  }
}

template <class T>
void mask_sum(const T* dy, const T* y, T* dz, T* sums, int64_t rows, int64_t columns, acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int64_t stripe = 8 * lanes<T>;
  const int64_t blocks = column_blocks(rows), stripes = (columns + stripe - 1) / stripe;
  A* to = sums == nullptr ? nullptr : partial;
  parallel_for(blocks * stripes, kGrain / (kColumnBlock * stripe) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / stripes, c = (t % stripes) * stripe;
      const int64_t first = b * kColumnBlock, last = first + kColumnBlock < rows ? first + kColumnBlock : rows;
      const int64_t width = columns - c < stripe ? columns - c : stripe;
      mask_sum_tile(dy, y, dz, to == nullptr ? nullptr : to + b * columns, first, last, c, width, columns);
    }
  });
  if (sums == nullptr) return;
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * columns + c];
    sums[c] = from_acc<T>(static_cast<A>(sum));
  }
}

void bias_relu_entry(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns) {
  FASTLLM_SWITCH_DTYPE(dtype, bias_relu(static_cast<T*>(y), static_cast<const T*>(bias), rows, columns))
}

void fill_rows_entry(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns) {
  FASTLLM_SWITCH_DTYPE(dtype, fill_rows(static_cast<T*>(y), static_cast<const T*>(bias), rows, columns))
}

void mask_sum_entry(DType dtype, const void* dy, const void* y, void* dz, void* sums, int64_t rows, int64_t columns,
                    void* partial) {
  FASTLLM_SWITCH_DTYPE(dtype, mask_sum(static_cast<const T*>(dy), static_cast<const T*>(y), static_cast<T*>(dz),
                                       static_cast<T*>(sums), rows, columns, static_cast<acc_t<T>*>(partial)))
}

}  // namespace

extern const LinearReluKernels linear_relu_kernels;
const LinearReluKernels linear_relu_kernels = {small_product_entry, bias_relu_entry, fill_rows_entry, mask_sum_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
