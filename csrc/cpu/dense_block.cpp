// The phases of dense_block on the CPU: cuts the pixels into pieces and runs the kernels on torch's
// threads. How they are cut depends on sizes alone, and sums are merged in the order of the pieces:
// the bits are the same for any number of threads.

#include "../dense_block.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/tensor_checks.h"
#include "batch_norm.h"
#include "dense_block_kernels.h"
#include "dense_block_narrow_kernels.h"
#include "driver.h"
#include "scratch.h"

namespace resops {
namespace {

using at::Tensor;

constexpr auto kFormat = kDenseBlockFormat;
constexpr int64_t kPieceRows = 128;
constexpr int64_t kMaxPieces = 256;  // of a reduction, whose partial sums have to be kept
constexpr int64_t kPadding = 32;     // values behind a vector that a kernel may read

const DenseBlockKernels& kernels(const DenseBlockArgs& args) {
  return RESOPS_KERNELS_FOR(dense_block_kernels, args.dtype);
}

int64_t rows_of(const Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }

// Vectors of channels in the accumulation type.
class Vectors {
 public:
  explicit Vectors(const Tensor& x) : is_double_(x.scalar_type() == at::kDouble) {}

  const void* add(const std::vector<double>& values) {
    const size_t size = values.size() + kPadding, bytes = is_double_ ? 8 : 4;
    buffers_.emplace_back(new char[size * bytes]());
    char* const out = buffers_.back().get();
    for (size_t i = 0; i < values.size(); ++i) {
      if (is_double_) {
        reinterpret_cast<double*>(out)[i] = kernel_value<double>(values[i]);
      } else {
        reinterpret_cast<float*>(out)[i] = kernel_value<float>(values[i]);
      }
    }
    return out;
  }

 private:
  bool is_double_;
  std::vector<std::unique_ptr<char[]>> buffers_;
};

// The norm of a consumer, whose scale is made as apply and accumulate both need it.
struct Norm {
  Norm(const Tensor& buffer_, const OptionalTensor& weight, const OptionalTensor& bias,
       const Tensor& mean, const Tensor& invstd)
      : buffer(buffer_.contiguous(kFormat)),
        vectors(buffer),
        inverse(to_vector(invstd)),
        gamma(channel_values(weight, mean.numel(), 1)),
        scale(gamma) {
    for (size_t c = 0; c < scale.size(); ++c) scale[c] *= inverse[c];
    args.dtype = kernel_dtype(buffer);
    args.channels = mean.numel();
    args.x = buffer.const_data_ptr();
    args.x_stride = buffer.size(1);
    args.mean = vectors.add(to_vector(mean));
    args.scale = vectors.add(scale);
    args.bias = vectors.add(channel_values(bias, args.channels, 0));
  }

