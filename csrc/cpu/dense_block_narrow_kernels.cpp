// The 1x1 convolution of a dense layer on a CPU, between the passes over what it reads.
//
// A block of the buffer is normalised into the second-level cache and multiplied there. Backward
// the gradient of what is multiplied stays in that cache too: from there it goes into the sum over
// all consumers, and in the same pass the block is normalised again for the gradient of the weight.
// So the buffer, the sum and the narrow tensor are all that passes through memory, each once.

#include "dense_block_narrow_kernels.h"

#include <algorithm>
#include <array>

#include "matrix.h"
#include "simd.h"

namespace resops::RESOPS_ISA {
namespace {

// Between the parts of a workspace: the last vector of a row may be written past its end.
constexpr int64_t kGap = kPanel;
constexpr int64_t kTile = kNarrowRows * kNarrowChannels + kGap;

int64_t up_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t panel_size(int64_t channels, int64_t outputs) {
  return up_to(channels, kPanel) * up_to(outputs, kPanel);
}
int64_t workspace_size() { return 2 * kTile; }
int64_t gradient_width(int64_t channels) { return up_to(channels, kLanes); }

// Panels of kPanel outputs: panel[channel][output].
void pack_forward(const float* weight, int64_t channels, int64_t outputs, float* panel) {
  for (int64_t n = 0; n < outputs; n += kLanes) {
    float* const to = panel + n / kPanel * kPanel * channels + n % kPanel;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = std::min<int64_t>(channels - c, kLanes);
      Pack<float> block[kLanes];
      for (int r = 0; r < kLanes; ++r) block[r] = load(weight + (n + r) * channels + c, count);
      transpose(block);
      for (int64_t i = 0; i < count; ++i) store(to + (c + i) * kPanel, block[i]);
    }
  }
}

// Panels of kPanel channels: panel[output][channel], zeros behind the last one.
void pack_backward(const float* weight, int64_t channels, int64_t outputs, float* panel) {
  for (int64_t c = 0; c < channels; c += kPanel, panel += kPanel * outputs) {
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const int64_t count = std::clamp<int64_t>(channels - c - i, 0, kLanes);
        store(panel + n * kPanel + i, load(weight + n * channels + c + i, count));
      }
    }
  }
}

const float* from_channel(const void* values, int64_t c) {
  return static_cast<const float*>(values) + c;
}

// The same pass from a row on and over `count` channels from c on alone.
DenseBlockArgs of_block(const DenseBlockArgs& a, int64_t row, int64_t c, int64_t count) {
  DenseBlockArgs part = a;
  part.channels = count;
  part.x = from_channel(a.x, row * a.x_stride + c);
  part.mean = from_channel(a.mean, c);
  part.scale = from_channel(a.scale, c);
  part.bias = from_channel(a.bias, c);
  if (a.factor) part.factor = from_channel(a.factor, c);
  if (a.grad_sum) part.grad_sum = static_cast<float*>(a.grad_sum) + row * a.grad_sum_stride + c;
  return part;
}

// f(begin, end) for equal blocks of at most kNarrowRows rows.
template <class F>
void for_blocks(int64_t begin, int64_t end, F f) {
  const int64_t blocks = (end - begin + kNarrowRows - 1) / kNarrowRows;
  for (int64_t i = 0; i < blocks; ++i) {
    f(begin + (end - begin) * i / blocks, begin + (end - begin) * (i + 1) / blocks);
  }
}

template <class F>
void for_channels(int64_t first, int64_t last, F f) {
  for (int64_t c = first; c < last; c += kNarrowChannels) {
    f(c, std::min(last - c, kNarrowChannels));
  }
}

void forward(const NarrowArgs& a, int64_t begin, int64_t end, float* workspace) {
  const int64_t channels = a.norm.channels, outputs = a.outputs;
  for_blocks(begin, end, [&](int64_t row, int64_t stop) {
    for_channels(0, channels, [&](int64_t c, int64_t count) {
      DenseBlockArgs norm = of_block(a.norm, row, c, count);
      norm.out = workspace;
      dense_block_kernels.apply(norm, 0, stop - row);
      for (int64_t n = 0; n < outputs; n += kPanel) {
        const Product product{
            workspace, count, a.panel + n * channels + c * kPanel, kPanel, a.c + row * outputs + n,
            outputs,   count};
        if (c == 0) {
          multiply<false, false>(product, stop - row, outputs - n);
        } else {
          multiply<false, true>(product, stop - row, outputs - n);
        }
      }
    });
  });
}

void backward(const NarrowArgs& a, int64_t begin, int64_t end, int64_t first, int64_t last,
              const NarrowSums& sums, float* workspace) {
  const int64_t outputs = a.outputs, width = gradient_width(a.norm.channels);
  float* const grad = workspace;
  float* const z = workspace + kTile;
  std::fill(sums.grad + first, sums.grad + last, 0.0);
  std::fill(sums.grad_centred + first, sums.grad_centred + last, 0.0);
  for_blocks(begin, end, [&](int64_t row, int64_t stop) {
    for_channels(first, last, [&](int64_t c, int64_t count) {
      const float* const grad_c = a.grad_c + row * outputs;
      for (int64_t i = 0; i < count; i += kPanel) {
        multiply<false, false>({grad_c, outputs, a.panel + (c + i) * outputs, kPanel, grad + i,
                                kNarrowChannels, outputs},
                               stop - row, count - i);
      }
      DenseBlockArgs norm = of_block(a.norm, row, c, count);
      norm.grad_y = grad;
      norm.out = a.of_weight ? z : nullptr;
      norm.grad_y_stride = kNarrowChannels;
      std::array<double, kNarrowChannels> sum, product;
      dense_block_kernels.accumulate(norm, 0, stop - row, sum.data(), product.data());
      for (int64_t i = 0; i < count; ++i) {
        sums.grad[c + i] += sum[i];
        sums.grad_centred[c + i] += product[i];
      }
      if (!a.of_weight) return;
      for (int64_t i = 0; i < count; i += kPanel) {
        const Product block{grad_c, outputs,   z + i, count, sums.grad_weight + c + i,
                            width,  stop - row};
        if (row == begin) {
          multiply<true, false>(block, outputs, count - i);
        } else {
          multiply<true, true>(block, outputs, count - i);
        }
      }
    });
  });
}

}  // namespace

const NarrowKernels narrow_kernels = {panel_size,    workspace_size, gradient_width, pack_forward,
                                      pack_backward, forward,        backward};

}  // namespace resops::RESOPS_ISA
