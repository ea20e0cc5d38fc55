// residual_add: schemas and argument checks. The kernels are registered per device, by
// cpu/residual_add.cpp; resops/ops/residual_add.py makes them differentiable, and
// resops/reference/residual_add.py defines what they compute.

#include "residual_add.h"

#include <torch/library.h>

#include <vector>

#include "common/tensor_checks.h"

namespace resops {
namespace {

void check_input_of_any_rank(const at::Tensor& x) {
  check_input("residual_add", x.dim() == 1 ? x.unsqueeze(1) : x);
}

WeightKind check_weight(const char* name, const OptionalTensor& weight, const at::Tensor& x) {
  if (!weight) return WeightKind::constant;
  const at::Tensor& t = *weight;
  check_device(name, t, x);
  std::vector<int64_t> column(x.dim(), 1);  // (N, 1, ..., 1)
  column[0] = x.size(0);
  if (t.numel() != 1 && t.sizes() != column && t.sizes() != x.sizes().slice(0, 1)) {
    TORCH_CHECK(t.sizes() == x.sizes(), name, " should have 1 element, the size ",
                x.sizes().slice(0, 1), " or ", at::IntArrayRef(column),
                " for one value per sample, or the size ", x.sizes(),
                " of the input, but got size ", t.sizes());
    TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " should have the dtype ",
                x.scalar_type(), " of the input, got ", t.scalar_type());
    return WeightKind::elementwise;
  }
  check_parameter_dtype(name, t, x);
  return t.numel() == 1 ? WeightKind::scalar : WeightKind::per_sample;
}

ResidualAddWeights check_weights(const at::Tensor& x, const OptionalTensor& alpha,
                                 const OptionalTensor& beta, bool complement) {
  const ResidualAddWeights kinds{check_weight("alpha", alpha, x), check_weight("beta", beta, x)};
  TORCH_CHECK_VALUE(!complement || !beta,
                    "beta should be None with complement=True, which makes it 1 - alpha");
  return kinds;
}

}  // namespace

std::array<int64_t, 2> residual_add_mask_size(const at::Tensor& x) {
  int64_t length = 1;
  for (int64_t d = 1; d < x.dim(); ++d) length *= x.size(d);
  return {x.size(0), (length + 7) / 8};
}

ResidualAddWeights check_residual_add_forward(const at::Tensor& x, const at::Tensor& residual,
                                              const OptionalTensor& alpha,
                                              const OptionalTensor& beta, bool complement) {
  check_input_of_any_rank(x);
  check_like("residual", residual, x);
  return check_weights(x, alpha, beta, complement);
}

ResidualAddWeights check_residual_add_backward(const at::Tensor& grad_y, const OptionalTensor& x,
                                               const OptionalTensor& residual,
                                               const OptionalTensor& alpha,
                                               const OptionalTensor& beta, bool complement,
                                               const OptionalTensor& mask, Activation activation,
                                               std::array<bool, 4> output_mask) {
  check_input_of_any_rank(grad_y);
  if (x) check_like("x", *x, grad_y);
  if (residual) check_like("residual", *residual, grad_y);
  const ResidualAddWeights kinds = check_weights(grad_y, alpha, beta, complement);
  const auto [need_x, need_residual, need_alpha, need_beta] = output_mask;
  TORCH_CHECK_VALUE(alpha || !need_alpha, "alpha is None, not a tensor, and has no gradient");
  TORCH_CHECK_VALUE(beta || !need_beta, "beta is None, not a tensor, and has no gradient");
  const bool need_z = is_smooth(activation) && (need_x || need_residual || need_alpha || need_beta);
  TORCH_CHECK(x || !(need_z || need_alpha),
              "x should be given for the gradient of alpha and of a smooth activation");
  TORCH_CHECK(residual || !(need_z || need_beta || (need_alpha && complement)),
              "residual should be given for the gradient of beta and of a smooth activation");
  if (!is_masked(activation)) {
    TORCH_CHECK(!mask || mask->numel() == 0, "mask should be empty for an activation without one");
    return kinds;
  }
  TORCH_CHECK(mask, "mask should be given for relu and leaky_relu");
  check_device("mask", *mask, grad_y);
  TORCH_CHECK(mask->scalar_type() == at::kByte, "mask should have dtype Byte, but got ",
              mask->scalar_type());
  TORCH_CHECK(mask->sizes() == at::IntArrayRef(residual_add_mask_size(grad_y)),
              "mask should have the size ", at::IntArrayRef(residual_add_mask_size(grad_y)),
              ", but got ", mask->sizes());
  return kinds;
}

}  // namespace resops

// alpha and beta are 1, N or x's own number of elements; without them alpha_value and beta_value
// stand for them. complement: beta = 1 - alpha. The bits of a mask row are in the memory order of
// y, which grad_y must have in backward.
TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def(
      "residual_add_forward(Tensor x, Tensor residual, Tensor? alpha, Tensor? beta, "
      "float alpha_value, float beta_value, bool complement, str activation, "
      "float negative_slope) -> (Tensor y, Tensor mask)");
  m.def(
      "residual_add_backward(Tensor grad_y, Tensor? x, Tensor? residual, Tensor? alpha, "
      "Tensor? beta, float alpha_value, float beta_value, bool complement, Tensor? mask, "
      "str activation, float negative_slope, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_alpha, Tensor grad_beta)");
  // The same in operations that autograd can follow, for second derivatives: registered by
  // resops/ops/residual_add.py.
  m.def(
      "residual_add_backward_formulas(Tensor grad_y, Tensor? x, Tensor? residual, Tensor? alpha, "
      "Tensor? beta, float alpha_value, float beta_value, bool complement, Tensor? mask, "
      "str activation, float negative_slope, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_alpha, Tensor grad_beta)");
}
