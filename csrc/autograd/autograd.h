// The ops with their gradients, for eager calls on native tensors: what the autograd Functions of
// resops/ops do, without their time on the host. Compiled graphs and the other backends go by
// those.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace resops {

at::Tensor batch_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                      const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var, bool training, double momentum,
                      double eps, const std::string& activation, double negative_slope);

// With constant weights.
at::Tensor residual_add(const at::Tensor& x, const at::Tensor& residual, double alpha, double beta,
                        const std::string& activation, double negative_slope);

}  // namespace resops
