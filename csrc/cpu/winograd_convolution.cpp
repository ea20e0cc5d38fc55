// Cuts a convolution into blocks of tiles and hands them to the kernels. How it is cut depends on
// its size alone, and sums are merged in the order of the blocks: the bits are the same for any
// number of threads. A thread's workspace is at most 64 MB; docs/math/conv_bn_act.md says what the
// numbers below weigh against each other.

#include "winograd_convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "../common/tensor_checks.h"
#include "conv_bn_act_kernels.h"
#include "convolution_tensors.h"
#include "driver.h"
#include "scratch.h"

namespace resops {
namespace {

using at::Tensor;

const WinogradKernels& kernels() { return RESOPS_ACTIVE_KERNELS(winograd_kernels); }

constexpr int64_t kOperandBytes = int64_t{24} << 20;  // of a block's operands
constexpr int64_t kCacheBytes = int64_t{1} << 20;     // of the second-level cache, or a half
constexpr int64_t kProductBytes = int64_t{32} << 20;  // of a weight's gradient at all points
// At most so many channels of the weight's gradient are computed together: of the output, of the
// input. The product is 2.4 MB at 36 points; a smaller one would read the operands more often.
// Where there is one block, it is read again at once, and half of it stays in the second-level
// cache: 1.2 times as fast for 512 channels of 7x7.
constexpr int64_t kGradientRows = 140, kRowsOfOneBlock = 70, kGradientColumns = 128;

int64_t points(int tile) { return (tile + 2) * (tile + 2); }

Tensor float_buffer(int64_t size) { return at::empty({size}, at::kFloat); }

// With inputs and outputs exchanged, and turned by half a circle, if `turned`.
WeightView oriented_view(const Tensor& w, bool turned) {
  WeightView v = weight_view(w);
  if (turned) {
    std::swap(v.out_stride, v.in_stride);
    v.data = static_cast<char*>(v.data) +
             2 * (v.row_stride + v.column_stride) * static_cast<int64_t>(w.element_size());
    v.row_stride = -v.row_stride;
    v.column_stride = -v.column_stride;
  }
  return v;
}

// Images and what is cut from them. Keeps the tensors that it points to.
struct Images {
  Images(at::TensorList inputs, const ChannelPrologue& from, at::IntArrayRef padding,
         int64_t out_channels, int64_t out_height, int64_t out_width)
      : prologue(from) {
    geometry.dtype = kernel_dtype(inputs[0]);
    geometry.tile = winograd_tile(out_height, out_width);
    geometry.height = inputs[0].size(2);
    geometry.width = inputs[0].size(3);
    geometry.out_channels = out_channels;
    geometry.out_height = out_height;
    geometry.out_width = out_width;
    geometry.pad_h = padding[0];
    geometry.pad_w = padding[1];
    geometry.tile_rows = ceil_div(out_height, geometry.tile);
    geometry.tile_columns = ceil_div(out_width, geometry.tile);
    geometry.in_channels = 0;
    for (const Tensor& x : inputs) {
      tensors.push_back(with_dense_channels(x));
      views.push_back(view(tensors.back()));
      geometry.in_channels += x.size(1);
    }
    geometry.inputs = views.data();
    geometry.input_count = static_cast<int64_t>(views.size());
    geometry.prologue = prologue.prologue;
    tiles = inputs[0].size(0) * geometry.tile_rows * geometry.tile_columns;
  }
  Images(const Images&) = delete;

