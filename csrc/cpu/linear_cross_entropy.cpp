// Linear layer and cross-entropy for few features (up to 32), forward and all gradients in one visit of a row.
//
// A library multiplies such shapes slowly, since it packs operands that are used once, and its three products, the
// softmax and the bias gradient each fork threads and walk the logits in memory: 9 streams of N x V. Here a panel of 4
// to 32 rows goes through everything at once. Its logits stand class by class, a vector holding one class of several
// rows, so that maximum, sum and every product need no sum across lanes; they become exp(z - max) where they stand and
// never leave the second cache.
//
// With f = scale w_y / sum, e_c = exp(z_c - max) and e_y - sum in place of e_y, dz = f e: the softmax is never divided
// out. grad_input_r = f_r sum_c e_rc weight_c; grad_weight_c = sum_r e_rc (f_r x_r), and the bias is a feature of ones.
//
// Threads take groups of rows, fixed by N alone; each sums its part of grad_weight, and the parts are added in order.
#include "linear_cross_entropy.h"

#include "parallel.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kAccumulators = 12;  // vectors of one tile: with its operands they fill 16 registers
constexpr int64_t kBlock = 64;     // classes summed before they join a total, which bounds the error of long sums

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// sum[i][k] = sum over p < n of a[i a_row + p a_inner] times vector k of b's row p, rows b_row apart.
template <int kRows, int kVectors, class T>
FASTLLM_INLINE void multiply_tile(const T* a, int64_t a_row, int64_t a_inner, const T* b, int64_t b_row, int64_t n,
                                  vec<T> (&sum)[kRows][kVectors]) {
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kVectors; ++k) sum[i][k] = vec<T>{};
  for (int64_t p = 0; p < n; ++p) {
    vec<T> v[kVectors];
    for (int k = 0; k < kVectors; ++k) v[k] = load(b + p * b_row + k * lanes<T>);
    for (int i = 0; i < kRows; ++i) {
      const T factor = a[i * a_row + p * a_inner];
      for (int k = 0; k < kVectors; ++k) sum[i][k] += v[k] * factor;
    }
  }
}

// Calls finish(i, sum) with kVectors sums for each of `rows` rows, in tiles of even height.
template <int kRows, int kVectors, class T, class F>
FASTLLM_INLINE void multiply_rows(int64_t rows, const T* a, int64_t a_row, int64_t a_inner, const T* b, int64_t b_row,
                                  int64_t n, F finish) {
  if (rows == kRows) {
    vec<T> sum[kRows][kVectors];
    multiply_tile<kRows, kVectors>(a, a_row, a_inner, b, b_row, n, sum);
    for (int i = 0; i < kRows; ++i) finish(i, sum[i]);
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1, kVectors>(rows, a, a_row, a_inner, b, b_row, n, finish);
  }
}

template <int kVectors, class T, class F>
void multiply(int64_t rows, const T* a, int64_t a_row, int64_t a_inner, const T* b, int64_t b_row, int64_t n,
              F finish) {
  constexpr int64_t most = kAccumulators / kVectors;
  const int64_t tiles = (rows + most - 1) / most, height = (rows + tiles - 1) / tiles;
  for (int64_t i = 0; i < rows; i += height)
    multiply_rows<most, kVectors>(rows - i < height ? rows - i : height, a + i * a_row, a_row, a_inner, b, b_row, n,
                                  [&](int64_t k, const vec<T>(&sum)[kVectors]) { finish(i + k, sum); });
}

// How rows are cut: by their number and the instruction set, never by the number of threads.
template <class T>
struct Plan {
  int64_t panel;                  // rows of a panel: lanes or 2 lanes
  int64_t groups, group;          // groups of rows, rows of a group
  int64_t weight_columns, width;  // of a row of partial sums: features if grad_weight is asked for; with bias, padded
  int64_t thread_items, partial_items;

  explicit Plan(const SkinnyLoss& s) {
    constexpr int64_t w = lanes<T>;
    panel = s.rows <= 2 * w ? w : 2 * w;
    const int64_t panels = (s.rows + panel - 1) / panel;
    const bool sums = s.grad_weight != nullptr || s.grad_bias != nullptr;
    const int64_t shared = panels / 8 < 4 ? 4 : panels / 8 > 16 ? 16 : panels / 8;
    const int64_t wanted = sums && panels > shared ? shared : panels;
    group = (panels + wanted - 1) / wanted * panel;
    groups = (s.rows + group - 1) / group;
    weight_columns = s.grad_weight != nullptr ? s.features : 0;
    width = round_up(weight_columns + (s.grad_bias != nullptr), w);
    thread_items = round_up(panel * (s.classes + 2 * s.features + width), 64 / sizeof(T));
    partial_items = round_up(s.classes * width, 64 / sizeof(T));
  }
  int64_t items() const { return num_threads() * thread_items + groups * partial_items; }
};

template <class T, int kVectors>
class Panel {
 public:
  static constexpr int w = lanes<T>;
  static constexpr int64_t kRows = kVectors * w;

