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

// One vector of row i of c. A column-major c is written item by item: it is small.
template <class T>
FASTLLM_INLINE void put(const SmallProduct& s, vec<acc_t<T>> v, int64_t i, int64_t j, int64_t size) {
  T* c = static_cast<T*>(s.c) + i * s.c_row;
  if (s.c_column == 1) {
    store_some(c + j, v, size);
    return;
  }
  T items[lanes<T>];
  store(items, v);
  for (int64_t k = 0; k < size; ++k) c[(j + k) * s.c_column] = items[k];
}

// kRows rows and two vectors of columns of c; b: the columns from j on, rows b_inner apart. kSums: also b's own sums.
template <class T, int kRows, bool kSums, class B>
FASTLLM_INLINE void small_tile(const SmallProduct& s, const B* b, int64_t b_inner, int64_t i, int64_t j, int64_t size) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  const T* a = static_cast<const T*>(s.a) + i * s.a_row;
  const int64_t first = size < w ? size : w, second = size - first;
  vec<A> total[kRows][2] = {}, total_of_b[2] = {};
  // Sums of a few hundred terms join the total one by one: the error grows with their number, not with `inner`.
  for (int64_t begin = 0; begin < s.inner; begin += 256) {
    const int64_t end = begin + 256 < s.inner ? begin + 256 : s.inner;
    vec<A> sum[kRows][2] = {}, sum_of_b[2] = {};
    for (int64_t p = begin; p < end; ++p) {
      const vec<A> u = load_some(b + p * b_inner, first);
      const vec<A> v = second > 0 ? load_some(b + p * b_inner + w, second) : vec<A>{};
      for (int k = 0; k < kRows; ++k) {
        const A factor = to_acc(a[k * s.a_row + p * s.a_inner]);
        sum[k][0] += u * factor;
        sum[k][1] += v * factor;
      }
      if constexpr (kSums) {
        sum_of_b[0] += u;
        sum_of_b[1] += v;
      }
    }
    for (int k = 0; k < kRows; ++k) {
      total[k][0] += sum[k][0];
      total[k][1] += sum[k][1];
    }
    total_of_b[0] += sum_of_b[0];
    total_of_b[1] += sum_of_b[1];
  }
  const T* bias = static_cast<const T*>(s.bias);
  for (int h = 0; h < 2; ++h) {
    const int64_t some = h == 0 ? first : second, column = j + h * w;
    if (some <= 0) continue;
    for (int k = 0; k < kRows; ++k) {
      vec<A> v = total[k][h];
      if (bias != nullptr) v += load_some(bias + column, some);
      if (s.relu) v = v <= 0 ? vec<A>{} : v;
      put<T>(s, v, i + k, column, some);
    }
    if constexpr (kSums) store_some(static_cast<T*>(s.column_sums) + column, total_of_b[h], some);
  }
}

template <class T, int kRows, class B>
FASTLLM_INLINE void small_rows(const SmallProduct& s, const B* b, int64_t b_inner, int64_t i, int64_t j, int64_t size) {
  if (i == 0 && s.column_sums != nullptr)
    small_tile<T, kRows, true>(s, b, b_inner, i, j, size);
  else
    small_tile<T, kRows, false>(s, b, b_inner, i, j, size);
}

template <class T, class B>
void small_stripe(const SmallProduct& s, const B* b, int64_t b_inner, int64_t i, int64_t last_row, int64_t j,
                  int64_t last_column) {
  constexpr int64_t wide = 2 * lanes<T>;
  for (; j < last_column; j += wide, b += wide) {
    const int64_t size = last_column - j < wide ? last_column - j : wide;
    int64_t r = i;
    for (; r + 8 <= last_row; r += 8) small_rows<T, 8>(s, b, b_inner, r, j, size);
    for (; r + 4 <= last_row; r += 4) small_rows<T, 4>(s, b, b_inner, r, j, size);
    for (; r < last_row; ++r) small_rows<T, 1>(s, b, b_inner, r, j, size);
  }
}

constexpr int64_t kTransposed = 4096;  // items of b, transposed to rows of contiguous columns in the first cache
constexpr int64_t kRowsOfTask = 256;

