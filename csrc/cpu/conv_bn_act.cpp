// The phases of a convolution on the CPU: for each call the fastest of our own kernels and torch's
// library. What a library's convolution does not do, prologue, epilogue and sums, is done before
// and after it, by the batch_norm op where that has it.

#include "../conv_bn_act.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/mkldnn_convolution.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "../autograd/operator.h"
#include "../common/memory_layout.h"
#include "../common/tensor_checks.h"
#include "conv_path.h"
#include "winograd_convolution.h"

namespace resops {
namespace {

using at::Tensor;

Tensor wide(const Tensor& t) { return is_half(t.scalar_type()) ? t.to(at::kFloat) : t; }

Tensor in_channels_last(const Tensor& t) {
  if (t.dim() == 4) return t.contiguous(at::MemoryFormat::ChannelsLast);
  if (t.dim() == 5) return t.contiguous(at::MemoryFormat::ChannelsLast3d);
  return t.movedim(1, -1).contiguous().movedim(-1, 1);
}

Tensor like_channel(const Tensor& t, const Tensor& x) {
  at::DimVector size(x.dim(), 1);
  size[1] = t.numel();
  return t.view(size);
}

ConvCall conv_call(ConvDirection direction, at::ScalarType dtype, at::IntArrayRef input_size,
                   at::IntArrayRef output_size, at::IntArrayRef weight_size,
                   const ConvGeometry& geometry) {
  return {direction,   dtype,           input_size,       output_size,
          weight_size, geometry.stride, geometry.padding, geometry.dilation};
}

// ---- by torch's library -------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& x) {
  static const auto op =
      find_operator<std::tuple<Tensor, Tensor>(const Tensor&)>("resops::batch_norm_statistics");
  return op.call(x);
}

std::tuple<Tensor, Tensor> gradient_sums(const Tensor& g, const Tensor& x, const Tensor& mean,
                                         const Tensor& invstd) {
  static const auto op = find_operator<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, std::string_view,
      double)>("resops::batch_norm_backward_reduce");
  return op.call(g, x, {}, {}, {}, {}, mean, invstd, "identity", 0.0);
}

Tensor activated(const Tensor& t, Activation activation, double negative_slope) {
  switch (activation) {
    case Activation::relu:
      return at::relu(t);
    case Activation::leaky_relu:
      return at::leaky_relu(t, negative_slope);
    case Activation::silu:
      return at::silu(t);
    case Activation::gelu:
      return at::gelu(t);
    default:
      return t;
  }
}

Tensor activation_backward(const Tensor& g, const Tensor& z, Activation activation,
                           double negative_slope) {
  switch (activation) {
    case Activation::relu:
      return at::threshold_backward(g, z, 0);
    case Activation::leaky_relu:
      return at::leaky_relu_backward(g, z, negative_slope, false);
    case Activation::silu:
      return at::silu_backward(g, z);
    case Activation::gelu:
      return at::gelu_backward(g, z);
    default:
      return g;
  }
}

// act( scale * x + shift ), rounded to the dtype of x.
Tensor normalised(at::TensorList inputs, const ChannelPrologue& prologue, std::string_view name) {
  const Tensor x = inputs.size() == 1 ? inputs[0] : at::cat(inputs, 1);
  if (!prologue.scale) return x;
  using Apply = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, const OptionalTensor&,
                                           const Tensor&, const Tensor&, std::string_view, double);
  static const auto op = find_operator<Apply>("resops::batch_norm_apply");
  const Tensor zero = at::zeros_like(*prologue.scale), one = at::ones_like(*prologue.scale);
  return std::get<0>(
      op.call(x, {}, prologue.scale, prologue.shift, zero, one, name, prologue.negative_slope));
}

// The values of a dense channels-last image as rows of channels, every `stride` positions.
Tensor rows(const Tensor& t, at::IntArrayRef stride) {
  Tensor picked = t;
  for (int64_t d = 0; d < 2; ++d) {
    if (stride[d] > 1) picked = picked.slice(d + 2, 0, std::nullopt, stride[d]);
  }
  return picked.permute({0, 2, 3, 1}).reshape({-1, t.size(1)});
}
Tensor as_matrix(const Tensor& weight) { return weight.reshape({weight.size(0), weight.size(1)}); }

constexpr std::array<int64_t, 2> kEveryPosition{1, 1};

