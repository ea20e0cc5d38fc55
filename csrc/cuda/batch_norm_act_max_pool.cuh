// batch_norm_act_max_pool on a GPU: forward, backward_reduce, backward_apply.
//
// A block walks down a band of rows and keeps in shared memory the few rows that windows share, so
// that each element is read from memory once (and the rows on the border of two bands twice).
// Forward holds rows of act(z), rounded to the tensor's type: the maximum is the same, and of
// values that round to one the first counts. Backward holds rows of grad_y and of the index, and
// gathers for each element of x what the windows above it hand down, in the order of the windows:
// nothing is added by two threads to one place.
//
// Channels-last: an image is a sample, of C values per pixel, of which a block takes a slab; a
// thread keeps its channels. Contiguous: an image is a plane, of one value per pixel
// (batch_norm_act_max_pool_planes.cuh, but for rows too long for it).

#pragma once

#include "activation.cuh"
#include "batch_norm_act_max_pool.h"
#include "batch_norm_reduce.cuh"

namespace resops::cuda {

struct PoolWalk {
  int64_t images, channels;
  int64_t depth;  // values of a pixel: C or 1
  int height, width, out_height, out_width;
  int kernel[2], stride[2], padding[2];
  int lanes, pixels;  // threads beside each other in a pixel, and pixels at a time
  int slabs;          // blocks beside each other in a pixel
  // Columns and rows of a block, and how many times they are in an image: of y in forward, of x in
  // backward; a row in backward is a step, the rows of x whose lowest window is the same.
  int tile, tiles, band, bands;
  int ring, held;  // rows and columns that shared memory has; held of a band of a plane: elements

  bool in_runs;  // bands of whole rows of planes (batch_norm_act_max_pool_planes.cuh)

  // Of the blocks that have the same channels.
  int64_t parts() const { return images * bands * tiles * depth / channels; }
};

// The index of kVec windows as it is in memory.
template <int kVec>
using IndexVector =
    std::conditional_t<kVec == 8, uint2, std::conditional_t<kVec == 4, unsigned, uint8_t>>;

// Where a block and a thread are.
template <int kVec>
struct PoolPlace {
  __device__ explicit PoolPlace(const PoolWalk& w) {
    int64_t rest = blockIdx.x;
    const int slab = static_cast<int>(rest % w.slabs);
    rest /= w.slabs;
    tile = static_cast<int>(rest % w.tiles);
    rest /= w.tiles;
    band = static_cast<int>(rest % w.bands);
    image = rest / w.bands;
    lane = static_cast<int>(threadIdx.x) % w.lanes;
    pixel = static_cast<int>(threadIdx.x) / w.lanes;
    value = static_cast<int64_t>(slab * w.lanes + lane) * kVec;
    channel = w.depth == 1 ? image % w.channels : value;
    active = pixel < w.pixels && value < w.depth;
  }
  int64_t image, value, channel;  // value: the first of this thread's in a pixel
  int tile, band, lane, pixel;
  bool active;
};

// Calls f(row, column, raw) for the pixels of rows [row, row_end) and columns [column, column_end)
// of an image that are this thread's, with the elements of x there; several loads are on their way
// at a time.
template <class T, int kVec, int kSteps = 4, class F>
__device__ __forceinline__ void for_pixels(const PoolWalk& w, const PoolPlace<kVec>& place,
                                           const T* x, int row, int row_end, int column,
                                           int column_end, F f) {
  const int columns = column_end - column, pixels = (row_end - row) * columns;
  if (!place.active) return;
  for (int first = place.pixel; first < pixels; first += kSteps * w.pixels) {
    Raw<T, kVec> raw[kSteps] = {};
    int h[kSteps], at[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int pixel = first + u * w.pixels;
      h[u] = row + pixel / columns;
      at[u] = column + pixel % columns;
      if (pixel < pixels) {
        const int64_t offset = ((place.image * w.height + h[u]) * w.width + at[u]) * w.depth;
        raw[u] = load_nc<Raw<T, kVec>>(x + offset + place.value);
      }
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (first + u * w.pixels < pixels) f(h[u], at[u], raw[u]);
    }
  }
}

// mean, scale = weight * invstd and bias of a thread's channels.
template <class T, int kVec>
struct PoolAffine {
  __device__ PoolAffine(const Channels<T, kVec>& channels, const BatchNormAffine& affine) {
    float weight[kVec];
    channels.read(affine.mean, mean);
    channels.read(affine.invstd, scale);
    channels.read(affine.weight, 1.0f, weight);
    channels.read(affine.bias, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) scale[i] *= weight[i];
  }
  float mean[kVec], scale[kVec], bias[kVec];
};

// ---- forward -----------------------------------------------------------------------------------

template <class T, int kVec>
struct PoolRows {  // of which a launch asks for as many bytes as it needs
  Raw<T, kVec> first[16 / sizeof(Raw<T, kVec>)];
};

template <int kVec>
__device__ __forceinline__ void store_index(uint8_t* p, const int (&where)[kVec]) {
  if constexpr (kVec == 1) {
    store<uint8_t>(p, static_cast<uint8_t>(where[0]));
  } else {
    unsigned word[kVec / 4] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) word[i / 4] |= static_cast<unsigned>(where[i]) << 8 * (i % 4);
    if constexpr (kVec == 8) {
      store<uint2>(p, make_uint2(word[0], word[1]));
    } else {
      store<unsigned>(p, word[0]);
    }
  }
}

