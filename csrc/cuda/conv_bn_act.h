// The forward convolution of conv_bn_act on a GPU: what the bindings call. No torch and no CUDA
// header here.
//
// As in batch_norm.h the functions run on the current device, only put work on the stream, and
// throw std::runtime_error if that fails.

#pragma once

#include <cstdint>

#include "../common/types.h"
#include "batch_norm.h"
#include "device.h"

namespace resops::cuda {

// One spatial dimension; size + 2 * padding, and the number of channels, are below kConvReach.
constexpr int kConvReach = 1 << 29;
struct ConvAxis {
  int size, out_size, kernel, stride, padding, dilation;
};

// With a prologue, scale and shift lie in shared memory.
constexpr int kMostPrologueChannels = 4096;

// Tensors are channels-last: x (N, H, W, C_in), whose pixels lie `pitch` elements apart, the weight
// (C, kernel, kernel, C_in), y and the residual (N, OH, OW, C).
struct ConvShape {
  DType dtype;  // bf16 or f16
  int64_t samples;
  int in_channels, out_channels;  // at least 1
  ConvAxis height, width;
  int64_t pitch;
  int filter_length;  // kernel * kernel * C_in; the whole weight has fewer than 2^31 elements

  int64_t pixels() const { return samples * height.out_size * width.out_size; }  // M
};

// y = act( conv( prologue( scale * x + shift ) ) + bias [+ residual] ). Null: absent.
struct ConvBnActForward {
  ConvShape shape;
  const void* x;
  const float* scale;  // (C_in,), as shift; without them the prologue is the identity
  const float* shift;
  Activation prologue;
  float prologue_slope;
  const void* weight;
  ChannelVector bias;  // (C,)
  const void* residual;
  Activation activation;
  float negative_slope;
  void* y;
};

// The architecture that the kernel is written for: it needs the cp.async and mma of sm_80.
constexpr int kConvArchitecture = 80;

// Floats of workspace that the statistics need.
int64_t conv_bn_act_workspace(const ConvBnActForward& call);

// `mean` and `var`, of y as it is stored, (C,) each: both or none. y may be empty, and then they
// are 0. Without them there need be no workspace.
void launch_conv_bn_act_forward(const ConvBnActForward& call, float* workspace, float* mean,
                                float* var, Stream stream);

}  // namespace resops::cuda
