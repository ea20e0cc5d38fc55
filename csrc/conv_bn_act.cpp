// conv_bn_act: schemas and argument checks of the phases of a convolution. The kernels are
// registered per device; resops/reference/conv_bn_act.py defines what they compute, and
// resops/ops/conv_bn_act_phases.py has the sizes and strides of what they return.

#include "conv_bn_act.h"

#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <limits>
#include <string>

#include "common/tensor_checks.h"

namespace resops {
namespace {

// Of a kernel, a stride, a padding, a dilation: no product of two overflows.
constexpr int64_t kLargestSetting = std::numeric_limits<int32_t>::max();

void check_setting(const char* name, at::IntArrayRef values, int64_t dimensions, int64_t smallest) {
  TORCH_CHECK(static_cast<int64_t>(values.size()) == dimensions, "expected ", name,
              " to be a list of ", dimensions, " values to match the convolution dimensions, but ",
              "got ", name, "=", values);
  for (const int64_t value : values) {
    TORCH_CHECK(smallest <= value && value <= kLargestSetting, name, " should be at least ",
                smallest, " and at most ", kLargestSetting, ", but got ", name, "=", values);
  }
}

void check_input_size(const char* name, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(3 <= size.size() && size.size() <= 5,
                    "conv_bn_act expects an input of size (N, C_in, *spatial) with 1 to 3 spatial ",
                    "dimensions, but got ", name, " of size ", size);
  for (const int64_t n : size) {
    TORCH_CHECK(n >= 0, name, " should have no negative size, but got ", size);
  }
}

// `weight` may be a size that somebody typed in.
at::DimVector output_size(at::IntArrayRef input, const char* weight_name, at::IntArrayRef weight,
                          const ConvGeometry& geometry) {
  const auto dimensions = static_cast<int64_t>(input.size()) - 2;
  TORCH_CHECK(weight.size() == input.size(), weight_name, " should have size (C, C_in, *kernel) ",
              "with ", dimensions, " kernel dimensions for an input of size ", input, ", but got ",
              weight);
  for (const int64_t n : weight) {
    TORCH_CHECK(1 <= n && n <= kLargestSetting, weight_name,
                " should have sizes of at least 1 and ", "at most ", kLargestSetting, ", but got ",
                weight);
  }
  TORCH_CHECK(weight[1] == input[1], weight_name, " of size ", weight, " expects an input with ",
              weight[1], " channels, but got ", input[1], " channels");
  check_setting("stride", geometry.stride, dimensions, 1);
  check_setting("padding", geometry.padding, dimensions, 0);
  check_setting("dilation", geometry.dilation, dimensions, 1);
  at::DimVector size{input[0], weight[0]};
  for (int64_t d = 0; d < dimensions; ++d) {
    const int64_t padded = input[d + 2] + 2 * geometry.padding[d];
    const int64_t span = geometry.dilation[d] * (weight[d + 2] - 1) + 1;
    TORCH_CHECK(span <= padded, "Kernel size can't be greater than actual input size: in spatial ",
                "dimension ", d, " the padded input has ", padded, " and the kernel spans ", span);
    size.push_back((padded - span) / geometry.stride[d] + 1);
  }
  return size;
}

// The size of all inputs side by side.
at::DimVector check_inputs(at::TensorList inputs) {
  TORCH_CHECK_VALUE(!inputs.empty(), "inputs should have at least one tensor, but got none");
  const at::Tensor& first = inputs[0];
  at::DimVector size(first.sizes());
  check_input_size("inputs[0]", size);
  check_input("conv_bn_act", first);
  for (size_t i = 1; i < inputs.size(); ++i) {
    const std::string name = "inputs[" + std::to_string(i) + "]";
    const at::Tensor& x = inputs[i];
    check_device(name.c_str(), x, first);
    TORCH_CHECK(x.scalar_type() == first.scalar_type(), name, " should have the dtype ",
                first.scalar_type(), " of inputs[0], but got ", x.scalar_type());
    bool fits = x.dim() == first.dim();
    for (int64_t d = 0; fits && d < x.dim(); ++d) fits = d == 1 || x.size(d) == first.size(d);
    TORCH_CHECK(fits, name, " should have the size ", first.sizes(),
                " of inputs[0] but for the channels, but got ", x.sizes());
    size[1] += x.size(1);
  }
  return size;
}

void check_prologue(const ConvPrologue& prologue, int64_t channels, const at::Tensor& x) {
  TORCH_CHECK_VALUE(prologue.scale.has_value() == prologue.shift.has_value(),
                    "scale and shift must either both be None or neither be None");
  if (prologue.scale) {
    check_statistic("scale", *prologue.scale, channels, x);
    check_statistic("shift", *prologue.shift, channels, x);
  } else {
    TORCH_CHECK_VALUE(prologue.activation == Activation::identity,
                      "prologue should be 'identity' without scale and shift");
  }
}

void check_conv_weight(const at::Tensor& conv_weight, const at::Tensor& x) {
  check_device("conv_weight", conv_weight, x);
  TORCH_CHECK(conv_weight.scalar_type() == x.scalar_type(), "conv_weight should have the dtype ",
              x.scalar_type(), " of the input, but got ", conv_weight.scalar_type());
}

// A tensor of this size, with dtype and device of the input.
void check_sized(const char* name, const at::Tensor& t, at::IntArrayRef size, const at::Tensor& x) {
  check_device(name, t, x);
  TORCH_CHECK(t.sizes() == size, name, " should have the size ", size, ", but got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " should have the dtype ", x.scalar_type(),
              " of the input, got ", t.scalar_type());
}

}  // namespace

at::DimVector check_conv_bn_act_forward(at::TensorList inputs, const ConvPrologue& prologue,
                                        const at::Tensor& conv_weight,
                                        const OptionalTensor& conv_bias,
                                        const OptionalTensor& residual, Activation activation,
                                        const ConvGeometry& geometry, bool statistics) {
  const at::DimVector input_size = check_inputs(inputs);
  const at::Tensor& x = inputs[0];
  check_prologue(prologue, input_size[1], x);
  check_conv_weight(conv_weight, x);
  const auto size = output_size(input_size, "conv_weight", conv_weight.sizes(), geometry);
  if (conv_bias) {
    check_vector("conv_bias", *conv_bias, size[1], x);
    check_parameter_dtype("conv_bias", *conv_bias, x);
  }
  if (residual) check_sized("residual", *residual, size, x);
  TORCH_CHECK_VALUE(!statistics || !residual,
                    "statistics are those of the convolution: residual should be None");
  TORCH_CHECK_VALUE(!statistics || activation == Activation::identity,
                    "statistics are those of the convolution: activation should be 'identity'");
  return size;
}

void check_conv_bn_act_out(const at::Tensor& out, at::TensorList inputs, at::IntArrayRef size) {
  check_sized("out", out, size, inputs[0]);
  at::assert_no_internal_overlap(out);
  for (const at::Tensor& x : inputs) at::assert_no_overlap(out, x);
}

at::DimVector check_conv_bn_act_backward_data(
    const at::Tensor& grad_y, const at::Tensor& conv_weight, at::IntArrayRef input_size,
    const OptionalTensor& x, const ConvPrologue& prologue, const OptionalTensor& mean,
    const OptionalTensor& invstd, const OptionalTensor& addend, const ConvGeometry& geometry) {
  check_input_size("input_size", input_size);
  check_input("conv_bn_act", grad_y);
  check_conv_weight(conv_weight, grad_y);
  const auto size = output_size(input_size, "conv_weight", conv_weight.sizes(), geometry);
  check_sized("grad_y", grad_y, size, grad_y);
  if (x) check_sized("x", *x, input_size, grad_y);
  TORCH_CHECK_VALUE(x || !(prologue.scale || prologue.shift),
                    "x should be given beside scale and shift");
  check_prologue(prologue, input_size[1], grad_y);
  TORCH_CHECK_VALUE(mean.has_value() == invstd.has_value(),
                    "mean and invstd must either both be None or neither be None");
  if (mean) {
    TORCH_CHECK_VALUE(x, "x should be given beside mean and invstd");
    check_statistic("mean", *mean, input_size[1], grad_y);
    check_statistic("invstd", *invstd, input_size[1], grad_y);
  }
  if (addend) check_sized("addend", *addend, input_size, grad_y);
  return size;
}

at::DimVector check_conv_bn_act_backward_weight(const at::Tensor& grad_y, at::TensorList inputs,
                                                const ConvPrologue& prologue,
                                                at::IntArrayRef weight_size,
                                                const ConvGeometry& geometry) {
  const at::DimVector input_size = check_inputs(inputs);
  check_prologue(prologue, input_size[1], inputs[0]);
  const auto size = output_size(input_size, "weight_size", weight_size, geometry);
  check_sized("grad_y", grad_y, size, inputs[0]);
  return size;
}

}  // namespace resops

