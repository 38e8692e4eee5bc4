// Log probabilities, entropy and other statistics of rows of logits, and the gradient of any of them.
//
// Eager PyTorch writes log-probabilities of the logits' size, and products of them for the entropy, in forward and
// again in backward. Here a row is read from memory once in each: in forward blocks of 1024 logits give their maximum,
// then from the cache their sums, which are brought to a higher maximum by one factor a block; in backward each
// gradient follows from its logit and three saved numbers a row.
//
// Nothing here depends on where a row lies in memory, on other rows, or on the number of threads.
#include "log_probs.h"

#include "parallel.h"
#include "rows.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
// Stands for log p of -inf: exp() of it is 0, and 0 times it is 0.
template <class A>
constexpr A kLeast = -1e4;

template <class T>
struct Problem {
  using A = acc_t<T>;
  const LogProbRows& r;

  const T* logits(int64_t row) const { return static_cast<const T*>(r.logits) + row * r.logits_stride; }
  T* grad(int64_t row) const { return static_cast<T*>(r.grad) + row * r.grad_stride; }
  int64_t target(int64_t row) const {
    return r.target_is_int32 ? static_cast<const int32_t*>(r.target)[row] : static_cast<const int64_t*>(r.target)[row];
  }
  A temperature(int64_t row) const {
    return r.temperature == nullptr ? static_cast<A>(r.number) : static_cast<const A*>(r.temperature)[row];
  }
  const int64_t* top_ids(int64_t row) const { return r.top_ids + row * r.tops; }
};

template <class A>
void put(void* to, int64_t i, A value) {
  if (to != nullptr) static_cast<A*>(to)[i] = value;
}
template <class A>
A get(const void* from, int64_t i) {
  return from == nullptr ? A(0) : static_cast<const A*>(from)[i];
}

// The capped logit of one class: the same bits that the vectors of the walk hold.
template <class T>
__attribute__((noinline)) acc_t<T> logit(const T* x, double cap) {
  if (cap == 0) return to_acc(*x);
  acc_t<T> z;
  softcapped(x, &z, cap, 1);
  return z;
}

// --- forward ----------------------------------------------------------------------------------------------------

enum Sums { kPlain, kEntropy, kSquares };

// Of a row's classes below its maximum m, with d = (z - m) / T: sum e^d, sum e^d d and sum e^2d. The classes at the
// maximum, whose e^d is 1, are counted apart: in a nearly certain row the others' sum is far below the rounding of 1.
template <class A>
struct State {
  A max = -kInfinity<A>, count = 0, others = 0, weighted = 0, squares = 0;

  void raise(A higher, A scale) {
    if (max > -kInfinity<A>) {
      const A d = (max - higher) * scale, factor = std::exp(d), bounded = d < kLeast<A> ? kLeast<A> : d;
      weighted = factor * (weighted + bounded * (others + count));
      squares = factor * factor * (squares + count);
      others = factor * (others + count);
    }
    max = higher;
    count = 0;
  }
};

// Adds a block. kAtMax: some of its classes are at the maximum. kScaled: a temperature other than 1.
template <Sums kSums, bool kScaled, bool kAtMax, class T>
void add_block(const T* x, int64_t n, acc_t<T> scale, State<acc_t<T>>* state) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  // While nothing but -inf has been seen, exponentials are taken against 0: they are 0, not exp(-inf + inf).
  const A reference = state->max == -kInfinity<A> ? A(0) : state->max;
  vec<A> others[2] = {}, weighted[2] = {}, squares[2] = {}, count{};
  const auto add = [&](vec<A> v, int lane) __attribute__((always_inline)) {
    vec<A> d = v - reference;
    if constexpr (kScaled) d *= scale;
    vec<A> e = exp_of<T>(d);
    if constexpr (kAtMax) {
      const auto below = v != reference;  // NaN, too
      count += below ? vec<A>{} : splat(A(1));
      e = below ? e : vec<A>{};
    }
    others[lane] += e;
    if constexpr (kSums != kPlain) weighted[lane] += e * max(splat(kLeast<A>), d);
    if constexpr (kSums == kSquares) squares[lane] += e * e;
  };
  int64_t i = 0;
  for (; i + 2 * w <= n; i += 2 * w) {
    // The next block: its maximum is taken next, and memory would idle while this one computes.
    for (int64_t line = 0; line < 2 * w * static_cast<int64_t>(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + kLogProbsBlock) + line);
    if constexpr (in_pairs<T>) {
      const Pair v = load_pair(x + i);
      add(v.even, 0);
      add(v.odd, 1);
    } else {
      add(load(x + i), 0);
      add(load(x + i + w), 1);
    }
  }
  for (; i < n; i += w) add(load_partial(x + i, n - i < w ? n - i : w, -kInfinity<A>), 0);
  state->others += reduce_add(others[0] + others[1]);
  if constexpr (kSums != kPlain) state->weighted += reduce_add(weighted[0] + weighted[1]);
  if constexpr (kSums == kSquares) state->squares += reduce_add(squares[0] + squares[1]);
  if constexpr (kAtMax) state->count += reduce_add(count);
}

