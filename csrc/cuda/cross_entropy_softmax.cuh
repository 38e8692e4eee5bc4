// The softmax statistics of a row of cross_entropy, merged over threads and blocks in a fixed order, and its gradient.
#pragma once
#include "cross_entropy_rows.cuh"

namespace fastllm::cuda {
namespace {

// --- statistics -------------------------------------------------------------------------------------------------

// Of some elements of a row: their maximum, the sum of exp(z - base), and in general kernels the sum of their shares
// and of share (base - z), where base is the maximum, or 0 while that is -inf: then exponentials are 0, not NaN. NaN
// is not in the maximum, but in the sum.
template <class A>
struct Stats {
  A max = -kInfinity<A>, sum = 0, mass = 0, pull = 0;
};

template <class A>
FASTLLM_DEVICE A base_of(A max) {
  return max == -kInfinity<A> ? A(0) : max;
}

// The two as one, with the same bits in either order.
template <bool general, class A>
FASTLLM_DEVICE Stats<A> merge(const Stats<A>& a, const Stats<A>& b) {
  const bool swap = b.max > a.max;
  const A high = swap ? b.max : a.max, low = swap ? a.max : b.max, base = base_of(high);
  Stats<A> both;
  both.max = high;
  both.sum = (swap ? a.sum : b.sum) * exp_fast(low - base) + (swap ? b.sum : a.sum);
  if constexpr (general) {
    both.mass = a.mass + b.mass;
    const A raised = (swap ? a.mass : b.mass) * (base - base_of(low));
    both.pull = (a.pull + b.pull) + raised;
  }
  return both;
}

// M logits become their exponentials exp(z - base), base of the returned maximum; their sum is added to `s`.
template <int M, class A>
FASTLLM_DEVICE void add_exponentials(Stats<A>& s, A (&z)[M]) {
  A top[4] = {s.max, -kInfinity<A>, -kInfinity<A>, -kInfinity<A>};
#pragma unroll
  for (int i = 0; i < M; ++i) top[i % 4] = greater_of(top[i % 4], z[i]);
  const A max = greater_of(greater_of(top[0], top[1]), greater_of(top[2], top[3])), base = base_of(max);
  A sum[2] = {s.sum * exp_fast(s.max - base), 0};
#pragma unroll
  for (int i = 0; i < M; ++i) {
    z[i] = exp_fast(z[i] - base);
    sum[i % 2] += z[i];
  }
  s.max = max;
  s.sum = sum[0] + sum[1];
}

// As above for columns [column, column + N), with their shares; the logits stay.
template <int N, class T>
FASTLLM_DEVICE void add_columns(const Rows<T>& r, const Row<T>& row, int column, const Acc<T> (&z)[N],
                                Stats<Acc<T> >& s) {
  using A = Acc<T>;
  const A before = base_of(s.max);
  A e[N], share[N];
#pragma unroll
  for (int j = 0; j < N; ++j) e[j] = z[j];
  add_exponentials(s, e);
  if (!has_shares(r)) return;
  const A base = base_of(s.max);
  shares_of(r, row, column, share);
  A mass = 0, pull = s.mass * (base - before);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    mass += share[j];
    pull += share[j] * (base - z[j]);
  }
  s.mass += mass;
  s.pull += pull;
}

template <bool general, class A>
FASTLLM_DEVICE Stats<A> merge_warp(Stats<A> s) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    Stats<A> other;
    other.max = shuffle_xor(s.max, lanes);
    other.sum = shuffle_xor(s.sum, lanes);
    if constexpr (general) {
      other.mass = shuffle_xor(s.mass, lanes);
      other.pull = shuffle_xor(s.pull, lanes);
    }
    s = merge<general>(s, other);
  }
  return s;
}

// For every thread; `scratch` (32 items) is shared memory.
template <bool general, class A>
FASTLLM_DEVICE Stats<A> merge_block(Stats<A> s, Stats<A>* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  s = merge_warp<general>(s);
  if (lane == 0) scratch[warp] = s;
  sync_block();
  return merge_warp<general>(lane < warps ? scratch[lane] : Stats<A>());
}

