// batch_norm on the CPU: cuts a tensor into pieces, runs the kernels on torch's threads and merges
// what they return. How a tensor is cut depends on its size alone, and partial results are merged
// in the order of the pieces: the bits are the same for any number of threads.

#include "batch_norm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/memory_layout.h"
#include "../common/tensor_checks.h"
#include "batch_norm_kernels.h"
#include "driver.h"

namespace resops {
namespace {

using at::Tensor;

// Of a channels-last reduction: rows in a piece, where there are more, and pieces.
constexpr int64_t kPieceRows = 128;
constexpr int64_t kMaxPieces = 256;

// Of a row of a channels-last tensor, at least.
constexpr int64_t kRowElements = 256;

const BatchNormKernels& kernels(const BatchNormArgs& args) {
  return RESOPS_KERNELS_FOR(batch_norm_kernels, args.dtype);
}

// How a tensor is walked; see batch_norm_kernels.h.
struct Walk {
  explicit Walk(const Tensor& x) : layout(x) {
    channels = x.size(1);
    for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
    numel = x.numel();
    count = x.size(0) * spatial;
    channels_last = channels == 1 || spatial == 1 || !layout.is_contiguous();
    if (channels_last) {
      // Whole cache lines of every type, and long enough that a row costs nothing of its own.
      width = std::lcm(std::max<int64_t>(channels, 1), int64_t{32});
      while (width < kRowElements) width *= 2;
      rows = numel / width;
      tail = numel % width;
      mask_step = width / 8;
      mask_bytes = ceil_div(numel, 8);
    } else {
      width = spatial;
      rows = x.size(0) * channels;
      mask_step = ceil_div(spatial, 8);
      mask_bytes = rows * mask_step;
    }
  }

  MemoryLayout layout;
  bool channels_last;
  int64_t channels, spatial = 1, numel, count;  // count: M, values per channel
  int64_t width, rows, tail = 0;                // tail: elements of a shorter last row
  int64_t mask_step, mask_bytes;
  // Whether every row of such a tensor starts a cache line.
  bool whole_lines(const Tensor& t) const { return width * t.element_size() % 64 == 0; }
  int64_t parameters() const { return channels_last ? width : channels; }
};

// Runs f on every part of the tensor, last part first: what the pass before it read last is still
// in the caches.
template <class F>
void for_spans_backwards(const Walk& walk, bool streaming, F f) {
  const int64_t elements = streaming ? 8 * kPieceElements : kPieceElements;
  const int64_t per_row = walk.channels_last ? 1 : ceil_div(walk.width, 4 * kPieceElements);
  const int64_t row_piece =
      per_row == 1 ? walk.width : ceil_div(ceil_div(walk.width, per_row), 32) * 32;
  const int64_t rows_per = std::max<int64_t>(elements / std::max<int64_t>(row_piece, 1), 1);
  const int64_t pieces = ceil_div(walk.rows, rows_per) * per_row;
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = end - 1; piece >= begin; --piece) {
      const int64_t row = piece / per_row * rows_per, column = piece % per_row * row_piece;
      f(BatchNormSpan{row, std::min(row + rows_per, walk.rows), column,
                      std::min(column + row_piece, walk.width)},
        false);
    }
  });
  if (walk.tail > 0) f(BatchNormSpan{walk.rows, walk.rows + 1, 0, walk.tail}, true);
}

// Two doubles for every column of every piece of a reduction.
struct Partials {
  int64_t columns, slots;
  std::unique_ptr<double[]> a, b;
  std::vector<double> counts;  // values that each slot counts, per column
};