template <class T>
double block_sum(const T* x, int64_t n) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  vec<A> sum{};
  for (int64_t i = 0; i < n; i += w) sum += load_some(x + i, n - i < w ? n - i : w);
  return reduce_add(sum);
}

// Index of the first class that is `value`; of the first NaN for NaN; n without either.
template <class X, class A>
int64_t find(const X* x, int64_t n, A value) {
  int64_t i = 0;
  if (value == value)
    while (i < n && to_acc(x[i]) != value) ++i;
  else
    while (i < n && to_acc(x[i]) == to_acc(x[i])) ++i;
  return i;
}

template <class A>
struct Found {
  State<A> state;
  double sum = 0;  // of z T
  int64_t argmax = 0;
};

// One walk over a row. `block` holds a block of capped logits.
template <Sums kSums, bool kScaled, bool kCap, class T>
Found<acc_t<T>> walk(const LogProbRows& r, const T* row, acc_t<T> scale, acc_t<T>* block) {
  using A = acc_t<T>;
  using X = std::conditional_t<kCap, A, T>;
  Found<A> found;
  State<A>& state = found.state;
  for (int64_t begin = 0; begin < r.classes; begin += kLogProbsBlock) {
    const int64_t size = r.classes - begin < kLogProbsBlock ? r.classes - begin : kLogProbsBlock;
    const X* x;
    if constexpr (kCap) {
      softcapped(row + begin, block, r.softcap, size);
      x = block;
    } else {
      x = row + begin;
    }
    const A most = row_max(x, size);
    if (most > state.max) {
      state.raise(most, scale);
      if (r.argmax != nullptr) found.argmax = begin + find(x, size, most);
    }
    if (most == state.max && most > -kInfinity<A>)
      add_block<kSums, kScaled, true>(x, size, scale, &state);
    else
      add_block<kSums, kScaled, false>(x, size, scale, &state);
    if (r.mean_logit != nullptr) found.sum += block_sum(x, size);
  }
  // A row of -inf alone, or with +inf, has no distribution; NaN is the largest, as for PyTorch.
  if (state.max == -kInfinity<A> || state.max == kInfinity<A>) state.others = kNaN<A>;
  if (state.others != state.others) {
    if (const int64_t nan = find(row, r.classes, kNaN<A>); nan < r.classes) {
      state.max = kNaN<A>;
      found.argmax = nan;
    }
  }
  return found;
}

template <class T>
void forward_row(const Problem<T>& problem, int64_t row, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const LogProbRows& r = problem.r;
  const int64_t y = problem.target(row);
  A* top = r.top_log_prob == nullptr ? nullptr : static_cast<A*>(r.top_log_prob) + row * r.tops;
  if (y == r.ignore_index) {
    void* const fields[] = {r.max,     r.log_sum, r.surprise,   r.log_prob,
                            r.entropy, r.lse,     r.mean_logit, r.log_sum_sq_probs};
    for (void* to : fields) put(to, row, A(0));
    if (r.argmax != nullptr) r.argmax[row] = -1;
    for (int64_t k = 0; top != nullptr && k < r.tops; ++k) top[k] = 0;
    return;
  }
  const T* x = problem.logits(row);
  const A temperature = problem.temperature(row), scale = 1 / temperature;
  const auto by_scale = [&]<Sums kSums>() {
    if (r.softcap != 0) return walk<kSums, true, true>(r, x, scale, scratch);
    return temperature == 1 ? walk<kSums, false, false>(r, x, scale, scratch)
                            : walk<kSums, true, false>(r, x, scale, scratch);
  };
  const Found<A> found = r.log_sum_sq_probs != nullptr ? by_scale.template operator()<kSquares>()
                         : r.entropy != nullptr        ? by_scale.template operator()<kEntropy>()
                                                       : by_scale.template operator()<kPlain>();
  const State<A>& s = found.state;
  const A log_sum = std::log1p(s.count - 1 + s.others), surprise = s.weighted / (s.count + s.others);
  const auto log_prob = [&](int64_t c) { return (logit(x + c, r.softcap) - s.max) * scale - log_sum; };
  put(r.max, row, s.max);
  put(r.log_sum, row, log_sum);
  put(r.surprise, row, surprise);
  if (r.log_prob != nullptr) put(r.log_prob, row, log_prob(y));
  put(r.entropy, row, log_sum - surprise);
  put(r.lse, row, std::isinf(s.max) ? s.max : s.max / temperature + log_sum);
  put(r.mean_logit, row, static_cast<A>(found.sum / static_cast<double>(r.classes) / temperature));
  put(r.log_sum_sq_probs, row, std::log1p(s.count - 1 + s.squares) - 2 * log_sum);
  if (r.argmax != nullptr) r.argmax[row] = found.argmax;
  for (int64_t k = 0; top != nullptr && k < r.tops; ++k) top[k] = log_prob(problem.top_ids(row)[k]);
}