  PrologueValues prologue;
  std::vector<Tensor> tensors;
  std::vector<ImageView> views;
  WinogradGeometry geometry{};
  int64_t tiles;
};

// Of the convolution. Few channels: what a block needs stays in the second-level cache. Many: there
// the weight does not, and is used for more tiles each time it is read.
int64_t convolution_block(const WinogradGeometry& g, int64_t tiles) {
  const int64_t channels = g.in_channels + g.out_channels;
  const int64_t wanted = (channels <= 256 ? 28 : 112) * (g.tile == 4 ? 1 : 2);
  const int64_t bytes = points(g.tile) * (channels + 64) * static_cast<int64_t>(sizeof(float));
  return equal_blocks(tiles, std::min(wanted, kOperandBytes / bytes));
}

// Of the gradient of the weight: a block's operands are written and read once, the product is read
// and written once per block. So the operands are twice as large as the product, within bounds: in
// the second-level cache beside a small product, and what the workspace allows beside a large one.
int64_t gradient_block(const WinogradGeometry& g, int64_t tiles) {
  const int64_t float_points = points(g.tile) * static_cast<int64_t>(sizeof(float));
  const int64_t wanted =
      std::clamp(2 * float_points * g.in_channels * g.out_channels, kCacheBytes, kOperandBytes);
  return equal_blocks(tiles, wanted / (float_points * (g.in_channels + g.out_channels + 64)));
}

// All blocks of a convolution.
void convolve_blocks(const WinogradGeometry& g, const WinogradOutput& output, int64_t tiles,
                     int64_t block, BlockSums& sums) {
  const WinogradKernels& k = kernels();
  const int64_t blocks = ceil_div(tiles, block), panels = ceil_div(g.out_channels, k.panel);
  const auto operands_of = [&](int64_t i, float* inputs) {
    return WinogradOperands{inputs, nullptr, i * block, std::min(block, tiles - i * block), block};
  };
  const int64_t operand_size = k.operand_size(g.tile, g.in_channels, block);
  if (blocks >= at::get_num_threads()) {
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch inputs(operand_size);
      const Scratch space(k.workspace_size(g, block, g.out_channels));
      for (int64_t i = begin; i < end; ++i) {
        const WinogradOperands operands = operands_of(i, inputs.data());
        k.transform_inputs(g, operands, 0, operands.tiles);
        sums.counts[i] = k.convolve(g, output, operands, {0, g.out_channels}, space.data(),
                                    sums.first_at(i), sums.second_at(i));
      }
    });
    return;
  }
  // Fewer blocks than threads: each block by all of them, first its tiles, then its channels.
  const Scratch inputs(operand_size);
  for (int64_t i = 0; i < blocks; ++i) {
    const WinogradOperands operands = operands_of(i, inputs.data());
    at::parallel_for(0, operands.tiles, 4, [&](int64_t begin, int64_t end) {
      k.transform_inputs(g, operands, begin, end);
    });
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const ChannelRange range{begin * k.panel, std::min(end * k.panel, g.out_channels)};
      const Scratch space(k.workspace_size(g, block, range.end - range.begin));
      double* first = sums.first_at(i) + (sums.first.empty() ? 0 : range.begin);
      double* second = sums.second_at(i) + (sums.first.empty() ? 0 : range.begin);
      const int64_t count = k.convolve(g, output, operands, range, space.data(), first, second);
      if (begin == 0) sums.counts[i] = count;
    });
  }
}

Tensor transform_weight(const WeightView& weight, int tile, int64_t in_channels,
                        int64_t out_channels) {
  const WinogradKernels& k = kernels();
  Tensor transformed = float_buffer(k.weight_size(tile, in_channels, out_channels));
  float* data = transformed.mutable_data_ptr<float>();
  at::parallel_for(0, ceil_div(out_channels, k.panel), 1, [&](int64_t begin, int64_t end) {
    k.transform_weight(tile, weight, in_channels,
                       {begin * k.panel, std::min(end * k.panel, out_channels)}, data);
  });
  return transformed;
}

}  // namespace

int winograd_tile(int64_t out_height, int64_t out_width) {
  const auto multiplications = [&](int64_t tile) {
    return points(static_cast<int>(tile)) * ceil_div(out_height, tile) * ceil_div(out_width, tile);
  };
  return multiplications(2) < multiplications(4) ? 2 : 4;
}

Tensor winograd_transform_weight(const Tensor& weight, bool turned, int tile) {
  const int64_t in_channels = weight.size(turned ? 0 : 1),
                out_channels = weight.size(turned ? 1 : 0);
  return transform_weight(oriented_view(weight, turned), tile, in_channels, out_channels);
}

bool is_transformed_weight(const Tensor& transformed, at::IntArrayRef weight_size, int tile) {
  return transformed.scalar_type() == at::kFloat && transformed.is_contiguous() &&
         transformed.numel() == kernels().weight_size(tile, weight_size[1], weight_size[0]);
}