Tensor library_convolution(ConvAlgorithm algorithm, const Tensor& x, const Tensor& weight,
                           const OptionalTensor& bias, at::IntArrayRef size,
                           const ConvGeometry& geometry) {
  if (algorithm == ConvAlgorithm::matrix_product) {
    const Tensor y = empty_channels_last(size, x.options());
    Tensor out = rows(y, kEveryPosition);
    at::mm_out(out, rows(x, geometry.stride), as_matrix(weight).t());
    if (bias) out.add_(*bias);
    return y;
  }
  if (algorithm == ConvAlgorithm::onednn) {
    return at::mkldnn_convolution(x, weight, bias, geometry.padding, geometry.stride,
                                  geometry.dilation, 1);
  }
  const std::vector<int64_t> no_output_padding(geometry.stride.size(), 0);
  return at::convolution(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation,
                         false, no_output_padding, 1);
}

Tensor matrix_backward_data(const Tensor& grad_y, const Tensor& weight, at::IntArrayRef input_size,
                            at::IntArrayRef stride) {
  const Tensor g = empty_channels_last(input_size, grad_y.options());
  const Tensor grad_rows = rows(grad_y, kEveryPosition);
  if (stride[0] == 1 && stride[1] == 1) {
    Tensor out = rows(g, stride);
    at::mm_out(out, grad_rows, as_matrix(weight));
    return g;
  }
  const Tensor out = at::mm(grad_rows, as_matrix(weight));
  const at::DimVector picked{grad_y.size(0), grad_y.size(2), grad_y.size(3), weight.size(1)};
  g.zero_();
  g.slice(2, 0, std::nullopt, stride[0])
      .slice(3, 0, std::nullopt, stride[1])
      .copy_(out.view(picked).permute({0, 3, 1, 2}));
  return g;
}

// The gradient of the input of a 1x1 convolution of stride 1 is the convolution by the transposed
// weight.
Tensor onednn_backward_data(const Tensor& grad_y, const Tensor& weight,
                            const ConvGeometry& geometry) {
  const Tensor transposed = in_channels_last(weight.transpose(0, 1));
  return at::mkldnn_convolution(grad_y, transposed, std::nullopt, geometry.padding, geometry.stride,
                                geometry.dilation, 1);
}

void matrix_backward_weight(ConvAlgorithm algorithm, const Tensor& grad_y, const Tensor& x,
                            at::IntArrayRef stride, const Tensor& grad_weight) {
  Tensor out = as_matrix(grad_weight);
  const Tensor grad_rows = rows(grad_y, kEveryPosition), x_rows = rows(x, stride);
  if (algorithm == ConvAlgorithm::transposed_product) {
    out.copy_(at::mm(x_rows.t(), grad_rows).t());
  } else {
    at::mm_out(out, grad_rows.t(), x_rows);
  }
}

Tensor library_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                        const ConvGeometry& geometry, bool of_weight) {
  const std::vector<int64_t> no_output_padding(geometry.stride.size(), 0);
  const auto grads = at::convolution_backward(grad_y, x, weight, std::nullopt, geometry.stride,
                                              geometry.padding, geometry.dilation, false,
                                              no_output_padding, 1, {!of_weight, of_weight, false});
  return of_weight ? std::get<1>(grads) : std::get<0>(grads);
}

// ---- the phases ---------------------------------------------------------------------------

// No phase is differentiable, whatever its inputs require: the library's convolutions inside are
// called below autograd.