// --- backward ---------------------------------------------------------------------------------------------------
//
// With G the sum of the incoming gradients of log probabilities, G_c that of those of class c, and H the entropy:
//   dz_c = G_c (1 - p_c) + p_c (g_lse - (G - G_c) - (log p_c + H) g_H)
// G_c is 0 for all but a few classes, which are done by themselves.

// The classes that incoming gradients name, with their sums G_c.
template <class T>
class Listed {
 public:
  using A = acc_t<T>;
  // Reads the logits, which may be overwritten after. `scratch` holds 3 numbers for each of tops + 1 entries.
  Listed(const Problem<T>& problem, int64_t row, A* scratch)
      : tops_(problem.r.grad_top_log_prob == nullptr ? 0 : problem.r.tops),
        size_(tops_ + (problem.r.grad_log_prob != nullptr)),
        ids_(tops_ == 0 ? nullptr : problem.top_ids(row)),
        y_(problem.target(row)),
        x_(scratch),
        sum_(scratch + size_),
        first_(reinterpret_cast<int32_t*>(scratch + 2 * size_)) {
    const T* x = problem.logits(row);
    for (int64_t k = 0; k < size_; ++k) {
      x_[k] = to_acc(x[id(k)]);
      sum_[k] = k < tops_ ? get<A>(problem.r.grad_top_log_prob, row * tops_ + k) : get<A>(problem.r.grad_log_prob, row);
      total_ += sum_[k];
    }
  }
  A total() const { return total_; }

  // grad_c = value(x_c, G_c) for each class in the list.
  template <class F>
  void write(T* grad, F value) {
    // The row of gradients itself tells where a class stands first in the list: at most 1025 entries, two bytes or
    // more.
    for (int64_t k = size_ - 1; k >= 0; --k) {
      const auto number = static_cast<uint16_t>(k);
      std::memcpy(grad + id(k), &number, sizeof number);
    }
    for (int64_t k = 0; k < size_; ++k) {
      uint16_t number;
      std::memcpy(&number, grad + id(k), sizeof number);
      first_[k] = number;
    }
    for (int64_t k = 0; k < size_; ++k)
      if (first_[k] != k) sum_[first_[k]] += sum_[k];
    for (int64_t k = 0; k < size_; ++k)
      if (first_[k] == k) grad[id(k)] = from_acc<T>(value(x_[k], sum_[k]));
  }

 private:
  int64_t id(int64_t k) const { return k < tops_ ? ids_[k] : y_; }

  int64_t tops_, size_;
  const int64_t* ids_;
  int64_t y_;
  A *x_, *sum_;
  int32_t* first_;
  A total_ = 0;
};

// A row's gradients, as functions of a logit x.
template <class T, bool kCap, bool kScaled, bool kEntropy>
struct Gradient {
  using A = acc_t<T>;
  A max, log_sum, surprise, scale, cap, share;  // share: p of a class at the maximum
  A others, entropy;                            // share scale (g_lse - G), share scale g_H

