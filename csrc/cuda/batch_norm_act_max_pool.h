// batch_norm_act_max_pool on a GPU: what the bindings call, under the rules of batch_norm.h.

#pragma once

#include "batch_norm.h"

namespace resops::cuda {

// x is (N, C, height, width). Every size below is less than 2^31.
struct PoolShape {
  DType dtype;  // f32, bf16 or f16
  int64_t samples, channels;
  bool channels_last;
  int height, width, out_height, out_width;
  int kernel[2], stride[2], padding[2];  // along height and width

  bool empty() const { return samples * channels == 0; }
};

struct PoolForward {
  BatchNormAffine affine;
  Activation activation;
  float negative_slope;
  const void* x;
  void* y;
  uint8_t* index;
};
void launch_batch_norm_act_max_pool_forward(const PoolShape& shape, const PoolForward& call,
                                            Stream stream);

struct PoolGradient {
  BatchNormAffine affine;
  Activation activation;
  float negative_slope;
  const void* x;
  const void* grad_y;
  const uint8_t* index;
};

// Floats of workspace that the reduction needs.
int64_t batch_norm_act_max_pool_workspace(const PoolShape& shape);

void launch_batch_norm_act_max_pool_backward_reduce(const PoolShape& shape,
                                                    const PoolGradient& call, float* workspace,
                                                    const BatchNormSums& out, Stream stream);

// `out` as of batch_norm's backward_apply; there is no residual.
void launch_batch_norm_act_max_pool_backward_apply(const PoolShape& shape, const PoolGradient& call,
                                                   const BatchNormGradientOut& out, Stream stream);

}  // namespace resops::cuda
