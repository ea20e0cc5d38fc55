// Interface between the dense_block driver and its kernels, one table per instruction set.
//
// Every tensor is rows of channels-last pixels. Those of the buffer, of grad_sum and of a gradient
// from outside are longer than what is read of them: each has its stride, in elements.

#pragma once

#include <cstdint>

#include "../common/types.h"

namespace resops {

// Pointers that a pass does not use are null. `acc` is double for f64, else float. Vectors hold
// `channels` values of acc, and some more that may be read.
struct DenseBlockArgs {
  DType dtype;
  int64_t channels;
  const void* x;
  int64_t x_stride;
  const void* grad_y;  // accumulate: dense; gradient: of the whole buffer
  int64_t grad_y_stride;
  void* grad_sum;
  int64_t grad_sum_stride;
  bool wide_sum;  // grad_sum is of acc
  bool first;     // accumulate: grad_sum holds nothing yet
  void* out;      // dense; accumulate: in f32 what apply writes, or null
  const void* mean;
  const void* scale;  // weight * invstd
  const void* bias;
  const void* factor;      // accumulate: what g is multiplied by on its way into grad_sum
  const void* sum_scale;   // gradient: grad_y + sum_scale * grad_sum
  const void* sum_slope;   //   + sum_slope * (x - mean) + sum_offset,
  const void* sum_offset;  // the last two only where mean is not null
};

// Rows [begin, end).
struct DenseBlockKernels {
  void (*apply)(const DenseBlockArgs&, int64_t begin, int64_t end);
  // Writes sum(g) and sum(g * (x - mean)) per channel, in an order that depends on sizes alone.
  void (*accumulate)(const DenseBlockArgs&, int64_t begin, int64_t end, double* sum_grad,
                     double* sum_grad_centred);
  void (*gradient)(const DenseBlockArgs&, int64_t begin, int64_t end);
};

namespace portable {
extern const DenseBlockKernels dense_block_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const DenseBlockKernels dense_block_kernels;
}
namespace avx512 {
extern const DenseBlockKernels dense_block_kernels;
}
namespace avx512_bf16 {
extern const DenseBlockKernels dense_block_kernels;
}
#endif

}  // namespace resops