// Calls f(span, channel_begin, channel_end, a, b) for every piece.
template <class F>
Partials reduce_pieces(const Walk& walk, F f) {
  Partials out;
  out.columns = walk.parameters();
  if (walk.channels_last) {
    const int64_t most =
        std::max({kPieceElements / walk.width, kPieceRows, ceil_div(walk.rows, kMaxPieces)});
    const int64_t full = ceil_div(walk.rows, most);
    const int64_t rows_per = full > 0 ? ceil_div(walk.rows, full) : 1;  // of one size, for threads
    out.slots = full + (walk.tail > 0);
    out.a.reset(new double[out.slots * out.columns]);
    out.b.reset(new double[out.slots * out.columns]);
    out.counts.resize(out.slots);
    at::parallel_for(0, out.slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t row = slot * rows_per;
        const BatchNormSpan span =
            slot < full ? BatchNormSpan{row, std::min(row + rows_per, walk.rows), 0, walk.width}
                        : BatchNormSpan{walk.rows, walk.rows + 1, 0, walk.tail};
        out.counts[slot] = static_cast<double>(span.row_end - span.row_begin);
        f(span, 0, walk.channels, &out.a[slot * out.columns], &out.b[slot * out.columns]);
      }
    });
    return out;
  }
  const int64_t per_plane = ceil_div(walk.width, 2 * kPieceElements);
  const int64_t part = ceil_div(ceil_div(walk.width, per_plane), 16) * 16;
  const int64_t samples = walk.rows / walk.channels;
  const int64_t group =
      std::clamp<int64_t>(kPieceElements / 4 / part, 1, std::min<int64_t>(walk.channels, 64));
  const int64_t groups = ceil_div(walk.channels, group);
  const int64_t samples_per = std::clamp<int64_t>(2 * kPieceElements / (part * group), 1, samples);
  const int64_t chunks = ceil_div(samples, samples_per);
  out.slots = chunks * per_plane;
  out.a.reset(new double[out.slots * out.columns]);
  out.b.reset(new double[out.slots * out.columns]);
  out.counts.resize(out.slots);
  const auto span_of = [&](int64_t slot) {
    const int64_t n = slot / per_plane * samples_per, column = slot % per_plane * part;
    return BatchNormSpan{n, std::min(n + samples_per, samples), column,
                         std::min(column + part, walk.width)};
  };
  for (int64_t slot = 0; slot < out.slots; ++slot) {
    const BatchNormSpan span = span_of(slot);
    out.counts[slot] =
        static_cast<double>((span.row_end - span.row_begin) * (span.end - span.begin));
  }
  at::parallel_for(0, out.slots * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      // Order of memory: samples, then groups of channels, then parts of a plane.
      const int64_t slot = piece / (groups * per_plane) * per_plane + piece % per_plane;
      const int64_t c = piece / per_plane % groups * group;
      const int64_t at = slot * out.columns + c;
      f(span_of(slot), c, std::min(c + group, walk.channels), &out.a[at], &out.b[at]);
    }
  });
  return out;
}

BatchNormArgs kernel_args(const Walk& walk, const Tensor& x, Activation activation,
                          double negative_slope) {
  BatchNormArgs args{};
  args.dtype = kernel_dtype(x);
  args.activation = activation;
  args.negative_slope = kernel_value<double>(negative_slope);
  args.channels_last = walk.channels_last;
  args.channels = walk.channels;
  args.width = walk.width;
  args.mask_step = walk.mask_step;
  args.x = x.const_data_ptr();
  return args;
}

// ---- small vectors of C values -----------------------------------------------------------------

// Kernel parameters: C values in the accumulation type, repeated over the width of a row.
class Parameters {
 public:
  Parameters(const Walk& walk, const Tensor& x)
      : walk_(walk), is_double_(x.scalar_type() == at::kDouble) {}

  const void* add(const std::vector<double>& values) {
    const int64_t size = walk_.parameters(), bytes = is_double_ ? 8 : 4;
    buffers_.emplace_back(new char[size * bytes]);
    if (is_double_) {
      fill(reinterpret_cast<double*>(buffers_.back().get()), values, size);
    } else {
      fill(reinterpret_cast<float*>(buffers_.back().get()), values, size);
    }
    return buffers_.back().get();
  }

 private:
  template <class acc>
  void fill(acc* out, const std::vector<double>& values, int64_t size) {
    for (int64_t i = 0; i < size && walk_.channels > 0; i += walk_.channels) {
      for (int64_t c = 0; c < walk_.channels; ++c) out[i + c] = kernel_value<acc>(values[c]);
    }
  }
  const Walk& walk_;
  bool is_double_;
  std::vector<std::unique_ptr<char[]>> buffers_;
};

// mean, scale = weight * invstd and bias, in the arithmetic that every pass uses: forward and
// backward must agree on the sign of z to the last bit.
void set_affine(BatchNormArgs& args, Parameters& parameters, const Walk& walk, const Tensor& mean,
                const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias) {
  std::vector<double> scale = channel_values(invstd, walk.channels, 0);
  const std::vector<double> gamma = channel_values(weight, walk.channels, 1);
  for (int64_t c = 0; c < walk.channels; ++c) scale[c] *= gamma[c];
  args.mean = parameters.add(channel_values(mean, walk.channels, 0));
  args.scale = parameters.add(scale);
  args.bias = parameters.add(channel_values(bias, walk.channels, 0));
}

