// Interface between the batch_norm driver and its kernels, one table per instruction set.
//
// A dense tensor (N, C, *spatial) is walked as rows:
//   channels-last: rows of `width` elements, a multiple of C and of a cache line, so that every row
//     starts with channel 0; parameters are repeated `width / C` times. What is left over is one
//     shorter last row.
//   contiguous: one row per plane (n, c), of S elements, all of one channel.
// C == 1 and S == 1 are the same in both layouts and go by the first.

#pragma once

#include <cstdint>

#include "../common/types.h"

namespace resops {

// What the elementwise passes and the reductions read and write. Pointers that a pass does not use
// are null. `acc` is double for f64, else float.
struct BatchNormArgs {
  DType dtype;
  Activation activation;
  double negative_slope;
  bool has_residual;  // forward: added; backward: z had one (see `mask` and `residual`)
  bool streaming;     // outputs bypass the caches
  bool channels_last;
  int64_t channels;
  int64_t width;      // elements in a row
  int64_t mask_step;  // bytes of mask in a row
  const void* x;
  const void* residual;  // forward, and backward of silu and gelu
  const void* grad_y;    // backward
  const uint8_t* mask;   // backward of relu and leaky_relu with a residual
  void* y;               // forward
  uint8_t* mask_out;     // forward, with a residual
  void* grad_x;          // backward_apply, or null
  void* grad_residual;   // backward_apply; backward_reduce with a residual through relu; or null
  const void* mean;      // acc; `width` values in channels-last, C in contiguous; so are the next
  const void* scale;     // weight * invstd
  const void* bias;
  const void* grad_slope;   // grad_x = scale * g + grad_slope * (x - mean) + grad_offset;
  const void* grad_offset;  // null for frozen statistics: scale * g, whatever x is
};

// Rows [row_begin, row_end), elements [begin, end) of each; begin is a multiple of 32.
struct BatchNormSpan {
  int64_t row_begin, row_end, begin, end;
};

struct BatchNormKernels {
  void (*apply)(const BatchNormArgs&, BatchNormSpan);
  void (*backward_apply)(const BatchNormArgs&, BatchNormSpan);

  // Reductions of one piece of the tensor, in an order that depends on nothing but its size.
  // channels-last: `span` is whole rows, or the last row alone; out has `width` entries.
  // contiguous: samples [row_begin, row_end) of the channels [channel_begin, channel_end), elements
  // [begin, end) of every plane; out[c - channel_begin].
  void (*statistics)(const BatchNormArgs&, BatchNormSpan, int64_t channel_begin,
                     int64_t channel_end, double* mean, double* m2);
  void (*backward_reduce)(const BatchNormArgs&, BatchNormSpan, int64_t channel_begin,
                          int64_t channel_end, double* sum_grad, double* sum_grad_centred);

  // Chan, Golub and LeVeque's merge of `width` partial (mean, m2), counted `count_b`, into those
  // counted `count_a`.
  void (*merge)(int64_t width, double count_a, double* mean_a, double* m2_a, double count_b,
                const double* mean_b, const double* m2_b);
};

namespace portable {
extern const BatchNormKernels batch_norm_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const BatchNormKernels batch_norm_kernels;
}
namespace avx512 {
extern const BatchNormKernels batch_norm_kernels;
}
namespace avx512_bf16 {
extern const BatchNormKernels batch_norm_kernels;
}
#endif

}  // namespace resops
