// Interface between the driver of 1x1 convolutions and their kernels, one table per instruction
// set. The positions of all images are the rows of a matrix, channels its columns.

#pragma once

#include <cstdint>

#include "convolution_views.h"

namespace resops {

// Positions of images one after the other: row r is image r / (height * width), and so on. One
// image of one row where positions are equally far apart everywhere.
struct PointwiseRows {
  DType dtype;
  const ImageView* slices;  // in the order of their channels
  int64_t slice_count;
  int64_t channels;
  int64_t height, width;  // of an image
  Prologue prologue;
};

struct RowRange {
  int64_t begin, end;
};

struct PointwiseWeight {
  // As pack_weight leaves it; or null, and then `raw` is packed on the way.
  const float* packed;
  WeightView raw;
};

struct PointwiseKernels {
  int64_t panel;  // output channels that are computed together

  // Sizes in floats.
  int64_t (*weight_size)(int64_t in_channels, int64_t out_channels);
  int64_t (*workspace_size)(const PointwiseRows& inputs, int64_t rows, int64_t out_channels);
  int64_t (*gradient_workspace_size)(int64_t rows, ChannelRange in_channels,
                                     ChannelRange out_channels);

  // Panels of `out_channels`.
  void (*pack_weight)(const WeightView&, int64_t in_channels, ChannelRange out_channels,
                      float* packed);

  // Outputs of some rows and some channels, and their sums, one value per channel of the range
  // each. Meanwhile the rows `next` of the inputs are fetched. The rows and columns of `output`'s
  // images are those of one image with one column.
  void (*convolve)(const PointwiseRows& inputs, const PointwiseWeight&, const ConvolutionOutput&,
                   RowRange rows, RowRange next, ChannelRange out_channels, float* workspace,
                   double* sum0, double* sum1);

  // The gradient of a part of the weight over `rows`, which are taken `step` at a time.
  void (*gradient)(const PointwiseRows& inputs, const PointwiseRows& gradients, int64_t rows,
                   int64_t step, ChannelRange in_channels, ChannelRange out_channels,
                   float* workspace, const WeightView& grad_weight);
};

namespace portable {
extern const PointwiseKernels pointwise_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const PointwiseKernels pointwise_kernels;
}
namespace avx512 {
extern const PointwiseKernels pointwise_kernels;
}
#endif

}  // namespace resops