  Panel(const SkinnyLoss& s, const Plan<T>& plan, T* memory)
      : s_(s),
        plan_(plan),
        weight_(static_cast<const T*>(s.weight)),
        e_(memory),
        turned_(e_ + s.classes * kRows),
        turned_grad_(turned_ + s.features * kRows),
        scaled_(turned_grad_ + s.features * kRows) {}

  // Rows [first, last), those that count packed into panels; partial (classes, width) becomes their sum.
  void run(int64_t first, int64_t last, T* partial) {
    bool written = false;
    for (int64_t r = first; r < last;) {
      for (count_ = 0; r < last && count_ < kRows; ++r) {
        const int64_t y = target(r);
        if (y == s_.ignore_index) {
          skip(r);
          continue;
        }
        row_[count_] = r;
        class_[count_++] = y;
      }
      if (count_ == 0) break;
      turn_input();
      softmax();
      if (s_.grad_input != nullptr) input_gradient();
      if (partial != nullptr) add_to(partial, written);
      written = true;
    }
    if (partial != nullptr && !written) std::memset(partial, 0, static_cast<size_t>(plan_.partial_items) * sizeof(T));
  }

 private:
  int64_t target(int64_t r) const {
    return s_.target_is_int32 ? static_cast<const int32_t*>(s_.target)[r] : static_cast<const int64_t*>(s_.target)[r];
  }
  const T* input(int64_t i) const { return static_cast<const T*>(s_.input) + row_[i] * s_.features; }

  void skip(int64_t r) const {
    static_cast<T*>(s_.loss)[r] = 0;
    if (s_.grad_input != nullptr)
      std::memset(static_cast<T*>(s_.grad_input) + r * s_.features, 0, static_cast<size_t>(s_.features) * sizeof(T));
  }

  // Feature by feature, as the vectors want it; zeros in lanes without a row.
  void turn_input() {
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t d = 0; d < s_.features; ++d) turned_[d * kRows + i] = i < count_ ? input(i)[d] : T(0);
  }

  // e = exp(z - max), but e_y - sum at the true class; factor = f; the loss.
  void softmax() {
    const T* bias = static_cast<const T*>(s_.bias);
    vec<T> m[kVectors], sum[kVectors] = {};
    for (int k = 0; k < kVectors; ++k) m[k] = splat(-kInfinity<T>);
    multiply<kVectors, T>(s_.classes, weight_, s_.features, 1, turned_, kRows, s_.features,
                          [&](int64_t c, const vec<T>(&z)[kVectors]) {
                            const T b = bias == nullptr ? T(0) : bias[c];
                            for (int k = 0; k < kVectors; ++k) {
                              const vec<T> logit = z[k] + b;
                              store(e_ + c * kRows + k * w, logit);
                              m[k] = max(logit, m[k]);
                            }
                          });
    T max_[kRows], sum_[kRows], true_logit[kRows];
    for (int k = 0; k < kVectors; ++k) store(max_ + k * w, m[k]);
    for (int64_t i = 0; i < count_; ++i) true_logit[i] = e_[class_[i] * kRows + i];
    // Against 0 where a row holds nothing but -inf: exponentials are 0, not exp(-inf + inf). Their sum of 0 then makes
    // the factor infinite and the gradients 0 times that: NaN, and -inf less -inf the loss.
    for (int k = 0; k < kVectors; ++k) m[k] = m[k] == -kInfinity<T> ? vec<T>{} : m[k];
    for (int64_t begin = 0; begin < s_.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < s_.classes ? begin + kBlock : s_.classes;
      vec<T> block[kVectors] = {};
      for (int64_t c = begin; c < end; ++c)
        for (int k = 0; k < kVectors; ++k) {
          T* at = e_ + c * kRows + k * w;
          const vec<T> value = exp_nonpositive(load(at) - m[k]);
          store(at, value);
          block[k] += value;
        }
      for (int k = 0; k < kVectors; ++k) sum[k] += block[k];
    }
    for (int k = 0; k < kVectors; ++k) store(sum_ + k * w, sum[k]);
    for (int64_t i = 0; i < count_; ++i) {
      const T weight = s_.class_weight == nullptr ? T(1) : static_cast<const T*>(s_.class_weight)[class_[i]];
      const T by_row = s_.row_scale == nullptr ? T(1) : static_cast<const T*>(s_.row_scale)[row_[i]];
      static_cast<T*>(s_.loss)[row_[i]] = weight * (std::log(sum_[i]) - (true_logit[i] - max_[i]));
      factor_[i] = static_cast<T>(s_.scale) * by_row * weight / sum_[i];
      e_[class_[i] * kRows + i] -= sum_[i];
    }
  }

  void input_gradient() {
    const int64_t features = s_.features;
    std::memset(turned_grad_, 0, static_cast<size_t>(features * kRows) * sizeof(T));
    for (int64_t c = 0; c < s_.classes; c += kBlock) {
      const int64_t size = c + kBlock < s_.classes ? kBlock : s_.classes - c;
      multiply<kVectors, T>(features, weight_ + c * features, 1, features, e_ + c * kRows, kRows, size,
                            [&](int64_t d, const vec<T>(&sum)[kVectors]) {
                              for (int k = 0; k < kVectors; ++k) {
                                T* at = turned_grad_ + d * kRows + k * w;
                                store(at, load(at) + sum[k]);
                              }
                            });
    }
    for (int64_t i = 0; i < count_; ++i) {
      T* to = static_cast<T*>(s_.grad_input) + row_[i] * features;
      for (int64_t d = 0; d < features; ++d) to[d] = factor_[i] * turned_grad_[d * kRows + i];
    }
  }

  // Adds this panel's part of grad_weight and, in the column after it, of grad_bias; the first panel writes.
  void add_to(T* partial, bool add) {
    const int64_t columns = plan_.weight_columns, width = plan_.width;
    for (int64_t i = 0; i < count_; ++i) {
      T* to = scaled_ + i * width;
      for (int64_t d = 0; d < columns; ++d) to[d] = factor_[i] * input(i)[d];
      for (int64_t d = columns; d < width; ++d) to[d] = d == columns ? factor_[i] : T(0);
    }
    int64_t c = 0;
    for (; c + 3 * w <= width; c += 3 * w) add_columns<3>(partial, add, c);
    if (c + 2 * w <= width)
      add_columns<2>(partial, add, c);
    else if (c < width)
      add_columns<1>(partial, add, c);
  }

  template <int kColumns>
  void add_columns(T* partial, bool add, int64_t column) {
    const int64_t width = plan_.width;
    multiply<kColumns, T>(s_.classes, e_, kRows, 1, scaled_ + column, width, count_,
                          [&](int64_t c, const vec<T>(&sum)[kColumns]) {
                            T* to = partial + c * width + column;
                            for (int k = 0; k < kColumns; ++k)
                              store(to + k * w, add ? load(to + k * w) + sum[k] : sum[k]);
                          });
  }

  const SkinnyLoss& s_;
  const Plan<T>& plan_;
  const T* weight_;
  T *e_, *turned_, *turned_grad_, *scaled_;  // (classes, kRows), twice (features, kRows), (kRows, width)
  int64_t count_ = 0, row_[kRows], class_[kRows];
  T factor_[kRows];
};

