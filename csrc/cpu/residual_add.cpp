// residual_add on the CPU: cuts the tensors into pieces and runs the kernels on torch's threads.
// How a tensor is cut depends on its size alone, and the partial sums of the weights' gradients are
// added in the order of the pieces: the bits are the same for any number of threads.

#include "../residual_add.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../common/memory_layout.h"
#include "../common/tensor_checks.h"
#include "driver.h"
#include "residual_add_kernels.h"

namespace resops {
namespace {

using at::Tensor;

// A weight as the kernels take it: a tensor like x, or one value for every row or for all of them.
struct Weight {
  Weight(WeightKind kind_, const OptionalTensor& t, double value, const MemoryLayout& layout)
      : kind(kind_) {
    if (kind == WeightKind::elementwise) {
      dense = layout.dense(*t);
    } else {
      values = t ? to_vector(*t) : std::vector<double>{value};
      for (double& v : values) v = kernel_value<double>(v);
    }
  }
  int64_t step() const { return kind == WeightKind::per_sample ? 1 : 0; }
  const void* data() const { return dense.defined() ? dense.const_data_ptr() : nullptr; }

  WeightKind kind;
  Tensor dense;
  std::vector<double> values;
};

// alpha and beta; with the complement, beta's values are made here, but for an elementwise alpha.
struct WeightPair {
  WeightPair(ResidualAddWeights kinds, const OptionalTensor& alpha_, const OptionalTensor& beta_,
             double alpha_value, double beta_value, bool complement_, const MemoryLayout& layout)
      : alpha(kinds.alpha, alpha_, alpha_value, layout),
        beta(kinds.beta, beta_, beta_value, layout),
        complement(complement_) {
    if (!complement) return;
    beta.kind = alpha.kind;
    beta.values = alpha.values;
    for (double& value : beta.values) value = 1 - value;
  }
  Loaded loaded() const {
    if (alpha.kind != WeightKind::elementwise) {
      return beta.kind == WeightKind::elementwise ? Loaded::beta : Loaded::none;
    }
    if (complement) return Loaded::complement;
    return beta.kind == WeightKind::elementwise ? Loaded::both : Loaded::alpha;
  }
  bool per_sample() const {
    return alpha.kind == WeightKind::per_sample || beta.kind == WeightKind::per_sample;
  }
  Weight alpha, beta;
  bool complement;
};

// The rows of a tensor (see residual_add_kernels.h) and the pieces that they are cut into.
struct Walk {
  Walk(const Tensor& x, bool per_sample, bool masked) {
    const int64_t samples = x.size(0), length = x.numel() / std::max<int64_t>(samples, 1);
    const bool one_row = !per_sample && (!masked || length % 8 == 0);
    rows = one_row ? 1 : samples;
    width = one_row ? x.numel() : length;
    mask_step = ceil_div(width, 8);
    parts = ceil_div(width, kPieceElements);
    part = ceil_div(ceil_div(width, std::max<int64_t>(parts, 1)), 32) * 32;
    rows_per = parts == 1 ? std::max<int64_t>(kPieceElements / width, 1) : 1;
  }

  // Calls f(span, slot) for every piece; row r of the span has the slot `slot + r - row_begin`.
  template <class F>
  void for_pieces(F f) const {
    at::parallel_for(0, ceil_div(rows, rows_per) * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t row = piece / parts * rows_per, column = piece % parts * part;
        f(ResidualAddSpan{row, std::min(row + rows_per, rows), column,
                          std::min(column + part, width)},
          row * parts + piece % parts);
      }
    });
  }
  bool whole_rows() const { return rows == 1 || width % 32 == 0; }

  int64_t rows, width, mask_step;
  int64_t parts, part;  // of a row, where it is longer than a piece
  int64_t rows_per;     // in a piece, where a row is shorter
};

ResidualAddArgs kernel_args(const Walk& walk, const Tensor& x, const WeightPair& weights,
                            Activation activation, double negative_slope) {
  ResidualAddArgs args{};
  args.dtype = kernel_dtype(x);
  args.activation = activation;
  args.negative_slope = kernel_value<double>(negative_slope);
  args.loaded = weights.loaded();
  args.complement = weights.complement;
  args.width = walk.width;
  args.mask_step = walk.mask_step;
  args.alpha_rows = weights.alpha.values.data();
  args.beta_rows = weights.beta.values.data();
  args.alpha_step = weights.alpha.step();
  args.beta_step = weights.beta.step();
  args.alpha = weights.alpha.data();
  args.beta = weights.beta.data();
  return args;
}

