// residual_add of CUDA tensors: checks arguments, allocates outputs and workspaces, calls the
// launchers.

#include "../residual_add.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../../common/tensor_checks.h"
#include "../../residual_add.h"
#include "device_call.h"

namespace resops::cuda {
namespace {

using at::Tensor;

ResidualAddShape shape_of(const Tensor& x) {
  return {kernel_dtype(x), x.size(0), x.numel() / std::max<int64_t>(x.size(0), 1)};
}

// alpha and beta in the memory that the kernels read them from.
struct WeightPair {
  WeightPair(resops::ResidualAddWeights kinds, const OptionalTensor& alpha_,
             const OptionalTensor& beta_, double alpha_value, double beta_value, bool complement,
             const MemoryLayout& layout) {
    args.alpha = weight_of(kinds.alpha, alpha_, alpha_value, layout, alpha);
    args.beta =
        weight_of(kinds.beta, beta_, complement ? 1 - alpha_value : beta_value, layout, beta);
    args.complement = complement;
  }
  static ResidualAddWeight weight_of(WeightKind kind, const OptionalTensor& t, double value,
                                     const MemoryLayout& layout, Tensor& kept) {
    ResidualAddWeight weight{};
    weight.constant = static_cast<float>(value);
    if (kind == WeightKind::constant) return weight;
    weight.is_float = t->scalar_type() == at::kFloat;
    if (kind == WeightKind::elementwise) {
      kept = dense(layout, *t);
      weight.tensor = kept.const_data_ptr();
    } else {
      kept = t->contiguous();
      weight.values = kept.const_data_ptr();
      weight.per_sample = kind == WeightKind::per_sample;
    }
    return weight;
  }
  Tensor alpha, beta;
  cuda::ResidualAddWeights args{};
};

std::tuple<Tensor, Tensor> residual_add_forward(const Tensor& x, const Tensor& residual,
                                                const OptionalTensor& alpha,
                                                const OptionalTensor& beta, double alpha_value,
                                                double beta_value, bool complement,
                                                std::string_view activation,
                                                double negative_slope) {
  const Activation act = parse_activation(activation);
  const auto kinds = check_residual_add_forward(x, residual, alpha, beta, complement);
  check_dtype("residual_add", x);
  const DeviceCall device(x);
  const MemoryLayout layout(x);
  const bool masked = is_masked(act);
  Tensor y = layout.empty(x);
  Tensor mask = masked ? at::empty(residual_add_mask_size(x), plain(x, at::kByte))
                       : at::empty({0}, plain(x, at::kByte));
  const Tensor dense_x = dense(layout, x), dense_residual = dense(layout, residual);
  const WeightPair weights(kinds, alpha, beta, alpha_value, beta_value, complement, layout);
  ResidualAddForward call{};
  call.shape = shape_of(x);
  call.weights = weights.args;
  call.activation = act;
  call.negative_slope = static_cast<float>(negative_slope);
  call.x = dense_x.const_data_ptr();
  call.residual = dense_residual.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.mask = masked ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  launch_residual_add_forward(call, device.stream);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_add_backward(
    const Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& residual,
    const OptionalTensor& alpha, const OptionalTensor& beta, double alpha_value, double beta_value,
    bool complement, const OptionalTensor& mask, std::string_view activation, double negative_slope,
    std::array<bool, 4> output_mask) {
  const Activation act = parse_activation(activation);
  const auto kinds = check_residual_add_backward(grad_y, x, residual, alpha, beta, complement, mask,
                                                 act, output_mask);
  check_dtype("residual_add", grad_y);
  const DeviceCall device(grad_y);
  const auto [need_x, need_residual, need_alpha, need_beta] = output_mask;
  const MemoryLayout layout(grad_y);
  const auto like_grad = [&](bool needed) {
    return needed ? layout.empty(grad_y) : at::empty({0}, plain(grad_y, grad_y.scalar_type()));
  };
  const auto weight_grad = [&](const OptionalTensor& weight, WeightKind kind, bool needed) {
    const auto dtype = weight ? weight->scalar_type() : statistic_dtype(grad_y);
    if (!needed) return at::empty({0}, plain(grad_y, dtype));
    return kind == WeightKind::elementwise ? layout.empty(grad_y)
                                           : at::empty(weight->sizes(), plain(grad_y, dtype));
  };
  Tensor grad_x = like_grad(need_x), grad_residual = like_grad(need_residual);
  Tensor grad_alpha = weight_grad(alpha, kinds.alpha, need_alpha);
  Tensor grad_beta = weight_grad(beta, kinds.beta, need_beta);
  if (!(need_x || need_residual || need_alpha || need_beta)) {
    return {grad_x, grad_residual, grad_alpha, grad_beta};
  }

  const WeightPair weights(kinds, alpha, beta, alpha_value, beta_value, complement, layout);
  const Tensor dense_grad = dense(layout, grad_y);
  Tensor dense_x, dense_residual, dense_mask;
  ResidualAddBackward call{};
  call.shape = shape_of(grad_y);
  call.weights = weights.args;
  call.activation = act;
  call.negative_slope = static_cast<float>(negative_slope);
  call.grad_y = dense_grad.const_data_ptr();
  if (is_smooth(act) || need_alpha) {
    dense_x = dense(layout, *x);
    call.x = dense_x.const_data_ptr();
  }
  if (is_smooth(act) || need_beta || (need_alpha && complement)) {
    dense_residual = dense(layout, *residual);
    call.residual = dense_residual.const_data_ptr();
  }
  if (is_masked(act)) {
    dense_mask = mask->contiguous();
    call.mask = dense_mask.const_data_ptr<uint8_t>();
  }
  call.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  call.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
  call.grad_alpha = need_alpha ? grad_alpha.mutable_data_ptr() : nullptr;
  call.grad_beta = need_beta ? grad_beta.mutable_data_ptr() : nullptr;
  const Tensor workspace = at::empty({residual_add_workspace(call)}, plain(grad_y, at::kFloat));
  launch_residual_add_backward(call, workspace.mutable_data_ptr<float>(), device.stream);
  return {grad_x, grad_residual, grad_alpha, grad_beta};
}

}  // namespace
}  // namespace resops::cuda

TORCH_LIBRARY_IMPL(resops, RESOPS_CUDA_KEY, m) {
  m.impl("residual_add_forward", &resops::cuda::residual_add_forward);
  m.impl("residual_add_backward", &resops::cuda::residual_add_backward);
}
