// dense_block on a GPU: what the bindings call. No torch and no CUDA header here.
//
// Tensors are rows of channels-last pixels, some of them with more channels than are read or
// written: such a one has its stride, in elements. Any address and any stride are taken, wide
// accesses where these allow them. docs/math/dense_block.md has the formulas.

#pragma once

#include <cstdint>
#include <vector>

#include "batch_norm.h"

namespace resops::cuda {

struct DenseBlockShape {
  DType dtype;  // f32, bf16 or f16
  int64_t rows, channels;
};

struct Rows {
  const void* data;  // null: absent
  int64_t stride;
};

// The sum over consumers, of the tensors' dtype or float.
struct DenseBlockSum {
  void* data;  // null: absent
  int64_t stride;
  bool is_float;
};

// y = relu( z ) with z of the norm; y is dense.
struct DenseBlockApply {
  BatchNormAffine affine;
  Rows x;
  void* y;
};
void launch_dense_block_apply(const DenseBlockShape& shape, const DenseBlockApply& call,
                              Stream stream);

// grad_sum [+]= factor * g, with the factor weight * invstd of constant statistics, else weight.
struct DenseBlockAccumulate {
  BatchNormAffine affine;
  const void* grad_y;  // dense
  Rows x;
  DenseBlockSum grad_sum;
  bool training;
  bool first;  // grad_sum holds nothing yet
};
// Floats of workspace; the tensors may be empty.
int64_t dense_block_workspace(const DenseBlockShape& shape, const DenseBlockAccumulate& call);
// sum(g) and sum(g * xhat) go to `out`; of empty tensors they are 0.
void launch_dense_block_accumulate(const DenseBlockShape& shape, const DenseBlockAccumulate& call,
                                   float* workspace, const BatchNormSums& out, Stream stream);

// out = [grad_y] + [invstd *] ( grad_sum [- mean_grad - xhat * mean_grad_xhat] ), dense. The four
// vectors are null with constant statistics.
struct DenseBlockGradient {
  Rows grad_y, x;
  DenseBlockSum grad_sum;
  const float* mean;
  const float* invstd;
  const float* mean_grad;
  const float* mean_grad_xhat;
  void* out;
};
void launch_dense_block_gradient(const DenseBlockShape& shape, const DenseBlockGradient& call,
                                 Stream stream);

// The running statistics of one consumer, of its first `channels` channels.
struct DenseBlockRunning {
  RunningStatistic mean, var;
  int64_t channels;
  double momentum;
};
// running = (1 - momentum) * running + momentum * batch for all consumers, with the variance times
// `unbiased`. What is not float is of `dtype`.
void launch_dense_block_update_running(DType dtype, const float* mean, const float* var,
                                       double unbiased,
                                       const std::vector<DenseBlockRunning>& consumers,
                                       Stream stream);

}  // namespace resops::cuda