// transposed (last - first, width) = b's rows [first, last) and columns [j, j + width).
template <class T>
FASTLLM_INLINE void transpose(const SmallProduct& s, int64_t first, int64_t last, int64_t j, int64_t width,
                              acc_t<T>* transposed) {
  const T* b = static_cast<const T*>(s.b) + first * s.b_inner + j * s.b_column;
  for (int64_t c = 0; c < width; ++c)
    for (int64_t p = 0; p < last - first; ++p) transposed[p * width + c] = to_acc(b[p * s.b_inner + c * s.b_column]);
}

// A stripe of columns of b whose columns are not contiguous, transposed first.
template <class T>
void transposed_stripe(const SmallProduct& s, int64_t i, int64_t last_row, int64_t j, int64_t last_column) {
  acc_t<T> transposed[kTransposed];
  const int64_t width = last_column - j;
  transpose<T>(s, 0, s.inner, j, width, transposed);
  small_stripe<T>(s, transposed, width, i, last_row, j, last_column);
}

// kRows rows of a piece of the inner dimension, added to their totals (kRows, width): two vectors of columns at most.
template <class T, int kRows>
FASTLLM_INLINE void add_piece(const SmallProduct& s, const acc_t<T>* b, int64_t first, int64_t last, int64_t i,
                              int64_t width, acc_t<T>* total) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  const T* a = static_cast<const T*>(s.a) + i * s.a_row + first * s.a_inner;
  const int64_t left = width < w ? width : w, right = width - left;
  vec<A> sum[kRows][2] = {};
  for (int64_t p = 0; p < last - first; ++p) {
    const vec<A> u = load_some(b + p * width, left);
    const vec<A> v = right > 0 ? load_some(b + p * width + w, right) : vec<A>{};
    for (int k = 0; k < kRows; ++k) {
      const A factor = to_acc(a[k * s.a_row + p * s.a_inner]);
      sum[k][0] += u * factor;
      sum[k][1] += v * factor;
    }
  }
  for (int k = 0; k < kRows; ++k) {
    A* row = total + k * width;
    store_some(row, load_some(row, left) + sum[k][0], left);
    if (right > 0) store_some(row + w, load_some(row + w, right) + sum[k][1], right);
  }
}

// As transposed_stripe, for an inner dimension that is too long to be transposed at once: piece by piece, of a stripe
// of at most two vectors of columns. The sums of a piece join the totals, so that their error is that of short sums.
template <class T>
void transposed_pieces(const SmallProduct& s, int64_t i, int64_t last_row, int64_t j, int64_t last_column) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  constexpr int64_t piece = kTransposed / (2 * w) < 256 ? kTransposed / (2 * w) : 256;
  A transposed[piece * 2 * w], totals[kRowsOfTask * 2 * w], sums_of_b[2 * w] = {};
  const int64_t width = last_column - j, rows = last_row - i;
  for (int64_t k = 0; k < rows * width; ++k) totals[k] = 0;
  for (int64_t first = 0; first < s.inner; first += piece) {
    const int64_t last = first + piece < s.inner ? first + piece : s.inner;
    transpose<T>(s, first, last, j, width, transposed);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_piece<T, 4>(s, transposed, first, last, i + r, width, totals + r * width);
    for (; r < rows; ++r) add_piece<T, 1>(s, transposed, first, last, i + r, width, totals + r * width);
    if (i == 0 && s.column_sums != nullptr) {
      A sums[2 * w] = {};
      for (int64_t p = 0; p < last - first; ++p)
        for (int64_t c = 0; c < width; ++c) sums[c] += transposed[p * width + c];
      for (int64_t c = 0; c < width; ++c) sums_of_b[c] += sums[c];
    }
  }
  const T* bias = static_cast<const T*>(s.bias);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += w) {
      const int64_t size = width - c < w ? width - c : w;
      vec<A> v = load_some(totals + r * width + c, size);
      if (bias != nullptr) v += load_some(bias + j + c, size);
      if (s.relu) v = v <= 0 ? vec<A>{} : v;
      put<T>(s, v, i + r, j + c, size);
    }
  }
  if (i == 0 && s.column_sums != nullptr)
    for (int64_t c = 0; c < width; ++c) static_cast<T*>(s.column_sums)[j + c] = from_acc<T>(sums_of_b[c]);
}

