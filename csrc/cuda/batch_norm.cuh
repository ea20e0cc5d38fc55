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

__device__ inline float shift_of(float a, float b, float c) {
  const float m = median(a, b, c);
  return m - m == 0 ? m : 0;  // an inf or NaN shows in the sums
}

// By planes: the shift of the block's channel.
template <class T, int kVec>
__device__ __forceinline__ void choose_shift(const Cursor<kVec, false>& cursor,
                                             const BatchNormWalk& w, const T* x,
                                             float (&shift)[1]) {
  float sample[3];
#pragma unroll
  for (int s = 0; s < 3; ++s) sample[s] = to_float(load_nc<T>(x + cursor.sample(w, s)));
  shift[0] = shift_of(sample[0], sample[1], sample[2]);
}

// By rows: the shifts of a thread's columns, in channels-last from the columns themselves.
template <class T, int kVec>
__device__ __forceinline__ void choose_shift(const Cursor<kVec, true>& cursor,
                                             const BatchNormWalk& w, const T* x,
                                             float (&shift)[kVec]) {
  float sample[3][kVec] = {};
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int64_t at = cursor.sample_row(w, s) + cursor.column, left = w.numel - at;
#pragma unroll
    for (int i = 0; i < kVec; ++i) sample[s][i] = sample[0][i];  // for where the tensor has ended
    if (left >= kVec) {
      unpack<T, kVec>(load_nc<Raw<T, kVec>>(x + at), sample[s]);
    } else if (left > 0) {
      load_some<T>(x + at, static_cast<int>(left), sample[s]);
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) shift[i] = shift_of(sample[0][i], sample[1][i], sample[2][i]);
}

// The same where planes are beside each other: a shift per share, of three of its columns, which
// one thread finds and leaves in the workspace.
template <class T, int kVec>
__device__ __forceinline__ void choose_shift_of_shares(SumsShared<kVec>& shared,
                                                       const Cursor<kVec, true>& cursor,
                                                       const BatchNormWalk& w, const T* x,
                                                       float* shifts, float (&shift)[kVec]) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * w.width, first = begin / w.plane;
  const int64_t exist = w.numel < w.pitch ? w.numel : w.pitch;
  const int64_t end = begin + w.width < exist ? begin + w.width : exist;
  for (int64_t p = first + threadIdx.x; p * w.plane < end; p += kThreads) {
    const int64_t share_begin = p == first ? begin : p * w.plane, plane_end = (p + 1) * w.plane;
    const int64_t length = (plane_end < end ? plane_end : end) - share_begin;
    float sample[3];
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const int64_t at = cursor.sample_row(w, s) + share_begin + part_sample(length, s);
      sample[s] = to_float(load_nc<T>(x + at));
    }
    const float value = shift_of(sample[0], sample[1], sample[2]);
    shared.a[p - first] = value;
    store<float>(shifts + blockIdx.y * w.columns + blockIdx.x + p, value);
  }
  block_sync();
  int64_t p = cursor.column / w.plane, left = (p + 1) * w.plane - cursor.column;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    shift[i] = cursor.column + i < end ? shared.a[p - first] : 0;
    if (--left > 0) continue;
    left = w.plane;
    ++p;
  }
  block_sync();  // before there are sums in its place
}

// ---- forward -----------------------------------------------------------------------------------

