// batch_norm on a GPU: statistics, apply, backward_reduce, backward_apply.
//
// Every pass is bound by memory: it reads its tensors once, 16 bytes per access, with several
// accesses on their way per thread. A pass over (rows, channels) gives each thread a fixed column,
// so that what belongs to a channel is read once and kept in registers (batch_norm_walk.cuh).
//
// Statistics are sums of x - shift and of its square in float, with a shift per channel and block
// that is a value of the channel itself: the median of three from inside the block's part, so that
// neither an outlier nor the border of an image becomes it. The finaliser merges the parts in
// double, in a fixed order (Chan, Golub and LeVeque, 1983; docs/math/batch_norm.md). Sums of
// integers stay exact all the way. No atomics: the same input gives the same bits on the same kind
// of GPU.

#pragma once

#include "activation.cuh"
#include "batch_norm_reduce.cuh"

namespace resops::cuda {

__device__ inline void write_statistics(const BatchNormStatistics& out, int64_t c, double mean,
                                        double var) {
  if (out.mean) out.mean[c] = static_cast<float>(mean);
  if (out.var) out.var[c] = static_cast<float>(var);
  if (out.invstd) out.invstd[c] = static_cast<float>(rsqrt(var + out.eps));
}

__device__ inline float median(float a, float b, float c) {
  return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

// The shifts of a thread's columns, or of its channel.
template <class T, int kVec, bool kChannelsLast, int kShifts>
__device__ __forceinline__ void choose_shift(const Cursor<kVec, kChannelsLast>& cursor,
                                             const BatchNormWalk& w, const T* x,
                                             float (&shift)[kShifts]) {
  float sample[3][kShifts] = {};
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int64_t at = cursor.sample(w, s), left = w.numel - at;
#pragma unroll
    for (int i = 0; i < kShifts; ++i)
      sample[s][i] = sample[0][i];  // for where the tensor has ended
    if (left >= kShifts) {
      unpack<T, kShifts>(load_nc<Raw<T, kShifts>>(x + at), sample[s]);
    } else if (left > 0) {
      load_some<T>(x + at, static_cast<int>(left), sample[s]);
    }
  }
#pragma unroll
  for (int i = 0; i < kShifts; ++i) {
    const float m = median(sample[0][i], sample[1][i], sample[2][i]);
    shift[i] = m - m == 0 ? m : 0;  // an inf or NaN shows in the sums
  }
}

// ---- forward -----------------------------------------------------------------------------------

// partial: [3][parts][columns], the shift, the sum of x - shift and of its square.
template <class T, int kVec, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kVec>)
    batch_norm_statistics_kernel(BatchNormWalk w, const T* __restrict__ x,
                                 float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);
  constexpr int kShifts = kChannelsLast ? kVec : 1;
  Cursor<kVec, kChannelsLast> cursor(w);
  float shift[kShifts], sum[kVec] = {}, square[kVec] = {};
  choose_shift<T>(cursor, w, x, shift);

  const T* const tensors[1] = {x};
  for_vectors<T, kVec, 1, false>(
      cursor, tensors, nullptr,
      [&](const Place&, int count, const float (&v)[1][kVec], unsigned, auto) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (i >= count) continue;
          const float d = v[0][i] - shift[i % kShifts];
          sum[i] += d;
          square[i] = fmaf(d, d, square[i]);
        }
      });

  const int64_t plane = w.parts() * w.columns, at = blockIdx.y * w.columns;
  const float2 total = sum_columns<kVec, kChannelsLast>(shared, w.lanes, w.lane_rows, sum, square);
  const int64_t column = summed_column<kVec, kChannelsLast>(w);
  if (column >= 0) {
    store<float>(partial + plane + at + column, total.x);
    store<float>(partial + 2 * plane + at + column, total.y);
  }
  if (cursor.lane_row == 0 && (kChannelsLast || threadIdx.x == 0)) {
#pragma unroll
    for (int i = 0; i < kShifts; ++i) {
      if (cursor.column + i < w.columns) store<float>(partial + at + cursor.column + i, shift[i]);
    }
  }
}

// Merges the parts, and updates the running statistics.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_finish_kernel(BatchNormWalk w, const float* __restrict__ partial,
                             BatchNormStatistics out) {
  RESOPS_SHARED(FinishShared, shared);
  const int64_t c = finish_channel();
  const int64_t plane = w.parts() * w.columns;
  double sum = 0, count = 0;
  for_parts(w, c, [&](int part, int64_t column, int64_t at) {
    const double n = static_cast<double>(w.values(part, column));
    if (n == 0) return;
    sum += n * load_nc<float>(partial + at) + load_nc<float>(partial + plane + at);
    count += n;
  });
  const Sums totals = sum_channel(shared, sum, count);
  const double m = totals.b, mean = m > 0 ? totals.a / m : 0;

  double m2 = 0;
  for_parts(w, c, [&](int part, int64_t column, int64_t at) {
    const double n = static_cast<double>(w.values(part, column));
    if (n == 0) return;
    const double away = load_nc<float>(partial + at) - mean;
    // The sum of (x - mean)^2 over the part; not negative but for rounding.
    const double own = load_nc<float>(partial + 2 * plane + at) +
                       away * (2 * load_nc<float>(partial + plane + at) + n * away);
    m2 += own < 0 ? 0 : own;
  });
  m2 = sum_channel(shared, m2, 0).a;

  if (!writes_channel(w, c)) return;
  write_statistics(out, c, mean, m > 0 ? m2 / m : 0);
  if (m > 0) {
    update_running<T>(out.running_mean, c, mean, out.momentum);
    update_running<T>(out.running_var, c, m2 / (m - 1), out.momentum);
  }
}

