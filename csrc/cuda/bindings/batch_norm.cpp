// batch_norm of CUDA tensors: checks arguments, allocates outputs and workspaces, calls the
// launchers.

#include "../batch_norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "../../common/tensor_checks.h"
#include "../batch_norm_slab.h"
#include "batch_norm_call.h"

namespace resops::cuda {
namespace {

using at::Tensor;

BatchNormShape shape_of(const Tensor& x) {
  int64_t spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
  const bool channels_last = x.size(1) == 1 || spatial == 1 || !MemoryLayout(x).is_contiguous();
  return {kernel_dtype(x), x.size(0), x.size(1), spatial, channels_last};
}

// How often a pass reads its tensors, RESOPS_CUDA_BATCH_NORM. What is not the default has not been
// measured on a GPU.
enum class Scheme {
  two_reads,
  reverse,      // two, and the second begins where the first ended
  single_read,  // where a slab of channels fits on the chip; else two
};
Scheme chosen_scheme() {
  const char* name = std::getenv("RESOPS_CUDA_BATCH_NORM");
  const std::string_view scheme = name ? name : "two_reads";
  TORCH_CHECK_VALUE(scheme == "two_reads" || scheme == "reverse" || scheme == "single_read",
                    "RESOPS_CUDA_BATCH_NORM must be two_reads, reverse or single_read, but got '",
                    std::string(scheme), "'");
  return scheme == "reverse"       ? Scheme::reverse
         : scheme == "single_read" ? Scheme::single_read
                                   : Scheme::two_reads;
}
BatchNormOptions second_read() {
  BatchNormOptions options;
  options.reverse = chosen_scheme() == Scheme::reverse;
  return options;
}
std::optional<BatchNormSlabs> slabs_for(const BatchNormShape& shape, int tensors) {
  if (chosen_scheme() != Scheme::single_read) return {};
  return choose_batch_norm_slabs(shape, tensors);
}

Tensor workspace_for(const Tensor& x, const BatchNormShape& shape) {
  return empty_vector(x, batch_norm_workspace(shape));
}

RunningStatistic running_statistic(const OptionalTensor& t) {
  if (!t) return {nullptr, true, 1};
  return {t->mutable_data_ptr(), t->scalar_type() == at::kFloat, t->stride(0)};
}

BatchNormStatistics statistics_of(const Tensor& mean, const Tensor& invstd,
                                  const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, double momentum, double eps) {
  return {mean.mutable_data_ptr<float>(),
          nullptr,
          invstd.mutable_data_ptr<float>(),
          eps,
          running_statistic(running_mean),
          running_statistic(running_var),
          momentum};
}

}  // namespace

std::pair<Tensor, Tensor> batch_norm_mean_invstd(const Tensor& x,
                                                 const OptionalTensor& running_mean,
                                                 const OptionalTensor& running_var, bool training,
                                                 double momentum, double eps, Stream stream) {
  const BatchNormShape shape = shape_of(x);
  Tensor mean = empty_vector(x, shape.channels), invstd = empty_vector(x, shape.channels);
  const BatchNormStatistics out =
      statistics_of(mean, invstd, running_mean, running_var, momentum, eps);
  if (training) {
    const Tensor workspace = workspace_for(x, shape);
    launch_batch_norm_statistics(shape, x.const_data_ptr(), workspace.mutable_data_ptr<float>(),
                                 out, stream);
  } else {
    launch_batch_norm_frozen(shape.channels, shape.dtype, out, stream);
  }
  return {mean, invstd};
}

namespace {

// ---- forward -----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& x) {
  check_input("batch_norm", x);
  check_dtype("batch_norm", x);
  const DeviceCall call(x);
  const BatchNormShape shape = shape_of(x);
  const Tensor input = dense(MemoryLayout(x), x), workspace = workspace_for(x, shape);
  Tensor mean = empty_vector(x, shape.channels), var = empty_vector(x, shape.channels);
  BatchNormStatistics out{};
  out.mean = mean.mutable_data_ptr<float>();
  out.var = var.mutable_data_ptr<float>();
  launch_batch_norm_statistics(shape, input.const_data_ptr(), workspace.mutable_data_ptr<float>(),
                               out, call.stream);
  return {mean, var};
}

// The outputs of apply, and its arguments. `x` is dense.
struct ApplyCall {
  ApplyCall(const BatchNormShape& shape, const MemoryLayout& layout, const Tensor& x,
            const OptionalTensor& residual, const Affine& affine, Activation activation,
            double negative_slope)
      : y(layout.empty(x)) {
    const bool masked = residual && is_masked(activation);
    mask = empty_vector(x, masked ? shape.mask_bytes() : 0, at::kByte);
    if (residual) added = dense(layout, *residual);
    args.affine = affine.args;
    args.activation = activation;
    args.negative_slope = static_cast<float>(negative_slope);
    args.x = x.const_data_ptr();
    args.residual = residual ? added.const_data_ptr() : nullptr;
    args.y = y.mutable_data_ptr();
    args.mask = masked ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  }
  void run(const BatchNormShape& shape, Stream stream) const {
    if (shape.numel() > 0) launch_batch_norm_apply(shape, args, second_read(), stream);
  }
  Tensor y, mask, added;
  BatchNormApply args{};
};

std::tuple<Tensor, Tensor> batch_norm_apply(const Tensor& x, const OptionalTensor& residual,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const Tensor& mean,
                                            const Tensor& invstd, std::string_view activation,
                                            double negative_slope) {
  const Activation act = parse_activation(activation);
  check_batch_norm_apply(x, residual, weight, bias, mean, invstd);
  check_dtype("batch_norm", x);
  const DeviceCall call(x);
  const MemoryLayout layout(x);
  const BatchNormShape shape = shape_of(x);
  const Tensor input = dense(layout, x);
  const Affine affine(mean, invstd, weight, bias);
  const ApplyCall apply(shape, layout, input, residual, affine, act, negative_slope);
  apply.run(shape, call.stream);
  return {apply.y, apply.mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double momentum, double eps,
    std::string_view activation, double negative_slope) {
  const Activation act = parse_activation(activation);
  check_batch_norm_forward(x, residual, weight, bias, running_mean, running_var, training, momentum,
                           eps);
  check_dtype("batch_norm", x);
  const DeviceCall call(x);
  const MemoryLayout layout(x);
  const BatchNormShape shape = shape_of(x);
  const Tensor input = dense(layout, x);
  const std::optional<BatchNormSlabs> slabs = training ? slabs_for(shape, 1) : std::nullopt;
  if (!slabs) {
    const auto [mean, invstd] = batch_norm_mean_invstd(input, running_mean, running_var, training,
                                                       momentum, eps, call.stream);
    const Affine affine(mean, invstd, weight, bias);
    const ApplyCall apply(shape, layout, input, residual, affine, act, negative_slope);
    apply.run(shape, call.stream);
    return {apply.y, mean, invstd, apply.mask};
  }
  const Tensor mean = empty_vector(x, shape.channels), invstd = empty_vector(x, shape.channels);
  const Affine affine(mean, invstd, weight, bias);
  const ApplyCall apply(shape, layout, input, residual, affine, act, negative_slope);
  const Tensor workspace = empty_vector(x, batch_norm_slab_workspace(shape, *slabs));
  launch_batch_norm_slab_forward(
      shape, *slabs, statistics_of(mean, invstd, running_mean, running_var, momentum, eps),
      apply.args, workspace.mutable_data_ptr<float>(), call.stream);
  return {apply.y, mean, invstd, apply.mask};
}

// ---- backward ----------------------------------------------------------------------------------

// The arguments of a backward call as its kernels take them.
struct BackwardCall {
  BackwardCall(const Tensor& grad_y_, const Tensor& x_, const OptionalTensor& residual_,
               const OptionalTensor& mask_, const OptionalTensor& weight,
               const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd,
               Activation activation, double negative_slope)
      : device(x_),
        layout(x_),
        shape(shape_of(x_)),
        x(dense(layout, x_)),
        grad_y(dense(layout, grad_y_)),
        affine(mean, invstd, weight, bias) {
    args.affine = affine.args;
    args.activation = activation;
    args.negative_slope = static_cast<float>(negative_slope);
    args.x = x.const_data_ptr();
    args.grad_y = grad_y.const_data_ptr();
    if (mask_ && mask_->numel() > 0) {
      mask = mask_->contiguous();
      args.mask = mask.const_data_ptr<uint8_t>();
    } else if (residual_ && is_smooth(activation)) {
      residual = dense(layout, *residual_);
      args.residual = residual.const_data_ptr();
    }
  }

  void reduce(const BatchNormSums& out) const {
    const Tensor workspace = workspace_for(x, shape);
    launch_batch_norm_backward_reduce(shape, args, workspace.mutable_data_ptr<float>(), out,
                                      device.stream);
  }

  std::tuple<Tensor, Tensor> apply(const Tensor& sum_grad, const Tensor& sum_grad_xhat,
                                   double factor, bool need_grad_x, bool need_grad_residual) const {
    const Gradients grads(*this, need_grad_x, need_grad_residual);
    if (shape.numel() == 0 || (!need_grad_x && !need_grad_residual)) return grads.tensors();
    const BatchNormGradientOut out = grads.args(
        sum_grad.defined() ? sum_grad.const_data_ptr<float>() : nullptr,
        sum_grad_xhat.defined() ? sum_grad_xhat.const_data_ptr<float>() : nullptr, factor);
    launch_batch_norm_backward_apply(shape, args, out, second_read(), device.stream);
    return grads.tensors();
  }

  // How many tensors the two passes read.
  int tensors() const { return args.residual ? 3 : 2; }

  // reduce and apply with a single read.
  std::tuple<Tensor, Tensor> at_once(const BatchNormSlabs& slabs, const BatchNormSums& sums,
                                     bool training, double factor, bool need_grad_x,
                                     bool need_grad_residual) const {
    const Gradients grads(*this, need_grad_x, need_grad_residual);
    const Tensor workspace = empty_vector(x, batch_norm_slab_workspace(shape, slabs));
    const BatchNormGradientOut out = grads.args(training ? sums.sum_grad : nullptr,
                                                training ? sums.sum_grad_xhat : nullptr, factor);
    launch_batch_norm_slab_backward(shape, slabs, args, sums, out,
                                    workspace.mutable_data_ptr<float>(), device.stream);
    return grads.tensors();
  }

  // grad_x and grad_residual, empty where they are not wanted.
  struct Gradients {
    Gradients(const BackwardCall& call, bool need_x, bool need_residual) {
      const Tensor none = empty_vector(call.x, 0, call.x.scalar_type());
      x = need_x ? call.layout.empty(call.x) : none;
      residual = need_residual ? call.layout.empty(call.x) : none;
    }
    std::tuple<Tensor, Tensor> tensors() const { return {x, residual}; }
    BatchNormGradientOut args(const float* sum_grad, const float* sum_grad_xhat,
                              double factor) const {
      const auto data = [](const Tensor& t) {
        return t.numel() > 0 ? t.mutable_data_ptr() : nullptr;
      };
      return {sum_grad, sum_grad_xhat, static_cast<float>(factor), data(x), data(residual)};
    }
    Tensor x, residual;
  };

  DeviceCall device;
  MemoryLayout layout;
  BatchNormShape shape;
  Tensor x, grad_y, mask, residual;
  Affine affine;
  BatchNormGradient args{};
};

void check_backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
                    const OptionalTensor& mask, const OptionalTensor& weight,
                    const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd,
                    Activation activation) {
  check_input("batch_norm", x);
  check_batch_norm_backward(grad_y, x, residual, mask, shape_of(x).mask_bytes(), weight, bias, mean,
                            invstd, activation);
  check_dtype("batch_norm", x);
}

std::tuple<Tensor, Tensor> batch_norm_backward_reduce(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, std::string_view activation, double negative_slope) {
  const Activation act = parse_activation(activation);
  check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, act);
  const BackwardCall call(grad_y, x, residual, mask, weight, bias, mean, invstd, act,
                          negative_slope);
  Tensor sum_grad = empty_vector(x, x.size(1)), sum_grad_xhat = empty_vector(x, x.size(1));
  call.reduce({sum_grad.mutable_data_ptr<float>(), sum_grad_xhat.mutable_data_ptr<float>(), nullptr,
               nullptr});
  return {sum_grad, sum_grad_xhat};
}

