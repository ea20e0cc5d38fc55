// batch_norm: schemas and argument checks. The kernels are registered per device, by
// cpu/batch_norm.cpp; resops/ops/batch_norm.py makes them differentiable, and
// resops/reference/batch_norm.py defines what they compute.

#include "batch_norm.h"

#include <torch/library.h>

#include <cmath>

#include "common/tensor_checks.h"

namespace resops {

void check_batch_norm_forward(const at::Tensor& x, const OptionalTensor& residual,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              bool training, double momentum, double eps) {
  check_input("batch_norm", x);
  int64_t count = x.size(0);
  for (int64_t d = 2; d < x.dim(); ++d) count *= x.size(d);
  TORCH_CHECK_VALUE(!training || count != 1,
                    "Expected more than 1 value per channel when training, got input size "
                    "torch.Size(",
                    x.sizes(), ")");
  TORCH_CHECK_VALUE(!training || eps > 0,
                    "batch_norm eps must be positive during training, but got ", eps);
  TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);
  TORCH_CHECK_VALUE(!std::isnan(momentum), "batch_norm momentum must be a number, but got nan");
  if (!training) {
    TORCH_CHECK(running_mean, "running_mean must be defined in evaluation mode");
    TORCH_CHECK(running_var, "running_var must be defined in evaluation mode");
  }
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "running_mean and running_var must either both be None or neither be None");
  check_pair("weight", weight, "bias", bias, x);
  check_pair("running_mean", running_mean, "running_var", running_var, x);
  const auto check_no_grad = [](const char* name, const OptionalTensor& t) {
    TORCH_CHECK(!t || !t->requires_grad(),
                "The function 'batch_norm' is not differentiable with respect to argument '", name,
                "'. This input cannot have requires_grad True.");
  };
  check_no_grad("running_mean", running_mean);
  check_no_grad("running_var", running_var);
  if (residual) check_like("residual", *residual, x);
}

void check_batch_norm_apply(const at::Tensor& x, const OptionalTensor& residual,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const at::Tensor& mean, const at::Tensor& invstd) {
  check_input("batch_norm", x);
  check_pair("weight", weight, "bias", bias, x);
  check_statistic("mean", mean, x);
  check_statistic("invstd", invstd, x);
  if (residual) check_like("residual", *residual, x);
}

void check_batch_norm_backward(const at::Tensor& grad_y, const at::Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& mask,
                               int64_t mask_size, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& mean,
                               const at::Tensor& invstd, Activation activation) {
  check_batch_norm_apply(x, residual, weight, bias, mean, invstd);
  check_like("grad_y", grad_y, x);
  if (!mask || mask->numel() == 0) {
    TORCH_CHECK(!residual || !is_masked(activation) || x.numel() == 0,
                "mask should be given for relu and leaky_relu with a residual: it has the signs");
    return;
  }
  check_device("mask", *mask, x);
  TORCH_CHECK(is_masked(activation), "mask should be empty for an activation without one");
  TORCH_CHECK(mask->scalar_type() == at::kByte, "mask should have dtype Byte, but got ",
              mask->scalar_type());
  TORCH_CHECK(mask->dim() == 1 && mask->numel() == mask_size, "mask should be a vector of ",
              mask_size, " bytes, but got size ", mask->sizes());
}

}  // namespace resops

TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def("batch_norm_statistics(Tensor x) -> (Tensor mean, Tensor var)");
  m.def(
      "batch_norm_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, str activation, float negative_slope) -> (Tensor y, Tensor mask)");
  m.def(
      "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, "
      "float eps, str activation, float negative_slope) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)");
  m.def(
      "batch_norm_backward_reduce(Tensor grad_y, Tensor x, Tensor? residual, Tensor? mask, "
      "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, str activation, "
      "float negative_slope) -> (Tensor sum_grad, Tensor sum_grad_xhat)");
  m.def(
      "batch_norm_backward_apply(Tensor grad_y, Tensor x, Tensor? residual, Tensor? mask, "
      "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, Tensor? mean_grad, "
      "Tensor? mean_grad_xhat, str activation, float negative_slope, bool need_grad_x, "
      "bool need_grad_residual) -> (Tensor grad_x, Tensor grad_residual)");
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor x, Tensor? residual, Tensor? mask, "
      "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, bool training, str activation, "
      "float negative_slope, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  // The same in operations that autograd can follow, for second derivatives: registered by
  // resops/ops/batch_norm.py.
  m.def(
      "batch_norm_backward_formulas(Tensor grad_y, Tensor x, Tensor? residual, Tensor? mask, "
      "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, bool training, float eps, "
      "str activation, float negative_slope, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
}
