// dense_block on a GPU: a norm that reads the first channels of a buffer, its backward pass into a
// sum over all such norms, the gradient of a slice of the buffer from that sum, and the running
// statistics of all norms at once.
//
// Every pass reads its tensors once. A block takes up to 32 neighbouring vectors of a row
// (blockIdx.x) and every `row_parts`-th tile of rows (blockIdx.y), so that a thread keeps its
// column, and with it what belongs to its channels, in registers. Tensors have strides of their
// own: what is read of the buffer and of the sum are the first channels of longer rows.
//
// A vector is 16 bytes of the widest tensor: beside a sum in float 8 bytes of 16 bits, and so where
// a number of channels is a multiple of 4 only. Sums over rows are merged as those of batch_norm,
// in a fixed order.

#pragma once

#include "activation.cuh"
#include "batch_norm_reduce.cuh"
#include "dense_block.h"

namespace resops::cuda {

struct DenseBlockWalk {
  int64_t rows, channels;
  int lanes;      // threads beside each other in a row
  int lane_rows;  // rows that a block handles at a time
  int row_parts;
};

// The rows of one thread, from `row` on in steps, and its column, the first of kVec.
template <int kVec>
struct RowCursor {
  __device__ explicit RowCursor(const DenseBlockWalk& w)
      : column(
            (static_cast<int64_t>(blockIdx.x) * w.lanes + static_cast<int>(threadIdx.x) % w.lanes) *
            kVec),
        step(static_cast<int64_t>(w.row_parts) * w.lane_rows) {
    const int lane_row = static_cast<int>(threadIdx.x) / w.lanes;
    row = static_cast<int64_t>(blockIdx.y) * w.lane_rows + lane_row;
    end = lane_row < w.lane_rows && column < w.channels ? w.rows : 0;
  }
  int64_t column, step, row, end;
};

// Calls f(row, raw) for every row of this thread, raw = load(row), several of which are on their
// way at a time.
template <int kSteps, int kVec, class Load, class F>
__device__ __forceinline__ void for_rows(const RowCursor<kVec>& cursor, Load load, F f) {
  for (int64_t first = cursor.row; first < cursor.end; first += kSteps * cursor.step) {
    decltype(load(first)) raw[kSteps] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t row = first + u * cursor.step;
      if (row < cursor.end) raw[u] = load(row);
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t row = first + u * cursor.step;
      if (row < cursor.end) f(row, raw[u]);
    }
  }
}

// A consumer's norm at a thread's channels.
template <class T, int kVec>
struct ConsumerNorm {
  __device__ __forceinline__ ConsumerNorm(const Channels<T, kVec>& channels,
                                          const BatchNormAffine& affine) {
    channels.read(affine.mean, mean);
    channels.read(affine.invstd, scale);
    channels.read(affine.weight, 1.0f, weight);
    channels.read(affine.bias, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) scale[i] *= weight[i];
  }
  // The argument of the ReLU, of x - mean. Forward and backward agree on its sign to the last bit.
  __device__ __forceinline__ float z(float centred, int i) const {
    return fmaf(centred, scale[i], bias[i]);
  }
  float mean[kVec], scale[kVec], weight[kVec], bias[kVec];
};

// ---- forward -----------------------------------------------------------------------------------

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    dense_block_apply_kernel(DenseBlockWalk w, BatchNormAffine affine, bool aligned,
                             const T* __restrict__ x, int64_t x_stride, T* __restrict__ y) {
  const RowCursor<kVec> cursor(w);
  const Channels<T, kVec> channels(cursor.column, w.channels, aligned);
  const ConsumerNorm<T, kVec> norm(channels, affine);
  for_rows<kUnroll<kVec, 1>>(
      cursor,
      [&](int64_t row) { return load_nc<Raw<T, kVec>>(x + row * x_stride + cursor.column); },
      [&](int64_t row, const Raw<T, kVec>& raw) {
        float v[kVec];
        unpack<T, kVec>(raw, v);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          v[i] = activate<Activation::relu>(norm.z(v[i] - norm.mean[i], i), 0.0f);
        }
        store<Raw<T, kVec>>(y + row * w.channels + cursor.column, pack<T, kVec>(v));
      });
}

// ---- backward ----------------------------------------------------------------------------------

template <class T, class S, int kVec>
struct AccumulateRaw {
  Raw<T, kVec> grad, x;
  Raw<S, kVec> sum;
};