// Rows and columns of x that a window sees, and where it begins, which may be in the padding.
struct PoolWindow {
  __device__ PoolWindow(const PoolWalk& w, int oh, int ow)
      : row(oh * w.stride[0] - w.padding[0]),
        column(ow * w.stride[1] - w.padding[1]),
        row_begin(max(row, 0)),
        row_end(min(row + w.kernel[0], w.height)),
        column_begin(max(column, 0)),
        column_end(min(column + w.kernel[1], w.width)) {}
  int row, column, row_begin, row_end, column_begin, column_end;
};

// The maximum of the values(row, column) of a window, and the place in it of the first such value.
template <class T, int kVec, class F>
__device__ __forceinline__ void window_maximum(const PoolWalk& w, const PoolWindow& window,
                                               F values, float (&best)[kVec], int (&where)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    best[i] = -__uint_as_float(0x7f800000u);
    where[i] = (window.row_begin - window.row) * w.kernel[1] + window.column_begin - window.column;
  }
  for (int h = window.row_begin; h < window.row_end; ++h) {
    for (int column = window.column_begin; column < window.column_end; ++column) {
      const int position = (h - window.row) * w.kernel[1] + column - window.column;
      float v[kVec];
      unpack<T, kVec>(values(h, column), v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (v[i] > best[i] || v[i] != v[i]) {  // a NaN stays
          best[i] = v[i];
          where[i] = position;
        }
      }
    }
  }
}