// ---- phases
// ----------------------------------------------------------------------------------------

struct Statistics {
  std::vector<double> mean, m2;  // C each; var = m2 / M
};

Statistics compute_statistics(const Walk& walk, const Tensor& x) {
  Statistics out{std::vector<double>(walk.channels), std::vector<double>(walk.channels)};
  if (walk.numel == 0) return out;
  const BatchNormArgs args = kernel_args(walk, x, Activation::identity, 0);
  const BatchNormKernels& k = kernels(args);
  const Partials parts =
      reduce_pieces(walk, [&](BatchNormSpan span, int64_t c0, int64_t c1, double* mean,
                              double* m2) { k.statistics(args, span, c0, c1, mean, m2); });
  const int64_t columns = parts.columns;
  double* mean = parts.a.get();
  double* m2 = parts.b.get();
  double count = parts.counts[0];
  const int64_t full = parts.slots - (walk.tail > 0);
  for (int64_t slot = 1; slot < full; ++slot) {
    k.merge(columns, count, mean, m2, parts.counts[slot], mean + slot * columns,
            m2 + slot * columns);
    count += parts.counts[slot];
  }
  if (full == 0) count = 0;  // slot 0 is the shorter row itself, whose columns count one value
  if (walk.tail > 0 && full > 0) {
    k.merge(walk.tail, count, mean, m2, 1, mean + full * columns, m2 + full * columns);
  }
  for (int64_t c = 0; c < walk.channels; ++c) {
    // The columns of one channel: one in contiguous, width / C in channels-last.
    double n = count + (c < walk.tail ? 1 : 0), merged_mean = mean[c], merged_m2 = m2[c];
    for (int64_t column = c + walk.channels; column < columns; column += walk.channels) {
      const double b = count + (column < walk.tail ? 1 : 0);
      if (b == 0) continue;
      const double delta = mean[column] - merged_mean;
      merged_mean = n == 0 ? mean[column] : merged_mean + delta * (b / (n + b));
      merged_m2 += m2[column] + (n == 0 ? 0 : delta * delta * (n * b / (n + b)));
      n += b;
    }
    if (!std::isfinite(merged_mean)) {
      // An infinity in the channel: its mean is what a plain sum gives, its variance is NaN.
      merged_mean = at::sum(x.select(1, c), at::kDouble).item<double>() / n;
      merged_m2 = std::numeric_limits<double>::quiet_NaN();
    }
    out.mean[c] = merged_mean;
    out.m2[c] = merged_m2;
  }
  return out;
}

std::tuple<Tensor, Tensor> run_apply(const Walk& walk, const Tensor& x,
                                     const OptionalTensor& residual, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const Tensor& mean,
                                     const Tensor& invstd, Activation activation,
                                     double negative_slope) {
  Tensor y = walk.layout.empty(x);
  const bool masked = residual && is_masked(activation);
  Tensor mask = at::empty({masked ? walk.mask_bytes : 0}, x.options().dtype(at::kByte));
  if (walk.numel == 0) return {y, mask};
  BatchNormArgs args = kernel_args(walk, x, activation, negative_slope);
  Parameters parameters(walk, x);
  set_affine(args, parameters, walk, mean, invstd, weight, bias);
  Tensor dense_residual;
  if (residual) {
    dense_residual = walk.layout.dense(*residual);
    args.residual = dense_residual.const_data_ptr();
    args.has_residual = true;
    if (masked) args.mask_out = mask.mutable_data_ptr<uint8_t>();
  }
  args.y = y.mutable_data_ptr();
  args.streaming = can_stream(y, walk.whole_lines(x));
  const BatchNormKernels& k = kernels(args);
  for_spans_backwards(walk, args.streaming, [&](BatchNormSpan span, bool is_tail) {
    BatchNormArgs part = args;
    part.streaming = args.streaming && !is_tail;
    k.apply(part, span);
  });
  return {y, mask};
}

