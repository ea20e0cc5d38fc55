// What other ops take from batch_norm on the CPU.

#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "../batch_norm.h"

namespace resops {

// Mean and invstd per channel, in the dtype of statistics: of the batch when training, and then the
// running statistics are updated; else of the running statistics. Arguments were checked before.
std::pair<at::Tensor, at::Tensor> batch_norm_mean_invstd(const at::Tensor& x,
                                                         const OptionalTensor& running_mean,
                                                         const OptionalTensor& running_var,
                                                         bool training, double momentum,
                                                         double eps);

// The values of a vector of C, or C times `missing`.
std::vector<double> channel_values(const OptionalTensor& t, int64_t channels, double missing);

}  // namespace resops