// Adds the groups' partial sums of classes [begin, end), in order, into grad_weight and grad_bias.
template <class T>
void finish(const SkinnyLoss& s, const Plan<T>& plan, const T* partial, int64_t begin, int64_t end) {
  constexpr int64_t w = lanes<T>;
  const int64_t columns = plan.weight_columns;
  T *weight = static_cast<T*>(s.grad_weight), *bias = static_cast<T*>(s.grad_bias);
  for (int64_t c = begin; c < end; ++c) {
    const T* from = partial + c * plan.width;
    for (int64_t d = 0; d < columns; d += w) {
      vec<T> sum = load(from + d);
      for (int64_t g = 1; g < plan.groups; ++g) sum += load(from + g * plan.partial_items + d);
      // What a row's last vector spills over is the next row's, written after it.
      T* to = weight + c * columns + d;
      if (to + w <= weight + end * columns)
        store(to, sum);
      else
        store_partial(to, sum, weight + end * columns - to < columns - d ? weight + end * columns - to : columns - d);
    }
    if (bias == nullptr) continue;
    T sum = from[columns];
    for (int64_t g = 1; g < plan.groups; ++g) sum += from[g * plan.partial_items + columns];
    bias[c] = sum;
  }
}

template <class T>
void run(const SkinnyLoss& s) {
  const Plan<T> plan(s);
  T* memory = static_cast<T*>(s.workspace);
  T* partial = memory + num_threads() * plan.thread_items;
  // Work below some twenty microseconds is not worth a second thread.
  const int64_t work = plan.group * s.classes * (3 * s.features + 16);
  parallel_for(plan.groups, (int64_t{1} << 19) / work + 1, [&](int64_t begin, int64_t end) {
    T* own = memory + thread_index() * plan.thread_items;
    const auto walk = [&](auto panel) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * plan.group, last = first + plan.group < s.rows ? first + plan.group : s.rows;
        panel.run(first, last, plan.width == 0 ? nullptr : partial + g * plan.partial_items);
      }
    };
    if (plan.panel == lanes<T>)
      walk(Panel<T, 1>(s, plan, own));
    else
      walk(Panel<T, 2>(s, plan, own));
  });
  if (plan.width == 0) return;
  parallel_for(s.classes, (int64_t{1} << 17) / (plan.groups * plan.width) + 1,
               [&](int64_t begin, int64_t end) { finish(s, plan, partial, begin, end); });
}

int64_t workspace(const SkinnyLoss& s) {
  return s.dtype == DType::kF64 ? Plan<double>(s).items() : Plan<float>(s).items();
}

void run_entry(const SkinnyLoss& s) {
  if (s.dtype == DType::kF64)
    run<double>(s);
  else
    run<float>(s);
}

}  // namespace

extern const LinearCrossEntropyKernels linear_cross_entropy_kernels;
const LinearCrossEntropyKernels linear_cross_entropy_kernels = {workspace, run_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
