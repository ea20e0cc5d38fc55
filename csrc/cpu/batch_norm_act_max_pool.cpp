// batch_norm_act_max_pool on the CPU: cuts images into bands of rows and runs the kernels on
// torch's threads. How they are cut depends on sizes alone, and sums are merged in the order of the
// bands: the bits are the same for any number of threads.

#include "../batch_norm_act_max_pool.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../common/memory_layout.h"
#include "../common/tensor_checks.h"
#include "batch_norm.h"
#include "batch_norm_act_max_pool_kernels.h"
#include "driver.h"

namespace resops {
namespace {

using at::Tensor;

// Neighbouring bands read some rows twice: one in this many at most, for the usual windows.
constexpr int64_t kFewestRows = 16;

const BatchNormActMaxPoolKernels& kernels() {
  return RESOPS_ACTIVE_KERNELS(batch_norm_act_max_pool_kernels);
}

// C values in the accumulation type of the kernels.
class ChannelVector {
 public:
  ChannelVector(const Tensor& x, std::vector<double> values)
      : wide_(std::move(values)), is_double_(x.scalar_type() == at::kDouble) {
    if (!is_double_) narrow_.assign(wide_.begin(), wide_.end());
  }
  const void* data() const {
    return is_double_ ? static_cast<const void*>(wide_.data()) : narrow_.data();
  }

 private:
  std::vector<double> wide_;
  std::vector<float> narrow_;
  bool is_double_;
};

// The arguments of a call as its kernels take them. `x` is dense.
struct Call {
  Call(const Tensor& x_, const PoolWindows& windows, const MemoryLayout& layout,
       Activation activation, double negative_slope, const Tensor& mean_, const Tensor& invstd,
       const OptionalTensor& weight, const OptionalTensor& bias_)
      : x(x_),
        channels(x.size(1)),
        inverse(to_vector(invstd)),
        gamma(channel_values(weight, channels, 1)),
        mean(x, to_vector(mean_)),
        scale(x, product(gamma, inverse)),
        bias(x, channel_values(bias_, channels, 0)) {
    args.dtype = kernel_dtype(x);
    args.activation = activation;
    args.negative_slope = negative_slope;
    args.channels = channels;
    args.depth = layout.is_contiguous() ? 1 : channels;
    args.height = x.size(2);
    args.width = x.size(3);
    args.out_height = windows.output_size(args.height, 0);
    args.out_width = windows.output_size(args.width, 1);
    for (int d = 0; d < 2; ++d) {
      args.kernel[d] = windows.kernel[d];
      args.stride[d] = windows.stride[d];
      args.padding[d] = windows.padding[d];
    }
    args.x = x.const_data_ptr();
    args.mean = mean.data();
    args.scale = scale.data();
    args.bias = bias.data();
    images = x.size(0) * channels / args.depth;
  }

  static std::vector<double> product(std::vector<double> a, const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i) a[i] *= b[i];
    return a;
  }

  // f(rows, band) for bands of the rows of every image; a band of `height` rows in all.
  template <class F>
  void for_bands(int64_t height, F f) const {
    const int64_t most = band_rows(height), bands = ceil_div(height, most);
    at::parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t row = band % bands * most;
        f(PoolRows{band / bands, row, std::min(row + most, height)}, band);
      }
    });
  }
  int64_t band_rows(int64_t height) const {
    const int64_t elements = std::max<int64_t>(args.width * args.depth, 1);
    const int64_t most = std::max(kFewestRows, ceil_div(kPieceElements, elements));
    return ceil_div(height, ceil_div(height, most));  // of one size, for threads
  }

  Tensor x;
  int64_t channels, images;
  std::vector<double> inverse, gamma;
  ChannelVector mean, scale, bias;
  BatchNormActMaxPoolArgs args{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_max_pool_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
    double momentum, double eps, std::string_view activation, double negative_slope,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding) {
  const Activation act = parse_activation(activation);
  const PoolWindows windows = check_pooling(x, kernel_size, stride, padding);
  check_batch_norm_forward(x, std::nullopt, weight, bias, running_mean, running_var, training,
                           momentum, eps);
  const MemoryLayout layout(x);
  const Tensor dense = layout.dense(x);
  auto [mean, invstd] =
      batch_norm_mean_invstd(dense, running_mean, running_var, training, momentum, eps);
  Tensor y = empty_pooled(x, windows, x.scalar_type());
  Tensor index = empty_pooled(x, windows, at::kByte);
  Call call(dense, windows, layout, act, negative_slope, mean, invstd, weight, bias);
  call.args.y = y.mutable_data_ptr();
  call.args.index_out = index.mutable_data_ptr<uint8_t>();
  const BatchNormActMaxPoolKernels& k = kernels();
  call.for_bands(call.args.out_height, [&](PoolRows rows, int64_t) { k.forward(call.args, rows); });
  return {y, mean, invstd, index};
}

