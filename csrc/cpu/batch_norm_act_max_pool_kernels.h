// Interface between the batch_norm_act_max_pool driver and its kernels, one table per instruction
// set.
//
// A dense tensor is walked as images of `depth` values per pixel: C values in channels-last, where
// there are N images; one in contiguous, where image i is a plane of channel i % C and there are
// N * C of them.

#pragma once

#include <cstdint>

#include "../common/types.h"

namespace resops {

// Pointers that a pass does not use are null. `acc` is double for f64, else float.
struct BatchNormActMaxPoolArgs {
  DType dtype;
  Activation activation;
  double negative_slope;
  int64_t channels, depth;
  int64_t height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2];  // along height and width
  const void* x;
  void* y;               // forward
  uint8_t* index_out;    // forward
  const void* grad_y;    // backward
  const uint8_t* index;  // backward
  void* grad_x;          // backward_apply
  const void* mean;      // acc, C values; so are the next
  const void* scale;     // weight * invstd
  const void* bias;
  const void* grad_slope;   // grad_x = scale * g + grad_slope * (x - mean) + grad_offset;
  const void* grad_offset;  // null for frozen statistics: scale * g
};

// Rows [begin, end) of an image: of y in forward, of x in the passes backward.
struct PoolRows {
  int64_t image, begin, end;
};

struct BatchNormActMaxPoolKernels {
  void (*forward)(const BatchNormActMaxPoolArgs&, PoolRows);
  // Writes sums over the rows, `depth` of each, in an order that depends on nothing but sizes.
  void (*backward_reduce)(const BatchNormActMaxPoolArgs&, PoolRows, double* sum_grad,
                          double* sum_grad_centred);
  void (*backward_apply)(const BatchNormActMaxPoolArgs&, PoolRows);
};

namespace portable {
extern const BatchNormActMaxPoolKernels batch_norm_act_max_pool_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const BatchNormActMaxPoolKernels batch_norm_act_max_pool_kernels;
}
namespace avx512 {
extern const BatchNormActMaxPoolKernels batch_norm_act_max_pool_kernels;
}
#endif

}  // namespace resops