// Keeps alive what the backward kernels point into.
struct BackwardCall {
  BackwardCall(const Walk& walk, const Tensor& grad_y, const Tensor& x_,
               const OptionalTensor& residual_, const OptionalTensor& mask_,
               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
               const Tensor& invstd, Activation activation, double negative_slope)
      : x(walk.layout.dense(x_)), grad(walk.layout.dense(grad_y)), parameters(walk, x) {
    args = kernel_args(walk, x, activation, negative_slope);
    args.grad_y = grad.const_data_ptr();
    if (mask_ && mask_->numel() > 0) {
      mask = mask_->contiguous();
      args.mask = mask.const_data_ptr<uint8_t>();
      args.has_residual = true;
    } else if (residual_ && is_smooth(activation)) {
      residual = walk.layout.dense(*residual_);
      args.residual = residual.const_data_ptr();
      args.has_residual = true;
    }
    set_affine(args, parameters, walk, mean, invstd, weight, bias);
  }
  Tensor x, grad, mask, residual;
  Parameters parameters;
  BatchNormArgs args;
};

struct GradSums {
  std::vector<double> grad, grad_centred;  // sum(g) and sum(g * (x - mean)), C each
};

GradSums run_reduce(const Walk& walk, const BackwardCall& call) {
  GradSums out{std::vector<double>(walk.channels), std::vector<double>(walk.channels)};
  if (walk.numel == 0) return out;
  const BatchNormKernels& k = kernels(call.args);
  const Partials parts =
      reduce_pieces(walk, [&](BatchNormSpan span, int64_t c0, int64_t c1, double* a, double* b) {
        k.backward_reduce(call.args, span, c0, c1, a, b);
      });
  for (int64_t slot = 0; slot < parts.slots; ++slot) {
    const double* a = &parts.a[slot * parts.columns];
    const double* b = &parts.b[slot * parts.columns];
    for (int64_t first = 0; first < parts.columns; first += walk.channels) {
      for (int64_t c = 0; c < walk.channels; ++c) {
        out.grad[c] += a[first + c];
        out.grad_centred[c] += b[first + c];
      }
    }
  }
  return out;
}

// grad_x = scale * (g - mean_grad - xhat * mean_grad_xhat), with xhat = (x - mean) * invstd; only
// the first term where the means are empty, for frozen statistics.
std::tuple<Tensor, Tensor> run_backward_apply(const Walk& walk, BackwardCall& call,
                                              const Tensor& invstd, const OptionalTensor& weight,
                                              const std::vector<double>& mean_grad,
                                              const std::vector<double>& mean_grad_xhat,
                                              bool need_grad_x, bool need_grad_residual) {
  const auto grad = [&](bool needed) {
    return needed ? walk.layout.empty(call.x) : at::empty({0}, call.x.options());
  };
  Tensor grad_x = grad(need_grad_x), grad_residual = grad(need_grad_residual);
  if (walk.numel == 0 || (!need_grad_x && !need_grad_residual)) return {grad_x, grad_residual};
  BatchNormArgs args = call.args;
  if (!mean_grad.empty()) {
    const std::vector<double> inverse = channel_values(invstd, walk.channels, 0);
    const std::vector<double> gamma = channel_values(weight, walk.channels, 1);
    std::vector<double> slope(walk.channels), offset(walk.channels);
    for (int64_t c = 0; c < walk.channels; ++c) {
      slope[c] = -gamma[c] * inverse[c] * inverse[c] * mean_grad_xhat[c];
      offset[c] = -gamma[c] * inverse[c] * mean_grad[c];
    }
    args.grad_slope = call.parameters.add(slope);
    args.grad_offset = call.parameters.add(offset);
  }
  args.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_residual = need_grad_residual ? grad_residual.mutable_data_ptr() : nullptr;
  args.streaming = (!need_grad_x || can_stream(grad_x, walk.whole_lines(call.x))) &&
                   (!need_grad_residual || can_stream(grad_residual, walk.whole_lines(call.x)));
  const BatchNormKernels& k = kernels(args);
  for_spans_backwards(walk, args.streaming, [&](BatchNormSpan span, bool is_tail) {
    BatchNormArgs part = args;
    part.streaming = args.streaming && !is_tail;
    k.backward_apply(part, span);
  });
  return {grad_x, grad_residual};
}

Tensor statistic(const Tensor& x, const std::vector<double>& values) {
  Tensor t =
      at::empty({static_cast<int64_t>(values.size())}, x.options().dtype(statistic_dtype(x)));
  write_vector(t, values);
  return t;
}

