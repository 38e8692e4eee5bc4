// Cross-entropy of rows of logits, with the gradient in the same visit.
//
// Eager PyTorch reads the logits, writes log-probabilities, reads them for the loss, writes a one-hot gradient of N x
// V, reads both and writes the gradient: 7 streams. Here a row is read from memory once and its gradient written once:
// blocks of 1024 logits become exp(x - running maximum) in a scratch row that stays in L2, with one correction factor a
// block, and a second walk over the scratch row rescales them: one exponential an element.
//
// The gradient at the true class is formed in the accumulator before it is rounded.
#include "cross_entropy.h"

#include "parallel.h"
#include "rows.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// What one row's gradient is made of. For class y: grad_c = p_c probability - w_c smooth - [c = y] truth, formed at y
// as truth (p_y - 1) + p_y rest - w_y smooth, whose first difference is exact as p_y nears 1. For class probabilities:
// grad_c = p_c probability - w_c (q_c keep + smooth) scale.
template <class A>
struct RowTerms {
  A probability, smooth, truth, rest, scale;
  int64_t y;
  A at_class(A p, A weight) const { return truth * (p - 1) + p * rest - weight * smooth; }
};

template <class T>
struct Problem {
  using A = acc_t<T>;
  const CrossEntropyRows& r;
  const A* weight;
  A keep, smooth, z_scale;  // 1 - e, e / V, s

  explicit Problem(const CrossEntropyRows& rows)
      : r(rows),
        weight(static_cast<const A*>(rows.weight)),
        keep(static_cast<A>(1 - rows.label_smoothing)),
        smooth(static_cast<A>(rows.label_smoothing / static_cast<double>(rows.classes))),
        z_scale(static_cast<A>(rows.lse_square_scale)) {}

  const T* logits(int64_t row) const { return static_cast<const T*>(r.logits) + row * r.logits_stride; }
  T* grad(int64_t row) const { return static_cast<T*>(r.grad) + row * r.grad_stride; }
  const T* probabilities(int64_t row) const {
    return r.probabilities == nullptr ? nullptr : static_cast<const T*>(r.probabilities) + row * r.classes;
  }
  int64_t target(int64_t row) const {
    return r.target_is_int32 ? static_cast<const int32_t*>(r.target)[row] : static_cast<const int64_t*>(r.target)[row];
  }
  bool ignored(int64_t row) const { return r.probabilities == nullptr && target(row) == r.ignore_index; }
  A weight_of(int64_t c) const { return weight == nullptr ? A(1) : weight[c]; }
  A scale(int64_t row) const {
    const A by_row = r.row_scale == nullptr ? A(1) : static_cast<const A*>(r.row_scale)[row];
    return static_cast<A>(r.scale) * by_row;
  }
  // s lse^2, infinite where the definition's square is; its derivative, in terms(), likewise.
  A z_loss(A lse) const { return z_scale == 0 ? A(0) : z_scale * (lse * lse); }
  // distribution_mass: sum_c w_c q'_c, for class probabilities.
  RowTerms<A> terms(int64_t row, A distribution_mass, A lse) const {
    const A g = scale(row);
    const A z_slope = z_scale == 0 ? A(0) : z_scale * (2 * lse);
    if (r.probabilities != nullptr) return {(distribution_mass + z_slope) * g, smooth, 0, 0, g, -1};
    const A truth = keep * weight_of(target(row)) * g;
    const A rest = (smooth * static_cast<A>(r.weight_sum) + z_slope) * g;
    return {truth + rest, smooth * g, truth, rest, g, target(row)};
  }
};

// How exponentials lie in the scratch row: in order, or (kPairs) as pairs of vectors from item `head` on, as far as
// whole pairs go.
template <class T>
FASTLLM_INLINE int64_t place(int64_t i, int64_t head, int64_t n) {
  constexpr int64_t w = lanes<T>;
  if (i < head || i >= head + (n - head) / (2 * w) * (2 * w)) return i;
  const int64_t inside = (i - head) % (2 * w);
  return i - inside + inside / 2 + (inside % 2) * w;
}

