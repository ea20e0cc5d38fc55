// Interface between the driver of a dense layer's 1x1 convolution and its kernels, one table per
// instruction set. Everything is float32.

#pragma once

#include <cstdint>

#include "dense_block_kernels.h"

namespace resops {

// A consumer of the buffer's first channels and the convolution behind it.
struct NarrowArgs {
  // For `forward` what apply takes, but for `out`; for `backward` what accumulate takes, but for
  // grad_y.
  DenseBlockArgs norm;
  int64_t outputs;     // channels of the convolution's output, a multiple of 16
  const float* panel;  // the weight as pack_forward or pack_backward has written it
  float* c;            // forward: the output
  const float* grad_c;
  bool of_weight;  // backward: whether the weight has a gradient
};

// What a piece of `backward` has added up, per channel; the gradient of the weight is
// (outputs, gradient_width) and written where there is one.
struct NarrowSums {
  double* grad;
  double* grad_centred;
  float* grad_weight;
};

struct NarrowKernels {
  // Floats of a packed weight and of a thread's workspace.
  int64_t (*panel_size)(int64_t channels, int64_t outputs);
  int64_t (*workspace_size)();
  // Channels of a row of a piece's gradient of the weight.
  int64_t (*gradient_width)(int64_t channels);
  // The weight (outputs, channels) as `forward` and `backward` read it.
  void (*pack_forward)(const float* weight, int64_t channels, int64_t outputs, float* panel);
  void (*pack_backward)(const float* weight, int64_t channels, int64_t outputs, float* panel);
  // Rows [begin, end) of c.
  void (*forward)(const NarrowArgs&, int64_t begin, int64_t end, float* workspace);
  // Rows [begin, end) of the channels [first, last), which begin at a multiple of kNarrowChannels.
  void (*backward)(const NarrowArgs&, int64_t begin, int64_t end, int64_t first, int64_t last,
                   const NarrowSums& sums, float* workspace);
};

constexpr int64_t kNarrowRows = 112;      // of a block, at most: eight times the rows of a product
constexpr int64_t kNarrowChannels = 128;  // of a block

namespace portable {
extern const NarrowKernels narrow_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const NarrowKernels narrow_kernels;
}
namespace avx512 {
extern const NarrowKernels narrow_kernels;
}
#endif

}  // namespace resops
