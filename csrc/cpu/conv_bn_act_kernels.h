// Interface between the convolution driver and the Winograd kernels, one table per instruction set.
//
// Outputs are cut into tiles of `tile` x `tile`, counted over images, rows and columns; a tile has
// (tile + 2)^2 points at which the transformed operands are multiplied. docs/math/conv_bn_act.md
// has the formulas.

#pragma once

#include <cstdint>

#include "convolution_views.h"

namespace resops {

// A 3x3 convolution of stride 1.
struct WinogradGeometry {
  DType dtype;
  int tile;  // 4 or 2
  int64_t in_channels, out_channels;
  int64_t height, width, out_height, out_width;
  int64_t pad_h, pad_w;
  int64_t tile_rows, tile_columns;  // in an image
  const ImageView* inputs;          // slices in the order of their channels
  int64_t input_count;
  Prologue prologue;
};

struct WinogradOutput : ConvolutionOutput {
  // As transform_weight leaves it; or null, and then `raw_weight` is transformed on the way, which
  // is faster where it is used by few tiles: the transformed one has four times the size.
  const float* weight = nullptr;
  WeightView raw_weight;
};

// Both operands of the products at every point, tiles x channels, for up to `capacity` tiles of
// which the first is `first_tile`. Only the gradient of the weight has the second.
struct WinogradOperands {
  float* inputs;
  float* gradients;
  int64_t first_tile, tiles, capacity;
};

struct WinogradKernels {
  int64_t panel;  // channels that are computed together

  // Sizes in floats.
  int64_t (*weight_size)(int tile, int64_t in_channels, int64_t out_channels);
  int64_t (*operand_size)(int tile, int64_t channels, int64_t tiles);
  int64_t (*workspace_size)(const WinogradGeometry&, int64_t tiles, int64_t out_channels);
  int64_t (*product_size)(int tile, int64_t in_channels, int64_t out_channels);

  // Panels of `out_channels` of the transformed weight.
  void (*transform_weight)(int tile, const WeightView&, int64_t in_channels,
                           ChannelRange out_channels, float* transformed);

  // Tiles [begin, end) of the operands.
  void (*transform_inputs)(const WinogradGeometry&, const WinogradOperands&, int64_t begin,
                           int64_t end);
  void (*transform_gradients)(const WinogradGeometry&, const ImageView& grad,
                              const WinogradOperands&, int64_t begin, int64_t end);

  // Outputs of all tiles of the operands, and their sums, one value per channel of the range each.
  // Returns the number of outputs per channel.
  int64_t (*convolve)(const WinogradGeometry&, const WinogradOutput&, const WinogradOperands&,
                      ChannelRange out_channels, float* workspace, double* sum0, double* sum1);

  // The gradient of a part of the weight: its products over the tiles of the operands, added to
  // those of tiles before if `accumulate`; and if `finish`, the way back from the points.
  void (*gradient)(const WinogradGeometry&, const WinogradOperands&, ChannelRange in_channels,
                   ChannelRange out_channels, bool accumulate, bool finish, float* product,
                   const WeightView& grad_weight);
};

namespace portable {
extern const WinogradKernels winograd_kernels;
}
#ifdef RESOPS_HAVE_X86_ISA
namespace avx2 {
extern const WinogradKernels winograd_kernels;
}
namespace avx512 {
extern const WinogradKernels winograd_kernels;
}
#endif

}  // namespace resops