// Sum of exp(x - m); with kKeep the exponentials go to e.
template <class T, bool kKeep, bool kPairs>
FASTLLM_INLINE acc_t<T> exp_sum(const T* x, acc_t<T> m, acc_t<T>* e, int64_t n, int64_t head) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  vec<A> s0{}, s1{};
  const auto in_order = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t i = from; i < to; i += w) {
      const int64_t left = to - i < w ? to - i : w;
      const vec<A> a = exp_of<T>(load_partial(x + i, left, -kInfinity<A>) - m);
      if constexpr (kKeep) store_partial(e + i, a, left);
      s0 += a;
    }
  };
  int64_t i = kPairs && head < n ? head : 0;
  in_order(0, i);
  for (; i + 2 * w <= n; i += 2 * w) {
    // The next block: its maximum is taken next, and memory would idle while this one computes.
    for (int64_t line = 0; line < 2 * w * static_cast<int64_t>(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + kCrossEntropyBlock) + line);
    vec<A> a, b;
    if constexpr (kPairs) {
      const Pair v = load_pair(x + i);
      a = exp_of<T>(v.even - m);
      b = exp_of<T>(v.odd - m);
    } else {
      a = exp_of<T>(load(x + i) - m);
      b = exp_of<T>(load(x + i + w) - m);
    }
    if constexpr (kKeep) {
      store(e + i, a);
      store(e + i + w, b);
    }
    s0 += a;
    s1 += b;
  }
  in_order(i, n);
  return reduce_add(s0 + s1);
}

template <class A>
struct Softmax {
  A max, sum;  // of the row: maximum, sum of exp(x - max)
  A log_sum() const { return std::log(sum); }
  A lse() const { return max + log_sum(); }
};

// Blocks are equal but for the first, which is longer by `head`, so that those after it begin where streaming does.
int64_t block_end(int64_t begin, int64_t head, int64_t n) {
  const int64_t end = (begin == 0 ? head : begin) + kCrossEntropyBlock;
  return end < n ? end : n;
}

// One walk over the row. With kKeep, e holds exp(x - reference of its block) and `references` one reference a block.
template <class T, bool kKeep, bool kPairs>
Softmax<acc_t<T>> softmax_walk(const T* x, int64_t n, acc_t<T>* e, acc_t<T>* references, int64_t head) {
  using A = acc_t<T>;
  A m = -kInfinity<A>, sum = 0;
  for (int64_t begin = 0, b = 0; begin < n; begin = block_end(begin, head, n), ++b) {
    const int64_t size = block_end(begin, head, n) - begin;
    const A block = row_max(x + begin, size);
    const A higher = block > m ? block : m;
    // While nothing but -inf has been seen, exponentials are taken against 0: they are 0, not exp(-inf + inf).
    const A reference = higher == -kInfinity<A> ? A(0) : higher;
    if (higher != m) sum = m == -kInfinity<A> && sum == 0 ? A(0) : sum * std::exp(m - higher);
    m = higher;
    sum += exp_sum<T, kKeep, kPairs>(x + begin, reference, e + begin, size, begin == 0 ? head : 0);
    if constexpr (kKeep) references[b] = higher;
  }
  // A row of -inf alone has no distribution.
  if (m == -kInfinity<A>) sum = std::numeric_limits<A>::quiet_NaN();
  return {m, sum};
}

// sum_c w_c (x_c - m), for label smoothing.
template <class T>
acc_t<T> weighted_offsets(const T* x, const acc_t<T>* weight, acc_t<T> m, int64_t n) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  vec<A> s{};
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const vec<A> d = load(x + i) - m;
    s += weight == nullptr ? d : d * load(weight + i);
  }
  A tail = 0;
  for (; i < n; ++i) tail += (to_acc(x[i]) - m) * (weight == nullptr ? A(1) : weight[i]);
  return reduce_add(s) + tail;
}