  Tensor buffer;
  Vectors vectors;
  std::vector<double> inverse, gamma, scale;
  DenseBlockArgs args{};
};

// f(begin, end) for pieces of `rows` rows of `channels` values.
template <class F>
void for_pieces(int64_t rows, int64_t channels, F f) {
  const int64_t piece = std::max(kPieceElements / std::max<int64_t>(channels, 1), int64_t{1});
  at::parallel_for(0, ceil_div(rows, piece), 1, [&](int64_t begin, int64_t end) {
    f(begin * piece, std::min(end * piece, rows));
  });
}

void dense_block_apply(const Tensor& buffer, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd,
                       const Tensor& y) {
  check_dense_block_norm(buffer, weight, bias, mean, invstd);
  check_dense_block_slice("y", y, mean.numel(), buffer);
  if (y.numel() == 0) return;
  Norm norm(buffer, weight, bias, mean, invstd);
  const DenseBlockOutput out(y);
  norm.args.out = out.data();
  const DenseBlockKernels& k = kernels(norm.args);
  for_pieces(rows_of(y), norm.args.channels,
             [&](int64_t begin, int64_t end) { k.apply(norm.args, begin, end); });
  out.finish();
}

// sum(g) and sum(g * xhat) from the sums of all pieces, which are of g and of g * (x - mean).
std::tuple<Tensor, Tensor> merged_sums(const std::vector<double>& sums,
                                       const std::vector<double>& products, const Norm& norm,
                                       const Tensor& mean) {
  const size_t channels = norm.inverse.size();
  std::vector<double> sum(channels), product(channels);
  for (size_t i = 0; i < sums.size(); ++i) {
    const size_t c = i % channels;
    sum[c] += sums[i];
    product[c] += products[i] * norm.inverse[c];
  }
  Tensor sum_grad = at::empty({mean.numel()}, mean.options());
  Tensor sum_grad_xhat = at::empty({mean.numel()}, mean.options());
  write_vector(sum_grad, sum);
  write_vector(sum_grad_xhat, product);
  return {sum_grad, sum_grad_xhat};
}

std::tuple<Tensor, Tensor> dense_block_accumulate(const Tensor& grad_y, const Tensor& buffer,
                                                  const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const Tensor& mean,
                                                  const Tensor& invstd, const Tensor& grad_sum,
                                                  bool training, bool first) {
  check_dense_block_norm(buffer, weight, bias, mean, invstd);
  const int64_t channels = mean.numel();
  check_dense_block_slice("grad_y", grad_y, channels, buffer);
  check_dense_block_sum(grad_sum, channels, buffer);
  Norm norm(buffer, weight, bias, mean, invstd);
  std::vector<double> sums, products;  // of each piece
  if (grad_y.numel() > 0) {
    const Tensor grad = grad_y.contiguous(kFormat);
    const DenseBlockOutput total(grad_sum);
    norm.args.grad_y = grad.const_data_ptr();
    norm.args.grad_y_stride = channels;
    norm.args.grad_sum = total.data();
    norm.args.grad_sum_stride = grad_sum.size(1);
    norm.args.wide_sum = grad_sum.scalar_type() != buffer.scalar_type();
    norm.args.first = first;
    norm.args.factor = norm.vectors.add(training ? norm.gamma : norm.scale);
    const int64_t rows = rows_of(grad);
    const int64_t most =
        std::max({kPieceElements / channels, kPieceRows, ceil_div(rows, kMaxPieces)});
    const int64_t pieces = ceil_div(rows, most), piece = ceil_div(rows, pieces);
    sums.resize(pieces * channels);
    products.resize(pieces * channels);
    const DenseBlockKernels& k = kernels(norm.args);
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        k.accumulate(norm.args, i * piece, std::min((i + 1) * piece, rows), &sums[i * channels],
                     &products[i * channels]);
      }
    });
    total.finish();
  }
  return merged_sums(sums, products, norm, mean);
}

Tensor dense_block_gradient(const OptionalTensor& grad_y, const Tensor& buffer_,
                            const OptionalTensor& grad_sum, const OptionalTensor& mean,
                            const OptionalTensor& invstd, const OptionalTensor& mean_grad,
                            const OptionalTensor& mean_grad_xhat, int64_t begin, int64_t end) {
  check_dense_block_gradient(grad_y, buffer_, grad_sum, mean, invstd, mean_grad, mean_grad_xhat,
                             begin, end);
  const int64_t channels = end - begin;
  Tensor out = at::empty({buffer_.size(0), channels, buffer_.size(2), buffer_.size(3)},
                         buffer_.options().memory_format(kFormat));
  if (out.numel() == 0) return out;
  const Tensor buffer = buffer_.contiguous(kFormat);
  const auto from = [begin](const Tensor& t) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + begin * t.element_size();
  };
  DenseBlockArgs args{};
  args.dtype = kernel_dtype(buffer);
  args.channels = channels;
  args.x = from(buffer);
  args.x_stride = buffer.size(1);
  args.out = out.mutable_data_ptr();
  Tensor outside, inside;
  Vectors vectors(buffer);
  if (grad_y) {
    outside = grad_y->contiguous(kFormat);
    args.grad_y = from(outside);
    args.grad_y_stride = outside.size(1);
  }
  if (grad_sum) {
    inside = grad_sum->contiguous(kFormat);
    args.grad_sum = from(inside);
    args.grad_sum_stride = inside.size(1);
    args.wide_sum = inside.scalar_type() != buffer.scalar_type();
    const std::vector<double> scale = channel_values(invstd, channels, 1);
    args.sum_scale = vectors.add(scale);
    if (mean) {
      std::vector<double> slope = to_vector(*mean_grad_xhat), offset = to_vector(*mean_grad);
      for (int64_t c = 0; c < channels; ++c) {
        slope[c] *= -scale[c] * scale[c];
        offset[c] *= -scale[c];
      }
      args.mean = vectors.add(to_vector(*mean));
      args.sum_slope = vectors.add(slope);
      args.sum_offset = vectors.add(offset);
    }
  }
  const DenseBlockKernels& k = kernels(args);
  for_pieces(rows_of(out), channels,
             [&](int64_t first, int64_t last) { k.gradient(args, first, last); });
  return out;
}