// mean and invstd of evaluation.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_frozen_kernel(int64_t channels, BatchNormStatistics out) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  write_statistics(out, c, read_running<T>(out.running_mean, c),
                   read_running<T>(out.running_var, c));
}

template <class T, int kVec, bool kChannelsLast, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kIsSmooth<kAct> ? 2 : kResidentBlocks<kVec>)
    batch_norm_apply_kernel(BatchNormWalk w, BatchNormAffine affine, bool aligned,
                            float negative_slope, const T* __restrict__ x,
                            const T* __restrict__ residual, T* __restrict__ y,
                            uint8_t* __restrict__ mask) {
  constexpr int kCount = kChannelsLast ? kVec : 1;
  constexpr bool kMask = kResidual && kIsMasked<kAct>;
  Cursor<kVec, kChannelsLast> cursor(w);
  const Channels<T, kCount> channels(cursor.column, w.channels, aligned);
  float mean[kCount], scale[kCount], bias[kCount], weight[kCount];
  channels.read(affine.mean, mean);
  channels.read(affine.invstd, scale);
  channels.read(affine.weight, 1.0f, weight);
  channels.read(affine.bias, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < kCount; ++i) scale[i] *= weight[i];

  const T* tensors[1 + kResidual] = {x};
  if constexpr (kResidual) tensors[1] = residual;
  for_vectors<T, kVec, 1 + kResidual, false>(
      cursor, tensors, nullptr,
      [&](const Place& place, int count, float (&v)[1 + kResidual][kVec], unsigned, auto is_short) {
        float (&z)[kVec] = v[0];
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const int c = i % kCount;
          z[i] = fmaf(z[i] - mean[c], scale[c], bias[c]);
          if constexpr (kResidual) z[i] += v[1][i];
          if (kMask && i < count && passes(z[i])) bits |= 1u << i;
          z[i] = activate<kAct>(z[i], negative_slope);
        }
        if constexpr (kMask) store_bits<kVec>(mask + place.byte, bits, count > 0);
        put(y + place.offset, count, z, is_short);
      });
}

// ---- backward ----------------------------------------------------------------------------------

// What the two backward passes share: the values per channel that they need, and g, the gradient
// before the activation.
template <class T, int kVec, bool kChannelsLast, Activation kAct, bool kResidual>
struct Backward {
  static constexpr int kCount = kChannelsLast ? kVec : 1;
  static constexpr bool kMask = kResidual && kIsMasked<kAct>;
  static constexpr bool kNeedsZ = kAct != Activation::identity && !kMask;
  static constexpr int kTensors = kResidual && kIsSmooth<kAct> ? 3 : 2;  // grad_y, x, residual

  __device__ __forceinline__ Backward(const Channels<T, kCount>& channels,
                                      const BatchNormAffine& affine, float slope)
      : negative_slope(slope) {
    float weight[kCount];
    channels.read(affine.mean, mean);
    channels.read(affine.invstd, scale);
    channels.read(affine.weight, 1.0f, weight);
    if constexpr (kNeedsZ) channels.read(affine.bias, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scale[i] *= weight[i];
  }

  // In place: grad_y becomes g, x becomes x - mean.
  __device__ __forceinline__ void operator()(float (&v)[kTensors][kVec], unsigned bits) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int c = i % kCount;
      float &g = v[0][i], &x = v[1][i];
      x -= mean[c];
      if constexpr (kMask) {
        g = masked_gradient<kAct>(g, (bits >> i & 1) != 0, negative_slope);
      } else if constexpr (kNeedsZ) {
        float z = fmaf(x, scale[c], bias[c]);
        if constexpr (kTensors == 3) z += v[2][i];
        g = activation_gradient<kAct>(g, z, negative_slope);
      }
    }
  }

  float mean[kCount], scale[kCount], bias[kCount];
  float negative_slope;
};

