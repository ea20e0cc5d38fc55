// What the drivers of convolutions share: arguments as they come and as kernels take them, and the
// sums of blocks that threads compute on their own.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/types.h"
#include "convolution_views.h"
#include "driver.h"

namespace resops {

// act( scale * x + shift ), per channel.
struct ChannelPrologue {
  std::optional<at::Tensor> scale, shift;
  Activation activation = Activation::identity;
  double negative_slope = 0;
};

// What is applied to the output before it is rounded, in this order.
struct ConvolutionEpilogue {
  std::optional<at::Tensor> bias;
  std::optional<at::Tensor> addend;  // like the output
  Activation activation = Activation::identity;
  double negative_slope = 0;
  // The derivative of act( scale * argument + shift ), by which the output is multiplied.
  ChannelPrologue derivative;
  std::optional<at::Tensor> argument;
  // Of the rounded output: mean and variance; or, with `mean` and `invstd`, the sums of the output
  // and of the output times (argument - mean) * invstd.
  bool statistics = false;
  std::optional<at::Tensor> mean, invstd;
};

// `t` itself where neighbouring channels have neighbouring places, else a channels-last copy.
at::Tensor with_dense_channels(const at::Tensor& t);

ImageView view(const at::Tensor& t);

WeightView weight_view(const at::Tensor& w);

// A vector as kernels read it, whole packs at a time.
std::vector<float> padded_vector(const at::Tensor& t);

// A prologue and the vectors that it points to.
struct PrologueValues {
  explicit PrologueValues(const ChannelPrologue& from);
  PrologueValues(const PrologueValues&) = delete;
  std::vector<float> scale, shift;
  Prologue prologue;
};

// What the output of a convolution into `out` points to. `prepared` makes of a tensor one that
// kernels can read.
struct OutputValues {
  OutputValues(const ConvolutionEpilogue& epilogue, const at::Tensor& out,
               at::Tensor (*prepared)(const at::Tensor&), ConvolutionOutput& output);
  OutputValues(const OutputValues&) = delete;
  PrologueValues derivative;
  std::vector<float> bias, mean;
  at::Tensor addend, argument;
};

// How many of `count` make a block, so that all blocks are nearly equal and none has more than
// `most`.
inline int64_t equal_blocks(int64_t count, int64_t most) {
  return ceil_div(count, ceil_div(count, std::max<int64_t>(most, 1)));
}

// Sums of a convolution's blocks, in the order of the blocks.
struct BlockSums {
  BlockSums(int64_t blocks, int64_t channels_, bool wanted)
      : channels(channels_),
        counts(blocks),
        first(wanted ? blocks * channels_ : 0),
        second(first) {}

  double* first_at(int64_t block) { return first.data() + (first.empty() ? 0 : block * channels); }
  double* second_at(int64_t block) {
    return second.data() + (second.empty() ? 0 : block * channels);
  }

  // Chan, Golub and LeVeque's merge of (count, mean, M2): mean and variance of everything.
  void merge_statistics() {
    double total = static_cast<double>(counts[0]);
    for (size_t block = 1; block < counts.size(); ++block) {
      const double count = static_cast<double>(counts[block]), sum = total + count;
      for (int64_t c = 0; c < channels; ++c) {
        const double delta = first_at(block)[c] - first[c];
        first[c] += delta * (count / sum);
        second[c] += second_at(block)[c] + delta * delta * (total * count / sum);
      }
      total = sum;
    }
    for (int64_t c = 0; c < channels; ++c) second[c] /= total;
  }
  void add_up() {
    for (size_t block = 1; block < counts.size(); ++block) {
      for (int64_t c = 0; c < channels; ++c) {
        first[c] += first_at(block)[c];
        second[c] += second_at(block)[c];
      }
    }
  }

  // The two vectors of the epilogue, empty ones where there are none.
  std::tuple<at::Tensor, at::Tensor> merged(Sums sums, const ConvolutionEpilogue& epilogue,
                                            const at::Tensor& out);

  int64_t channels;
  std::vector<int64_t> counts;
  std::vector<double> first, second;  // of all blocks; merged, in the first `channels`
};

// The weight of a folded convolution as conv_bn_act_folded's kernels multiply by it, for an output
// of this size: at all points (3x3) or packed (1x1). Checks its argument.
at::Tensor prepared_weight(const at::Tensor& weight, int64_t out_height, int64_t out_width);

}  // namespace resops