// sum_c w_c q'_c (log_sum - (x_c - m)), and the mass sum_c w_c q'_c.
template <class T>
acc_t<T> distribution_loss(const T* x, const T* q, const acc_t<T>* weight, acc_t<T> keep, acc_t<T> smooth, acc_t<T> m,
                           acc_t<T> log_sum, int64_t n, acc_t<T>* mass) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  vec<A> s{}, total{};
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    vec<A> share = load(q + i) * keep + smooth;
    if (weight != nullptr) share *= load(weight + i);
    s += share * (log_sum - (load(x + i) - m));
    total += share;
  }
  A tail = 0, tail_total = 0;
  for (; i < n; ++i) {
    const A share = (to_acc(q[i]) * keep + smooth) * (weight == nullptr ? A(1) : weight[i]);
    tail += share * (log_sum - (to_acc(x[i]) - m));
    tail_total += share;
  }
  *mass = reduce_add(total) + tail_total;
  return reduce_add(s) + tail;
}

template <class T>
bool streams(const CrossEntropyRows& r) {
  return !r.fixed_blocks && r.grad != r.logits && r.rows * r.classes * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
}

// Subtracts the row's target distribution from a vector of scaled probabilities.
template <class T>
FASTLLM_INLINE vec<acc_t<T>> less_target(const Problem<T>& problem, const T* q, RowTerms<acc_t<T>> terms,
                                         vec<acc_t<T>> v, int64_t i, int64_t size) {
  using A = acc_t<T>;
  if (q != nullptr) {
    vec<A> share = load_some(q + i, size) * problem.keep + terms.smooth;
    if (problem.weight != nullptr) share *= load_some(problem.weight + i, size);
    return v - share * terms.scale;
  }
  if (terms.smooth == 0) return v;
  return problem.weight == nullptr ? v - terms.smooth : v - load_some(problem.weight + i, size) * terms.smooth;
}

// The gradient from kept exponentials e: p_c = e_c factor(block). kPairs: of a plain row, whose every gradient but the
// true class's is that product.
template <class T, bool kPairs>
void gradient_from_exponentials(const Problem<T>& problem, int64_t row, const acc_t<T>* e, const acc_t<T>* references,
                                Softmax<acc_t<T>> softmax, acc_t<T> mass) {
  using A = acc_t<T>;
  const int64_t n = problem.r.classes;
  const T* q = problem.probabilities(row);
  const RowTerms<A> terms = problem.terms(row, mass, softmax.lse());
  const bool plain = q == nullptr && terms.smooth == 0;
  T* grad = problem.grad(row);
  const bool streaming = streams<T>(problem.r);
  A truth = 0;
  const int64_t head = Sink<T>{grad, streaming}.head();
  for (int64_t begin = 0, b = 0; begin < n; begin = block_end(begin, head, n), ++b) {
    const int64_t size = block_end(begin, head, n) - begin;
    const A above = references[b] == -kInfinity<A> ? A(0) : std::exp(references[b] - softmax.max);
    const A share = above / softmax.sum;
    const A factor = with_plain_nan(share * terms.probability);
    const Sink<T> sink{grad + begin, streaming};
    if (terms.y >= begin && terms.y < begin + size) {
      const int64_t at = kPairs ? place<T>(terms.y - begin, begin == 0 ? head : 0, size) : terms.y - begin;
      truth = terms.at_class(e[begin + at] * share, problem.weight_of(terms.y));
    }
    const auto scaled = [&](int64_t i, int64_t some) { return load_some(e + begin + i, some) * factor; };
    if constexpr (kPairs)
      write_row<true>(sink, size, scaled,
                      [&](int64_t i) { return Pair{scaled(i, lanes<T>), scaled(i + lanes<T>, lanes<T>)}; });
    else if (plain)
      write_row<false>(sink, size, scaled, nullptr);
    else
      write_row<false>(
          sink, size,
          [&](int64_t i, int64_t some) { return less_target(problem, q, terms, scaled(i, some), begin + i, some); },
          nullptr);
  }
  if (terms.y >= 0) grad[terms.y] = from_acc<T>(truth);
}

