// log_probs: per-token statistics of rows of logits (log-probability, entropy, argmax, ...) and their gradient.
//
// PyTorch writes log-probabilities in float32 and reads them again for every statistic: 4 or more streams of N x V
// items forward, more backward. Here a row is read once forward, whatever is asked for, and read and written once
// backward.
//
// A row's result has the same bits wherever the row stands, and whatever rows are beside it: its columns are dealt to
// the threads of one block in pieces of 16 bytes counted from the row's first column, not from a boundary of memory,
// and the number of threads follows from the row's length. Where the pieces are not aligned, a thread loads the two
// aligned pieces that one spans and joins them. The gradient of an element depends on that element and numbers of the
// row, so that backward walks from boundary to boundary; sums and products that belong together are fused by name.
#include "cross_entropy_softmax.cuh"
#include "log_probs.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;
template <class T, bool general>
constexpr int kBlocks = sizeof(T) == 8 ? 1
                        : general      ? 2
                                       : 3;  // that a multiprocessor runs side by side
template <class A>
constexpr A kLeast = -1e4;  // stands for log p of -inf: exp() of it is 0, and 0 times it is 0
constexpr int kNowhere = std::numeric_limits<int>::max();

template <class T>
struct TokenRows {
  using A = Acc<T>;
  int64_t rows;
  int classes, top;
  const T* logits;
  int64_t logits_stride;
  const void* target;
  bool target_is_int32;
  int64_t ignore_index;
  const A* temperature;
  A inverse_number, cap, inverse_cap;
  const int64_t* top_ids;
  A* saved;
  A *log_prob, *entropy, *lse, *mean_logit, *log_sum_sq_probs, *top_log_prob;
  int64_t* argmax;
  const A *grad_log_prob, *grad_entropy, *grad_lse, *grad_top_log_prob;
  T* grad;
  int64_t grad_stride;
  int grad_width;  // bytes to which a group of `grad` is aligned where that of `logits` is aligned to 16
};

template <class T>
struct TokenRow {
  int64_t index;
  const T* logits;
  int y;
  Acc<T> inverse_temperature;
};

// Row `index`; false where it is ignored.
template <class T>
FASTLLM_DEVICE bool open_row(const TokenRows<T>& r, int64_t index, TokenRow<T>* row) {
  row->index = index;
  row->logits = r.logits + index * r.logits_stride;
  const int64_t label = r.target_is_int32 ? load(static_cast<const int32_t*>(r.target) + index)
                                          : load(static_cast<const int64_t*>(r.target) + index);
  if (label == r.ignore_index) return false;
  const bool inside = label >= 0 && label < r.classes;
  FASTLLM_DEVICE_ASSERT(inside, "log_probs: target is neither a class nor ignore_index");
  row->y = inside ? static_cast<int>(label) : 0;
  row->inverse_temperature = r.temperature == nullptr ? r.inverse_number : 1 / load(r.temperature + index);
  return true;
}

template <class T>
FASTLLM_DEVICE int top_id(const TokenRows<T>& r, const TokenRow<T>& row, int k) {
  const int64_t id = load(r.top_ids + row.index * r.top + k);
  const bool inside = id >= 0 && id < r.classes;
  FASTLLM_DEVICE_ASSERT(inside, "log_probs: an id of top_ids is not a class");
  return inside ? static_cast<int>(id) : 0;
}

// z of a logit; `general` kernels serve softcap and temperature.
template <bool general, class T>
FASTLLM_DEVICE Acc<T> z_of(const TokenRows<T>& r, const TokenRow<T>& row, T x) {
  Acc<T> z = widen(x);
  if constexpr (general) {
    if (r.cap != 0) z = times(r.cap, std::tanh(z * r.inverse_cap));
    z = times(z, row.inverse_temperature);
  }
  return z;
}