template <class T, int kVec, Activation kAct>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_max_pool_forward_kernel(PoolWalk w, BatchNormAffine affine, bool aligned,
                                           float negative_slope, const T* __restrict__ x,
                                           T* __restrict__ y, uint8_t* __restrict__ index) {
  using Rows = PoolRows<T, kVec>;
  RESOPS_SHARED(Rows, shared);
  Raw<T, kVec>* const rows = shared.first;
  const PoolPlace<kVec> place(w);
  const PoolAffine<T, kVec> a(Channels<T, kVec>(place.channel, w.channels, aligned), affine);
  const int ow_begin = place.tile * w.tile, ow_end = min(ow_begin + w.tile, w.out_width);
  const int w_begin = max(ow_begin * w.stride[1] - w.padding[1], 0);
  const int w_end = min((ow_end - 1) * w.stride[1] - w.padding[1] + w.kernel[1], w.width);
  const auto held = [&](int h, int column) {
    return ((h % w.ring) * w.held + column - w_begin) * w.lanes + place.lane;
  };
  const int oh_end = min((place.band + 1) * w.band, w.out_height);
  int next = 0;  // row of x that is to be read next
  for (int oh = place.band * w.band; oh < oh_end; ++oh) {
    const int h_first = oh * w.stride[0] - w.padding[0];
    const int h_begin = max(h_first, 0), h_end = min(h_first + w.kernel[0], w.height);
    next = max(next, h_begin);
    for_pixels<T, kVec>(w, place, x, next, h_end, w_begin, w_end,
                        [&](int h, int column, const Raw<T, kVec>& raw) {
                          float v[kVec];
                          unpack<T, kVec>(raw, v);
#pragma unroll
                          for (int i = 0; i < kVec; ++i) {
                            const float z = fmaf(v[i] - a.mean[i], a.scale[i], a.bias[i]);
                            v[i] = activate<kAct>(z, negative_slope);
                          }
                          rows[held(h, column)] = pack<T, kVec>(v);
                        });
    next = max(next, h_end);
    block_sync();
    for (int ow = ow_begin + place.pixel; place.active && ow < ow_end; ow += w.pixels) {
      float best[kVec];
      int where[kVec];
      window_maximum<T, kVec>(
          w, PoolWindow(w, oh, ow), [&](int h, int column) { return rows[held(h, column)]; }, best,
          where);
      const int64_t at =
          ((place.image * w.out_height + oh) * w.out_width + ow) * w.depth + place.value;
      store<Raw<T, kVec>>(y + at, pack<T, kVec>(best));
      store_index<kVec>(index + at, where);
    }
    block_sync();
  }
}

// ---- backward ----------------------------------------------------------------------------------

template <int kVec>
__device__ __forceinline__ int index_at(const IndexVector<kVec>& index, int i) {
  if constexpr (kVec == 8) {
    return (i < 4 ? index.x >> 8 * i : index.y >> 8 * (i - 4)) & 0xff;
  } else if constexpr (kVec == 4) {
    return index >> 8 * i & 0xff;
  } else {
    return index;
  }
}

// Adds to g what the windows that see pixel (h, column) hand down, those of rows [oh_begin,
// oh_last] in grads and indices at held(row, column).
template <class T, int kVec, class Held>
__device__ __forceinline__ void gather(const PoolWalk& w, int h, int column, int oh_begin,
                                       int oh_last, const Raw<T, kVec>* grads,
                                       const IndexVector<kVec>* indices, Held held,
                                       float (&g)[kVec]) {
  const int right = (column + w.padding[1]) / w.stride[1];  // the last window
  const int left = right - (w.kernel[1] - 1) / w.stride[1];
  for (int oh = oh_begin; oh <= oh_last; ++oh) {
    const int row = h + w.padding[0] - oh * w.stride[0];
    if (row >= w.kernel[0]) continue;
    for (int ow = max(left, 0); ow <= min(right, w.out_width - 1); ++ow) {
      const int place_in_row = column + w.padding[1] - ow * w.stride[1];
      if (place_in_row >= w.kernel[1]) continue;
      const int position = row * w.kernel[1] + place_in_row;
      float from[kVec];
      unpack<T, kVec>(grads[held(oh, ow)], from);
      const IndexVector<kVec> where = indices[held(oh, ow)];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (index_at<kVec>(where, i) == position) g[i] += from[i];
      }
    }
  }
}

