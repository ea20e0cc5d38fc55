// Interface between the residual_add driver and its kernels, one table per instruction set.
//
// A dense tensor (N, *) is walked as rows of `width` contiguous elements: one row per sample, or
// all of it as one row where no weight and no padding of the mask tells samples apart.

#pragma once

#include <cstdint>

#include "../common/types.h"

namespace resops {

// Which weights are tensors like x, read element by element; the others are one value per row.
enum class Loaded { none, alpha, beta, both, complement };  // complement: alpha, and beta from it

// Pointers that a pass does not use are null.
struct ResidualAddArgs {
  DType dtype;
  Activation activation;
  double negative_slope;
  Loaded loaded;
  bool complement;    // beta = 1 - alpha, whatever alpha is
  bool streaming;     // outputs bypass the caches
  int64_t width;      // elements in a row
  int64_t mask_step;  // bytes of mask in a row
  // One value per row r, alpha_rows[r * alpha_step] with a step of 1, or of 0: one for all rows.
  const double* alpha_rows;
  const double* beta_rows;
  int64_t alpha_step, beta_step;
  // Tensors like x, of which backward gets those that it needs.
  const void* alpha;
  const void* beta;
  const void* x;
  const void* residual;
  const void* grad_y;   // backward
  const uint8_t* mask;  // backward of relu and leaky_relu
  void* y;              // forward
  uint8_t* mask_out;    // forward of relu and leaky_relu
  void* grad_x;         // backward; each of the gradients may be null
  void* grad_residual;
  void* grad_alpha;  // of a weight like x
  void* grad_beta;
  bool sum_alpha;  // the gradients of weights that are one value per row
  bool sum_beta;
};

// Rows [row_begin, row_end), elements [begin, end) of each; begin is a multiple of 16.
struct ResidualAddSpan {
  int64_t row_begin, row_end, begin, end;
};

struct ResidualAddKernels {
  void (*forward)(const ResidualAddArgs&, ResidualAddSpan);

  // The sums are of one row's elements in the span, for rows row_begin, row_begin + 1, ...; their
  // order depends on nothing but their number.
  void (*backward)(const ResidualAddArgs&, ResidualAddSpan, double* sum_alpha, double* sum_beta);
};

namespace portable {
extern const ResidualAddKernels residual_add_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const ResidualAddKernels residual_add_kernels;
}
namespace avx512 {
extern const ResidualAddKernels residual_add_kernels;
}
namespace avx512_bf16 {
extern const ResidualAddKernels residual_add_kernels;
}
#endif

}  // namespace resops