// The derivative of z by its logit. 1 - tanh^2 in factors that keep their digits where the logit nears the cap.
template <bool general, class T>
FASTLLM_DEVICE Acc<T> z_slope(const TokenRows<T>& r, const TokenRow<T>& row, T x) {
  using A = Acc<T>;
  if constexpr (general) {
    if (r.cap == 0) return row.inverse_temperature;
    const A squashed = times(r.cap, std::tanh(widen(x) * r.inverse_cap));
    return ((r.cap - squashed) * r.inverse_cap) * ((r.cap + squashed) * r.inverse_cap) * row.inverse_temperature;
  }
  return 1;
}

// e^x for x in [kLeast, 0]. For float32 logits the rounding of x log2 e, |x| 2^-24 of the result, is put right.
template <class T>
FASTLLM_DEVICE Acc<T> exp_of(Acc<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    constexpr float kRest = 1.442695040888963407 - static_cast<double>(kLog2E<float>), kLn2 = 0.69314718f;
    const float high = x * kLog2E<float>;
    const float low = std::fma(x, kRest, std::fma(x, kLog2E<float>, -high));
    const float e = exp2_fast(high);
    return std::fma(e, low * kLn2, e);
  } else {
    return exp_fast(x);
  }
}

// --- forward ----------------------------------------------------------------------------------------------------

// Of some elements z of a row, the largest of which is `top`: over the others, with d = z - top, sums of e^d, d e^d and
// e^2d; over all, the sum of z. That the largest is left out keeps the digits of what a nearly certain row leaves to
// the others. NaN is in no maximum, but in the sums.
template <class A>
struct TokenStats {
  A top = -kInfinity<A>, others = 0, fall = 0, squares = 0, sum = 0;
  int argmax = kNowhere, first_nan = kNowhere;
};

// M elements; column(i): that of the i-th, of which those beyond the row are -inf. z is used up.
template <bool whole, int M, class T, class Column>
FASTLLM_DEVICE void add_elements(const TokenRows<T>& r, TokenStats<Acc<T> >& s, Acc<T> (&z)[M], Column column) {
  using A = Acc<T>;
  if (r.mean_logit != nullptr) {
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (whole || column(i) < r.classes) s.sum += z[i];
  }
  if (r.argmax != nullptr) {
    A top = z[0];
    bool nan = false;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      top = greater_of(top, z[i]);
      nan |= z[i] != z[i];
    }
    if (top > s.top || (nan && s.first_nan == kNowhere)) {
      bool found = false;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (top > s.top && !found && z[i] == top) {
          s.argmax = column(i);
          found = true;
        }
        if (z[i] != z[i] && s.first_nan == kNowhere) s.first_nan = column(i);
      }
    }
  }
  // A tournament: z[0] becomes the largest, every other element the lesser of some pair.
#pragma unroll
  for (int apart = 1; apart < M; apart *= 2)
#pragma unroll
    for (int i = 0; i + apart < M; i += 2 * apart) {
      const A a = z[i], b = z[i + apart];
      z[i] = greater_of(a, b);
      z[i + apart] = lesser_or_nan(a, b);
    }
  const A before = s.top, top = greater_of(before, z[0]), base = base_of(top);
  z[0] = lesser_or_nan(before, z[0]);
  const A shift = greater_or_nan(before - base, kLeast<A>), factor = exp_of<T>(shift);
  A others[2] = {}, fall[2] = {}, squares[2] = {};
  const bool with_fall = r.entropy != nullptr, with_squares = r.log_sum_sq_probs != nullptr;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    const A d = greater_or_nan(z[i] - base, kLeast<A>);
    z[i] = exp_of<T>(d);
    others[i % 2] += z[i];
    if (with_fall) fall[i % 2] = std::fma(z[i], d, fall[i % 2]);
  }
  if (with_squares) {
#pragma unroll
    for (int i = 0; i < M; ++i) squares[i % 2] = std::fma(z[i], z[i], squares[i % 2]);
  }
  s.top = top;
  s.fall = std::fma(std::fma(shift, s.others, s.fall), factor, fall[0] + fall[1]);
  s.others = std::fma(s.others, factor, others[0] + others[1]);
  s.squares = std::fma(s.squares, factor * factor, squares[0] + squares[1]);
}