// S is what grad_sum is stored as. partial: [2][row_parts][channels], the sums of g and of
// g * (x - mean).
template <class T, class S, int kVec, bool kFirst>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    dense_block_accumulate_kernel(DenseBlockWalk w, BatchNormAffine affine, bool aligned,
                                  bool training, const T* __restrict__ grad_y,
                                  const T* __restrict__ x, int64_t x_stride,
                                  S* __restrict__ grad_sum, int64_t sum_stride,
                                  float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);
  const RowCursor<kVec> cursor(w);
  const Channels<T, kVec> channels(cursor.column, w.channels, aligned);
  const ConsumerNorm<T, kVec> norm(channels, affine);
  float sum[kVec] = {}, product[kVec] = {};
  for_rows<kUnroll<kVec, 3>>(
      cursor,
      [&](int64_t row) {
        AccumulateRaw<T, S, kVec> raw;
        raw.grad = load_nc<Raw<T, kVec>>(grad_y + row * w.channels + cursor.column);
        raw.x = load_nc<Raw<T, kVec>>(x + row * x_stride + cursor.column);
        if constexpr (!kFirst) {
          raw.sum = load<Raw<S, kVec>>(grad_sum + row * sum_stride + cursor.column);
        }
        return raw;
      },
      [&](int64_t row, const AccumulateRaw<T, S, kVec>& raw) {
        float g[kVec], v[kVec], total[kVec] = {};
        unpack<T, kVec>(raw.grad, g);
        unpack<T, kVec>(raw.x, v);
        if constexpr (!kFirst) unpack<S, kVec>(raw.sum, total);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float centred = v[i] - norm.mean[i];
          g[i] = activation_gradient<Activation::relu>(g[i], norm.z(centred, i), 0.0f);
          sum[i] += g[i];
          product[i] = fmaf(g[i], centred, product[i]);
          total[i] = fmaf(g[i], training ? norm.weight[i] : norm.scale[i], total[i]);
        }
        store<Raw<S, kVec>>(grad_sum + row * sum_stride + cursor.column, pack<S, kVec>(total));
      });
  const float2 total = sum_columns<kVec, true>(shared, w.lanes, w.lane_rows, sum, product);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * w.lanes * kVec + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < w.lanes * kVec && column < w.channels) {
    const int64_t at = blockIdx.y * w.channels + column;
    store<float>(partial + at, total.x);
    store<float>(partial + w.row_parts * w.channels + at, total.y);
  }
}

template <class T, class S, int kVec>
struct GradientRaw {
  Raw<T, kVec> grad, x;
  Raw<S, kVec> sum;
};

// grad_y and grad_sum may be null; x is where mean is.
template <class T, class S, int kVec>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    dense_block_gradient_kernel(DenseBlockWalk w, bool aligned, const T* __restrict__ grad_y,
                                int64_t grad_stride, const T* __restrict__ x, int64_t x_stride,
                                const S* __restrict__ grad_sum, int64_t sum_stride,
                                const float* __restrict__ mean, const float* __restrict__ invstd,
                                const float* __restrict__ mean_grad,
                                const float* __restrict__ mean_grad_xhat, T* __restrict__ out) {
  const RowCursor<kVec> cursor(w);
  // out = grad_y + scale * grad_sum + slope * (x - centre) + offset
  float centre[kVec] = {}, scale[kVec], slope[kVec] = {}, offset[kVec] = {};
#pragma unroll
  for (int i = 0; i < kVec; ++i) scale[i] = 1;
  if (mean != nullptr) {
    const Channels<T, kVec> channels(cursor.column, w.channels, aligned);
    channels.read(mean, centre);
    channels.read(invstd, scale);
    channels.read(mean_grad, offset);
    channels.read(mean_grad_xhat, slope);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      offset[i] *= -scale[i];
      slope[i] *= -scale[i] * scale[i];
    }
  }
  for_rows<kUnroll<kVec, 3>>(
      cursor,
      [&](int64_t row) {
        GradientRaw<T, S, kVec> raw = {};
        if (grad_y) raw.grad = load_nc<Raw<T, kVec>>(grad_y + row * grad_stride + cursor.column);
        if (mean) raw.x = load_nc<Raw<T, kVec>>(x + row * x_stride + cursor.column);
        if (grad_sum) raw.sum = load_nc<Raw<S, kVec>>(grad_sum + row * sum_stride + cursor.column);
        return raw;
      },
      [&](int64_t row, const GradientRaw<T, S, kVec>& raw) {
        float g[kVec], v[kVec], total[kVec];  // zeros where a tensor is absent
        unpack<T, kVec>(raw.grad, g);
        unpack<T, kVec>(raw.x, v);
        unpack<S, kVec>(raw.sum, total);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          g[i] = fmaf(total[i], scale[i], g[i]) + fmaf(v[i] - centre[i], slope[i], offset[i]);
        }
        store<Raw<T, kVec>>(out + row * w.channels + cursor.column, pack<T, kVec>(g));
      });
}

// ---- running statistics ------------------------------------------------------------------------

// As many consumers as the arguments of a kernel, 4 KB, have room for.
constexpr int kMostConsumers = 56;

struct DenseBlockRunningTable {
  const float* mean;
  const float* var;
  double unbiased;
  DenseBlockRunning consumers[kMostConsumers];
};
static_assert(sizeof(DenseBlockRunningTable) <= 4096);

// A consumer for every blockIdx.y.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dense_block_update_running_kernel(DenseBlockRunningTable table) {
  const DenseBlockRunning& consumer = table.consumers[blockIdx.y];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= consumer.channels) return;
  const double mean = load_nc<float>(table.mean + c);
  const double var = load_nc<float>(table.var + c) * table.unbiased;
  update_running<T>(consumer.mean, c, mean, consumer.momentum);
  update_running<T>(consumer.var, c, var, consumer.momentum);
}

}  // namespace resops::cuda
