// cross_entropy: loss, softmax statistics and gradient of rows of logits.
//
// PyTorch reads the logits, writes log-probabilities, reads them for the loss, writes and reads a one-hot gradient and
// writes the gradient: 7 streams of N x V items, some of them in float32. Here the loss alone reads the logits once,
// and loss and gradient together read them once and write the gradient once, wherever a row fits the registers of a
// block or, from sm_90 on, of a cluster of blocks, which exchange their statistics through each other's shared memory.
// A longer row is read twice, the second time from the L2 cache where the rows in flight fit it. A class index is never
// turned into a one-hot row, and nothing waits for the host: divisors and incoming gradients are read on the device.
//
// Sums are taken in float32 (float64 for float64), thread by thread, then in a fixed order: the same bits every time.
#include "cross_entropy.h"
#include "cross_entropy_held.cuh"

namespace fastllm::cuda {
namespace {

// Threads of a block, at most, and blocks that a multiprocessor, with its 65536 registers, runs side by side.
constexpr int kThreads = 256;
template <class T, bool general, bool with_grad>
constexpr int kStreamingBlocks = !kLean<T, general> ? 2
                                 : with_grad        ? 4
                                                    : 5;
template <class T, bool general>
constexpr int kBackwardBlocks = kLean<T, general> ? 3 : 2;

template <class T>
FASTLLM_DEVICE void ignore_row(const Rows<T>& r, const Row<T>& row, int first, int stride, bool edges) {
  if (edges && threadIdx.x == 0) {
    store(r.loss + row.index, Acc<T>(0));
    store(r.row_max + row.index, Acc<T>(0));
    store(r.row_log_sum + row.index, Acc<T>(0));
  }
  if (r.grad != nullptr) write_zeros(r, row, first, stride, edges);
}

// A row in the registers of `cluster` blocks.
template <class T, bool general>
__global__ void __launch_bounds__(kHoldingThreads<T, general>, kHoldingBlocks<T, general>)
    held_rows(Rows<T> r, int cluster) {
  const int rank = cluster > 1 ? cluster_rank() : 0;
  const Part part{cluster, static_cast<int>(rank * blockDim.x + threadIdx.x), static_cast<int>(cluster * blockDim.x),
                  rank == 0};
  Row<T> row;
  if (!open_row(r, blockIdx.x / cluster, &row)) {
    ignore_row(r, row, part.first, part.stride, part.edges);
    return;
  }
  if (cluster > 1) announce_to_cluster();
  if constexpr (kLean<T, general>)
    hold_lean_row(r, row, part);
  else
    hold_row<general>(r, row, part);
}

// Statistics of a thread's part of a row, read group by group. `again`: the row will be read once more.
template <bool general, bool again, class T>
FASTLLM_DEVICE Stats<Acc<T> > read_row(const Rows<T>& r, const Row<T>& row) {
  using A = Acc<T>;
  constexpr int N = kVec<T>, K = kInFlight;
  constexpr int kTogether = 16 / N < K ? 16 / N : K;  // groups of one maximum
  const int stride = blockDim.x;
  const T* logits = row.logits + row.head;
  Stats<A> s;
  for_chunks<K>(threadIdx.x, stride, row.groups, [&](int v, auto is_whole) {
    constexpr bool whole = decltype(is_whole)::value;
    Vec<T, N> x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (whole || v + k * stride < row.groups) {
        const T* from = logits + int64_t{v + k * stride} * N;
        x[k] = again ? load_vec<N>(from) : load_vec_streaming<N>(from);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) x[k].items[j] = kMinusInfinity<T>;
      }
    }
    if constexpr (general) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (!whole && v + k * stride >= row.groups) break;
        A z[N];
#pragma unroll
        for (int j = 0; j < N; ++j) z[j] = logit<general>(r, x[k].items[j]);
        add_columns(r, row, row.head + (v + k * stride) * N, z, s);
      }
    } else {
#pragma unroll
      for (int k = 0; k < K; k += kTogether) {
        A z[kTogether * N];
#pragma unroll
        for (int i = 0; i < kTogether * N; ++i) z[i] = widen(x[k + i / N].items[i % N]);
        add_exponentials(s, z);
      }
    }
  });
  const int edge = edge_column(r, row);
  if (edge < 0) return s;
  A z[1] = {logit<general>(r, load(row.logits + edge))};
  if constexpr (general)
    add_columns(r, row, edge, z, s);
  else
    add_exponentials(s, z);
  return s;
}