// The gradient from the logits and their softmax: p_c = exp(z_c - max) / sum. kCap: z = softcap tanh(x / softcap), and
// the gradient takes tanh's derivative.
template <class T, bool kCap>
void gradient_from_softmax(const Problem<T>& problem, int64_t row, const acc_t<T>* z, Softmax<acc_t<T>> softmax,
                           acc_t<T> mass) {
  using A = acc_t<T>;
  const T* x = problem.logits(row);
  const T* q = problem.probabilities(row);
  const RowTerms<A> terms = problem.terms(row, mass, softmax.lse());
  const A share = 1 / softmax.sum, scale = with_plain_nan(share * terms.probability);
  const A cap = static_cast<A>(problem.r.softcap);
  const auto slope = [&](vec<A> v) { return cap_slope<T>(v, cap); };
  const auto logit = [&](int64_t i, int64_t some) {
    if constexpr (kCap)
      return load_some(z + i, some);
    else
      return load_some(x + i, some);
  };
  T* grad = problem.grad(row);
  const auto at = [&](int64_t c) { return kCap ? z[c] : to_acc(x[c]); };
  A truth = 0;
  if (terms.y >= 0) {
    const A value = at(terms.y);
    truth = terms.at_class(std::exp(value - softmax.max) * share, problem.weight_of(terms.y));
    if (kCap) truth *= slope(splat(to_acc(x[terms.y])))[0];
  }
  const Sink<T> sink{grad, streams<T>(problem.r)};
  const auto value = [&](int64_t i, int64_t some) {
    const vec<A> v = logit(i, some);
    vec<A> g = less_target(problem, q, terms, exp_of<T>(v - softmax.max) * scale, i, some);
    if constexpr (kCap) g *= slope(load_some(x + i, some));
    return g;
  };
  if constexpr (in_pairs<T> && !kCap) {
    if (q == nullptr && terms.smooth == 0)
      write_row<true>(sink, problem.r.classes, value, [&](int64_t i) {
        const Pair v = load_pair(x + i);
        return Pair{exp_of<T>(v.even - softmax.max) * scale, exp_of<T>(v.odd - softmax.max) * scale};
      });
    else
      write_row<false>(sink, problem.r.classes, value, nullptr);
  } else {
    write_row<false>(sink, problem.r.classes, value, nullptr);
  }
  if (terms.y >= 0) grad[terms.y] = from_acc<T>(truth);
}

// Loss and lse of a row given its softmax; x: the logits that the softmax was taken of.
template <class T, class X>
acc_t<T> row_loss(const Problem<T>& problem, int64_t row, const X* x, Softmax<acc_t<T>> softmax, acc_t<T>* mass) {
  using A = acc_t<T>;
  const CrossEntropyRows& r = problem.r;
  const A m = softmax.max, log_sum = softmax.log_sum(), lse = m + log_sum;
  A loss;
  if constexpr (std::is_same_v<X, T>) {
    const T* q = problem.probabilities(row);
    if (q != nullptr) {
      loss = distribution_loss(x, q, problem.weight, problem.keep, problem.smooth, m, log_sum, r.classes, mass);
      return loss + problem.z_loss(lse);
    }
  } else if (r.probabilities != nullptr) {
    const T* q = problem.probabilities(row);
    A sum = 0;
    loss = 0;
    for (int64_t c = 0; c < r.classes; ++c) {
      const A share = (to_acc(q[c]) * problem.keep + problem.smooth) * problem.weight_of(c);
      loss += share * (log_sum - (to_acc(x[c]) - m));
      sum += share;
    }
    *mass = sum;
    return loss + problem.z_loss(lse);
  }
  const int64_t y = problem.target(row);
  loss = problem.keep * problem.weight_of(y) * (log_sum - (to_acc(x[y]) - m));
  if (problem.smooth != 0)
    loss +=
        problem.smooth * (static_cast<A>(r.weight_sum) * log_sum - weighted_offsets(x, problem.weight, m, r.classes));
  return loss + problem.z_loss(lse);
}

