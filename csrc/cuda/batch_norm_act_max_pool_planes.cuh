// batch_norm_act_max_pool of contiguous tensors.
//
// The rows of a plane are one run of memory. A block takes a band of them: it reads the run that
// its windows see, 16 bytes per access, into shared memory, where windows may begin anywhere, and
// writes the run of what it computes, again 16 bytes per access, of neighbouring elements of one or
// two rows. A vector that runs over an end of a run is read whole, and written element by element.
// Where a band of one row does not fit into shared memory, the kernels of
// batch_norm_act_max_pool.cuh cut rows into tiles.

#pragma once

#include "batch_norm_act_max_pool.cuh"

namespace resops::cuda {

// Which of kVec elements are in the run: [first, last).
struct InRun {
  int first, last;
  __device__ bool has(int i) const { return i >= first && i < last; }
};

// The vector at p, of which the tensor has `left` elements.
template <class T, int kVec>
__device__ __forceinline__ Raw<T, kVec> load_vector(const T* p, int64_t left) {
  if (left >= kVec) return load_nc<Raw<T, kVec>>(p);
  T part[kVec] = {};
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i < left) part[i] = load_nc<T>(p + i);
  }
  return bits_as<Raw<T, kVec>>(part);
}

// Calls f(at, raw, in_run) for this thread's vectors of the run [begin, end) of a tensor of `numel`
// elements; `at` is the offset of the vector's first element.
template <class T, int kVec, int kSteps, class F>
__device__ __forceinline__ void for_run(const T* p, int64_t begin, int64_t end, int64_t numel,
                                        F f) {
  constexpr int64_t kBlock = int64_t{kThreads} * kVec;
  for (int64_t at = begin / kVec * kVec + threadIdx.x * kVec; at < end; at += kSteps * kBlock) {
    Raw<T, kVec> raw[kSteps] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t own = at + u * kBlock;
      if (own < end) raw[u] = load_vector<T, kVec>(p + own, numel - own);
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t own = at + u * kBlock;
      const int64_t first = begin - own, last = end - own;
      if (last > 0)
        f(own, raw[u], InRun{first > 0 ? int(first) : 0, last < kVec ? int(last) : kVec});
    }
  }
}

// The run in shared memory, from its first vector on.
template <class T, int kVec>
__device__ __forceinline__ void hold_run(Raw<T, kVec>* held, const T* p, int64_t begin, int64_t end,
                                         int64_t numel) {
  for_run<T, kVec, 2>(p, begin, end, numel, [&](int64_t at, const Raw<T, kVec>& raw, InRun) {
    held[(at - begin / kVec * kVec) / kVec] = raw;
  });
}

template <class T, int kVec>
__device__ __forceinline__ void store_run(T* p, const InRun& in_run, const float (&v)[kVec]) {
  if (in_run.last - in_run.first == kVec) return store<Raw<T, kVec>>(p, pack<T, kVec>(v));
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (in_run.has(i)) store<T>(p + i, from_float<T>(v[i]));
  }
}

// ---- forward -----------------------------------------------------------------------------------

