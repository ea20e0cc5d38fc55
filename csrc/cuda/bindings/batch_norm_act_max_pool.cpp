// batch_norm_act_max_pool of CUDA tensors: checks arguments, allocates outputs and workspaces,
// calls the launchers.

#include "../batch_norm_act_max_pool.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>

#include "../../batch_norm_act_max_pool.h"
#include "../../common/tensor_checks.h"
#include "batch_norm_call.h"

namespace resops::cuda {
namespace {

using at::Tensor;

PoolShape pool_shape(const Tensor& x, const PoolWindows& windows) {
  PoolShape shape{};
  shape.dtype = kernel_dtype(x);
  shape.samples = x.size(0);
  shape.channels = x.size(1);
  shape.channels_last = !MemoryLayout(x).is_contiguous();
  const auto small = [&](int64_t size) {
    TORCH_CHECK_NOT_IMPLEMENTED(size < std::numeric_limits<int>::max() / 2,
                                "batch_norm_act_max_pool does not take images of size ",
                                x.sizes().slice(2), " on CUDA");
    return static_cast<int>(size);
  };
  shape.height = small(x.size(2));
  shape.width = small(x.size(3));
  shape.out_height = small(windows.output_size(x.size(2), 0));
  shape.out_width = small(windows.output_size(x.size(3), 1));
  for (int d = 0; d < 2; ++d) {
    shape.kernel[d] = static_cast<int>(windows.kernel[d]);
    shape.padding[d] = static_cast<int>(windows.padding[d]);
    // A longer stride than the image leaves one window too.
    shape.stride[d] = static_cast<int>(
        std::min(windows.stride[d], x.size(2 + d) + windows.padding[d] + windows.kernel[d]));
  }
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_max_pool_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
    double momentum, double eps, std::string_view activation, double negative_slope,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding) {
  const Activation act = parse_activation(activation);
  const PoolWindows windows = check_pooling(x, kernel_size, stride, padding);
  check_batch_norm_forward(x, std::nullopt, weight, bias, running_mean, running_var, training,
                           momentum, eps);
  check_dtype("batch_norm_act_max_pool", x);
  const PoolShape shape = pool_shape(x, windows);
  const DeviceCall device(x);
  const Tensor input = dense(MemoryLayout(x), x);
  const auto [mean, invstd] = batch_norm_mean_invstd(input, running_mean, running_var, training,
                                                     momentum, eps, device.stream);
  Tensor y = empty_pooled(x, windows, x.scalar_type());
  Tensor index = empty_pooled(x, windows, at::kByte);
  const Affine affine(mean, invstd, weight, bias);
  launch_batch_norm_act_max_pool_forward(
      shape,
      {affine.args, act, static_cast<float>(negative_slope), input.const_data_ptr(),
       y.mutable_data_ptr(), index.mutable_data_ptr<uint8_t>()},
      device.stream);
  return {y, mean, invstd, index};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_max_pool_backward(
    const Tensor& grad_y_, const Tensor& x_, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd, const Tensor& index_,
    bool training, std::string_view activation, double negative_slope, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, std::array<bool, 3> output_mask) {
  const Activation act = parse_activation(activation);
  const PoolWindows windows = check_pooling(x_, kernel_size, stride, padding);
  check_batch_norm_act_max_pool_backward(grad_y_, x_, weight, bias, mean, invstd, index_, windows);
  check_dtype("batch_norm_act_max_pool", x_);
  const PoolShape shape = pool_shape(x_, windows);
  const DeviceCall device(x_);
  const MemoryLayout layout(x_);
  const Tensor x = dense(layout, x_), grad_y = dense(layout, grad_y_),
               index = dense(layout, index_);
  const Affine affine(mean, invstd, weight, bias);
  const PoolGradient call{affine.args,
                          act,
                          static_cast<float>(negative_slope),
                          x.const_data_ptr(),
                          grad_y.const_data_ptr(),
                          index.const_data_ptr<uint8_t>()};

  const auto [need_x, need_weight, need_bias] = output_mask;
  ParameterGradients grads(x, weight, bias, need_weight, need_bias, need_x && training);
  if (grads.needed()) {
    const Tensor workspace = empty_vector(x, batch_norm_act_max_pool_workspace(shape));
    launch_batch_norm_act_max_pool_backward_reduce(shape, call, workspace.mutable_data_ptr<float>(),
                                                   grads.sums(), device.stream);
  }
  Tensor grad_x = need_x ? layout.empty(x) : empty_vector(x, 0, x.scalar_type());
  if (need_x) {
    const int64_t count = x.numel() / std::max<int64_t>(x.size(1), 1);
    const float factor = 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
    const BatchNormSums sums = training ? grads.sums() : BatchNormSums{};
    launch_batch_norm_act_max_pool_backward_apply(
        shape, call,
        {sums.sum_grad, sums.sum_grad_xhat, factor, grad_x.mutable_data_ptr(), nullptr},
        device.stream);
  }
  return {grad_x, grads.grad_weight(), grads.grad_bias()};
}

}  // namespace
}  // namespace resops::cuda

TORCH_LIBRARY_IMPL(resops, RESOPS_CUDA_KEY, m) {
  m.impl("batch_norm_act_max_pool_forward", &resops::cuda::batch_norm_act_max_pool_forward);
  m.impl("batch_norm_act_max_pool_backward", &resops::cuda::batch_norm_act_max_pool_backward);
}
