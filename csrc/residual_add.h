// Argument checks of residual_add, the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "common/types.h"

namespace resops {

using OptionalTensor = std::optional<at::Tensor>;

// What a weight is broadcast along: everything, the elements of a sample, nothing.
enum class WeightKind { constant, scalar, per_sample, elementwise };

struct ResidualAddWeights {
  WeightKind alpha, beta;
};

// The kinds of alpha and beta; where two fit, the results are the same.
ResidualAddWeights check_residual_add_forward(const at::Tensor& x, const at::Tensor& residual,
                                              const OptionalTensor& alpha,
                                              const OptionalTensor& beta, bool complement);

// `x` and `residual` are required where a gradient in `output_mask` needs them, and so is the mask
// after relu and leaky_relu.
ResidualAddWeights check_residual_add_backward(const at::Tensor& grad_y, const OptionalTensor& x,
                                               const OptionalTensor& residual,
                                               const OptionalTensor& alpha,
                                               const OptionalTensor& beta, bool complement,
                                               const OptionalTensor& mask, Activation activation,
                                               std::array<bool, 4> output_mask);

// (N, ceil(L / 8)): one bit per element, the rows of bits padded to bytes.
std::array<int64_t, 2> residual_add_mask_size(const at::Tensor& x);

}  // namespace resops