at::TensorOptions plain(const Tensor& x, at::ScalarType dtype) {
  return x.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> residual_add_forward(const Tensor& x, const Tensor& residual,
                                                const OptionalTensor& alpha,
                                                const OptionalTensor& beta, double alpha_value,
                                                double beta_value, bool complement,
                                                std::string_view activation,
                                                double negative_slope) {
  const Activation act = parse_activation(activation);
  const ResidualAddWeights kinds = check_residual_add_forward(x, residual, alpha, beta, complement);
  const MemoryLayout layout(x);
  const bool masked = is_masked(act);
  Tensor y = layout.empty(x);
  Tensor mask = masked ? at::empty(residual_add_mask_size(x), plain(x, at::kByte))
                       : at::empty({0}, plain(x, at::kByte));
  if (x.numel() == 0) return {y, mask};
  const WeightPair weights(kinds, alpha, beta, alpha_value, beta_value, complement, layout);
  const Walk walk(x, weights.per_sample(), masked);
  const Tensor dense = layout.dense(x), dense_residual = layout.dense(residual);
  ResidualAddArgs args = kernel_args(walk, x, weights, act, negative_slope);
  args.x = dense.const_data_ptr();
  args.residual = dense_residual.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (masked) args.mask_out = mask.mutable_data_ptr<uint8_t>();
  args.streaming = can_stream(y, walk.whole_rows());
  const ResidualAddKernels& kernels = RESOPS_KERNELS_FOR(residual_add_kernels, args.dtype);
  walk.for_pieces([&](ResidualAddSpan span, int64_t) { kernels.forward(args, span); });
  return {y, mask};
}

// The gradient of a weight: a tensor like x that the kernel writes, or sums by piece and row.
struct WeightGrad {
  WeightGrad(const OptionalTensor& weight, WeightKind kind_, bool needed, const Walk& walk,
             const Tensor& x, const MemoryLayout& layout)
      : kind(kind_) {
    const auto dtype = weight ? weight->scalar_type() : statistic_dtype(x);
    if (!needed) {
      grad = at::empty({0}, plain(x, dtype));
    } else if (kind == WeightKind::elementwise) {
      grad = layout.empty(x);
      data = grad.mutable_data_ptr();
    } else {
      grad = at::empty(weight->sizes(), plain(x, dtype));
      sums.reset(new double[walk.rows * walk.parts]);
    }
  }
  double* at(int64_t slot) const { return sums ? sums.get() + slot : nullptr; }

  void add_up(const Walk& walk) const {
    if (!sums) return;
    std::vector<double> total(grad.numel());
    const int64_t step = kind == WeightKind::per_sample ? 1 : 0;
    for (int64_t row = 0; row < walk.rows; ++row) {
      for (int64_t part = 0; part < walk.parts; ++part) {
        total[row * step] += sums[row * walk.parts + part];
      }
    }
    write_vector(grad, total);
  }

  WeightKind kind;
  Tensor grad;
  void* data = nullptr;
  std::unique_ptr<double[]> sums;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_add_backward(
    const Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& residual,
    const OptionalTensor& alpha, const OptionalTensor& beta, double alpha_value, double beta_value,
    bool complement, const OptionalTensor& mask, std::string_view activation, double negative_slope,
    std::array<bool, 4> output_mask) {
  const Activation act = parse_activation(activation);
  const ResidualAddWeights kinds = check_residual_add_backward(grad_y, x, residual, alpha, beta,
                                                               complement, mask, act, output_mask);
  const auto [need_x, need_residual, need_alpha, need_beta] = output_mask;
  const MemoryLayout layout(grad_y);
  const WeightPair weights(kinds, alpha, beta, alpha_value, beta_value, complement, layout);
  const Walk walk(grad_y, weights.per_sample(), is_masked(act));
  const auto like_x = [&](bool needed) {
    return needed ? layout.empty(grad_y) : at::empty({0}, plain(grad_y, grad_y.scalar_type()));
  };
  Tensor grad_x = like_x(need_x), grad_residual = like_x(need_residual);
  const WeightGrad grad_alpha(alpha, kinds.alpha, need_alpha, walk, grad_y, layout);
  const WeightGrad grad_beta(beta, kinds.beta, need_beta, walk, grad_y, layout);
  if (grad_y.numel() > 0 && (need_x || need_residual || need_alpha || need_beta)) {
    const Tensor dense = layout.dense(grad_y);
    const bool need_z = is_smooth(act);
    Tensor dense_x, dense_residual, dense_mask;
    ResidualAddArgs args = kernel_args(walk, grad_y, weights, act, negative_slope);
    args.grad_y = dense.const_data_ptr();
    if (need_z || need_alpha) {
      dense_x = layout.dense(*x);
      args.x = dense_x.const_data_ptr();
    }
    if (need_z || need_beta || (need_alpha && complement)) {
      dense_residual = layout.dense(*residual);
      args.residual = dense_residual.const_data_ptr();
    }
    if (is_masked(act)) {
      dense_mask = mask->contiguous();
      args.mask = dense_mask.const_data_ptr<uint8_t>();
    }
    args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
    args.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
    args.grad_alpha = grad_alpha.data;
    args.grad_beta = grad_beta.data;
    args.sum_alpha = grad_alpha.sums != nullptr;
    args.sum_beta = grad_beta.sums != nullptr;
    args.streaming = true;
    for (const Tensor& out : {grad_x, grad_residual, grad_alpha.grad, grad_beta.grad}) {
      const bool written = out.defined() && out.sizes() == grad_y.sizes();
      if (written) args.streaming = args.streaming && can_stream(out, walk.whole_rows());
    }
    const ResidualAddKernels& kernels = RESOPS_KERNELS_FOR(residual_add_kernels, args.dtype);
    walk.for_pieces([&](ResidualAddSpan span, int64_t slot) {
      kernels.backward(args, span, grad_alpha.at(slot), grad_beta.at(slot));
    });
  }
  grad_alpha.add_up(walk);
  grad_beta.add_up(walk);
  return {grad_x, grad_residual, grad_alpha.grad, grad_beta.grad};
}

}  // namespace
}  // namespace resops

TORCH_LIBRARY_IMPL(resops, CPU, m) {
  m.impl("residual_add_forward", &resops::residual_add_forward);
  m.impl("residual_add_backward", &resops::residual_add_backward);
}