template <class T>
FASTLLM_DEVICE TokenStats<Acc<T> > merge(const TokenStats<Acc<T> >& a, const TokenStats<Acc<T> >& b) {
  using A = Acc<T>;
  const bool swap = b.top > a.top;
  const A high = swap ? b.top : a.top, low = swap ? a.top : b.top, base = base_of(high);
  const A shift = greater_or_nan(low - base, kLeast<A>), factor = exp_of<T>(shift);
  const A lower = (swap ? a.others : b.others) + 1;  // with the top of that side
  TokenStats<A> both;
  both.top = high;
  both.others = std::fma(lower, factor, swap ? b.others : a.others);
  both.fall = std::fma(std::fma(shift, lower, swap ? a.fall : b.fall), factor, swap ? b.fall : a.fall);
  both.squares = std::fma((swap ? a.squares : b.squares) + 1, factor * factor, swap ? b.squares : a.squares);
  both.sum = a.sum + b.sum;
  const int first = a.argmax < b.argmax ? a.argmax : b.argmax;
  both.argmax = a.top == b.top ? first : swap ? b.argmax : a.argmax;
  both.first_nan = a.first_nan < b.first_nan ? a.first_nan : b.first_nan;
  return both;
}

// For lane 0, whose order of summation is the result's.
template <class T>
FASTLLM_DEVICE TokenStats<Acc<T> > merge_lanes(TokenStats<Acc<T> > s) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    TokenStats<Acc<T> > other;
    other.top = shuffle_xor(s.top, lanes);
    other.others = shuffle_xor(s.others, lanes);
    other.fall = shuffle_xor(s.fall, lanes);
    other.squares = shuffle_xor(s.squares, lanes);
    other.sum = shuffle_xor(s.sum, lanes);
    other.argmax = shuffle_xor(s.argmax, lanes);
    other.first_nan = shuffle_xor(s.first_nan, lanes);
    s = merge<T>(s, other);
  }
  return s;
}

// `scratch` (32 items) is shared memory. Lane 0 of every warp has the whole block's.
template <class T>
FASTLLM_DEVICE TokenStats<Acc<T> > merge_threads(TokenStats<Acc<T> > s, TokenStats<Acc<T> >* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  s = merge_lanes<T>(s);
  if (lane == 0) scratch[warp] = s;
  sync_block();
  return merge_lanes<T>(lane < warps ? scratch[lane] : TokenStats<Acc<T> >());
}

// The N items from `shift` on, 0 < shift < N, of two pieces that follow each other.
template <class T, int N>
FASTLLM_DEVICE Vec<T, N> join(const Vec<T, N>& a, const Vec<T, N>& b, int shift) {
  const uint32_t *first = reinterpret_cast<const uint32_t*>(&a), *second = reinterpret_cast<const uint32_t*>(&b);
  const int bytes = shift * static_cast<int>(sizeof(T));
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = first[i];
    words[4 + i] = second[i];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = (bytes & 8) != 0 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = (bytes & 4) != 0 ? words[i + 1] : words[i];
  Vec<T, N> joined;
  uint32_t* to = reinterpret_cast<uint32_t*>(&joined);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = (bytes & 2) != 0 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
  return joined;
}