void update_running(const Tensor& running, const std::vector<double>& batch, double momentum) {
  visit_values(running, [&](auto& value, int64_t c) {
    value = static_cast<std::remove_reference_t<decltype(value)>>(
        (1 - momentum) * static_cast<double>(value) + momentum * batch[c]);
  });
}

}  // namespace

std::vector<double> channel_values(const OptionalTensor& t, int64_t channels, double missing) {
  return t ? to_vector(*t) : std::vector<double>(channels, missing);
}

std::pair<Tensor, Tensor> batch_norm_mean_invstd(const Tensor& x,
                                                 const OptionalTensor& running_mean,
                                                 const OptionalTensor& running_var, bool training,
                                                 double momentum, double eps) {
  const Walk walk(x);
  std::vector<double> mean, invstd;
  if (training) {
    Statistics s = compute_statistics(walk, walk.layout.dense(x));
    const double m = static_cast<double>(walk.count);
    if (running_mean && walk.count > 0) {
      std::vector<double> unbiased = s.m2;
      for (double& v : unbiased) v /= m - 1;
      update_running(*running_mean, s.mean, momentum);
      update_running(*running_var, unbiased, momentum);
    }
    mean = std::move(s.mean);
    invstd = std::move(s.m2);
    for (double& v : invstd) v /= std::max(m, 1.0);
  } else {
    mean = channel_values(running_mean, walk.channels, 0);
    invstd = channel_values(running_var, walk.channels, 0);
  }
  for (double& v : invstd) v = 1 / std::sqrt(v + eps);
  return {statistic(x, mean), statistic(x, invstd)};
}

namespace {

// ---- the ops
// --------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& x) {
  check_input("batch_norm", x);
  const Walk walk(x);
  Statistics s = compute_statistics(walk, walk.layout.dense(x));
  for (double& m2 : s.m2) m2 /= static_cast<double>(std::max<int64_t>(walk.count, 1));
  return {statistic(x, s.mean), statistic(x, s.m2)};
}

std::tuple<Tensor, Tensor> batch_norm_apply(const Tensor& x, const OptionalTensor& residual,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const Tensor& mean,
                                            const Tensor& invstd, std::string_view activation,
                                            double negative_slope) {
  const Activation act = parse_activation(activation);
  check_batch_norm_apply(x, residual, weight, bias, mean, invstd);
  const Walk walk(x);
  return run_apply(walk, walk.layout.dense(x), residual, weight, bias, mean, invstd, act,
                   negative_slope);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double momentum, double eps,
    std::string_view activation, double negative_slope) {
  const Activation act = parse_activation(activation);
  check_batch_norm_forward(x, residual, weight, bias, running_mean, running_var, training, momentum,
                           eps);
  const Walk walk(x);
  const Tensor dense = walk.layout.dense(x);
  const auto [mean, invstd] =
      batch_norm_mean_invstd(dense, running_mean, running_var, training, momentum, eps);
  auto [y, mask] =
      run_apply(walk, dense, residual, weight, bias, mean, invstd, act, negative_slope);
  return {y, mean, invstd, mask};
}

std::tuple<Tensor, Tensor> batch_norm_backward_reduce(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, std::string_view activation, double negative_slope) {
  const Activation act = parse_activation(activation);
  check_input("batch_norm", x);
  const Walk walk(x);
  check_batch_norm_backward(grad_y, x, residual, mask, walk.mask_bytes, weight, bias, mean, invstd,
                            act);
  const BackwardCall call(walk, grad_y, x, residual, mask, weight, bias, mean, invstd, act,
                          negative_slope);
  GradSums sums = run_reduce(walk, call);
  const std::vector<double> inverse = channel_values(invstd, walk.channels, 0);
  for (int64_t c = 0; c < walk.channels; ++c) sums.grad_centred[c] *= inverse[c];
  return {statistic(x, sums.grad), statistic(x, sums.grad_centred)};
}

