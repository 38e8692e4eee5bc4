// The sums over rows of cross_entropy: what a mean divides by, and the reduced loss.
//
// Both stay on the device, where the next kernel reads them: nothing waits for the host. Up to 16384 rows are summed by
// one block, more by a block each, whose sums are then added in order: the same bits every time. In float64, for a sum
// of so few numbers costs nothing.
#include "cross_entropy.h"
#include "cross_entropy_rows.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kRowsOfBlock = 16384;
constexpr size_t kScratch = kWarp * sizeof(double);

// What one row adds to the divisor.
template <class A>
struct Counted {
  const void* target;
  bool target_is_int32;
  const A* weight;
  int64_t classes, ignore_index;
  FASTLLM_DEVICE double operator()(int64_t row) const {
    const int64_t label = target_is_int32 ? load(static_cast<const int32_t*>(target) + row)
                                          : load(static_cast<const int64_t*>(target) + row);
    if (label == ignore_index) return 0;
    if (weight == nullptr) return 1;
    return label >= 0 && label < classes ? load(weight + label) : A(0);  // the row's own kernel asserts it
  }
};

template <class A>
struct Item {
  const A* values;
  FASTLLM_DEVICE double operator()(int64_t row) const { return load(values + row); }
};

// The only block writes its sum over the divisor to `output`, one of several to `partial`.
template <class Term, class A, class T>
__global__ void __launch_bounds__(kThreads)
    sum_rows(Term term, int64_t rows, int64_t rows_of_block, double* partial, const A* divisor, T* output) {
  const int64_t begin = blockIdx.x * rows_of_block, end = begin + rows_of_block < rows ? begin + rows_of_block : rows;
  double sum = 0;
#pragma unroll 4
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) sum += term(row);
  sum = reduce_block(sum, 0.0, Sum(), reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1)
    store(partial + blockIdx.x, sum);
  else
    store(output,
          narrow<T>(static_cast<A>(divisor != nullptr ? over_divisor(sum, static_cast<double>(load(divisor))) : sum)));
}

template <class Term, class A, class T>
Status sum(Term term, int64_t rows, double* partial, const A* divisor, T* output, Stream stream) {
  const int64_t blocks = cross_entropy_partials(rows);
  const Status status = launch(sum_rows<Term, A, T>, {blocks, kThreads, kScratch}, stream, term, rows, kRowsOfBlock,
                               partial, divisor, output);
  if (status != 0 || blocks == 1) return status;
  return launch(sum_rows<Item<double>, A, T>, {1, kThreads, kScratch}, stream, Item<double>{partial}, blocks, blocks,
                nullptr, divisor, output);
}

}  // namespace

int64_t cross_entropy_partials(int64_t rows) { return rows <= kRowsOfBlock ? 1 : ceil_div(rows, kRowsOfBlock); }

Status cross_entropy_divisor(DType dtype, const void* target, bool target_is_int32, int64_t rows, int64_t classes,
                             int64_t ignore_index, const void* weight, void* partial, void* divisor, Stream stream) {
  const auto run = [&]<class A>(A) {
    const Counted<A> term{target, target_is_int32, static_cast<const A*>(weight), classes, ignore_index};
    return sum(term, rows, static_cast<double*>(partial), static_cast<const A*>(nullptr), static_cast<A*>(divisor),
               stream);
  };
  return dtype == DType::kF64 ? run(double{}) : run(float{});
}

Status cross_entropy_reduce(DType dtype, const void* loss, int64_t rows, const void* divisor, void* partial,
                            void* output, Stream stream) {
  FASTLLM_SWITCH_DTYPE(dtype,
                       return sum(Item<Acc<T> >{static_cast<const Acc<T>*>(loss)}, rows, static_cast<double*>(partial),
                                  static_cast<const Acc<T>*>(divisor), static_cast<T*>(output), stream))
  return 1;
}

}  // namespace fastllm::cuda
