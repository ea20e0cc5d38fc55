// conv_bn_act of CUDA tensors: checks arguments, allocates outputs and workspaces, calls the
// launcher of the forward convolution. The backward convolutions are cuDNN's: they have no kernel
// here.

#include "../conv_bn_act.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../../common/tensor_checks.h"
#include "../../conv_bn_act.h"
#include "device_call.h"

namespace resops::cuda {
namespace {

using at::Tensor;

// What the kernel does not do. resops/ops/conv_bn_act_phases.py tells the same beforehand.
void check_supported(const Tensor& x, at::IntArrayRef weight, bool prologue) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_half(x.scalar_type()), "\"conv_bn_act\" not implemented for '",
                              c10::toString(x.scalar_type()),
                              "' by the CUDA kernels, which take float16 and bfloat16");
  TORCH_CHECK_NOT_IMPLEMENTED(x.dim() == 4, "\"conv_bn_act\" not implemented for ", x.dim() - 2,
                              " spatial dimensions by the CUDA kernels, which take 2");
  TORCH_CHECK_NOT_IMPLEMENTED(
      weight[0] < kConvReach && c10::multiply_integers(weight) < std::numeric_limits<int>::max(),
      "conv_weight of size ", weight, " is too large for the CUDA kernels");
  TORCH_CHECK_NOT_IMPLEMENTED(!prologue || weight[1] <= kMostPrologueChannels,
                              "the CUDA kernels take a prologue of at most ", kMostPrologueChannels,
                              " channels, but got ", weight[1]);
}

ConvAxis axis_of(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding,
                 int64_t dilation) {
  TORCH_CHECK_NOT_IMPLEMENTED(size + 2 * padding < kConvReach, "an image of ", size,
                              " pixels with ", padding,
                              " of padding is too large for the CUDA kernels");
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  return {narrow(size),   narrow(out_size), narrow(kernel),
          narrow(stride), narrow(padding),  narrow(dilation)};
}

// The values of (N, C, H, W), stored as (N, H, W, C).
Tensor channels_last(const Tensor& t) { return aligned(t.movedim(1, -1).contiguous()); }

// The distance of neighbouring pixels where these are rows of channels, as in a channels-last
// tensor or in some channels of a wider one; else 0.
int64_t pitch_of(const Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) return 0;
  int64_t pitch = 0, pixels = 1;
  for (const int64_t d : {3, 2, 0}) {
    if (x.size(d) <= 1) continue;
    if (pitch == 0) pitch = x.stride(d);
    if (x.stride(d) != pitch * pixels) return 0;
    pixels *= x.size(d);
  }
  if (pitch == 0) return x.size(1);  // of one pixel
  return pitch >= x.size(1) ? pitch : 0;
}

std::tuple<Tensor, Tensor, Tensor> conv_bn_act_forward(
    at::TensorList inputs, const OptionalTensor& scale, const OptionalTensor& shift,
    std::string_view prologue, double prologue_slope, const Tensor& conv_weight,
    const OptionalTensor& conv_bias, const OptionalTensor& residual, std::string_view activation,
    double negative_slope, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool statistics) {
  const Activation before = parse_activation(prologue), after = parse_activation(activation);
  const at::DimVector size =
      check_conv_bn_act_forward(inputs, {scale, shift, before}, conv_weight, conv_bias, residual,
                                after, {stride, padding, dilation}, statistics);
  check_supported(inputs[0], conv_weight.sizes(), scale.has_value());
  const DeviceCall device(inputs[0]);
  const auto vector = [&](const OptionalTensor& t) {
    return t ? aligned(t->contiguous()) : Tensor();
  };

  Tensor x = inputs.size() == 1 ? inputs[0] : at::cat(inputs, 1);
  int64_t pitch = pitch_of(x);
  if (pitch == 0) {
    x = channels_last(x).movedim(-1, 1);
    pitch = x.size(1);
  }
  const Tensor weight = channels_last(conv_weight), bias = vector(conv_bias);
  const Tensor dense_scale = vector(scale), dense_shift = vector(shift);
  const Tensor dense_residual = residual ? channels_last(*residual) : Tensor();
  const auto axis = [&](int64_t d) {
    return axis_of(x.size(d + 2), size[d + 2], conv_weight.size(d + 2), stride[d], padding[d],
                   dilation[d]);
  };
  ConvBnActForward call{};
  call.shape = {kernel_dtype(x),
                x.size(0),
                static_cast<int>(x.size(1)),
                static_cast<int>(size[1]),
                axis(0),
                axis(1),
                pitch,
                static_cast<int>(weight.numel() / size[1])};
  Tensor y = empty_channels_last(size, plain(x, x.scalar_type()));
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.y = y.mutable_data_ptr();
  if (scale) {
    call.scale = dense_scale.const_data_ptr<float>();
    call.shift = dense_shift.const_data_ptr<float>();
  }
  call.prologue = before;
  call.prologue_slope = static_cast<float>(prologue_slope);
  if (conv_bias) call.bias = {bias.const_data_ptr(), bias.scalar_type() == at::kFloat};
  if (residual) call.residual = dense_residual.const_data_ptr();
  call.activation = after;
  call.negative_slope = static_cast<float>(negative_slope);

  const auto floats = [&](int64_t count) { return at::empty({count}, plain(x, at::kFloat)); };
  Tensor mean = floats(statistics ? size[1] : 0), var = floats(statistics ? size[1] : 0);
  const Tensor workspace = floats(statistics ? conv_bn_act_workspace(call) : 0);
  launch_conv_bn_act_forward(call, workspace.mutable_data_ptr<float>(),
                             statistics ? mean.mutable_data_ptr<float>() : nullptr,
                             statistics ? var.mutable_data_ptr<float>() : nullptr, device.stream);
  return {y, mean, var};
}

}  // namespace
}  // namespace resops::cuda

TORCH_LIBRARY_IMPL(resops, RESOPS_CUDA_KEY, m) {
  m.impl("conv_bn_act_forward", &resops::cuda::conv_bn_act_forward);
}