// Calls f(offset, x, g) for the elements of x that are this thread's: `offset` is that of the first
// of kVec, g the gradient that reaches them from the pooling.
template <class T, int kVec, int kSteps, class F>
__device__ __forceinline__ void for_gradients(const PoolWalk& w, const PoolPlace<kVec>& place,
                                              unsigned char* shared, const T* x, const T* grad_y,
                                              const uint8_t* index, F f) {
  using Index = IndexVector<kVec>;
  auto* const grads = reinterpret_cast<Raw<T, kVec>*>(shared);
  auto* const indices = reinterpret_cast<Index*>(grads + w.ring * w.held * w.lanes);
  const int w_begin = place.tile * w.tile, w_end = min(w_begin + w.tile, w.width);
  // Windows that reach the columns.
  const int before = w_begin + w.padding[1] - w.kernel[1];
  const int ow_begin = before < 0 ? 0 : before / w.stride[1] + 1;
  const int ow_end = min((w_end - 1 + w.padding[1]) / w.stride[1] + 1, w.out_width);
  const auto held = [&](int oh, int ow) {
    return ((oh % w.ring) * w.held + ow - ow_begin) * w.lanes + place.lane;
  };
  const int steps = (w.height - 1 + w.padding[0]) / w.stride[0] + 1;
  const int step_begin = place.band * w.band, step_end = min(step_begin + w.band, steps);
  for (int step = step_begin; step < step_end; ++step) {
    // The first step reads the rows that earlier windows share with it too.
    const int first = step == step_begin ? max(step - w.ring + 1, 0) : step;
    for (int oh = first; oh <= min(step, w.out_height - 1); ++oh) {
      for (int ow = ow_begin + place.pixel; place.active && ow < ow_end; ow += w.pixels) {
        const int64_t at =
            ((place.image * w.out_height + oh) * w.out_width + ow) * w.depth + place.value;
        grads[held(oh, ow)] = load_nc<Raw<T, kVec>>(grad_y + at);
        indices[held(oh, ow)] = load_nc<Index>(index + at);
      }
    }
    block_sync();
    const int h_begin = max(step * w.stride[0] - w.padding[0], 0);
    const int h_end = min((step + 1) * w.stride[0] - w.padding[0], w.height);
    if (h_begin < h_end) {
      for_pixels<T, kVec, kSteps>(
          w, place, x, h_begin, h_end, w_begin, w_end,
          [&](int h, int column, const Raw<T, kVec>& raw) {
            float g[kVec] = {}, values[kVec];
            gather<T, kVec>(w, h, column, max(step - w.ring + 1, 0), min(step, w.out_height - 1),
                            grads, indices, held, g);
            unpack<T, kVec>(raw, values);
            f(((place.image * w.height + h) * w.width + column) * w.depth + place.value, values, g);
          });
    }
    block_sync();
  }
}

// Pixels of a thread at a time: of gelu more would not fit the registers.
template <Activation kAct>
constexpr int kPoolSteps = kAct == Activation::gelu ? 1 : 4;

// In place: the gradient before the activation, and x - mean.
template <class T, int kVec, Activation kAct>
__device__ __forceinline__ void before_activation(const PoolAffine<T, kVec>& a,
                                                  float negative_slope, float (&x)[kVec],
                                                  float (&g)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    x[i] -= a.mean[i];
    g[i] = activation_gradient<kAct>(g[i], fmaf(x[i], a.scale[i], a.bias[i]), negative_slope);
  }
}

