// Windows of batch_norm_act_max_pool, and its argument checks, the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "common/types.h"

namespace resops {

using OptionalTensor = std::optional<at::Tensor>;

// Along height and width. resops/reference/batch_norm_act_max_pool.py says what they mean.
struct PoolWindows {
  std::array<int64_t, 2> kernel, stride, padding;

  int64_t output_size(int64_t size, int dimension) const {
    return (size + 2 * padding[dimension] - kernel[dimension]) / stride[dimension] + 1;
  }
};

// Also makes the windows of a schema's arguments.
PoolWindows check_pooling(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding);

// y's sizes and memory format for an input like x; of another dtype for the index.
at::Tensor empty_pooled(const at::Tensor& x, const PoolWindows& windows, at::ScalarType dtype);

void check_batch_norm_act_max_pool_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const at::Tensor& mean,
                                            const at::Tensor& invstd, const at::Tensor& index,
                                            const PoolWindows& windows);

}  // namespace resops