  // d = (z - max) / T of logits x.
  FASTLLM_INLINE vec<A> below(vec<A> x) const {
    vec<A> d = kCap ? tanh_of(x / cap) * cap - max : x - max;
    if constexpr (kScaled) d *= scale;
    return d;
  }
  FASTLLM_INLINE vec<A> operator()(vec<A> x) const {
    const vec<A> d = below(x), e = exp_of<T>(d);
    vec<A> g;
    if constexpr (kEntropy)  // log p + H = d - the mean of d
      g = e * (others - fastllm::cpu::max(splat(kLeast<A>), d - surprise) * entropy);
    else
      g = e * others;
    if constexpr (kCap) g *= cap_slope<T>(x, cap);
    return g;
  }
};

template <class T, bool kCap, bool kScaled, bool kEntropy>
void gradient_row(const Problem<T>& problem, int64_t row, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const LogProbRows& r = problem.r;
  const T* x = problem.logits(row);
  T* grad = problem.grad(row);
  Listed<T> listed(problem, row, scratch);
  const A max = get<A>(r.max, row), log_sum = get<A>(r.log_sum, row), surprise = get<A>(r.surprise, row);
  const A scale = 1 / problem.temperature(row), cap = static_cast<A>(r.softcap);
  const A g_lse = get<A>(r.grad_lse, row), g_entropy = get<A>(r.grad_entropy, row), share = std::exp(-log_sum);
  const Gradient<T, kCap, kScaled, kEntropy> gradient{max,
                                                      log_sum,
                                                      surprise,
                                                      scale,
                                                      cap,
                                                      share,
                                                      with_plain_nan(share * scale * (g_lse - listed.total())),
                                                      with_plain_nan(share * scale * g_entropy)};
  const bool streaming = r.grad != r.logits && r.rows * r.classes * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const Sink<T> sink{grad, streaming};
  const auto value = [&](int64_t i, int64_t some) { return gradient(load_some(x + i, some)); };
  if constexpr (in_pairs<T> && !kCap)
    write_row<true>(sink, r.classes, value, [&](int64_t i) {
      const Pair v = load_pair(x + i);
      return Pair{gradient(v.even), gradient(v.odd)};
    });
  else
    write_row<false>(sink, r.classes, value, nullptr);
  listed.write(grad, [&](A logit_of_class, A own) {
    const T stored = from_acc<T>(logit_of_class);
    const A d = (logit(&stored, r.softcap) - max) * scale, log_p = d - log_sum;
    const A at_least = d - surprise < kLeast<A> ? kLeast<A> : d - surprise;
    const A p = std::exp(log_p);
    A g = p * (g_lse - (listed.total() - own) - at_least * g_entropy) - std::expm1(log_p) * own;
    if (kCap) g *= cap_slope<T>(splat(logit_of_class), cap)[0];
    return g * scale;
  });
}

template <class T>
void backward_row(const Problem<T>& problem, int64_t row, acc_t<T>* scratch) {
  const LogProbRows& r = problem.r;
  if (problem.target(row) == r.ignore_index) {
    fill_zero(problem.grad(row), r.classes);
    return;
  }
  const bool scaled = problem.temperature(row) != 1, entropy = r.grad_entropy != nullptr;
  if (r.softcap != 0)
    entropy ? gradient_row<T, true, true, true>(problem, row, scratch)
            : gradient_row<T, true, true, false>(problem, row, scratch);
  else if (scaled)
    entropy ? gradient_row<T, false, true, true>(problem, row, scratch)
            : gradient_row<T, false, true, false>(problem, row, scratch);
  else
    entropy ? gradient_row<T, false, false, true>(problem, row, scratch)
            : gradient_row<T, false, false, false>(problem, row, scratch);
}

template <class T, class F>
void for_rows(const LogProbRows& r, F row_function) {
  using A = acc_t<T>;
  const Problem<T> problem{r};
  A* scratch = static_cast<A*>(r.scratch);
  const int64_t size = log_probs_scratch(r.tops), grain = 16384 / (r.classes + 1) + 1;
  parallel_for(r.rows, grain, [&](int64_t begin, int64_t end) {
    A* own = scratch + thread_index() * size;
    for (int64_t row = begin; row < end; ++row) row_function(problem, row, own);
    stream_fence();
  });
}

void forward_entry(const LogProbRows& r) { FASTLLM_SWITCH_DTYPE(r.dtype, for_rows<T>(r, forward_row<T>)) }

void backward_entry(const LogProbRows& r) { FASTLLM_SWITCH_DTYPE(r.dtype, for_rows<T>(r, backward_row<T>)) }

}  // namespace

extern const LogProbsKernels log_probs_kernels;
const LogProbsKernels log_probs_kernels = {forward_entry, backward_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