// partial: [3][parts][columns], the shift, the sum of x - shift and of its square.
template <class T, int kVec, bool kByRows>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    batch_norm_statistics_kernel(BatchNormWalk w, const T* __restrict__ x,
                                 float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);
  constexpr int kShifts = kByRows ? kVec : 1;
  Cursor<kVec, kByRows> cursor(w);
  float shift[kShifts], sum[kVec] = {}, square[kVec] = {};
  const bool of_shares = kByRows && w.plane > 1;
  if constexpr (kByRows) {
    if (of_shares) choose_shift_of_shares<T>(shared, cursor, w, x, partial, shift);
  }
  if (!of_shares) choose_shift<T>(cursor, w, x, shift);

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

  const int64_t plane = w.parts() * w.columns;
  store_sums<kVec, kByRows>(shared, w, sum, square, partial + plane, partial + 2 * plane);
  if (!of_shares && cursor.lane_row == 0 && (kByRows || threadIdx.x == 0)) {
#pragma unroll
    for (int i = 0; i < kShifts; ++i) {
      const int64_t column = cursor.column + i;
      if (column < w.columns) store<float>(partial + blockIdx.y * w.columns + column, shift[i]);
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
  for_parts(w, c, [&](int part, const PlaneShare& share, int64_t at) {
    const double n = static_cast<double>(w.values(part, share));
    if (n == 0) return;
    sum += n * load_nc<float>(partial + at) + load_nc<float>(partial + plane + at);
    count += n;
  });
  const Sums totals = sum_channel(shared, sum, count);
  const double m = totals.b, mean = m > 0 ? totals.a / m : 0;

  double m2 = 0;
  for_parts(w, c, [&](int part, const PlaneShare& share, int64_t at) {
    const double n = static_cast<double>(w.values(part, share));
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

template <class T, int kVec, bool kByRows, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    batch_norm_apply_kernel(BatchNormWalk w, BatchNormAffine affine, bool aligned,
                            float negative_slope, const T* __restrict__ x,
                            const T* __restrict__ residual, T* __restrict__ y,
                            uint8_t* __restrict__ mask) {
  constexpr int kCount = kByRows ? kVec : 1;
  constexpr bool kMask = kResidual && kIsMasked<kAct>;
  Cursor<kVec, kByRows> cursor(w);
  const Channels<T, kCount> channels(cursor.column, w.channels, aligned, kByRows ? w.plane : 1);
  float mean[kCount], scale[kCount], bias[kCount], weight[kCount];
  channels.read(affine.mean, mean);
  channels.read(affine.invstd, scale);
  channels.read(affine.weight, 1.0f, weight);
  channels.read(affine.bias, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < kCount; ++i) scale[i] *= weight[i];

  const T* tensors[1 + kResidual] = {x};
  if constexpr (kResidual) tensors[1] = residual;
  // More of silu and gelu at a time would not fit the registers.
  constexpr int kSteps = kIsSmooth<kAct> ? 4 : kUnroll<kVec, 1 + kResidual>;
  for_vectors<T, kVec, 1 + kResidual, false, kSteps>(
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
  // The bits are one run, and there is room for planes of whole bytes (docs/architecture.md, "The
  // mask").
  if constexpr (kMask && kByRows) clear_bytes(mask, ceil_div(w.numel, 8), w.mask_bytes);
}

// ---- backward ----------------------------------------------------------------------------------

// What the two backward passes share: the values per channel that they need, and g, the gradient
// before the activation.
template <class T, int kVec, bool kByRows, Activation kAct, bool kResidual>
struct Backward {
  static constexpr int kCount = kByRows ? kVec : 1;
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
template <class T, int kVec, bool kByRows, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    batch_norm_backward_reduce_kernel(BatchNormWalk w, BatchNormAffine affine, bool aligned,
                                      float negative_slope, const T* __restrict__ grad_y,
                                      const T* __restrict__ x, const T* __restrict__ residual,
                                      const uint8_t* __restrict__ mask,
                                      float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);
  using Pass = Backward<T, kVec, kByRows, kAct, kResidual>;
  Cursor<kVec, kByRows> cursor(w);
  const Channels<T, Pass::kCount> channels(cursor.column, w.channels, aligned,
                                           kByRows ? w.plane : 1);
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

  store_sums<kVec, kByRows>(shared, w, sum, product, partial, partial + w.parts() * w.columns);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_finish_kernel(BatchNormWalk w, const float* __restrict__ partial,
                                      const float* __restrict__ invstd, BatchNormSums out) {
  RESOPS_SHARED(FinishShared, shared);
  const int64_t c = finish_channel();
  const int64_t plane = w.parts() * w.columns;
  double sum = 0, product = 0;
  for_parts(w, c, [&](int, const PlaneShare&, int64_t at) {
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
template <class T, int kVec, bool kByRows, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    batch_norm_backward_apply_kernel(BatchNormWalk w, BatchNormAffine affine, bool aligned,
                                     float negative_slope, const T* __restrict__ grad_y,
                                     const T* __restrict__ x, const T* __restrict__ residual,
                                     const uint8_t* __restrict__ mask,
                                     const float* __restrict__ sum_grad,
                                     const float* __restrict__ sum_grad_xhat, float factor,
                                     T* __restrict__ grad_x, T* __restrict__ grad_residual) {
  using Pass = Backward<T, kVec, kByRows, kAct, kResidual>;
  constexpr int kCount = Pass::kCount;
  Cursor<kVec, kByRows> cursor(w);
  const Channels<T, kCount> channels(cursor.column, w.channels, aligned, kByRows ? w.plane : 1);
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
