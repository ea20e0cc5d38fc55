// Cuts a 1x1 convolution into blocks of rows, the gradient of its weight into parts of the weight,
// and hands them to the kernels. How it is cut depends on its size alone, and sums are merged in
// the order of the blocks: the bits are the same for any number of threads. docs/math/
// conv_bn_act.md says what the numbers below weigh against each other.

#include "pointwise_convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <utility>

#include "../common/tensor_checks.h"
#include "conv_bn_act_pointwise_kernels.h"
#include "driver.h"
#include "scratch.h"

namespace resops {
namespace {

using at::Tensor;

const PointwiseKernels& kernels() { return RESOPS_ACTIVE_KERNELS(pointwise_kernels); }

constexpr int64_t kFloatBytes = sizeof(float);
// Rows of a block: what it reads stays in the second-level cache while the panels of the weight
// pass by.
constexpr int64_t kLeastRows = 56, kMostRows = 224, kRowBytes = int64_t{1} << 20;
// A larger weight is packed panel by panel, again for each block.
constexpr int64_t kPackedBytes = int64_t{32} << 20;
// Of the gradient of the weight: rows that are taken at a time, and what they may need.
constexpr int64_t kLeastStep = 64, kMostStep = 256, kStepBytes = int64_t{1} << 20;
constexpr int64_t kProductBytes = int64_t{32} << 20;
// Of the gradient's output channels that are computed together at most.
constexpr int64_t kMostOutChannels = 4096;

bool is_dense(const Tensor& weight) {
  return (weight.size(1) == 1 || weight.stride(1) == 1) &&
         (weight.size(0) == 1 || weight.stride(0) == weight.size(1));
}

Tensor with_even_rows(const Tensor& t) {
  return has_even_rows(t) ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

// The step between positions of a tensor with even rows.
int64_t row_step(const Tensor& t) {
  for (const int64_t d : {3, 2, 0}) {
    if (t.size(d) > 1) return t.stride(d);
  }
  return t.size(1);
}

// One image with one column.
ImageView column_view(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.size(1), 0, row_step(t), 0};
}

// Tensors side by side as rows. Keeps what it points to.
struct Rows {
  Rows(at::TensorList inputs, const ChannelPrologue& from, at::IntArrayRef stride, int64_t height,
       int64_t width)
      : prologue(from) {
    rows.dtype = kernel_dtype(inputs[0]);
    rows.channels = 0;
    rows.height = height;
    rows.width = width;
    bool even = true;
    for (const Tensor& x : inputs) {
      tensors.push_back(with_dense_channels(x));
      const Tensor& dense = tensors.back();
      views.push_back(view(dense));
      views.back().row_stride *= stride[0];
      views.back().column_stride *= stride[1];
      rows.channels += x.size(1);
      even = even && stride[0] == 1 && stride[1] == 1 && has_even_rows(dense);
    }
    count = inputs[0].size(0) * height * width;
    if (even) {  // one image with one row
      for (size_t i = 0; i < views.size(); ++i) views[i].column_stride = row_step(tensors[i]);
      rows.height = 1;
      rows.width = count;
    }
    rows.slices = views.data();
    rows.slice_count = static_cast<int64_t>(views.size());
    rows.prologue = prologue.prologue;
  }
  Rows(const Rows&) = delete;