// For every thread of the cluster, which has been announced to: each block leaves its statistics with all.
template <bool general, class A>
FASTLLM_DEVICE Stats<A> merge_cluster(const Stats<A>& s, Stats<A>* slots, int cluster) {
  await_cluster();
  if (static_cast<int>(threadIdx.x) < cluster) store(map_shared(slots + cluster_rank(), threadIdx.x), s);
  sync_cluster();
  const int lane = threadIdx.x % kWarp;
  return merge_warp<general>(lane < cluster ? slots[lane] : Stats<A>());
}

constexpr int kMaxCluster = 16;
template <class A>
constexpr size_t kStatsBytes = (kWarp + kMaxCluster) * sizeof(Stats<A>);

// --- gradient ---------------------------------------------------------------------------------------------------

// The gradient of scale loss: scale (p_c pull - share_c), p_c = exp(z_c - max) inverse_sum. At the class it is formed
// as truth (p - 1) + p rest - w_y smooth, whose first difference is exact as p nears 1; pull = truth + rest.
template <class A>
struct Slope {
  A max, inverse_sum, truth, rest, scale;
  A factor;  // pull inverse_sum scale
};

template <class T>
FASTLLM_DEVICE Acc<T> truth_of(const Rows<T>& r, const Row<T>& row) {
  if (row.y < 0) return 0;
  return r.weight == nullptr ? r.keep : r.keep * load(r.weight + row.y);
}

template <class T>
FASTLLM_DEVICE Acc<T> incoming_of(const Rows<T>& r, int64_t index) {
  if (r.incoming == nullptr) return 1;
  const int64_t at = index * r.incoming_stride;
  return r.incoming_is_acc ? load(static_cast<const Acc<T>*>(r.incoming) + at)
                           : load_acc(static_cast<const T*>(r.incoming) + at);
}

template <class T>
FASTLLM_DEVICE Slope<Acc<T> > slope_of(const Rows<T>& r, const Row<T>& row, Acc<T> max, Acc<T> log_sum,
                                       Acc<T> inverse_sum, Acc<T> mass) {
  using A = Acc<T>;
  Slope<A> s;
  s.max = max;
  s.inverse_sum = inverse_sum;
  s.truth = truth_of(r, row);
  s.rest = mass + (r.z_scale == 0 ? A(0) : r.z_scale * (2 * (max + log_sum)));  // infinite where the definition's is
  s.scale = incoming_of(r, row.index);
  if (r.divisor != nullptr) s.scale = over_divisor(s.scale, load(r.divisor));
  s.factor = (s.truth + s.rest) * inverse_sum * s.scale;
  return s;
}

// The derivative of the softcap by its value z, 1 - (z / cap)^2, in factors that keep their digits where z nears cap.
template <class T>
FASTLLM_DEVICE Acc<T> cap_slope(const Rows<T>& r, Acc<T> z) {
  if (r.cap == 0) return 1;
  return ((r.cap - z) * r.inverse_cap) * ((r.cap + z) * r.inverse_cap);
}

template <bool general, class T>
FASTLLM_DEVICE T gradient_at_class(const Rows<T>& r, const Row<T>& row, const Slope<Acc<T> >& s, Acc<T> z) {
  using A = Acc<T>;
  const A p = exp_fast(z - s.max) * s.inverse_sum;
  A slope = s.truth * (p - 1) + p * s.rest;
  if constexpr (general) {
    slope -= r.weight == nullptr ? r.smooth : r.smooth * load(r.weight + row.y);
    slope *= cap_slope(r, z);
  }
  return narrow<T>(slope * s.scale);
}

