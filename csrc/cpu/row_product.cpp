// A matrix product whose rows do not know of each other: an element is the sum, in order, of sums over kPiece terms,
// each added up in order by fused multiply-adds. A library's order depends on the shape, on alignment and on the number
// of threads, and so on the rows that happen to be in a batch.
//
// Blocked as usual: a task is a block of rows and a stripe of columns. A piece of b is packed into panels of two
// vectors of columns, which stay in the first cache while tiles of rows walk over them; what is added up waits in the
// second.
#include "row_product.h"

#include "parallel.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kPiece = 256;  // terms summed before they join a total, which bounds the error of long sums
constexpr int64_t kBlockRows = 192;
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;  // with two vectors of columns, as many as registers hold
constexpr int64_t kPanels = 4;                          // of a stripe

template <class T>
constexpr int64_t kWide = 2 * lanes<T>;  // columns of a panel
template <class T>
constexpr int64_t kStripe = kPanels * kWide<T>;

// Where a thread keeps what it works on, in items of the accumulator.
template <class T>
constexpr int64_t kPacked = kPiece * kWide<T>;
template <class T>
constexpr int64_t kTotals = kBlockRows * kStripe<T>;
constexpr int64_t kWidened = kBlockRows * kPiece;  // of operands in bfloat16 and float16

// packed (last - first, kWide) = b's rows [first, last) and `size` columns from j on, zeros after them.
template <class T>
void pack(const RowProduct& s, int64_t first, int64_t last, int64_t j, int64_t size, acc_t<T>* packed) {
  const T* b = static_cast<const T*>(s.b) + first * s.b_inner + j * s.b_column;
  const int64_t terms = last - first;
  if (s.b_column == 1 && size == kWide<T>) {
    for (int64_t p = 0; p < terms; ++p)
      for (int h = 0; h < 2; ++h) store(packed + p * kWide<T> + h * lanes<T>, load(b + p * s.b_inner + h * lanes<T>));
    return;
  }
  if (size < kWide<T>) std::memset(packed, 0, static_cast<size_t>(terms * kWide<T>) * sizeof(acc_t<T>));
  for (int64_t c = 0; c < size; ++c)
    for (int64_t p = 0; p < terms; ++p) packed[p * kWide<T> + c] = to_acc(b[p * s.b_inner + c * s.b_column]);
}

// total (kRows, stripe) += a's rows times a packed panel.
template <class A, int kRows>
FASTLLM_INLINE void add_tile(const A* a, int64_t a_row, int64_t a_inner, const A* packed, int64_t terms, A* total,
                             int64_t stripe) {
  constexpr int w = lanes<A>;
  vec<A> sum[kRows][2] = {};
  for (int64_t p = 0; p < terms; ++p) {
    const vec<A> u = load(packed + p * 2 * w), v = load(packed + p * 2 * w + w);
    for (int k = 0; k < kRows; ++k) {
      const vec<A> factor = splat(a[k * a_row + p * a_inner]);
      sum[k][0] += u * factor;
      sum[k][1] += v * factor;
    }
  }
  for (int k = 0; k < kRows; ++k)
    for (int h = 0; h < 2; ++h) store(total + k * stripe + h * w, load(total + k * stripe + h * w) + sum[k][h]);
}

template <class A, int kRows>
void add_rows(int64_t rows, const A* a, int64_t a_row, int64_t a_inner, const A* packed, int64_t terms, A* total,
              int64_t stripe) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    add_tile<A, kRows>(a + i * a_row, a_row, a_inner, packed, terms, total + i * stripe, stripe);
  if constexpr (kRows > 1) {
    if (i < rows)
      add_rows<A, kRows / 2>(rows - i, a + i * a_row, a_row, a_inner, packed, terms, total + i * stripe, stripe);
  }
}