template <class T, int kVec, Activation kAct>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_max_pool_planes_forward_kernel(PoolWalk w, BatchNormAffine affine,
                                                  float negative_slope, const T* __restrict__ x,
                                                  T* __restrict__ y, uint8_t* __restrict__ index) {
  using Rows = PoolRows<T, kVec>;
  RESOPS_SHARED(Rows, shared);
  const PoolPlace<1> place(w);
  const PoolAffine<T, 1> a(Channels<T, 1>(place.channel, w.channels, false), affine);
  const int oh_begin = place.band * w.band, oh_end = min(oh_begin + w.band, w.out_height);
  const int h_begin = max(oh_begin * w.stride[0] - w.padding[0], 0);
  const int h_end = min((oh_end - 1) * w.stride[0] - w.padding[0] + w.kernel[0], w.height);
  const int64_t begin = (place.image * w.height + h_begin) * w.width;
  const int64_t end = begin + static_cast<int64_t>(h_end - h_begin) * w.width;
  for_run<T, kVec, 4>(x, begin, end, w.images * w.height * w.width,
                      [&](int64_t at, const Raw<T, kVec>& raw, InRun) {
                        float v[kVec];
                        unpack<T, kVec>(raw, v);
#pragma unroll
                        for (int i = 0; i < kVec; ++i) {
                          const float z = fmaf(v[i] - a.mean[0], a.scale[0], a.bias[0]);
                          v[i] = activate<kAct>(z, negative_slope);
                        }
                        shared.first[(at - begin / kVec * kVec) / kVec] = pack<T, kVec>(v);
                      });
  block_sync();
  const T* const rows = reinterpret_cast<const T*>(shared.first) + begin % kVec;
  const auto value = [&](int h, int column) { return rows[(h - h_begin) * w.width + column]; };

  const int64_t out_begin = (place.image * w.out_height + oh_begin) * w.out_width;
  const int64_t out_end = out_begin + static_cast<int64_t>(oh_end - oh_begin) * w.out_width;
  for (int64_t at = out_begin / kVec * kVec + threadIdx.x * kVec; at < out_end;
       at += kThreads * kVec) {
    const int64_t first = out_begin - at, last = out_end - at;
    const InRun in_run{first > 0 ? int(first) : 0, last < kVec ? int(last) : kVec};
    float best[kVec] = {};
    int where[kVec] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (!in_run.has(i)) continue;
      const int pixel = static_cast<int>(at + i - out_begin), row = pixel / w.out_width;
      const PoolWindow window(w, oh_begin + row, pixel - row * w.out_width);
      float best_i[1];
      int where_i[1];
      window_maximum<T, 1>(w, window, value, best_i, where_i);
      best[i] = best_i[0];
      where[i] = where_i[0];
    }
    store_run<T, kVec>(y + at, in_run, best);
    if (in_run.last - in_run.first == kVec) {
      store_index<kVec>(index + at, where);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (in_run.has(i)) store<uint8_t>(index + at + i, static_cast<uint8_t>(where[i]));
      }
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------

// Calls f(at, x - mean, g, in_run) for the vectors of x that are this thread's, with the gradient
// before the activation; of elements that are not in the run both are 0.
template <class T, int kVec, Activation kAct, class F>
__device__ __forceinline__ void for_plane_gradients(const PoolWalk& w, const PoolPlace<1>& place,
                                                    const PoolAffine<T, 1>& a, float negative_slope,
                                                    unsigned char* shared, const T* x,
                                                    const T* grad_y, const uint8_t* index, F f) {
  constexpr int kIndexVec = kVectorSize<uint8_t>;
  const int steps = (w.height - 1 + w.padding[0]) / w.stride[0] + 1;
  const int step_begin = place.band * w.band, step_end = min(step_begin + w.band, steps);
  const int oh_begin = max(step_begin - w.ring + 1, 0), oh_end = min(step_end, w.out_height);
  const int64_t out_begin = (place.image * w.out_height + oh_begin) * w.out_width;
  const int64_t out_end = out_begin + static_cast<int64_t>(oh_end - oh_begin) * w.out_width;
  const int64_t out_numel = w.images * w.out_height * w.out_width;
  auto* const held = reinterpret_cast<Raw<T, kVec>*>(shared);
  auto* const held_index = reinterpret_cast<uint4*>(shared + w.held * sizeof(T));
  hold_run<T, kVec>(held, grad_y, out_begin, out_end, out_numel);
  hold_run<uint8_t, kIndexVec>(held_index, index, out_begin, out_end, out_numel);
  block_sync();
  const T* const grads = reinterpret_cast<const T*>(held) + out_begin % kVec;
  const uint8_t* const indices =
      reinterpret_cast<const uint8_t*>(held_index) + out_begin % kIndexVec;
  const auto at_window = [&](int oh, int ow) { return (oh - oh_begin) * w.out_width + ow; };

  const int h_begin = max(step_begin * w.stride[0] - w.padding[0], 0);
  const int h_end = min(step_end * w.stride[0] - w.padding[0], w.height);
  const int64_t begin = (place.image * w.height + h_begin) * w.width;
  const int64_t end = begin + static_cast<int64_t>(h_end - h_begin) * w.width;
  for_run<T, kVec, 1>(x, begin, end, w.images * w.height * w.width,
                      [&](int64_t at, const Raw<T, kVec>& raw, const InRun& in_run) {
                        float v[kVec], g[kVec] = {};
                        unpack<T, kVec>(raw, v);
#pragma unroll
                        for (int i = 0; i < kVec; ++i) {
                          float x_i[1] = {v[i]}, g_i[1] = {};
                          v[i] = 0;
                          if (!in_run.has(i)) continue;
                          const int pixel = static_cast<int>(at + i - begin), row = pixel / w.width;
                          const int h = h_begin + row, last = (h + w.padding[0]) / w.stride[0];
                          gather<T, 1>(w, h, pixel - row * w.width, max(last - w.ring + 1, 0),
                                       min(last, w.out_height - 1), grads, indices, at_window, g_i);
                          before_activation<T, 1, kAct>(a, negative_slope, x_i, g_i);
                          v[i] = x_i[0];
                          g[i] = g_i[0];
                        }
                        f(at, v, g, in_run);
                      });
}

// partial: [2][parts][C], the sums of g and of g * (x - mean).
template <class T, int kVec, Activation kAct>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_max_pool_planes_backward_reduce_kernel(
        PoolWalk w, int64_t parts, BatchNormAffine affine, float negative_slope,
        const T* __restrict__ x, const T* __restrict__ grad_y, const uint8_t* __restrict__ index,
        float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);  // after the rows, which may be more
  const PoolPlace<1> place(w);
  const PoolAffine<T, 1> a(Channels<T, 1>(place.channel, w.channels, false), affine);
  float sum[kVec] = {}, product[kVec] = {};
  for_plane_gradients<T, kVec, kAct>(
      w, place, a, negative_slope, reinterpret_cast<unsigned char*>(&shared), x, grad_y, index,
      [&](int64_t, const float (&v)[kVec], const float (&g)[kVec], const InRun&) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          sum[i] += g[i];
          product[i] = fmaf(g[i], v[i], product[i]);
        }
      });
  block_sync();
  const float2 total = sum_columns<kVec, false>(shared, 1, kThreads, sum, product);
  if (threadIdx.x != 0) return;
  const int64_t part = place.image / w.channels * w.bands + place.band;
  store<float>(partial + part * w.channels + place.channel, total.x);
  store<float>(partial + (parts + part) * w.channels + place.channel, total.y);
}

