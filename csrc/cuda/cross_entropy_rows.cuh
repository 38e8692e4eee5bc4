// One row of cross_entropy: where its 16-byte groups lie, its logits and the shares of its classes.
//
// A row of V items rarely starts at a 16-byte boundary (50257 is odd). It is walked as at most 15 bytes up to the
// boundary, groups of 16 bytes, and at most 15 bytes after them; a few threads mind those edges, one item each.
//
// `general` kernels serve softcap, label smoothing and class probabilities. What is asked otherwise (class weights,
// z-loss, ignored rows) costs a number a row, and nothing an element.
#pragma once
#include <cmath>
#include <limits>

#include "common.cuh"
#include "cross_entropy.h"

namespace fastllm::cuda {
namespace {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
template <class T>
constexpr T kMinusInfinity = -kInfinity<T>;
template <>
constexpr bf16 kMinusInfinity<bf16>{0xff80};
template <>
constexpr f16 kMinusInfinity<f16>{0xfc00};

template <class T>
constexpr unsigned kMinusInfinityWord = 0xff800000u;  // as many as fill 32 bits
template <>
constexpr unsigned kMinusInfinityWord<bf16> = 0xff80ff80u;
template <>
constexpr unsigned kMinusInfinityWord<f16> = 0xfc00fc00u;

// x over the divisor of a mean: NaN for 0, where the definition divides 0 by 0 in one of its terms.
template <class A>
FASTLLM_DEVICE A over_divisor(A x, A divisor) {
  return divisor == 0 ? kNaN<A> : x / divisor;
}

// --- arguments --------------------------------------------------------------------------------------------------

template <class T>
struct Rows {
  using A = Acc<T>;
  int64_t rows;
  int classes;
  const T* logits;
  int64_t logits_stride;
  const void* target;
  bool target_is_int32;
  const T* probabilities;
  const A *weight, *weight_sum;
  int64_t ignore_index;
  A keep, smooth, z_scale;  // 1 - e, e / V, s
  A cap, inverse_cap;       // 0: no softcap
  A *loss, *row_max, *row_log_sum;
  T* grad;
  int64_t grad_stride;
  // Bytes to which a group of `grad`, of `probabilities`, is aligned where that of `logits` is aligned to 16.
  int grad_width, probabilities_width;
  const void* incoming;
  bool incoming_is_acc;
  int64_t incoming_stride;
  const A* divisor;
  bool correct;
};

template <class T>
struct Row {
  int64_t index;
  const T* logits;
  int head, groups;  // items before the first boundary; whole groups after them
  int y;             // the class, -1 for class probabilities