// A row by one block, read once for its loss, and once more for its gradient.
template <class T, bool general, bool with_grad>
__global__ void __launch_bounds__(kThreads, kStreamingBlocks<T, general, with_grad>) streamed_rows(Rows<T> r) {
  using A = Acc<T>;
  Row<T> row;
  if (!open_row(r, blockIdx.x, &row)) {
    ignore_row(r, row, threadIdx.x, blockDim.x, true);
    return;
  }
  const A z_class = logit_of_class<general>(r, row);
  Stats<A> s = read_row<general, with_grad>(r, row);
  s = merge_row<general>(merge_warp<general>(s), reinterpret_cast<Stats<A>*>(shared_memory()), 1);
  Slope<A> slope = open_slope(r, row);
  finish_row<general>(r, row, s, z_class, threadIdx.x == 0, &slope);
  if constexpr (with_grad) write_gradient<general>(r, row, slope, threadIdx.x, blockDim.x, true);
}

// The sum of a row's shares, without its class.
template <class T>
FASTLLM_DEVICE Acc<T> mass_of(const Rows<T>& r, const Row<T>& row) {
  using A = Acc<T>;
  if (r.probabilities == nullptr) return r.smooth * (r.weight_sum != nullptr ? load(r.weight_sum) : A(r.classes));
  A mass = 0;
  for (int column = threadIdx.x; column < r.classes; column += blockDim.x) {
    A share[1];
    shares_of(r, row, column, share);
    mass += share[0];
  }
  return reduce_block(mass, A(0), Sum(), reinterpret_cast<A*>(shared_memory()));
}

// The gradient from saved statistics; a row is cut into `parts`.
template <class T, bool general>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, general>) backward_rows(Rows<T> r, int parts) {
  using A = Acc<T>;
  if (r.correct && incoming_of(r, 0) == A(1)) return;
  for (int64_t piece = blockIdx.x; piece < r.rows * parts; piece += gridDim.x) {
    const int part = static_cast<int>(piece % parts), stride = parts * blockDim.x;
    const int first = part * blockDim.x + threadIdx.x;
    Row<T> row;
    if (!open_row(r, piece / parts, &row)) {
      write_zeros(r, row, first, stride, part == 0);
      continue;
    }
    const A max = load(r.row_max + row.index), log_sum = load(r.row_log_sum + row.index);
    A mass = 0;
    if constexpr (general) mass = mass_of(r, row);
    Slope<A> slope = open_slope(r, row);
    close_slope(r, max, log_sum, std::exp(-log_sum), mass, &slope);
    write_gradient<general>(r, row, slope, first, stride, part == 0);
  }
}

// --- launchers --------------------------------------------------------------------------------------------------

template <class T>
Rows<T> rows_of(const CrossEntropy& c) {
  using A = Acc<T>;
  constexpr int64_t item = sizeof(T);
  Rows<T> r{};
  r.rows = c.rows;
  r.classes = static_cast<int>(c.classes);
  r.logits = static_cast<const T*>(c.logits);
  r.logits_stride = c.logits_stride;
  r.target = c.target;
  r.target_is_int32 = c.target_is_int32;
  r.probabilities = static_cast<const T*>(c.probabilities);
  r.weight = static_cast<const A*>(c.weight);
  r.weight_sum = static_cast<const A*>(c.weight_sum);
  r.ignore_index = c.ignore_index;
  r.keep = static_cast<A>(1 - c.label_smoothing);
  r.smooth = static_cast<A>(c.label_smoothing / static_cast<double>(c.classes));
  r.z_scale = static_cast<A>(c.lse_square_scale);
  r.cap = static_cast<A>(c.softcap);
  r.inverse_cap = static_cast<A>(c.softcap == 0 ? 0 : 1 / c.softcap);
  r.loss = static_cast<A*>(c.loss);
  r.row_max = static_cast<A*>(c.row_max);
  r.row_log_sum = static_cast<A*>(c.row_log_sum);
  r.grad = static_cast<T*>(c.grad);
  r.grad_stride = c.grad_stride;
  const int64_t bytes = c.logits_stride * item;
  r.grad_width = common_width(c.logits, bytes, c.grad, c.grad_stride * item);
  r.probabilities_width = common_width(c.logits, bytes, c.probabilities, c.classes * item);
  r.incoming = c.incoming;
  r.incoming_is_acc = c.incoming_is_acc;
  r.incoming_stride = c.incoming_stride;
  r.divisor = static_cast<const A*>(c.divisor);
  r.correct = c.correct;
  return r;
}

bool is_general(const CrossEntropy& c) {
  return c.probabilities != nullptr || c.label_smoothing != 0 || c.softcap != 0;
}