std::tuple<Tensor, Tensor> batch_norm_backward_apply(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, const OptionalTensor& mean_grad,
    const OptionalTensor& mean_grad_xhat, std::string_view activation, double negative_slope,
    bool need_grad_x, bool need_grad_residual) {
  const Activation act = parse_activation(activation);
  check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, act);
  TORCH_CHECK_VALUE(mean_grad.has_value() == mean_grad_xhat.has_value(),
                    "mean_grad and mean_grad_xhat must either both be None or neither be None");
  Tensor grad, grad_xhat;
  if (mean_grad) {
    check_statistic("mean_grad", *mean_grad, x);
    check_statistic("mean_grad_xhat", *mean_grad_xhat, x);
    grad = mean_grad->contiguous();
    grad_xhat = mean_grad_xhat->contiguous();
  }
  const BackwardCall call(grad_y, x, residual, mask, weight, bias, mean, invstd, act,
                          negative_slope);
  return call.apply(grad, grad_xhat, 1, need_grad_x, need_grad_residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, std::string_view activation,
    double negative_slope, std::array<bool, 4> output_mask) {
  const Activation act = parse_activation(activation);
  check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, act);
  const BackwardCall call(grad_y, x, residual, mask, weight, bias, mean, invstd, act,
                          negative_slope);
  const auto [need_x, need_residual, need_weight, need_bias] = output_mask;
  ParameterGradients grads(x, weight, bias, need_weight, need_bias, need_x && training);
  const double factor = 1.0 / static_cast<double>(std::max<int64_t>(call.shape.count(), 1));
  const Tensor sum_grad = training ? grads.sum_grad() : Tensor(),
               sum_grad_xhat = training ? grads.sum_grad_xhat() : Tensor();
  if (grads.needed() && (need_x || need_residual) && slab_backward_takes(act)) {
    if (const auto slabs = slabs_for(call.shape, call.tensors())) {
      auto [grad_x, grad_residual] =
          call.at_once(*slabs, grads.sums(), training, factor, need_x, need_residual);
      return {grad_x, grad_residual, grads.grad_weight(), grads.grad_bias()};
    }
  }
  if (grads.needed()) call.reduce(grads.sums());
  auto [grad_x, grad_residual] = call.apply(sum_grad, sum_grad_xhat, factor, need_x, need_residual);
  return {grad_x, grad_residual, grads.grad_weight(), grads.grad_bias()};
}

}  // namespace
}  // namespace resops::cuda

TORCH_LIBRARY_IMPL(resops, RESOPS_CUDA_KEY, m) {
  m.impl("batch_norm_statistics", &resops::cuda::batch_norm_statistics);
  m.impl("batch_norm_apply", &resops::cuda::batch_norm_apply);
  m.impl("batch_norm_forward", &resops::cuda::batch_norm_forward);
  m.impl("batch_norm_backward_reduce", &resops::cuda::batch_norm_backward_reduce);
  m.impl("batch_norm_backward_apply", &resops::cuda::batch_norm_backward_apply);
  m.impl("batch_norm_backward", &resops::cuda::batch_norm_backward);
}