  PrologueValues prologue;
  std::vector<Tensor> tensors;
  std::vector<ImageView> views;
  PointwiseRows rows{};
  int64_t count;  // of rows
};

// A dense weight as a matrix, with inputs and outputs exchanged if `turned`.
WeightView matrix_view(const Tensor& weight, bool turned) {
  WeightView v = weight_view(weight);
  v.out_stride = weight.size(1);
  v.in_stride = 1;
  if (turned) std::swap(v.in_stride, v.out_stride);
  return v;
}

void pack_weight(const WeightView& weight, int64_t in_channels, int64_t out_channels,
                 float* packed) {
  const PointwiseKernels& k = kernels();
  at::parallel_for(0, ceil_div(out_channels, k.panel), 1, [&](int64_t begin, int64_t end) {
    k.pack_weight(weight, in_channels, {begin * k.panel, std::min(end * k.panel, out_channels)},
                  packed);
  });
}

}  // namespace

Tensor pointwise_pack_weight(const Tensor& weight) {
  const Tensor dense = weight.contiguous();
  const int64_t in_channels = weight.size(1), out_channels = weight.size(0);
  Tensor packed = at::empty({kernels().weight_size(in_channels, out_channels)}, at::kFloat);
  pack_weight(matrix_view(dense, false), in_channels, out_channels,
              packed.mutable_data_ptr<float>());
  return packed;
}

bool is_packed_weight(const Tensor& packed, at::IntArrayRef weight_size) {
  return packed.scalar_type() == at::kFloat && packed.is_contiguous() &&
         packed.numel() == kernels().weight_size(weight_size[1], weight_size[0]);
}

bool has_even_rows(const Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) return false;
  int64_t expected = 0;  // step to the next place in the dimension; 0 as long as there is none
  for (const int64_t d : {3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (expected != 0 && t.stride(d) != expected) return false;
    if (expected == 0 && t.stride(d) < t.size(1)) return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

std::tuple<Tensor, Tensor> pointwise_forward(at::TensorList inputs, const ChannelPrologue& prologue,
                                             const Tensor& weight, bool turned,
                                             at::IntArrayRef stride,
                                             const ConvolutionEpilogue& epilogue,
                                             const Tensor* packed, const Tensor& out) {
  const PointwiseKernels& k = kernels();
  const Rows from(inputs, prologue, stride, out.size(2), out.size(3));
  const int64_t in_channels = from.rows.channels, out_channels = out.size(1);
  const int64_t panels = ceil_div(out_channels, k.panel);
  const int64_t most = std::clamp(kRowBytes / (in_channels * kFloatBytes), kLeastRows, kMostRows);
  const int64_t block = equal_blocks(from.count, most), blocks = ceil_div(from.count, block);

  const Tensor dense_weight = is_dense(weight) ? weight : weight.contiguous();
  PointwiseWeight operand{nullptr, matrix_view(dense_weight, turned)};
  const int64_t weight_size = k.weight_size(in_channels, out_channels);
  // A weight that is used by one block alone is packed on the way.
  const bool pack = !packed && blocks > 1 && weight_size * kFloatBytes <= kPackedBytes;
  const Scratch own(pack ? weight_size : 0);
  if (pack) pack_weight(operand.raw, in_channels, out_channels, own.data());
  if (pack) operand.packed = own.data();
  if (packed) operand.packed = packed->const_data_ptr<float>();
  const auto range_of = [&](int64_t begin, int64_t end) {
    return ChannelRange{begin * k.panel, std::min(end * k.panel, out_channels)};
  };

  ConvolutionOutput output;
  const OutputValues values(epilogue, out, with_even_rows, output);
  output.out = column_view(out);
  if (epilogue.addend) output.addend = column_view(values.addend);
  if (epilogue.argument) output.argument = column_view(values.argument);

  BlockSums sums(blocks, out_channels, output.sums != Sums::none);
  const auto rows_of = [&](int64_t i) {
    return RowRange{std::min(i * block, from.count), std::min((i + 1) * block, from.count)};
  };
  for (int64_t i = 0; i < blocks; ++i) sums.counts[i] = rows_of(i).end - rows_of(i).begin;
  // Fewer blocks than threads: each block by all of them, some panels each.
  const int64_t parts = blocks >= at::get_num_threads() ? 1 : panels;
  const int64_t workspace = k.workspace_size(from.rows, block, out_channels);
  const auto run = [&](int64_t i, ChannelRange range, float* space) {
    const size_t offset = sums.first.empty() ? 0 : range.begin;
    k.convolve(from.rows, operand, output, rows_of(i), rows_of(i + 1), range, space,
               sums.first_at(i) + offset, sums.second_at(i) + offset);
  };
  if (parts == 1) {
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch space(workspace);
      for (int64_t i = begin; i < end; ++i) run(i, {0, out_channels}, space.data());
    });
  } else {
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Scratch space(workspace);
      for (int64_t i = 0; i < blocks; ++i) run(i, range_of(begin, end), space.data());
    });
  }
  return sums.merged(output.sums, epilogue, out);
}

void pointwise_backward_weight(const Tensor& grad_y, at::TensorList inputs,
                               const ChannelPrologue& prologue, at::IntArrayRef stride,
                               const Tensor& grad_weight) {
  const PointwiseKernels& k = kernels();
  const std::array<int64_t, 2> every{1, 1};
  const Rows from(inputs, prologue, stride, grad_y.size(2), grad_y.size(3));
  const Rows grads({&grad_y, 1}, {}, every, grad_y.size(2), grad_y.size(3));
  const int64_t in_channels = from.rows.channels, out_channels = grad_y.size(1);
  const WeightView out = matrix_view(grad_weight, false);

  // A unit of work is the product for some input and some output channels. There is one for each
  // thread at least; which unit a value is in does not change it.
  const int64_t threads = at::get_num_threads(), panels = ceil_div(in_channels, k.panel);
  const int64_t row_parts =
      std::max(ceil_div(out_channels, kMostOutChannels),
               std::min(ceil_div(threads, panels), ceil_div(out_channels, k.panel)));
  const int64_t rows = ceil_div(ceil_div(out_channels, row_parts), k.panel) * k.panel;
  const int64_t fitting = std::max<int64_t>(kProductBytes / (rows * kFloatBytes * k.panel), 1);
  const int64_t columns = std::min(ceil_div(panels, threads), fitting) * k.panel;
  const int64_t row_ranges = ceil_div(out_channels, rows);
  const int64_t units = ceil_div(in_channels, columns) * row_ranges;
  const int64_t step = std::clamp(kStepBytes / (out_channels * kFloatBytes), kLeastStep, kMostStep);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t c = unit / row_ranges * columns, row = unit % row_ranges * rows;
      const ChannelRange in{c, std::min(c + columns, in_channels)};
      const ChannelRange of_out{row, std::min(row + rows, out_channels)};
      const Scratch space(k.gradient_workspace_size(step, in, of_out));
      k.gradient(from.rows, grads.rows, from.count, step, in, of_out, space.data(), out);
    }
  });
}

}  // namespace resops