// Threads of a block where `blocks` of them share a row, each thread taking `bytes` of it.
int threads_for(int64_t row_bytes, int64_t blocks, int64_t bytes, int most) {
  const int64_t wanted = ceil_div(ceil_div(row_bytes, bytes * blocks), kWarp) * kWarp;
  return static_cast<int>(wanted < 2 * kWarp ? 2 * kWarp : wanted < most ? wanted : most);
}

template <class T>
constexpr size_t kShared = kStatsBytes<Acc<T> >;

// Whether the device runs clusters of so many blocks, of the most threads.
template <class T>
bool has_room(const CrossEntropy& c, int cluster) {
  const auto ask = [&]<bool general>(std::bool_constant<general>) {
    return cluster_fits<held_rows<T, general> >({cluster, kHoldingThreads<T, general>, kShared<T>, cluster});
  };
  return is_general(c) ? ask(std::true_type()) : ask(std::false_type());
}

template <class T, bool general>
Status hold(const CrossEntropy& c, Stream stream) {
  const int64_t row_bytes = c.classes * static_cast<int64_t>(sizeof(T));
  const int threads = threads_for(row_bytes, c.cluster, 16 * kHeld<T, general>, kHoldingThreads<T, general>);
  return launch(held_rows<T, general>, {c.rows * c.cluster, threads, kShared<T>, c.cluster}, stream, rows_of<T>(c),
                c.cluster);
}

template <class T, bool general>
Status stream_rows(const CrossEntropy& c, Stream stream) {
  const int64_t row_bytes = c.classes * static_cast<int64_t>(sizeof(T));
  return launch(c.grad == nullptr ? streamed_rows<T, general, false> : streamed_rows<T, general, true>,
                {c.rows, threads_for(row_bytes, 1, 16 * kInFlight, kThreads), kShared<T>}, stream, rows_of<T>(c));
}

template <class T>
Status forward(const CrossEntropy& c, Stream stream) {
  if (c.cluster > 0) return is_general(c) ? hold<T, true>(c, stream) : hold<T, false>(c, stream);
  return is_general(c) ? stream_rows<T, true>(c, stream) : stream_rows<T, false>(c, stream);
}

// Blocks that each walk over many rows: as many as the multiprocessors hold side by side. Few rows are cut into parts.
template <class T>
Status backward(const CrossEntropy& c, Stream stream) {
  const int64_t row_bytes = c.classes * static_cast<int64_t>(sizeof(T)), rows = c.rows == 0 ? 1 : c.rows;
  const int threads = threads_for(row_bytes, 1, 16 * kInFlight, kThreads);
  const int64_t resident = int64_t{c.multiprocessors} * (kBackwardBlocks<T, false> * kThreads / threads);
  const int64_t most_parts = ceil_div(row_bytes, int64_t{threads} * 16 * kInFlight), wanted = ceil_div(resident, rows);
  // The shares of class probabilities are summed over the whole row.
  const int64_t parts = c.probabilities != nullptr || most_parts < 1 ? 1 : wanted < most_parts ? wanted : most_parts;
  const int64_t pieces = c.rows * parts;
  const Shape shape{pieces < resident ? pieces : resident, threads, kWarp * sizeof(Acc<T>)};
  return launch(is_general(c) ? backward_rows<T, true> : backward_rows<T, false>, shape, stream, rows_of<T>(c),
                static_cast<int>(parts));
}

}  // namespace

bool cross_entropy_fits(DType dtype, int64_t classes, int cluster) {
  FASTLLM_SWITCH_DTYPE(dtype, return classes <= cluster * kHeldByBlock<T>)
  return false;
}

int cross_entropy_cluster(const CrossEntropy& c, int capability) {
  constexpr int64_t kManyRows = 512;  // enough for blocks of their own to fill a GPU
  if (c.grad == nullptr && c.rows >= kManyRows) return 0;
  const int largest = capability < 90 ? 1 : kMaxCluster;
  int cluster = 1;
  while (cluster <= largest && !cross_entropy_fits(c.dtype, c.classes, cluster)) cluster *= 2;
  if (cluster > largest) return 0;
  if (cluster > 1) FASTLLM_SWITCH_DTYPE(c.dtype, if (!has_room<T>(c, cluster)) return 0)
  return cluster;
}

Status cross_entropy_forward(const CrossEntropy& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return forward<T>(arguments, stream))
  return 1;
}

Status cross_entropy_backward(const CrossEntropy& arguments, Stream stream) {
  FASTLLM_SWITCH_DTYPE(arguments.dtype, return backward<T>(arguments, stream))
  return 1;
}

}  // namespace fastllm::cuda