// y, g and grad_weight are channels-last, whatever the layout of the arguments. mean, var and the
// sums are empty where they are not asked for.
TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def(
      "conv_bn_act_forward(Tensor[] inputs, Tensor? scale, Tensor? shift, str prologue, "
      "float prologue_slope, Tensor conv_weight, Tensor? conv_bias, Tensor? residual, "
      "str activation, float negative_slope, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, bool statistics) -> (Tensor y, Tensor mean, Tensor var)");
  // The same with y written into `out`, such as some channels of a wider tensor.
  m.def(
      "conv_bn_act_forward_into(Tensor[] inputs, Tensor? scale, Tensor? shift, str prologue, "
      "float prologue_slope, Tensor conv_weight, Tensor? conv_bias, Tensor? residual, "
      "str activation, float negative_slope, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, bool statistics, Tensor(a!) out) -> (Tensor mean, Tensor var)");
  m.def(
      "conv_bn_act_backward_data(Tensor grad_y, Tensor conv_weight, SymInt[] input_size, "
      "Tensor? x, Tensor? scale, Tensor? shift, str prologue, float prologue_slope, "
      "Tensor? mean, Tensor? invstd, Tensor? addend, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation) -> (Tensor g, Tensor sum_g, Tensor sum_g_xhat)");
  m.def(
      "conv_bn_act_backward_weight(Tensor grad_y, Tensor[] inputs, Tensor? scale, Tensor? shift, "
      "str prologue, float prologue_slope, SymInt[] weight_size, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor grad_weight");
}