// partial: [2][parts][columns], the sums of g and of g * (x - mean).
template <class T, int kVec, bool kChannelsLast, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kIsSmooth<kAct> ? 2 : kResidentBlocks<kVec>)
    batch_norm_backward_reduce_kernel(BatchNormWalk w, BatchNormAffine affine, bool aligned,
                                      float negative_slope, const T* __restrict__ grad_y,
                                      const T* __restrict__ x, const T* __restrict__ residual,
                                      const uint8_t* __restrict__ mask,
                                      float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);
  using Pass = Backward<T, kVec, kChannelsLast, kAct, kResidual>;
  Cursor<kVec, kChannelsLast> cursor(w);
  const Channels<T, Pass::kCount> channels(cursor.column, w.channels, aligned);
  const Pass pass(channels, affine, negative_slope);
  float sum[kVec] = {}, product[kVec] = {};

  const T* tensors[Pass::kTensors] = {grad_y, x};
  if constexpr (Pass::kTensors == 3) tensors[2] = residual;
  for_vectors<T, kVec, Pass::kTensors, Pass::kMask>(
      cursor, tensors, mask,
      [&](const Place&, int count, float (&v)[Pass::kTensors][kVec], unsigned bits, auto) {
        pass(v, bits);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (i >= count) continue;
          sum[i] += v[0][i];
          product[i] = fmaf(v[0][i], v[1][i], product[i]);
        }
      });

  const float2 total = sum_columns<kVec, kChannelsLast>(shared, w.lanes, w.lane_rows, sum, product);
  const int64_t column = summed_column<kVec, kChannelsLast>(w);
  if (column >= 0) {
    const int64_t at = blockIdx.y * w.columns + column;
    store<float>(partial + at, total.x);
    store<float>(partial + w.parts() * w.columns + at, total.y);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_finish_kernel(BatchNormWalk w, const float* __restrict__ partial,
                                      const float* __restrict__ invstd, BatchNormSums out) {
  RESOPS_SHARED(FinishShared, shared);
  const int64_t c = finish_channel();
  const int64_t plane = w.parts() * w.columns;
  double sum = 0, product = 0;
  for_parts(w, c, [&](int, int64_t, int64_t at) {
    sum += load_nc<float>(partial + at);
    product += load_nc<float>(partial + plane + at);
  });
  const Sums totals = sum_channel(shared, sum, product);
  if (!writes_channel(w, c)) return;
  const float sum_grad = static_cast<float>(totals.a);
  const float sum_grad_xhat = static_cast<float>(totals.b * invstd[c]);
  out.sum_grad[c] = sum_grad;
  out.sum_grad_xhat[c] = sum_grad_xhat;
  if (out.grad_bias) static_cast<T*>(out.grad_bias)[c] = from_float<T>(sum_grad);
  if (out.grad_weight) static_cast<T*>(out.grad_weight)[c] = from_float<T>(sum_grad_xhat);
}

// x is null where neither z nor grad_x needs it.
template <class T, int kVec, bool kChannelsLast, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kIsSmooth<kAct> ? 2 : kResidentBlocks<kVec>)
    batch_norm_backward_apply_kernel(BatchNormWalk w, BatchNormAffine affine, bool aligned,
                                     float negative_slope, const T* __restrict__ grad_y,
                                     const T* __restrict__ x, const T* __restrict__ residual,
                                     const uint8_t* __restrict__ mask,
                                     const float* __restrict__ sum_grad,
                                     const float* __restrict__ sum_grad_xhat, float factor,
                                     T* __restrict__ grad_x, T* __restrict__ grad_residual) {
  using Pass = Backward<T, kVec, kChannelsLast, kAct, kResidual>;
  constexpr int kCount = Pass::kCount;
  Cursor<kVec, kChannelsLast> cursor(w);
  const Channels<T, kCount> channels(cursor.column, w.channels, aligned);
  const Pass pass(channels, affine, negative_slope);
  // grad_x = scale * g [+ slope * (x - mean) + offset]
  float slope[kCount] = {}, offset[kCount] = {};
  if (sum_grad) {
    float invstd[kCount];
    channels.read(affine.invstd, invstd);
    channels.read(sum_grad, offset);
    channels.read(sum_grad_xhat, slope);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      offset[i] *= -factor * pass.scale[i];
      slope[i] *= -factor * pass.scale[i] * invstd[i];
    }
  }

  const T* tensors[Pass::kTensors] = {grad_y, x};
  if constexpr (Pass::kTensors == 3) tensors[2] = residual;
  // More of gelu at a time would not fit the registers.
  constexpr int kSteps = kAct == Activation::gelu ? 2 : kUnroll<kVec, Pass::kTensors>;
  for_vectors<T, kVec, Pass::kTensors, Pass::kMask, kSteps>(
      cursor, tensors, mask,
      [&](const Place& place, int count, float (&v)[Pass::kTensors][kVec], unsigned bits,
          auto is_short) {
        pass(v, bits);
        if (grad_residual) put(grad_residual + place.offset, count, v[0], is_short);
        if (!grad_x) return;
        float out[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const int c = i % kCount;
          const float rest = sum_grad ? fmaf(v[1][i], slope[c], offset[c]) : 0;
          out[i] = fmaf(v[0][i], pass.scale[c], rest);
        }
        put(grad_x + place.offset, count, out, is_short);
      });
}

}  // namespace resops::cuda
