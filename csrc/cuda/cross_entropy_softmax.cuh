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
struct alignas(4 * sizeof(A)) Stats {
  A max = -kInfinity<A>, sum = 0, mass = 0, pull = 0;
};

template <class A>
FASTLLM_DEVICE A base_of(A max) {
  return max == -kInfinity<A> ? A(0) : max;
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

// What `s` adds to statistics of a maximum that is `base` or, where that is 0, -inf; their maximum is not set.
template <bool general, class A>
FASTLLM_DEVICE Stats<A> rebased(const Stats<A>& s, A base) {
  Stats<A> moved;
  moved.sum = s.sum * exp_fast(s.max - base);
  if constexpr (general) {
    moved.mass = s.mass;
    moved.pull = s.pull + s.mass * (base - base_of(s.max));
  }
  return moved;
}

// Those of all lanes, for every lane: the maximum first, so that each lane's sum is rescaled once.
template <bool general, class A>
FASTLLM_DEVICE Stats<A> merge_warp(const Stats<A>& s) {
  const A max = reduce_warp(s.max, Max());
  Stats<A> all = rebased<general>(s, base_of(max));
  all.max = max;
  all.sum = reduce_warp(all.sum, Sum());
  if constexpr (general) {
    all.mass = reduce_warp(all.mass, Sum());
    all.pull = reduce_warp(all.pull, Sum());
  }
  return all;
}

constexpr int kMaxCluster = 16, kMaxWarps = 16;
template <class A>
constexpr size_t kStatsBytes = kMaxCluster * kMaxWarps * sizeof(Stats<A>);

// From the statistics of each warp those of the row, for every thread of the cluster, which has been announced to.
// slots: shared memory that no one reads before. Each warp leaves its own with all blocks.
template <bool general, class A>
FASTLLM_DEVICE Stats<A> merge_row(const Stats<A>& s, Stats<A>* slots, int cluster) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (cluster > 1) {
    await_cluster();
    if (lane < cluster) store(map_shared(slots + cluster_rank() * warps + warp, lane), s);
    sync_cluster();
  } else {
    if (lane == 0) slots[warp] = s;
    sync_block();
  }
  const int count = cluster * warps;
  A max = -kInfinity<A>;
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) max = greater_of(max, slots[i].max);
  Stats<A> all;
  all.max = reduce_warp(max, Max());
  const A base = base_of(all.max);
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) {
    const Stats<A> moved = rebased<general>(slots[i], base);
    all.sum += moved.sum;
    all.mass += moved.mass;
    all.pull += moved.pull;
  }
  all.sum = reduce_warp(all.sum, Sum());
  if constexpr (general) {
    all.mass = reduce_warp(all.mass, Sum());
    all.pull = reduce_warp(all.pull, Sum());
  }
  return all;
}

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

// What is known of it before the row's statistics are.
template <class T>
FASTLLM_DEVICE Slope<Acc<T> > open_slope(const Rows<T>& r, const Row<T>& row) {
  Slope<Acc<T> > s;
  s.truth = truth_of(r, row);
  s.scale = incoming_of(r, row.index);
  if (r.divisor != nullptr) s.scale = over_divisor(s.scale, load(r.divisor));
  return s;
}

// log_sum is looked at where there is a z-loss.
template <class T>
FASTLLM_DEVICE void close_slope(const Rows<T>& r, Acc<T> max, Acc<T> log_sum, Acc<T> inverse_sum, Acc<T> mass,
                                Slope<Acc<T> >* s) {
  using A = Acc<T>;
  s->max = max;
  s->inverse_sum = inverse_sum;
  s->rest = mass + (r.z_scale == 0 ? A(0) : r.z_scale * (2 * (max + log_sum)));  // infinite where the definition's is
  s->factor = (s->truth + s->rest) * inverse_sum * s->scale;
}

// Writes a row's loss and statistics, and closes the slope of its gradient. z: the logit of its class.
template <bool general, class T>
FASTLLM_DEVICE void finish_row(const Rows<T>& r, const Row<T>& row, Stats<Acc<T> > s, Acc<T> z, bool writes,
                               Slope<Acc<T> >* slope) {
  using A = Acc<T>;
  // A row of -inf alone has no distribution.
  if (s.max == -kInfinity<A>) s.sum = kNaN<A>;
  const A log_sum = writes || r.z_scale != 0 ? std::log(s.sum) : A(0);
  if (writes) {
    const A lse = s.max + log_sum;
    A loss = r.z_scale == 0 ? A(0) : r.z_scale * (lse * lse);  // infinite where the definition's square is
    if (row.y >= 0) loss += slope->truth * (s.max - z + log_sum);
    if constexpr (general) loss += s.pull + s.mass * log_sum;
    store(r.loss + row.index, loss);
    store(r.row_max + row.index, s.max);
    store(r.row_log_sum + row.index, log_sum);
  }
  close_slope(r, s.max, log_sum, 1 / s.sum, s.mass, slope);
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
  A slope[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    slope[j] = exp_fast(z[j] - s.max) * s.factor;
    if constexpr (general) {
      slope[j] -= share[j] * s.scale;
      slope[j] *= cap_slope(r, z[j]);
    }
  }
  return narrow_items<T>(slope);
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