  // The group in which y lies; one that is not there where it lies in none.
  FASTLLM_DEVICE int y_group() const { return y < head ? -1 : (y - head) / kVec<T>; }
};

template <class T>
FASTLLM_DEVICE T* grad_of(const Rows<T>& r, const Row<T>& row) {
  return r.grad + row.index * r.grad_stride;
}
template <class T>
FASTLLM_DEVICE const T* probabilities_of(const Rows<T>& r, const Row<T>& row) {
  return r.probabilities + row.index * r.classes;
}

// Row `index`; false where it is ignored.
template <class T>
FASTLLM_DEVICE bool open_row(const Rows<T>& r, int64_t index, Row<T>* row) {
  row->index = index;
  row->logits = r.logits + index * r.logits_stride;
  const int head = static_cast<int>(items_to_boundary(row->logits));
  row->head = head < r.classes ? head : r.classes;
  row->groups = (r.classes - row->head) / kVec<T>;
  row->y = -1;
  if (r.probabilities != nullptr) return true;
  const int64_t label = r.target_is_int32 ? load(static_cast<const int32_t*>(r.target) + index)
                                          : load(static_cast<const int64_t*>(r.target) + index);
  if (label == r.ignore_index) return false;
  const bool inside = label >= 0 && label < r.classes;
  FASTLLM_DEVICE_ASSERT(inside, "cross_entropy: target is neither a class nor ignore_index");
  row->y = inside ? static_cast<int>(label) : 0;
  return true;
}

// The column outside whole groups that this thread minds, or -1.
template <class T>
FASTLLM_DEVICE int edge_column(const Rows<T>& r, const Row<T>& row) {
  constexpr int N = kVec<T>;
  const int t = threadIdx.x;
  if (t < N) return t < row.head ? t : -1;
  const int column = row.head + row.groups * N + t - N;
  return t < 2 * N && column < r.classes ? column : -1;
}

// --- groups that are aligned to fewer than 16 bytes -------------------------------------------------------------

template <int M, int N, class T>
FASTLLM_DEVICE void store_parts(T* p, const Vec<T, N>& group) {
#pragma unroll
  for (int i = 0; i < N; i += M) {
    Vec<T, M> part;
#pragma unroll
    for (int j = 0; j < M; ++j) part.items[j] = group.items[i + j];
    store_vec<M>(p + i, part);
  }
}
// wide: `width` is known to be 16.
template <bool wide, class T, int N>
FASTLLM_DEVICE void store_group(T* p, const Vec<T, N>& group, int width) {
  if constexpr (wide) {
    store_vec_streaming<N>(p, group);
  } else if (sizeof(T) == 8 || width >= 8) {
    store_parts<8 / sizeof(T)>(p, group);
  } else if constexpr (sizeof(T) < 8) {
    if (sizeof(T) == 4 || width == 4)
      store_parts<4 / sizeof(T)>(p, group);
    else
      store_parts<1>(p, group);
  }
}
// Calls body(wide), a std::bool_constant, so that loops are compiled for either.
template <class Body>
FASTLLM_DEVICE void for_width(int width, Body body) {
  if (width == 16)
    body(std::true_type());
  else
    body(std::false_type());
}

template <class T>
FASTLLM_DEVICE Vec<T, kVec<T> > load_group(const T* p, int width) {
  constexpr int N = kVec<T>;
  if (width == 16) return load_vec_streaming<N>(p);
  Vec<T, N> group;
#pragma unroll
  for (int j = 0; j < N; ++j) group.items[j] = load(p + j);
  return group;
}

// --- elements ---------------------------------------------------------------------------------------------------

template <bool general, class T>
FASTLLM_DEVICE Acc<T> logit(const Rows<T>& r, T x) {
  const Acc<T> z = widen(x);
  if constexpr (general)
    if (r.cap != 0) return r.cap * std::tanh(z * r.inverse_cap);
  return z;
}

template <bool general, class T>
FASTLLM_DEVICE Acc<T> logit_of_class(const Rows<T>& r, const Row<T>& row) {
  return row.y < 0 ? Acc<T>(0) : logit<general>(r, load(row.logits + row.y));
}

// Whether classes other than the target's, or all of given probabilities, have a share in the loss.
template <class T>
FASTLLM_DEVICE bool has_shares(const Rows<T>& r) {
  return r.probabilities != nullptr || r.smooth != 0;
}

// What columns [column, column + N) weigh in the loss, sum_c share_c (lse - z_c): all but the class itself.
template <int N, class T>
FASTLLM_DEVICE void shares_of(const Rows<T>& r, const Row<T>& row, int column, Acc<T> (&share)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) share[j] = r.smooth;
  if (r.probabilities != nullptr) {
    const T* from = probabilities_of(r, row) + column;
    Vec<T, N> q;
    if constexpr (N == 1)
      q.items[0] = load(from);
    else
      q = load_group(from, r.probabilities_width);
#pragma unroll
    for (int j = 0; j < N; ++j) share[j] += widen(q.items[j]) * r.keep;
  }
  if (r.weight != nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) share[j] *= load(r.weight + column + j);
  }
}

}  // namespace
}  // namespace fastllm::cuda