// partial: [2][parts][C], the sums of g and of g * (x - mean).
template <class T, int kVec, bool kChannelsLast, Activation kAct>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_max_pool_backward_reduce_kernel(PoolWalk w, int64_t parts,
                                                   BatchNormAffine affine, bool aligned,
                                                   float negative_slope, const T* __restrict__ x,
                                                   const T* __restrict__ grad_y,
                                                   const uint8_t* __restrict__ index,
                                                   float* __restrict__ partial) {
  RESOPS_SHARED(SumsShared<kVec>, shared);  // after the rows, which may be more
  const PoolPlace<kVec> place(w);
  const PoolAffine<T, kVec> a(Channels<T, kVec>(place.channel, w.channels, aligned), affine);
  float sum[kVec] = {}, product[kVec] = {};
  for_gradients<T, kVec, kPoolSteps<kAct>>(
      w, place, reinterpret_cast<unsigned char*>(&shared), x, grad_y, index,
      [&](int64_t, float (&v)[kVec], float (&g)[kVec]) {
        before_activation<T, kVec, kAct>(a, negative_slope, v, g);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          sum[i] += g[i];
          product[i] = fmaf(g[i], v[i], product[i]);
        }
      });
  const float2 total = sum_columns<kVec, kChannelsLast>(shared, w.lanes, w.pixels, sum, product);
  // Thread t has the sums of value t of the block's slab.
  const int t = static_cast<int>(threadIdx.x), width = kChannelsLast ? w.lanes * kVec : 1;
  const int64_t sample = kChannelsLast ? place.image : place.image / w.channels;
  const int64_t part = (sample * w.bands + place.band) * w.tiles + place.tile;
  const int64_t channel =
      kChannelsLast ? place.value - place.lane * kVec + t : place.image % w.channels;
  if (t >= width || channel >= w.channels) return;
  store<float>(partial + part * w.channels + channel, total.x);
  store<float>(partial + (parts + part) * w.channels + channel, total.y);
}

// grad_x = scale * g [+ slope * (x - mean) + offset]
template <class T, int kVec>
class PoolGradientOfX {
 public:
  __device__ PoolGradientOfX(const Channels<T, kVec>& channels, const PoolAffine<T, kVec>& a,
                             const BatchNormAffine& affine, const float* sum_grad,
                             const float* sum_grad_xhat, float factor)
      : has_sums_(sum_grad != nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) scale_[i] = a.scale[i];
    if (!has_sums_) return;
    float invstd[kVec];
    channels.read(affine.invstd, invstd);
    channels.read(sum_grad, offset_);
    channels.read(sum_grad_xhat, slope_);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      offset_[i] *= -factor * a.scale[i];
      slope_[i] *= -factor * a.scale[i] * invstd[i];
    }
  }
  // Of the i-th channel.
  __device__ __forceinline__ float operator()(int i, float x_minus_mean, float g) const {
    return fmaf(g, scale_[i], has_sums_ ? fmaf(x_minus_mean, slope_[i], offset_[i]) : 0);
  }

 private:
  bool has_sums_;
  float scale_[kVec], slope_[kVec] = {}, offset_[kVec] = {};
};

template <class T, int kVec, Activation kAct>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_max_pool_backward_apply_kernel(PoolWalk w, BatchNormAffine affine, bool aligned,
                                                  float negative_slope, const T* __restrict__ x,
                                                  const T* __restrict__ grad_y,
                                                  const uint8_t* __restrict__ index,
                                                  const float* __restrict__ sum_grad,
                                                  const float* __restrict__ sum_grad_xhat,
                                                  float factor, T* __restrict__ grad_x) {
  using Rows = PoolRows<T, kVec>;
  RESOPS_SHARED(Rows, shared);
  const PoolPlace<kVec> place(w);
  const Channels<T, kVec> channels(place.channel, w.channels, aligned);
  const PoolAffine<T, kVec> a(channels, affine);
  const PoolGradientOfX<T, kVec> of_x(channels, a, affine, sum_grad, sum_grad_xhat, factor);
  for_gradients<T, kVec, kPoolSteps<kAct>>(
      w, place, reinterpret_cast<unsigned char*>(&shared), x, grad_y, index,
      [&](int64_t at, float (&v)[kVec], float (&g)[kVec]) {
        before_activation<T, kVec, kAct>(a, negative_slope, v, g);
#pragma unroll
        for (int i = 0; i < kVec; ++i) g[i] = of_x(i, v[i], g[i]);
        store<Raw<T, kVec>>(grad_x + at, pack<T, kVec>(g));
      });
}

}  // namespace resops::cuda
