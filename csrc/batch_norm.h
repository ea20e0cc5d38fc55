// Argument checks of batch_norm, the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/types.h"

namespace resops {

using OptionalTensor = std::optional<at::Tensor>;

void check_batch_norm_forward(const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              bool training, double momentum, double eps);

void check_batch_norm_apply(const at::Tensor& x, const OptionalTensor& residual,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const at::Tensor& mean, const at::Tensor& invstd);

// `mask` may be empty; `mask_size` is the number of bytes that it has otherwise.
void check_batch_norm_backward(const at::Tensor& grad_y, const at::Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& mask,
                               int64_t mask_size, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& mean,
                               const at::Tensor& invstd, Activation activation);

}  // namespace resops
