// Argument checks of dense_block, the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace resops {

using OptionalTensor = std::optional<at::Tensor>;

// A norm over the first C channels of the buffer, C the size of `mean`.
void check_dense_block_norm(const at::Tensor& buffer, const OptionalTensor& weight,
                            const OptionalTensor& bias, const at::Tensor& mean,
                            const at::Tensor& invstd);

// (N, channels, H, W) beside the buffer, of its dtype.
void check_dense_block_slice(const char* name, const at::Tensor& t, int64_t channels,
                             const at::Tensor& buffer);

// (N, at least `channels`, H, W), of the buffer's dtype or that of its statistics.
void check_dense_block_sum(const at::Tensor& grad_sum, int64_t channels, const at::Tensor& buffer);

// What `gradient` takes for the channels [begin, end).
void check_dense_block_gradient(const OptionalTensor& grad_y, const at::Tensor& buffer,
                                const OptionalTensor& grad_sum, const OptionalTensor& mean,
                                const OptionalTensor& invstd, const OptionalTensor& mean_grad,
                                const OptionalTensor& mean_grad_xhat, int64_t begin, int64_t end);

}  // namespace resops