// Statistics of a thread's columns: groups threadIdx.x, threadIdx.x + blockDim.x, ... of N columns.
template <bool general, class T>
FASTLLM_DEVICE TokenStats<Acc<T> > read_columns(const TokenRows<T>& r, const TokenRow<T>& row) {
  using A = Acc<T>;
  constexpr int N = kVec<T>, K = kInFlight;
  const int stride = blockDim.x, groups = (r.classes - 1) / N + 1;
  const int back = (N - static_cast<int>(items_to_boundary(row.logits))) % N;  // items from a boundary to the row
  // Whether groups v to `last` can be read in aligned pieces that lie within the row.
  const auto is_inner = [&](int v, int last) {
    return v * N >= back && last * N + (back == 0 ? N : 2 * N - back) <= r.classes;
  };
  const auto read_group = [&](int group) {
    const T* from = row.logits + int64_t{group} * N;
    if (back == 0) return load_vec_streaming<N>(from);
    return join(load_vec<N>(from - back), load_vec<N>(from - back + N), back);
  };
  TokenStats<A> s;
  for (int v = threadIdx.x; v < groups; v += K * stride) {
    const auto column = [&](int i) { return (v + i / N * stride) * N + i % N; };
    Vec<T, N> x[K];
    const bool whole = is_inner(v, v + (K - 1) * stride);
    if (whole && back == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) x[k] = load_vec_streaming<N>(row.logits + int64_t{v + k * stride} * N);
    } else if (whole) {
      Vec<T, N> next[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T* from = row.logits + int64_t{v + k * stride} * N - back;
        x[k] = load_vec<N>(from);
        next[k] = load_vec<N>(from + N);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) x[k] = join(x[k], next[k], back);
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int group = v + k * stride;
        if (is_inner(group, group)) {
          x[k] = read_group(group);
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j)
            x[k].items[j] = group * N + j < r.classes ? load(row.logits + group * N + j) : kMinusInfinity<T>;
        }
      }
    }
    A z[K * N];
#pragma unroll
    for (int i = 0; i < K * N; ++i) z[i] = z_of<general>(r, row, x[i / N].items[i % N]);
    if (whole) {
      add_elements<true>(r, s, z, column);
    } else {
      if constexpr (general) {  // a cap makes -inf finite
#pragma unroll
        for (int i = 0; i < K * N; ++i)
          if (column(i) >= r.classes) z[i] = -kInfinity<A>;
      }
      add_elements<false>(r, s, z, column);
    }
  }
  return s;
}

template <class A>
FASTLLM_DEVICE void store_if(A* p, int64_t index, A value) {
  if (p != nullptr) store(p + index, value);
}

template <class T, class A>
FASTLLM_DEVICE void write_row(const TokenRows<T>& r, int64_t i, A log_prob, A entropy, A lse, A mean_logit,
                              A log_sum_sq_probs, int64_t argmax, A top, A tail) {
  store_if(r.log_prob, i, log_prob);
  store_if(r.entropy, i, entropy);
  store_if(r.lse, i, lse);
  store_if(r.mean_logit, i, mean_logit);
  store_if(r.log_sum_sq_probs, i, log_sum_sq_probs);
  store_if(r.argmax, i, argmax);
  store(r.saved + i, top);
  store(r.saved + r.rows + i, tail);
  store(r.saved + 2 * r.rows + i, entropy);
}

template <class T>
FASTLLM_DEVICE void ignore_row(const TokenRows<T>& r, const TokenRow<T>& row) {
  using A = Acc<T>;
  for (int k = threadIdx.x; r.top_log_prob != nullptr && k < r.top; k += blockDim.x)
    store(r.top_log_prob + row.index * r.top + k, A(0));
  if (threadIdx.x != 0) return;
  write_row(r, row.index, A(0), A(0), A(0), A(0), A(0), -1, A(0), A(0));
}