template <class T>
void small_product(const SmallProduct& s) {
  constexpr int64_t wide = 2 * lanes<T>;
  const bool transpose = s.b_column != 1, in_pieces = transpose && s.inner > kTransposed / wide;
  const int64_t stripe = !transpose ? 8 * wide : in_pieces ? wide : kTransposed / s.inner / wide * wide;
  const int64_t stripes = (s.columns + stripe - 1) / stripe, blocks = (s.rows + kRowsOfTask - 1) / kRowsOfTask;
  const int64_t task_work =
      (s.columns < stripe ? s.columns : stripe) * s.inner * (s.rows < kRowsOfTask ? s.rows : kRowsOfTask);
  parallel_for(stripes * blocks, (int64_t{1} << 18) / (task_work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / stripes * kRowsOfTask, j = t % stripes * stripe;
      const int64_t last_row = i + kRowsOfTask < s.rows ? i + kRowsOfTask : s.rows;
      const int64_t last_column = j + stripe < s.columns ? j + stripe : s.columns;
      if (in_pieces)
        transposed_pieces<T>(s, i, last_row, j, last_column);
      else if (transpose)
        transposed_stripe<T>(s, i, last_row, j, last_column);
      else
        small_stripe<T>(s, static_cast<const T*>(s.b) + j, s.b_inner, i, last_row, j, last_column);
    }
  });
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
void mask_tile(const T* dy, const T* y, T* dz, acc_t<T>* partial, int64_t first, int64_t last, int64_t c, int64_t width,
               int64_t columns) {
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
void mask(const T* dy, const T* y, T* dz, int64_t rows, int64_t columns, acc_t<T>* partial) {
  constexpr int64_t stripe = 8 * lanes<T>;
  const int64_t blocks = column_blocks(rows), stripes = (columns + stripe - 1) / stripe;
  const int64_t task = (rows < kColumnBlock ? rows : kColumnBlock) * (columns < stripe ? columns : stripe);
  parallel_for(blocks * stripes, kGrain / (task + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / stripes, c = (t % stripes) * stripe;
      const int64_t first = b * kColumnBlock, last = first + kColumnBlock < rows ? first + kColumnBlock : rows;
      const int64_t width = columns - c < stripe ? columns - c : stripe;
      mask_tile(dy, y, dz, partial == nullptr ? nullptr : partial + b * columns, first, last, c, width, columns);
    }
  });
}

template <class T>
void finish_sums(const acc_t<T>* partial, int64_t blocks, int64_t columns, T* sums) {
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * columns + c];
    sums[c] = from_acc<T>(static_cast<acc_t<T>>(sum));
  }
}

void bias_relu_entry(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns) {
  FASTLLM_SWITCH_DTYPE(dtype, bias_relu(static_cast<T*>(y), static_cast<const T*>(bias), rows, columns))
}

void fill_rows_entry(DType dtype, void* y, const void* bias, int64_t rows, int64_t columns) {
  FASTLLM_SWITCH_DTYPE(dtype, fill_rows(static_cast<T*>(y), static_cast<const T*>(bias), rows, columns))
}

void mask_entry(DType dtype, const void* dy, const void* y, void* dz, int64_t rows, int64_t columns, void* partial) {
  FASTLLM_SWITCH_DTYPE(dtype, mask(static_cast<const T*>(dy), static_cast<const T*>(y), static_cast<T*>(dz), rows,
                                   columns, static_cast<acc_t<T>*>(partial)))
}

void finish_sums_entry(DType dtype, const void* partial, int64_t blocks, int64_t columns, void* sums) {
  FASTLLM_SWITCH_DTYPE(dtype,
                       finish_sums(static_cast<const acc_t<T>*>(partial), blocks, columns, static_cast<T*>(sums)))
}

}  // namespace

extern const LinearReluKernels linear_relu_kernels;
const LinearReluKernels linear_relu_kernels = {small_product_entry, bias_relu_entry, fill_rows_entry, mask_entry,
                                               finish_sums_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