std::tuple<Tensor, Tensor, Tensor> conv_bn_act_forward(
    at::TensorList inputs, const OptionalTensor& scale, const OptionalTensor& shift,
    std::string_view prologue, double prologue_slope, const Tensor& conv_weight,
    const OptionalTensor& conv_bias, const OptionalTensor& residual, std::string_view activation,
    double negative_slope, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool statistics) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Activation before = parse_activation(prologue), act = parse_activation(activation);
  const ConvGeometry geometry{stride, padding, dilation};
  const auto size = check_conv_bn_act_forward(inputs, {scale, shift, before}, conv_weight,
                                              conv_bias, residual, act, geometry, statistics);
  const Tensor& x = inputs[0];
  const ChannelPrologue on_load{scale, shift, before, prologue_slope};
  const auto none = [&] { return at::empty({0}, x.options().dtype(statistic_dtype(x))); };

  at::DimVector input_size(x.sizes());
  input_size[1] = conv_weight.size(1);
  const ConvPath path = conv_path(conv_call(ConvDirection::forward, x.scalar_type(), input_size,
                                            size, conv_weight.sizes(), geometry));
  if (path.algorithm == ConvAlgorithm::winograd) {
    const Tensor y = empty_channels_last(size, x.options());
    ConvolutionEpilogue epilogue;
    epilogue.bias = conv_bias;
    epilogue.addend = residual;
    epilogue.activation = act;
    epilogue.negative_slope = negative_slope;
    epilogue.statistics = statistics;
    auto [mean, var] =
        winograd_forward(inputs, on_load, conv_weight, false, padding, epilogue, nullptr, y);
    return {y, mean, var};
  }

  const bool wide_bias = conv_bias && conv_bias->scalar_type() != x.scalar_type();
  const Tensor dense = in_channels_last(normalised(inputs, on_load, prologue));
  Tensor y = library_convolution(path.algorithm, dense, conv_weight,
                                 wide_bias ? std::nullopt : conv_bias, size, geometry);
  if (wide_bias || residual || act != Activation::identity) {
    Tensor c = wide(y);
    if (wide_bias) c = at::add(c, like_channel(*conv_bias, c));
    if (residual) c = at::add(c, *residual);
    y = activated(c, act, negative_slope).to(x.scalar_type());
  }
  y = in_channels_last(y);
  if (!statistics) return {y, none(), none()};
  auto [mean, var] = batch_norm_statistics(y);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> conv_bn_act_backward_data(
    const Tensor& grad_y, const Tensor& conv_weight, at::IntArrayRef input_size,
    const OptionalTensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
    std::string_view prologue, double prologue_slope, const OptionalTensor& mean,
    const OptionalTensor& invstd, const OptionalTensor& addend, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Activation before = parse_activation(prologue);
  const ConvGeometry geometry{stride, padding, dilation};
  check_conv_bn_act_backward_data(grad_y, conv_weight, input_size, x, {scale, shift, before}, mean,
                                  invstd, addend, geometry);
  const auto none = [&] { return at::empty({0}, grad_y.options().dtype(statistic_dtype(grad_y))); };
  const ConvPath path =
      conv_path(conv_call(ConvDirection::backward_data, grad_y.scalar_type(), input_size,
                          grad_y.sizes(), conv_weight.sizes(), geometry));
  if (path.algorithm == ConvAlgorithm::winograd) {
    const Tensor g = empty_channels_last(input_size, grad_y.options());
    ConvolutionEpilogue epilogue;
    epilogue.addend = addend;
    epilogue.derivative = {scale, shift, before, prologue_slope};
    epilogue.argument = x;
    epilogue.mean = mean;
    epilogue.invstd = invstd;
    const std::array<int64_t, 2> turned_padding{2 - padding[0], 2 - padding[1]};
    auto [sum_g, sum_g_xhat] =
        winograd_forward({&grad_y, 1}, {}, conv_weight, true, turned_padding, epilogue, nullptr, g);
    return {g, sum_g, sum_g_xhat};
  }

  const Tensor grad = in_channels_last(grad_y);
  Tensor g;
  if (path.algorithm == ConvAlgorithm::matrix_product) {
    g = matrix_backward_data(grad, conv_weight, input_size, stride);
  } else if (path.algorithm == ConvAlgorithm::onednn) {
    g = onednn_backward_data(grad, conv_weight, geometry);
  } else {
    // Only the size of the convolution's input is asked for.
    const Tensor input = x ? *x : empty_channels_last(input_size, grad_y.options());
    g = library_backward(grad, input, conv_weight, geometry, false);
  }
  const bool derivative = scale && before != Activation::identity;
  if (addend || derivative) {
    Tensor sum = wide(g);
    if (addend) sum = at::add(sum, *addend);
    if (derivative) {
      const Tensor scaled = at::mul(wide(*x), like_channel(*scale, *x));
      const Tensor z = at::add(scaled, like_channel(*shift, *x));
      sum = activation_backward(sum, z, before, prologue_slope);
    }
    g = sum.to(grad_y.scalar_type());
  }
  g = in_channels_last(g);
  if (!mean) return {g, none(), none()};
  auto [sum_g, sum_g_xhat] = gradient_sums(g, *x, *mean, *invstd);
  return {g, sum_g, sum_g_xhat};
}