template <class T>
void task(const RowProduct& s, int64_t i, int64_t rows, int64_t j, int64_t columns, acc_t<T>* memory) {
  using A = acc_t<T>;
  constexpr int w = lanes<T>;
  A *packed = memory, *total = packed + kPacked<T>, *widened = total + kTotals<T>;
  std::memset(total, 0, static_cast<size_t>(rows * kStripe<T>) * sizeof(A));
  for (int64_t first = 0; first < s.inner; first += kPiece) {
    const int64_t last = first + kPiece < s.inner ? first + kPiece : s.inner, terms = last - first;
    const T* a = static_cast<const T*>(s.a) + i * s.a_row + first * s.a_inner;
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t r = 0; r < rows; ++r) {
        int64_t p = 0;
        if (s.a_inner == 1)
          for (; p + w <= terms; p += w) store(widened + r * kPiece + p, load(a + r * s.a_row + p));
        for (; p < terms; ++p) widened[r * kPiece + p] = to_acc(a[r * s.a_row + p * s.a_inner]);
      }
    }
    for (int64_t c = 0; c < columns; c += kWide<T>) {
      pack<T>(s, first, last, j + c, columns - c < kWide<T> ? columns - c : kWide<T>, packed);
      if constexpr (std::is_same_v<T, A>)
        add_rows<A, kTileRows>(rows, a, s.a_row, s.a_inner, packed, terms, total + c, kStripe<T>);
      else
        add_rows<A, kTileRows>(rows, widened, kPiece, 1, packed, terms, total + c, kStripe<T>);
    }
  }
  const T* bias = s.bias == nullptr ? nullptr : static_cast<const T*>(s.bias) + j;
  for (int64_t r = 0; r < rows; ++r) {
    T* c = static_cast<T*>(s.c) + (i + r) * s.c_row + j;
    for (int64_t k = 0; k < columns; k += w) {
      const int64_t size = columns - k < w ? columns - k : w;
      vec<A> v = load(total + r * kStripe<T> + k);
      if (bias != nullptr) v += load_some(bias + k, size);
      if (s.relu) v = v <= 0 ? vec<A>{} : v;  // NaN stays
      store_some(c + k, v, size);
    }
  }
}

template <class T>
int64_t workspace() {
  const int64_t items = kPacked<T> + kTotals<T> + (std::is_same_v<T, acc_t<T>> ? 0 : kWidened);
  return items * static_cast<int64_t>(sizeof(acc_t<T>));
}

template <class T>
void multiply(const RowProduct& s) {
  if (s.rows == 0 || s.columns == 0) return;
  const int64_t blocks = (s.rows + kBlockRows - 1) / kBlockRows, stripes = (s.columns + kStripe<T> - 1) / kStripe<T>;
  const int64_t tiles = ((s.rows + blocks - 1) / blocks + kTileRows - 1) / kTileRows, block = tiles * kTileRows;
  const int64_t work = block * (s.columns < kStripe<T> ? s.columns : kStripe<T>)*(s.inner + 1);
  parallel_for(blocks * stripes, (int64_t{1} << 18) / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    auto* memory = reinterpret_cast<acc_t<T>*>(static_cast<char*>(s.workspace) + thread_index() * workspace<T>());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t % blocks * block, j = t / blocks * kStripe<T>;
      task<T>(s, i, s.rows - i < block ? s.rows - i : block, j, s.columns - j < kStripe<T> ? s.columns - j : kStripe<T>,
              memory);
    }
  });
}

int64_t workspace_entry(const RowProduct& s) {
  FASTLLM_SWITCH_DTYPE(s.dtype, return workspace<T>())
  return 0;
}
void multiply_entry(const RowProduct& s) { FASTLLM_SWITCH_DTYPE(s.dtype, multiply<T>(s)) }

}  // namespace

extern const RowProductKernels row_product_kernels;
const RowProductKernels row_product_kernels = {workspace_entry, multiply_entry};

}  // namespace fastllm::cpu::FASTLLM_ISA