template <class T, int kVec, Activation kAct>
__global__ void __launch_bounds__(kThreads, 2) batch_norm_act_max_pool_planes_backward_apply_kernel(
    PoolWalk w, BatchNormAffine affine, float negative_slope, const T* __restrict__ x,
    const T* __restrict__ grad_y, const uint8_t* __restrict__ index,
    const float* __restrict__ sum_grad, const float* __restrict__ sum_grad_xhat, float factor,
    T* __restrict__ grad_x) {
  using Rows = PoolRows<T, kVec>;
  RESOPS_SHARED(Rows, shared);
  const PoolPlace<1> place(w);
  const Channels<T, 1> channel(place.channel, w.channels, false);
  const PoolAffine<T, 1> a(channel, affine);
  const PoolGradientOfX<T, 1> of_x(channel, a, affine, sum_grad, sum_grad_xhat, factor);
  for_plane_gradients<T, kVec, kAct>(
      w, place, a, negative_slope, reinterpret_cast<unsigned char*>(&shared), x, grad_y, index,
      [&](int64_t at, const float (&v)[kVec], float (&g)[kVec], const InRun& in_run) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) g[i] = of_x(0, v[i], g[i]);
        store_run<T, kVec>(grad_x + at, in_run, g);
      });
}

}  // namespace resops::cuda
