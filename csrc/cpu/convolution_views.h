// What the drivers of convolutions hand to their kernels.
//
// Images are channels-last: neighbours in memory are neighbouring channels, and everything else is
// a stride, so that a slice of a wider tensor's channels needs no copy.

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

// Element (out, in, row, column) of a weight is data[out * out_stride + ...]; a weight that is
// turned around has negative strides.
struct WeightView {
  DType dtype;
  void* data;
  int64_t out_stride, in_stride, row_stride, column_stride;
};

// A part of the channels; the beginnings are multiples of the width of a panel.
struct ChannelRange {
  int64_t begin, end;
};

enum class Sums {
  none,
  statistics,  // of the rounded outputs: mean and M2
  gradient,    // of the rounded outputs g: sum(g) and sum(g * (argument - mean))
};

// Where outputs go, and what is applied to them first.
struct ConvolutionOutput {
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

}  // namespace resops