void dense_block_update_running(const Tensor& mean, const Tensor& var, int64_t count,
                                at::TensorList running_means, at::TensorList running_vars,
                                at::ArrayRef<double> momenta) {
  check_dense_block_running(mean, var, count, running_means, running_vars, momenta);
  const std::vector<double> batch_mean = to_vector(mean);
  std::vector<double> batch_var = to_vector(var);
  const double unbiased =
      static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (double& v : batch_var) v *= unbiased;
  const auto update = [](const Tensor& running, const std::vector<double>& batch, double momentum) {
    visit_values(running, [&](auto& value, int64_t c) {
      value = static_cast<std::remove_reference_t<decltype(value)>>(
          (1 - momentum) * static_cast<double>(value) + momentum * batch[c]);
    });
  };
  for (size_t i = 0; i < momenta.size(); ++i) {
    update(running_means[i], batch_mean, momenta[i]);
    update(running_vars[i], batch_var, momenta[i]);
  }
}

// ---- with the 1x1 convolution that a consumer of a layer stands before -----------------------

constexpr int64_t kNarrowPieceRows = 448;  // at least, where there are more
constexpr int64_t kNarrowPieces = 16;      // each has a gradient of the weight
constexpr int64_t kEnoughPieces = 4;       // fewer are cut into blocks of channels too

const NarrowKernels& narrow() { return RESOPS_ACTIVE_KERNELS(narrow_kernels); }

void check_narrow(const Tensor& buffer, const Tensor& conv_weight, int64_t channels) {
  const auto size = conv_weight.sizes();
  TORCH_CHECK(buffer.scalar_type() == at::kFloat && conv_weight.scalar_type() == at::kFloat,
              "dense_block_narrow expects float32, but got ", buffer.scalar_type(), " and ",
              conv_weight.scalar_type());
  TORCH_CHECK(size.size() == 4 && size[1] == channels && size[2] == 1 && size[3] == 1 &&
                  size[0] > 0 && size[0] % 16 == 0 && channels > 0,
              "conv_weight should be of size (16 n, ", channels, ", 1, 1), but got size ", size);
}

// A weight as kernels read it; `pack` is a member of NarrowKernels.
template <class Pack>
const float* packed(Pack pack, const Tensor& conv_weight, const Scratch& panel) {
  const int64_t outputs = conv_weight.size(0), channels = conv_weight.size(1);
  const Tensor rows = conv_weight.reshape({outputs, channels}).contiguous();
  pack(rows.const_data_ptr<float>(), channels, outputs, panel.data());
  return panel.data();
}

Tensor dense_block_narrow_forward(const Tensor& buffer, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean,
                                  const Tensor& invstd, const Tensor& conv_weight) {
  check_dense_block_norm(buffer, weight, bias, mean, invstd);
  const int64_t channels = mean.numel();
  check_narrow(buffer, conv_weight, channels);
  const int64_t outputs = conv_weight.size(0);
  const Tensor c = at::empty({buffer.size(0), outputs, buffer.size(2), buffer.size(3)},
                             buffer.options().memory_format(kFormat));
  if (c.numel() == 0) return c;
  const Norm norm(buffer, weight, bias, mean, invstd);
  const NarrowKernels& k = narrow();
  const Scratch panel(k.panel_size(channels, outputs));
  NarrowArgs args{};
  args.norm = norm.args;
  args.outputs = outputs;
  args.panel = packed(k.pack_forward, conv_weight, panel);
  args.c = c.mutable_data_ptr<float>();
  const int64_t rows = rows_of(c);
  at::parallel_for(0, ceil_div(rows, kNarrowRows), 1, [&](int64_t begin, int64_t end) {
    const Scratch workspace(k.workspace_size());
    k.forward(args, begin * kNarrowRows, std::min(end * kNarrowRows, rows), workspace.data());
  });
  return c;
}

