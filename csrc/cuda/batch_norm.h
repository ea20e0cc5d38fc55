// batch_norm on a GPU: what the bindings call. No torch and no CUDA header here.
//
// The functions run on the current device (set_device) and only put work on the stream. They throw
// std::runtime_error with the kernel, the grid and the device if that fails. A tensor is dense,
// starts on 16 bytes, and has at least one element unless said otherwise.

#pragma once

#include <cstdint>

#include "../common/types.h"
#include "device.h"

namespace resops::cuda {

struct BatchNormShape {
  DType dtype;  // f32, bf16 or f16
  int64_t samples, channels, spatial;
  bool channels_last;  // what is the same in both layouts, C == 1 or S == 1, counts as this

  int64_t count() const { return samples * spatial; }  // M, values per channel
  int64_t numel() const { return count() * channels; }
  int vector_size() const { return dtype == DType::f32 ? 4 : 8; }  // elements of 16 bytes
  // Whether a thread's vectors are at the same place of a row, not of a plane, and the bits of a
  // mask are one run (batch_norm_walk.cuh).
  bool by_rows() const { return channels_last || spatial % vector_size() != 0; }
  int64_t mask_bytes() const {
    return channels_last ? (numel() + 7) / 8 : samples * channels * ((spatial + 7) / 8);
  }
};

// One value per channel, in float or in the dtype of the tensor. Null: absent.
struct ChannelVector {
  const void* data;
  bool is_float;
};
struct RunningStatistic {
  void* data;
  bool is_float;
  int64_t stride;  // elements
};

// z = (x - mean) * (weight * invstd) + bias
struct BatchNormAffine {
  const float* mean;
  const float* invstd;
  ChannelVector weight, bias;
};

struct BatchNormOptions {
  bool reverse = false;  // walk from the last row to the first: what the pass before read last
  int blocks_per_multiprocessor = 0;  // 0: a default
};

// Floats of workspace that a reduction needs; the tensor may be empty.
int64_t batch_norm_workspace(const BatchNormShape& shape);

// ---- forward -----------------------------------------------------------------------------------

// What is done with the statistics of a channel. Null: not wanted.
struct BatchNormStatistics {
  float* mean;
  float* var;  // biased
  float* invstd;
  double eps;
  RunningStatistic running_mean, running_var;
  double momentum;
};

// Mean and variance of every channel; of an empty tensor zeros, and the running ones stay.
void launch_batch_norm_statistics(const BatchNormShape& shape, const void* x, float* workspace,
                                  const BatchNormStatistics& out, Stream stream);

// mean and invstd of evaluation, from the running statistics. `channels` may be 0.
void launch_batch_norm_frozen(int64_t channels, DType dtype, const BatchNormStatistics& out,
                              Stream stream);

struct BatchNormApply {
  BatchNormAffine affine;
  Activation activation;
  float negative_slope;
  const void* x;
  const void* residual;  // or null
  void* y;
  uint8_t* mask;  // with a residual, if the activation is masked
};
void launch_batch_norm_apply(const BatchNormShape& shape, const BatchNormApply& call,
                             const BatchNormOptions& options, Stream stream);

// ---- backward ----------------------------------------------------------------------------------

struct BatchNormGradient {
  BatchNormAffine affine;
  Activation activation;
  float negative_slope;
  const void* grad_y;
  const void* x;
  // At most one, of a forward pass with a residual: the mask after relu and leaky_relu, the
  // residual for silu and gelu.
  const uint8_t* mask;
  const void* residual;
};

// sum(g) and sum(g * xhat); also in the dtype of the tensor if that is asked for.
struct BatchNormSums {
  float* sum_grad;
  float* sum_grad_xhat;
  void* grad_bias;
  void* grad_weight;
};
// The tensor may be empty: then the sums are 0.
void launch_batch_norm_backward_reduce(const BatchNormShape& shape, const BatchNormGradient& call,
                                       float* workspace, const BatchNormSums& out, Stream stream);

// The second half of it: adds up what `parts` blocks have left in the workspace,
// [2][parts][columns] sums of g and of g * (x - mean). Column k is of channel k % C.
void launch_batch_norm_merge_sums(DType dtype, int64_t channels, int64_t columns, int parts,
                                  const float* workspace, const float* invstd,
                                  const BatchNormSums& out, Stream stream);

// grad_x = weight * invstd * (g - factor * (sum_grad + xhat * sum_grad_xhat)), grad_residual = g.
struct BatchNormGradientOut {
  const float* sum_grad;  // both null: frozen statistics
  const float* sum_grad_xhat;
  float factor;
  void* grad_x;         // or null
  void* grad_residual;  // or null
};
void launch_batch_norm_backward_apply(const BatchNormShape& shape, const BatchNormGradient& call,
                                      const BatchNormGradientOut& out,
                                      const BatchNormOptions& options, Stream stream);

}  // namespace resops::cuda