template <class T>
void forward_row(const Problem<T>& problem, int64_t row, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const CrossEntropyRows& r = problem.r;
  const auto finish = [&](A loss, A max, A log_sum) {
    static_cast<A*>(r.loss)[row] = loss;
    static_cast<A*>(r.row_max)[row] = max;
    static_cast<A*>(r.row_log_sum)[row] = log_sum;
  };
  if (problem.ignored(row)) {
    finish(0, 0, 0);
    if (r.grad != nullptr) fill_zero(problem.grad(row), r.classes);
    return;
  }
  const T* x = problem.logits(row);
  A mass = 0;
  if (r.softcap != 0) {
    softcapped(x, scratch, r.softcap, r.classes);
    const Softmax<A> softmax = softmax_walk<A, false, false>(scratch, r.classes, nullptr, nullptr, 0);
    finish(row_loss<T, A>(problem, row, scratch, softmax, &mass), softmax.max, softmax.log_sum());
    if (r.grad != nullptr) gradient_from_softmax<T, true>(problem, row, scratch, softmax, mass);
    return;
  }
  A* references = scratch + r.classes;
  const auto walk = [&]<bool kKeep, bool kPairs>() {
    const int64_t head = kKeep ? Sink<T>{problem.grad(row), streams<T>(r)}.head() : 0;
    const Softmax<A> softmax = softmax_walk<T, kKeep, kPairs>(x, r.classes, scratch, references, head);
    finish(row_loss<T, T>(problem, row, x, softmax, &mass), softmax.max, softmax.log_sum());
    if constexpr (kKeep) gradient_from_exponentials<T, kPairs>(problem, row, scratch, references, softmax, mass);
  };
  if (r.grad == nullptr)
    walk.template operator()<false, in_pairs<T>>();
  else if (in_pairs<T> && r.probabilities == nullptr && problem.smooth == 0)
    walk.template operator()<true, in_pairs<T>>();
  else
    walk.template operator()<true, false>();
}

template <class T>
acc_t<T> distribution_mass(const Problem<T>& problem, int64_t row) {
  const T* q = problem.probabilities(row);
  acc_t<T> mass = 0;
  if (q != nullptr)
    for (int64_t c = 0; c < problem.r.classes; ++c)
      mass += (to_acc(q[c]) * problem.keep + problem.smooth) * problem.weight_of(c);
  return mass;
}

template <class T>
void backward_row(const Problem<T>& problem, int64_t row, acc_t<T>* scratch) {
  const CrossEntropyRows& r = problem.r;
  if (problem.ignored(row)) {
    fill_zero(problem.grad(row), r.classes);
    return;
  }
  const acc_t<T> max = static_cast<const acc_t<T>*>(r.row_max)[row];
  const Softmax<acc_t<T>> softmax{max, std::exp(static_cast<const acc_t<T>*>(r.row_log_sum)[row])};
  const acc_t<T> mass = distribution_mass(problem, row);
  if (r.softcap != 0) {
    softcapped(problem.logits(row), scratch, r.softcap, r.classes);
    gradient_from_softmax<T, true>(problem, row, scratch, softmax, mass);
  } else {
    gradient_from_softmax<T, false>(problem, row, scratch, softmax, mass);
  }
}

template <class T, class F>
void for_rows(const CrossEntropyRows& r, F row_function) {
  using A = acc_t<T>;
  const Problem<T> problem(r);
  A* scratch = static_cast<A*>(r.scratch);
  const int64_t size = cross_entropy_scratch(r.classes);
  const int64_t grain = 16384 / (r.classes + 1) + 1;
  parallel_for(r.rows, grain, [&](int64_t begin, int64_t end) {
    A* own = scratch + thread_index() * size;
    for (int64_t row = begin; row < end; ++row) row_function(problem, row, own);
    stream_fence();
  });
}

void forward_entry(const CrossEntropyRows& r) { FASTLLM_SWITCH_DTYPE(r.dtype, for_rows<T>(r, forward_row<T>)) }

void backward_entry(const CrossEntropyRows& r) { FASTLLM_SWITCH_DTYPE(r.dtype, for_rows<T>(r, backward_row<T>)) }

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {forward_entry, backward_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