// Of N columns that are not the class.
template <bool general, int N, class T>
FASTLLM_DEVICE Vec<T, N> gradient_of(const Rows<T>& r, const Row<T>& row, const Slope<Acc<T> >& s, int column,
                                     const Acc<T> (&z)[N]) {
  using A = Acc<T>;
  A share[N];
  if constexpr (general) shares_of(r, row, column, share);
  Vec<T, N> g;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    A slope = exp_fast(z[j] - s.max) * s.factor;
    if constexpr (general) {
      slope -= share[j] * s.scale;
      slope *= cap_slope(r, z[j]);
    }
    g.items[j] = narrow<T>(slope);
  }
  return g;
}

template <bool general, class T>
FASTLLM_DEVICE T edge_gradient(const Rows<T>& r, const Row<T>& row, const Slope<Acc<T> >& s, int column, Acc<T> z) {
  if (column == row.y) return gradient_at_class<general>(r, row, s, z);
  const Acc<T> one[1] = {z};
  return gradient_of<general>(r, row, s, column, one).items[0];
}

constexpr int kInFlight = 4;  // groups that a thread loads before it uses the first

// Calls chunk(v, whole) for every K-th v of first, first + stride, ...: a chunk of groups v, v + stride, ... of which
// all K exist where `whole`, a std::bool_constant, is true.
template <int K, class Chunk>
FASTLLM_DEVICE void for_chunks(int first, int stride, int groups, Chunk chunk) {
  int v = first;
  for (; v + (K - 1) * stride < groups; v += K * stride) chunk(v, std::true_type());
  if (K > 1 && v < groups) chunk(v, std::false_type());
}

// The groups first, first + stride, ... and, with `edges`, what lies outside groups. Every item is read by the thread
// that writes it, before it does: the gradient may overwrite the logits.
template <bool general, class T>
FASTLLM_DEVICE void write_gradient(const Rows<T>& r, const Row<T>& row, const Slope<Acc<T> >& s, int first, int stride,
                                   bool edges) {
  using A = Acc<T>;
  constexpr int N = kVec<T>;
  const T* logits = row.logits + row.head;
  T* grad = grad_of(r, row);
  const int y_group = row.y_group();
  bool y_is_here = false;
  T z_class{};
  for_width(r.grad_width, [&](auto is_wide) {
    constexpr bool wide = decltype(is_wide)::value;
    constexpr int K = wide ? kInFlight : 1;
    for_chunks<K>(first, stride, row.groups, [&](int v, auto is_whole) {
      constexpr bool whole = decltype(is_whole)::value;
      Vec<T, N> x[K];
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (whole || v + k * stride < row.groups) x[k] = load_vec_streaming<N>(logits + int64_t{v + k * stride} * N);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int group = v + k * stride, column = row.head + group * N;
        if (!whole && group >= row.groups) break;
        A z[N];
#pragma unroll
        for (int j = 0; j < N; ++j) z[j] = logit<general>(r, x[k].items[j]);
        if (group == y_group) {
          y_is_here = true;
          z_class = load(row.logits + row.y);
        }
        store_group<wide>(grad + column, gradient_of<general>(r, row, s, column, z), r.grad_width);
      }
    });
  });
  if (y_is_here) store(grad + row.y, gradient_at_class<general>(r, row, s, logit<general>(r, z_class)));
  const int edge = edges ? edge_column(r, row) : -1;
  if (edge >= 0)
    store(grad + edge, edge_gradient<general>(r, row, s, edge, logit<general>(r, load(row.logits + edge))));
}

// The same items of an ignored row.
template <class T>
FASTLLM_DEVICE void write_zeros(const Rows<T>& r, const Row<T>& row, int first, int stride, bool edges) {
  constexpr int N = kVec<T>;
  T* grad = grad_of(r, row);
  for_width(r.grad_width, [&](auto wide) {
    for (int v = first; v < row.groups; v += stride)
      store_group<decltype(wide)::value>(grad + row.head + int64_t{v} * N, Vec<T, N>{}, r.grad_width);
  });
  const int edge = edges ? edge_column(r, row) : -1;
  if (edge >= 0) store(grad + edge, T{});
}

}  // namespace
}  // namespace fastllm::cuda
