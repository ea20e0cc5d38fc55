// 3x3 convolutions of stride 1 by Winograd's minimal filtering, on tensors and torch's threads.

#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "convolution_tensors.h"

namespace resops {

// Outputs along a side of a tile: 4, or 2 where that takes fewer multiplications.
int winograd_tile(int64_t out_height, int64_t out_width);

// The weight at all points, for winograd_forward to use again: one vector, which depends on the
// instruction set in use. `turned` is the weight of the gradient of the input.
at::Tensor winograd_transform_weight(const at::Tensor& weight, bool turned, int tile);

// Whether `transformed` is of the instruction set in use, for a weight of this size.
bool is_transformed_weight(const at::Tensor& transformed, at::IntArrayRef weight_size, int tile);

// The convolution of `inputs` side by side into `out`, and the two vectors of the epilogue, empty
// ones where there are none. Neighbouring channels of inputs, addend and argument are copied into
// neighbouring places where they are not; those of `out` are there.
// With `turned`, `weight` is (C_in, C, 3, 3), and turned by half a circle: that is the gradient of
// a convolution's input. `transformed` is null or what winograd_transform_weight made of them.
std::tuple<at::Tensor, at::Tensor> winograd_forward(
    at::TensorList inputs, const ChannelPrologue& prologue, const at::Tensor& weight, bool turned,
    at::IntArrayRef padding, const ConvolutionEpilogue& epilogue, const at::Tensor* transformed,
    const at::Tensor& out);

// The gradient of the weight, (C, C_in, 3, 3), into `grad_weight`.
void winograd_backward_weight(const at::Tensor& grad_y, at::TensorList inputs,
                              const ChannelPrologue& prologue, at::IntArrayRef padding,
                              const at::Tensor& grad_weight);

}  // namespace resops