template <class T, bool general>
__global__ void __launch_bounds__(kThreads, kBlocks<T, general>) token_rows(TokenRows<T> r) {
  using A = Acc<T>;
  TokenRow<T> row;
  if (!open_row(r, blockIdx.x, &row)) {
    ignore_row(r, row);
    return;
  }
  TokenStats<A> s = read_columns<general>(r, row);
  s = merge_threads<T>(s, reinterpret_cast<TokenStats<A>*>(shared_memory()));
  const A top = shuffle(s.top, 0), others = shuffle(s.others, 0);
  const bool endless = std::isinf(top);
  const A tail = top == -kInfinity<A> ? kNaN<A> : std::log1p(others);
  for (int k = threadIdx.x; r.top_log_prob != nullptr && k < r.top; k += blockDim.x) {
    const A z = z_of<general>(r, row, load(row.logits + top_id(r, row, k)));
    store(r.top_log_prob + row.index * r.top + k, (z - top) - tail);
  }
  if (threadIdx.x != 0) return;
  const A entropy = r.entropy == nullptr ? A(0) : endless ? kNaN<A> : tail - s.fall / (1 + others);
  const A z_y = z_of<general>(r, row, load(row.logits + row.y));
  const int largest = s.first_nan != kNowhere ? s.first_nan : s.argmax != kNowhere ? s.argmax : 0;
  write_row(r, row.index, (z_y - top) - tail, entropy, endless && others == others ? top : top + tail,
            s.sum / static_cast<A>(r.classes), std::fma(A(-2), tail, std::log1p(s.squares)), largest, top, tail);
}

// --- backward ---------------------------------------------------------------------------------------------------

// The gradient at an element z that is neither the target nor in top_ids:
//   p (everywhere - (log p + H) g_H), p = exp(d - tail), d = z - top; `scale` is exp(-tail) / temperature.
template <class A>
struct TokenSlope {
  A top, tail;
  A lse, entropy, g_entropy;   // incoming, and H
  A scaled, g_scaled, offset;  // everywhere scale, g_H scale, H - tail
};

template <bool general, class T>
FASTLLM_DEVICE T gradient_of(const TokenRows<T>& r, const TokenRow<T>& row, const TokenSlope<Acc<T> >& s, T x) {
  using A = Acc<T>;
  const A d = greater_or_nan(z_of<general>(r, row, x) - s.top, kLeast<A>);
  A slope = s.scaled;
  if (r.grad_entropy != nullptr) slope = std::fma(-s.g_scaled, d + s.offset, slope);
  A g = exp_of<T>(d) * slope;
  if constexpr (general)
    if (r.cap != 0) g *= z_slope<general>(r, row, x);
  return narrow<T>(g);
}

// The gradient at a place: a column with an incoming gradient of its own, the target or one of top_ids. Those may name
// a column more than once: all its places find the same sums, in the order of the places, and so the same bits. 1 - p
// is taken without cancellation, and the column's own gradients are left out of the sum that p multiplies.
template <bool general, class T>
FASTLLM_DEVICE Acc<T> gradient_at(const TokenRows<T>& r, const TokenRow<T>& row, const TokenSlope<Acc<T> >& s,
                                  const int* columns, const Acc<T>* incoming, int count, int place) {
  using A = Acc<T>;
  const int column = columns[place];
  A own = 0, rest = s.lse;
  for (int i = 0; i < count; ++i) {
    if (columns[i] == column)
      own += incoming[i];
    else
      rest -= incoming[i];
  }
  const T x = load(row.logits + column);
  const A log_p = (z_of<general>(r, row, x) - s.top) - s.tail;
  A slope = rest;
  if (r.grad_entropy != nullptr) slope = std::fma(-s.g_entropy, greater_or_nan(log_p, kLeast<A>) + s.entropy, slope);
  const A g = std::fma(std::exp(log_p), slope, -std::expm1(log_p) * own);
  return g * z_slope<general>(r, row, x);
}

// Calls each(from, to, ...) for the row's elements: whole groups, aligned in `logits`, and the items around them.
template <class T, class Group, class Item>
FASTLLM_DEVICE void walk_row(const TokenRows<T>& r, const TokenRow<T>& row, Group on_group, Item on_item) {
  constexpr int N = kVec<T>;
  const int to_boundary = static_cast<int>(items_to_boundary(row.logits));
  const int head = to_boundary < r.classes ? to_boundary : r.classes, groups = (r.classes - head) / N;
  for_width(r.grad_width, [&](auto wide) {
    constexpr int K = decltype(wide)::value ? kInFlight : 1;
    for_chunks<K>(threadIdx.x, blockDim.x, groups, [&](int v, auto whole) { on_group(head, groups, v, wide, whole); });
  });
  const int t = threadIdx.x, column = t < N ? t : head + groups * N + t - N;
  if (t < N ? t < head : t < 2 * N && column < r.classes) on_item(column);
}