Tensor conv_bn_act_backward_weight(const Tensor& grad_y, at::TensorList inputs,
                                   const OptionalTensor& scale, const OptionalTensor& shift,
                                   std::string_view prologue, double prologue_slope,
                                   at::IntArrayRef weight_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Activation before = parse_activation(prologue);
  const ConvGeometry geometry{stride, padding, dilation};
  check_conv_bn_act_backward_weight(grad_y, inputs, {scale, shift, before}, weight_size, geometry);
  const ChannelPrologue on_load{scale, shift, before, prologue_slope};
  at::DimVector input_size(inputs[0].sizes());
  input_size[1] = weight_size[1];
  const ConvPath path = conv_path(conv_call(ConvDirection::backward_weight, grad_y.scalar_type(),
                                            input_size, grad_y.sizes(), weight_size, geometry));
  Tensor grad_weight = empty_channels_last(weight_size, grad_y.options());
  if (path.algorithm == ConvAlgorithm::winograd) {
    winograd_backward_weight(grad_y, inputs, on_load, padding, grad_weight);
    return grad_weight;
  }
  const Tensor x = in_channels_last(normalised(inputs, on_load, prologue));
  const Tensor grad = in_channels_last(grad_y);
  if (path.algorithm == ConvAlgorithm::matrix_product ||
      path.algorithm == ConvAlgorithm::transposed_product) {
    matrix_backward_weight(path.algorithm, grad, x, stride, grad_weight);
    return grad_weight;
  }
  return in_channels_last(library_backward(grad, x, grad_weight, geometry, true));
}

// act( conv(x) + bias [+ residual] ) with a weight that winograd_weight has transformed; one of
// another instruction set is not used.
Tensor conv_bn_act_folded(const Tensor& x, const Tensor& conv_weight, const Tensor& at_points,
                          const Tensor& conv_bias, const OptionalTensor& residual,
                          std::string_view activation, double negative_slope,
                          at::IntArrayRef padding) {
  const Activation act = parse_activation(activation);
  const std::array<int64_t, 2> ones{1, 1};
  const ConvGeometry geometry{ones, padding, ones};
  const OptionalTensor none;
  const auto size =
      check_conv_bn_act_forward({&x, 1}, {none, none, Activation::identity}, conv_weight, conv_bias,
                                residual, act, geometry, false);
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && conv_weight.dim() == 4 &&
                  conv_weight.size(2) == 3 && conv_weight.size(3) == 3 && padding[0] <= 2 &&
                  padding[1] <= 2,
              "conv_bn_act_folded expects float32 on the CPU, a 3x3 kernel and a padding up to 2");
  Tensor y = empty_channels_last(size, x.options());
  if (y.numel() == 0) return y;
  ConvolutionEpilogue epilogue;
  epilogue.bias = conv_bias;
  epilogue.addend = residual;
  epilogue.activation = act;
  epilogue.negative_slope = negative_slope;
  const bool usable =
      is_transformed_weight(at_points, conv_weight.sizes(), winograd_tile(size[2], size[3]));
  winograd_forward({&x, 1}, {}, conv_weight, false, padding, epilogue,
                   usable ? &at_points : nullptr, y);
  return y;
}

}  // namespace

Tensor winograd_weight(const Tensor& weight, int64_t out_height, int64_t out_width) {
  TORCH_CHECK(weight.device().is_cpu() && weight.scalar_type() == at::kFloat && weight.dim() == 4 &&
                  weight.size(2) == 3 && weight.size(3) == 3,
              "weight should be a float32 tensor of size (C, C_in, 3, 3) on the CPU");
  return winograd_transform_weight(weight, false, winograd_tile(out_height, out_width));
}

}  // namespace resops

TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def(
      "conv_bn_act_folded(Tensor x, Tensor conv_weight, Tensor at_points, Tensor conv_bias, "
      "Tensor? residual, str activation, float negative_slope, SymInt[] padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(resops, CPU, m) {
  m.impl("conv_bn_act_folded", &resops::conv_bn_act_folded);
  m.impl("conv_bn_act_forward", &resops::conv_bn_act_forward);
  m.impl("conv_bn_act_backward_data", &resops::conv_bn_act_backward_data);
  m.impl("conv_bn_act_backward_weight", &resops::conv_bn_act_backward_weight);
}
