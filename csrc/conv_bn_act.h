// Argument checks of the phases of conv_bn_act, the same for every device.

#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "common/types.h"

namespace resops {

using OptionalTensor = std::optional<at::Tensor>;

struct ConvGeometry {
  at::IntArrayRef stride, padding, dilation;
};

// What is convolved: act( scale * x + shift ), x being one tensor or several beside each other.
struct ConvPrologue {
  const OptionalTensor& scale;
  const OptionalTensor& shift;
  Activation activation;
};

// Each returns the size of the convolution's output, (N, C, *spatial).
at::DimVector check_conv_bn_act_forward(at::TensorList inputs, const ConvPrologue& prologue,
                                        const at::Tensor& conv_weight,
                                        const OptionalTensor& conv_bias,
                                        const OptionalTensor& residual, Activation activation,
                                        const ConvGeometry& geometry, bool statistics);

// `out` of size `size`, for the output.
void check_conv_bn_act_out(const at::Tensor& out, at::TensorList inputs, at::IntArrayRef size);

at::DimVector check_conv_bn_act_backward_data(
    const at::Tensor& grad_y, const at::Tensor& conv_weight, at::IntArrayRef input_size,
    const OptionalTensor& x, const ConvPrologue& prologue, const OptionalTensor& mean,
    const OptionalTensor& invstd, const OptionalTensor& addend, const ConvGeometry& geometry);

at::DimVector check_conv_bn_act_backward_weight(const at::Tensor& grad_y, at::TensorList inputs,
                                                const ConvPrologue& prologue,
                                                at::IntArrayRef weight_size,
                                                const ConvGeometry& geometry);

}  // namespace resops