template <class T, bool general>
__global__ void __launch_bounds__(kThreads, kBlocks<T, general>) token_gradient(TokenRows<T> r) {
  using A = Acc<T>;
  constexpr int N = kVec<T>;
  const int stride = blockDim.x;
  TokenRow<T> row;
  const bool counted = open_row(r, blockIdx.x, &row);
  T* grad = r.grad + row.index * r.grad_stride;
  if (!counted) {
    walk_row(
        r, row,
        [&](int head, int groups, int v, auto wide, auto) {
          constexpr int K = decltype(wide)::value ? kInFlight : 1;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const int group = v + k * stride;
            if (group < groups)
              store_group<decltype(wide)::value>(grad + head + int64_t{group} * N, Vec<T, N>{}, r.grad_width);
          }
        },
        [&](int column) { store(grad + column, T{}); });
    return;
  }
  const int64_t index = row.index;
  const int top = r.grad_top_log_prob == nullptr ? 0 : r.top, places = top + (r.grad_log_prob == nullptr ? 0 : 1);
  A* scratch = reinterpret_cast<A*>(shared_memory());
  A *incoming = scratch + kWarp, *found = incoming + places;
  int* columns = reinterpret_cast<int*>(found + places);
  A sum = 0;
  for (int i = threadIdx.x; i < places; i += stride) {
    columns[i] = i < top ? top_id(r, row, i) : row.y;
    incoming[i] = i < top ? load(r.grad_top_log_prob + index * r.top + i) : load(r.grad_log_prob + index);
    sum += incoming[i];
  }
  if (places > 0) sum = reduce_block(sum, A(0), Sum(), scratch);

  TokenSlope<A> s;
  s.top = load(r.saved + index);
  s.tail = load(r.saved + r.rows + index);
  s.lse = r.grad_lse == nullptr ? A(0) : load(r.grad_lse + index);
  s.g_entropy = s.entropy = 0;
  if (r.grad_entropy != nullptr) {
    s.g_entropy = load(r.grad_entropy + index);
    s.entropy = load(r.saved + 2 * r.rows + index);
  }
  // With a cap the temperature is in z_slope.
  const A scale = std::exp(-s.tail) * (general && r.cap == 0 ? row.inverse_temperature : A(1));
  s.scaled = (s.lse - sum) * scale;
  s.g_scaled = s.g_entropy * scale;
  s.offset = s.entropy - s.tail;
  for (int i = threadIdx.x; i < places; i += stride)
    found[i] = gradient_at<general>(r, row, s, columns, incoming, places, i);
  // The gradient may take the logits' place: not before those of all places are read.
  if (places > 0) sync_block();
  walk_row(
      r, row,
      [&](int head, int groups, int v, auto wide, auto is_whole) {
        constexpr bool whole = decltype(is_whole)::value;
        constexpr int K = decltype(wide)::value ? kInFlight : 1;
        Vec<T, N> x[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int group = v + k * stride;
          if (whole || group < groups) x[k] = load_vec_streaming<N>(row.logits + head + int64_t{group} * N);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int group = v + k * stride;
          if (!whole && group >= groups) break;
#pragma unroll
          for (int j = 0; j < N; ++j) x[k].items[j] = gradient_of<general>(r, row, s, x[k].items[j]);
          store_group<decltype(wide)::value>(grad + head + int64_t{group} * N, x[k], r.grad_width);
        }
      },
      [&](int column) { store(grad + column, gradient_of<general>(r, row, s, load(row.logits + column))); });
  if (places == 0) return;
  sync_block();
  for (int i = threadIdx.x; i < places; i += stride) store(grad + columns[i], narrow<T>(found[i]));
}