std::tuple<Tensor, Tensor> winograd_forward(at::TensorList inputs, const ChannelPrologue& prologue,
                                            const Tensor& weight, bool turned,
                                            at::IntArrayRef padding,
                                            const ConvolutionEpilogue& epilogue,
                                            const Tensor* transformed, const Tensor& out) {
  const Images images(inputs, prologue, padding, out.size(1), out.size(2), out.size(3));
  const WinogradGeometry& g = images.geometry;
  const int64_t block = convolution_block(g, images.tiles);

  WinogradOutput output;
  output.raw_weight = oriented_view(weight, turned);
  // A weight that is used by one block alone is transformed on the way.
  const bool on_the_way = transformed == nullptr && block >= images.tiles;
  Tensor at_points = transformed ? *transformed : Tensor();
  if (!transformed && !on_the_way) {
    at_points = transform_weight(output.raw_weight, g.tile, g.in_channels, g.out_channels);
  }
  if (!on_the_way) output.weight = at_points.const_data_ptr<float>();
  const OutputValues values(epilogue, out, with_dense_channels, output);

  BlockSums sums(ceil_div(images.tiles, block), g.out_channels, output.sums != Sums::none);
  convolve_blocks(g, output, images.tiles, block, sums);
  return sums.merged(output.sums, epilogue, out);
}

void winograd_backward_weight(const Tensor& grad_y, at::TensorList inputs,
                              const ChannelPrologue& prologue, at::IntArrayRef padding,
                              const Tensor& grad_weight) {
  const WinogradKernels& k = kernels();
  const Images images(inputs, prologue, padding, grad_y.size(1), grad_y.size(2), grad_y.size(3));
  const WinogradGeometry& g = images.geometry;
  const Tensor grad = with_dense_channels(grad_y);
  const ImageView grad_view = view(grad);
  const WeightView out = weight_view(grad_weight);
  const int64_t block = gradient_block(g, images.tiles), blocks = ceil_div(images.tiles, block);
  // A unit of work is the product of some input channels, the columns, and some output channels,
  // the rows. There is one for each thread at least; which unit a value is in does not change it.
  const int64_t most_columns = ceil_div(ceil_div(g.in_channels, k.panel), at::get_num_threads());
  const int64_t columns = std::min(most_columns * k.panel, kGradientColumns);
  const int64_t rows = equal_blocks(g.out_channels, blocks == 1 ? kRowsOfOneBlock : kGradientRows);
  const int64_t row_ranges = ceil_div(g.out_channels, rows);
  const int64_t all_units = ceil_div(g.in_channels, columns) * row_ranges;
  const int64_t unit_size = k.product_size(g.tile, columns, rows);
  // With several blocks the products of all units wait for the next one; of as many as may wait.
  const int64_t waiting = kProductBytes / (unit_size * static_cast<int64_t>(sizeof(float)));
  const int64_t group = blocks == 1 ? all_units : equal_blocks(all_units, waiting);

  const Scratch inputs_at_points(k.operand_size(g.tile, g.in_channels, block));
  const Scratch gradients_at_points(k.operand_size(g.tile, g.out_channels, block));
  const Scratch products(blocks == 1 ? 0 : group * unit_size);
  WinogradOperands operands{inputs_at_points.data(), gradients_at_points.data(), 0, 0, block};
  for (int64_t first = 0; first < all_units; first += group) {
    const int64_t units = std::min(group, all_units - first);
    for (int64_t i = 0; i < blocks; ++i) {
      operands.first_tile = i * block;
      operands.tiles = std::min(block, images.tiles - i * block);
      at::parallel_for(0, operands.tiles, 4, [&](int64_t begin, int64_t end) {
        k.transform_inputs(g, operands, begin, end);
        k.transform_gradients(g, grad_view, operands, begin, end);
      });
      at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
        const Scratch own(blocks == 1 ? unit_size : 0);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t c = (first + unit) / row_ranges * columns;
          const int64_t row = (first + unit) % row_ranges * rows;
          float* product = blocks == 1 ? own.data() : products.data() + unit * unit_size;
          k.gradient(g, operands, {c, std::min(c + columns, g.in_channels)},
                     {row, std::min(row + rows, g.out_channels)}, i > 0, i + 1 == blocks, product,
                     out);
        }
      });
    }
  }
}

}  // namespace resops
