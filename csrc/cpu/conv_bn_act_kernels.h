// Interface between the convolution driver and the Winograd kernels, one table per instruction set.
//
// Images are channels-last: neighbours in memory are neighbouring channels, and everything else is
// a stride, so that a slice of a wider tensor's channels needs no copy. Outputs are cut into tiles
// of `tile` x `tile`, counted over images, rows and columns; a tile has (tile + 2)^2 points at
// which the transformed operands are multiplied. docs/math/conv_bn_act.md has the formulas.

#pragma once

#include <cstdint>

#include "../common/types.h"

namespace resops {

// Strides in elements. A null pointer: there is no such tensor.
struct ImageView {
  void* data = nullptr;
  int64_t channels = 0, batch_stride = 0, row_stride = 0, column_stride = 0;
};

// act( scale * x + shift ), per channel; without scale x itself. Vectors hold 16 values more than
// there are channels.
struct Prologue {
  const float* scale = nullptr;
  const float* shift = nullptr;
  Activation activation = Activation::identity;
  float negative_slope = 0;
};

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

enum class Sums {
  none,
  statistics,  // of the rounded outputs: mean and M2
  gradient,    // of the rounded outputs g: sum(g) and sum(g * (argument - mean))
};

// Element (out, in, row, column) of a weight is data[out * out_stride + ...]; a weight that is
// turned around has negative strides.
struct WeightView {
  DType dtype;
  void* data;
  int64_t out_stride, in_stride, row_stride, column_stride;
};

struct WinogradOutput {
  // As transform_weight leaves it; or null, and then `raw_weight` is transformed on the way, which
  // is faster where it is used by few tiles: the transformed one has four times the size.
  const float* weight = nullptr;
  WeightView raw_weight;
  ImageView out;
  const float* bias = nullptr;  // like the prologue's vectors
  ImageView addend;             // added before the activation
  Activation activation = Activation::identity;
  float negative_slope = 0;
  // The output is multiplied by the derivative of this activation at its argument.
  Prologue derivative;
  ImageView argument;
  const float* mean = nullptr;
  Sums sums = Sums::none;
};

// Both operands of the products at every point, tiles x channels, for up to `capacity` tiles of
// which the first is `first_tile`. Only the gradient of the weight has the second.
struct WinogradOperands {
  float* inputs;
  float* gradients;
  int64_t first_tile, tiles, capacity;
};

// A part of the channels; the beginnings are multiples of the width of a panel.
struct ChannelRange {
  int64_t begin, end;
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
