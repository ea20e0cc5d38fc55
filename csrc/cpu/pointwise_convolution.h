// 1x1 convolutions without padding as products of matrices, on tensors and torch's threads.

#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "convolution_tensors.h"

namespace resops {

// Whether the positions of a (N, C, H, W) are equally far apart and its channels neighbours, so
// that it can be the output: dense in channels-last, or some channels of such a tensor.
bool has_even_rows(const at::Tensor& t);

// The weight as pointwise_forward packs it, for it to use again: one vector, whose size tells the
// instruction sets apart.
at::Tensor pointwise_pack_weight(const at::Tensor& weight);

// Whether `packed` is of the instruction set in use, for a weight of this size.
bool is_packed_weight(const at::Tensor& packed, at::IntArrayRef weight_size);

// The convolution of `inputs` side by side into `out`, and the two vectors of the epilogue, empty
// ones where there are none. With `turned`, `weight` is (C_in, C, 1, 1): that is the gradient of
// the input of a convolution with stride 1. `packed` is null or what pointwise_pack_weight made.
std::tuple<at::Tensor, at::Tensor> pointwise_forward(
    at::TensorList inputs, const ChannelPrologue& prologue, const at::Tensor& weight, bool turned,
    at::IntArrayRef stride, const ConvolutionEpilogue& epilogue, const at::Tensor* packed,
    const at::Tensor& out);

// The gradient of the weight, (C, C_in, 1, 1), into `grad_weight`, which is dense.
void pointwise_backward_weight(const at::Tensor& grad_y, at::TensorList inputs,
                               const ChannelPrologue& prologue, at::IntArrayRef stride,
                               const at::Tensor& grad_weight);

}  // namespace resops