struct GradSums {
  std::vector<double> grad, grad_xhat;  // sum(g) and sum(g * xhat), C each
};

GradSums add_up(const Call& call) {
  const int64_t depth = call.args.depth, height = call.args.height;
  const int64_t bands = ceil_div(height, call.band_rows(height));
  std::vector<double> grad(call.images * bands * depth), centred(grad.size());
  const BatchNormActMaxPoolKernels& k = kernels();
  call.for_bands(height, [&](PoolRows rows, int64_t band) {
    k.backward_reduce(call.args, rows, &grad[band * depth], &centred[band * depth]);
  });
  GradSums out{std::vector<double>(call.channels), std::vector<double>(call.channels)};
  for (int64_t band = 0; band < call.images * bands; ++band) {
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t c = depth == 1 ? band / bands % call.channels : i;
      out.grad[c] += grad[band * depth + i];
      out.grad_xhat[c] += centred[band * depth + i] * call.inverse[c];
    }
  }
  return out;
}

// grad_x = weight * invstd * (g - mean(g) - xhat * mean(g * xhat)); with no sums, for frozen
// statistics, the first term only.
Tensor grad_of_x(Call& call, const MemoryLayout& layout, const GradSums* sums) {
  Tensor grad_x = layout.empty(call.x);
  std::vector<double> slope, offset;
  if (sums) {
    const double m = static_cast<double>(
        std::max<int64_t>(call.x.size(0) * call.args.height * call.args.width, 1));
    for (int64_t c = 0; c < call.channels; ++c) {
      const double scale = -call.gamma[c] * call.inverse[c] / m;
      slope.push_back(scale * call.inverse[c] * sums->grad_xhat[c]);
      offset.push_back(scale * sums->grad[c]);
    }
  }
  const ChannelVector grad_slope(call.x, slope), grad_offset(call.x, offset);
  call.args.grad_slope = sums ? grad_slope.data() : nullptr;
  call.args.grad_offset = sums ? grad_offset.data() : nullptr;
  call.args.grad_x = grad_x.mutable_data_ptr();
  const BatchNormActMaxPoolKernels& k = kernels();
  call.for_bands(call.args.height,
                 [&](PoolRows rows, int64_t) { k.backward_apply(call.args, rows); });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_max_pool_backward(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, const Tensor& index, bool training,
    std::string_view activation, double negative_slope, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, std::array<bool, 3> output_mask) {
  const Activation act = parse_activation(activation);
  const PoolWindows windows = check_pooling(x, kernel_size, stride, padding);
  check_batch_norm_act_max_pool_backward(grad_y, x, weight, bias, mean, invstd, index, windows);
  const MemoryLayout layout(x);
  Call call(layout.dense(x), windows, layout, act, negative_slope, mean, invstd, weight, bias);
  const Tensor grad = layout.dense(grad_y), where = layout.dense(index);
  call.args.grad_y = grad.const_data_ptr();
  call.args.index = where.const_data_ptr<uint8_t>();

  const auto [need_x, need_weight, need_bias] = output_mask;
  GradSums sums;
  if (need_weight || need_bias || (need_x && training)) sums = add_up(call);
  Tensor grad_x =
      need_x ? grad_of_x(call, layout, training ? &sums : nullptr) : at::empty({0}, x.options());
  const auto parameter_grad = [&](const OptionalTensor& parameter, bool needed,
                                  const std::vector<double>& values) {
    const auto dtype = parameter ? parameter->scalar_type() : statistic_dtype(x);
    Tensor out = at::empty({needed ? call.channels : 0}, x.options().dtype(dtype));
    if (needed) write_vector(out, values);
    return out;
  };
  return {grad_x, parameter_grad(weight, need_weight, sums.grad_xhat),
          parameter_grad(bias, need_bias, sums.grad)};
}

}  // namespace
}  // namespace resops

TORCH_LIBRARY_IMPL(resops, CPU, m) {
  m.impl("batch_norm_act_max_pool_forward", &resops::batch_norm_act_max_pool_forward);
  m.impl("batch_norm_act_max_pool_backward", &resops::batch_norm_act_max_pool_backward);
}