std::tuple<Tensor, Tensor> batch_norm_backward_apply(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, const OptionalTensor& mean_grad,
    const OptionalTensor& mean_grad_xhat, std::string_view activation, double negative_slope,
    bool need_grad_x, bool need_grad_residual) {
  const Activation act = parse_activation(activation);
  check_input("batch_norm", x);
  const Walk walk(x);
  check_batch_norm_backward(grad_y, x, residual, mask, walk.mask_bytes, weight, bias, mean, invstd,
                            act);
  TORCH_CHECK_VALUE(mean_grad.has_value() == mean_grad_xhat.has_value(),
                    "mean_grad and mean_grad_xhat must either both be None or neither be None");
  if (mean_grad) {
    check_statistic("mean_grad", *mean_grad, x);
    check_statistic("mean_grad_xhat", *mean_grad_xhat, x);
  }
  BackwardCall call(walk, grad_y, x, residual, mask, weight, bias, mean, invstd, act,
                    negative_slope);
  std::vector<double> means, means_xhat;
  if (mean_grad) {
    means = channel_values(mean_grad, walk.channels, 0);
    means_xhat = channel_values(mean_grad_xhat, walk.channels, 0);
  }
  return run_backward_apply(walk, call, invstd, weight, means, means_xhat, need_grad_x,
                            need_grad_residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, std::string_view activation,
    double negative_slope, std::array<bool, 4> output_mask) {
  const Activation act = parse_activation(activation);
  check_input("batch_norm", x);
  const Walk walk(x);
  check_batch_norm_backward(grad_y, x, residual, mask, walk.mask_bytes, weight, bias, mean, invstd,
                            act);
  BackwardCall call(walk, grad_y, x, residual, mask, weight, bias, mean, invstd, act,
                    negative_slope);
  const auto [need_x, need_residual, need_weight, need_bias] = output_mask;
  GradSums sums{std::vector<double>(walk.channels), std::vector<double>(walk.channels)};
  // Through a ReLU, grad_residual is grad_y or zero: for a large tensor the reduction writes it,
  // and the second pass reads it in place of grad_y and mask. From memory, two tensors in and one
  // out, twice, are quicker than two in, then two in and two out; from a cache they are not.
  const bool written_early = need_x && need_residual && training && act == Activation::relu &&
                             call.args.mask != nullptr &&
                             static_cast<int64_t>(call.x.nbytes()) >= 4 * kStreamBytes;
  Tensor early;
  if (written_early) {
    early = walk.layout.empty(call.x);
    call.args.grad_residual = early.mutable_data_ptr();
    call.args.streaming = walk.channels_last && can_stream(early, walk.whole_lines(early));
  }
  if (need_weight || need_bias || (need_x && training)) sums = run_reduce(walk, call);
  if (written_early) {
    call.args.grad_y = call.args.grad_residual;
    call.args.activation = Activation::identity;
    call.args.has_residual = false;
  }
  const std::vector<double> inverse = channel_values(invstd, walk.channels, 0);
  for (int64_t c = 0; c < walk.channels; ++c) sums.grad_centred[c] *= inverse[c];

  std::vector<double> mean_grad, mean_grad_xhat;
  if (training) {
    const double m = static_cast<double>(std::max<int64_t>(walk.count, 1));
    for (double sum : sums.grad) mean_grad.push_back(sum / m);
    for (double sum : sums.grad_centred) mean_grad_xhat.push_back(sum / m);
  }
  auto [grad_x, grad_residual] =
      run_backward_apply(walk, call, invstd, weight, mean_grad, mean_grad_xhat, need_x,
                         need_residual && !written_early);
  if (written_early) grad_residual = early;
  const auto parameter_grad = [&](const OptionalTensor& parameter, bool needed,
                                  const std::vector<double>& values) {
    const auto dtype = parameter ? parameter->scalar_type() : statistic_dtype(x);
    Tensor grad = at::empty({needed ? walk.channels : 0}, x.options().dtype(dtype));
    if (needed) write_vector(grad, values);
    return grad;
  };
  return {grad_x, grad_residual, parameter_grad(weight, need_weight, sums.grad_centred),
          parameter_grad(bias, need_bias, sums.grad)};
}

}  // namespace
}  // namespace resops

TORCH_LIBRARY_IMPL(resops, CPU, m) {
  m.impl("batch_norm_statistics", &resops::batch_norm_statistics);
  m.impl("batch_norm_apply", &resops::batch_norm_apply);
  m.impl("batch_norm_forward", &resops::batch_norm_forward);
  m.impl("batch_norm_backward_reduce", &resops::batch_norm_backward_reduce);
  m.impl("batch_norm_backward_apply", &resops::batch_norm_backward_apply);
  m.impl("batch_norm_backward", &resops::batch_norm_backward);
}
