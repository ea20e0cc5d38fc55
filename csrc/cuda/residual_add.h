// residual_add on a GPU: what the bindings call. No torch and no CUDA header here.
//
// The functions run on the current device (set_device) and only put work on the stream. They throw
// std::runtime_error with the kernel, the grid and the device if that fails. Tensors are dense and
// start on 16 bytes.

#pragma once

#include <cstdint>

#include "../common/types.h"
#include "device.h"

namespace resops::cuda {

struct ResidualAddShape {
  DType dtype;              // f32, bf16 or f16
  int64_t samples, length;  // N and L = numel / N
  int64_t numel() const { return samples * length; }
};

// One of: a tensor like x; one value for every sample, or for all of them, in float or in x's
// dtype; a constant.
struct ResidualAddWeight {
  const void* tensor;
  const void* values;
  bool is_float, per_sample;
  float constant;
};
struct ResidualAddWeights {
  ResidualAddWeight alpha, beta;
  bool complement;  // beta is 1 - alpha, whatever alpha is
};

struct ResidualAddForward {
  ResidualAddShape shape;
  ResidualAddWeights weights;
  Activation activation;
  float negative_slope;
  const void* x;
  const void* residual;
  void* y;
  // relu and leaky_relu: N * ceil(L / 8) bytes, in which the bits are one run, and zeros behind it.
  uint8_t* mask;
};
void launch_residual_add_forward(const ResidualAddForward& call, Stream stream);

// Gradients that are not wanted are null. That of a weight has the weight's own dtype and number of
// elements. x and residual are null where nothing needs them.
struct ResidualAddBackward {
  ResidualAddShape shape;
  ResidualAddWeights weights;
  Activation activation;
  float negative_slope;
  const void* grad_y;
  const void* x;
  const void* residual;
  const uint8_t* mask;  // relu and leaky_relu
  void* grad_x;
  void* grad_residual;
  void* grad_alpha;
  void* grad_beta;
};
// Floats of workspace that the call needs.
int64_t residual_add_workspace(const ResidualAddBackward& call);
void launch_residual_add_backward(const ResidualAddBackward& call, float* workspace, Stream stream);

}  // namespace resops::cuda