// --- launchers --------------------------------------------------------------------------------------------------

template <class T>
TokenRows<T> rows_of(const LogProbsRows& c) {
  using A = Acc<T>;
  constexpr int64_t item = sizeof(T);
  TokenRows<T> r{};
  r.rows = c.rows;
  r.classes = static_cast<int>(c.classes);
  r.top = c.top;
  r.logits = static_cast<const T*>(c.logits);
  r.logits_stride = c.logits_stride;
  r.target = c.target;
  r.target_is_int32 = c.target_is_int32;
  r.ignore_index = c.ignore_index;
  r.temperature = static_cast<const A*>(c.temperature);
  r.inverse_number = static_cast<A>(1 / c.number);
  r.cap = static_cast<A>(c.softcap);
  r.inverse_cap = static_cast<A>(c.softcap == 0 ? 0 : 1 / c.softcap);
  r.top_ids = c.top_ids;
  r.saved = static_cast<A*>(c.saved);
  r.log_prob = static_cast<A*>(c.log_prob);
  r.entropy = static_cast<A*>(c.entropy);
  r.lse = static_cast<A*>(c.lse);
  r.mean_logit = static_cast<A*>(c.mean_logit);
  r.log_sum_sq_probs = static_cast<A*>(c.log_sum_sq_probs);
  r.top_log_prob = static_cast<A*>(c.top_log_prob);
  r.argmax = c.argmax;
  r.grad_log_prob = static_cast<const A*>(c.grad_log_prob);
  r.grad_entropy = static_cast<const A*>(c.grad_entropy);
  r.grad_lse = static_cast<const A*>(c.grad_lse);
  r.grad_top_log_prob = static_cast<const A*>(c.grad_top_log_prob);
  r.grad = static_cast<T*>(c.grad);
  r.grad_stride = c.grad_stride;
  r.grad_width = common_width(c.logits, c.logits_stride * item, c.grad, c.grad_stride * item);
  return r;
}

bool is_general(const LogProbsRows& c) { return c.softcap != 0 || c.temperature != nullptr || c.number != 1; }

// A block a row: its threads follow from the row's length alone, on which the order of its sums depends.
template <class T>
Shape shape_of(const LogProbsRows& c, size_t shared) {
  constexpr int64_t kWarpBytes = 16 * kInFlight * kWarp;
  const int64_t threads = kWarp * ceil_div(c.classes * static_cast<int64_t>(sizeof(T)), kWarpBytes);
  return {c.rows, threads < 2 * kWarp ? 2 * kWarp : threads < kThreads ? static_cast<int>(threads) : kThreads, shared};
}

template <class T>
Status forward(const LogProbsRows& c, Stream stream) {
  const Shape shape = shape_of<T>(c, kWarp * sizeof(TokenStats<Acc<T> >));
  return launch(is_general(c) ? token_rows<T, true> : token_rows<T, false>, shape, stream, rows_of<T>(c));
}

template <class T>
Status backward(const LogProbsRows& c, Stream stream) {
  const size_t places = (c.grad_top_log_prob == nullptr ? 0 : c.top) + (c.grad_log_prob == nullptr ? 0 : 1);
  const Shape shape = shape_of<T>(c, kWarp * sizeof(Acc<T>) + places * (2 * sizeof(Acc<T>) + sizeof(int)));
  return launch(is_general(c) ? token_gradient<T, true> : token_gradient<T, false>, shape, stream, rows_of<T>(c));
}

}  // namespace

Status log_probs_forward(const LogProbsRows& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return forward<T>(arguments, stream))
  return 1;
}

Status log_probs_backward(const LogProbsRows& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return backward<T>(arguments, stream))
  return 1;
}

}  // namespace fastllm::cuda