// The gradient of a 1x1 weight from those of all pieces, (pieces, outputs, at least channels).
Tensor merged_weight(const Tensor& pieces, int64_t channels) {
  const int64_t outputs = pieces.size(1);
  const Tensor total = pieces.size(0) == 1 ? pieces[0] : at::sum(pieces, 0);
  const Tensor grad_weight =
      at::empty({outputs, channels, 1, 1}, pieces.options().memory_format(kFormat));
  grad_weight.view({outputs, channels}).copy_(total.narrow(1, 0, channels));
  return grad_weight;
}

std::tuple<Tensor, Tensor, Tensor> dense_block_narrow_backward(
    const Tensor& grad_c, const Tensor& conv_weight, const Tensor& buffer,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& invstd, const Tensor& grad_sum, bool training, bool first, bool of_weight) {
  check_dense_block_norm(buffer, weight, bias, mean, invstd);
  const int64_t channels = mean.numel();
  check_narrow(buffer, conv_weight, channels);
  const int64_t outputs = conv_weight.size(0);
  check_dense_block_slice("grad_c", grad_c, outputs, buffer);
  check_dense_block_sum(grad_sum, channels, buffer);

  const Tensor grad = grad_c.contiguous(kFormat);
  const int64_t rows = rows_of(grad);
  const int64_t most = std::max(kNarrowPieceRows, ceil_div(rows, kNarrowPieces));
  const int64_t pieces = ceil_div(rows, most), piece = ceil_div(rows, std::max<int64_t>(pieces, 1));
  const int64_t part = pieces < kEnoughPieces ? kNarrowChannels : channels;
  const int64_t parts = ceil_div(channels, part);
  const NarrowKernels& k = narrow();
  const int64_t width = k.gradient_width(channels);
  const Tensor grad_weights =
      at::empty({of_weight ? std::max<int64_t>(pieces, 1) : 0, outputs, width}, grad.options());
  if (pieces == 0) grad_weights.zero_();
  std::vector<double> sums(pieces * channels), products(pieces * channels);
  Norm norm(buffer, weight, bias, mean, invstd);
  if (pieces > 0) {
    const DenseBlockOutput total(grad_sum);
    norm.args.grad_sum = total.data();
    norm.args.grad_sum_stride = grad_sum.size(1);
    norm.args.first = first;
    norm.args.factor = norm.vectors.add(training ? norm.gamma : norm.scale);
    const Scratch panel(k.panel_size(channels, outputs));
    NarrowArgs args{};
    args.norm = norm.args;
    args.outputs = outputs;
    args.panel = packed(k.pack_backward, conv_weight, panel);
    args.grad_c = grad.const_data_ptr<float>();
    args.of_weight = of_weight;
    float* const weights = of_weight ? grad_weights.mutable_data_ptr<float>() : nullptr;
    at::parallel_for(0, pieces * parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch workspace(k.workspace_size());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t of_rows = i / parts, c = i % parts * part;
        const NarrowSums found{&sums[of_rows * channels], &products[of_rows * channels],
                               of_weight ? weights + of_rows * outputs * width : nullptr};
        k.backward(args, of_rows * piece, std::min((of_rows + 1) * piece, rows), c,
                   std::min(c + part, channels), found, workspace.data());
      }
    });
    total.finish();
  }
  auto [sum_grad, sum_grad_xhat] = merged_sums(sums, products, norm, mean);
  return {sum_grad, sum_grad_xhat,
          of_weight ? merged_weight(grad_weights, channels) : at::empty({0}, grad.options())};
}

}  // namespace
}  // namespace resops

TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def(
      "dense_block_narrow_forward(Tensor buffer, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, Tensor conv_weight) -> Tensor");
  m.def(
      "dense_block_narrow_backward(Tensor grad_c, Tensor conv_weight, Tensor buffer, "
      "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, Tensor(a!) grad_sum, "
      "bool training, bool first, bool of_weight) "
      "-> (Tensor sum_grad, Tensor sum_grad_xhat, Tensor grad_conv_weight)");
}

TORCH_LIBRARY_IMPL(resops, CPU, m) {
  m.impl("dense_block_narrow_forward", &resops::dense_block_narrow_forward);
  m.impl("dense_block_narrow_backward", &resops::dense_block_narrow_backward);
  m.impl("dense_block_apply", &resops::dense_block_apply);
  m.impl("dense_block_accumulate", &resops::dense_block_accumulate);
  m.impl("dense_block_gradient", &resops::dense_block_gradient);
  m.impl("dense_block_update_running", &resops::dense_block_update_running);
}
