// What the batch_norm kernels do per channel: read its values, and add up over threads and parts in
// a fixed order.

#pragma once

#include <initializer_list>

#include "batch_norm.h"
#include "batch_norm_walk.cuh"

namespace resops::cuda {

// ---- values per channel ------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float load_channel(const ChannelVector& p, int64_t c, float missing) {
  if (p.data == nullptr) return missing;
  if (p.is_float) return load_nc<float>(static_cast<const float*>(p.data) + c);
  return to_float(load_nc<T>(static_cast<const T*>(p.data) + c));
}

// Whether vectors of values per channel may start at these addresses, where they are not null.
inline bool are_aligned(std::initializer_list<const void*> vectors) {
  for (const void* p : vectors) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// The channels of a thread's kVec columns, of which `plane` neighbours are of one channel, or the
// one channel of its block.
template <class T, int kCount>
class Channels {
 public:
  __device__ __forceinline__ Channels(int64_t column, int64_t channels, bool aligned,
                                      int64_t plane = 1)
      : first_(column / plane % channels),
        left_(plane - column % plane),
        plane_(plane),
        channels_(channels),
        aligned_(aligned) {}

  __device__ void read(ChannelVector p, float missing, float (&v)[kCount]) const {
    if constexpr (kCount > 1) {
      if (aligned_ && p.data != nullptr) {
        if (p.is_float) {
#pragma unroll
          for (int i = 0; i < kCount; i += 4) {
            float part[4];
            unpack<float, 4>(load_nc<uint4>(static_cast<const float*>(p.data) + first_ + i), part);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[i + j] = part[j];
          }
        } else {
          unpack<T, kCount>(load_nc<uint4>(static_cast<const T*>(p.data) + first_), v);
        }
        return;
      }
    }
    int64_t c = first_, left = left_;
    float value = load_channel<T>(p, c, missing);
    if (plane_ >= kCount) {  // two channels at most, and no loads for each of which few lanes stay
      const float next =
          left < kCount ? load_channel<T>(p, c + 1 == channels_ ? 0 : c + 1, missing) : value;
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = i < left ? value : next;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = value;
      if (i + 1 == kCount || --left > 0) continue;
      left = plane_;
      c = c + 1 == channels_ ? 0 : c + 1;
      value = load_channel<T>(p, c, missing);
    }
  }
  __device__ void read(const float* p, float (&v)[kCount]) const {
    read(ChannelVector{p, true}, 0.0f, v);
  }

 private:
  int64_t first_, left_, plane_, channels_;  // left_: columns of the first one
  bool aligned_;                             // whole vectors of channels, from pointers at 16 bytes
};

// ---- sums of a block ---------------------------------------------------------------------------

template <int kVec>
struct SumsShared {
  float a[kThreads * kVec];
  float b[kThreads * kVec];
};

// Over the lanes of a warp, for all of them.
__device__ __forceinline__ float2 sum_warp(float2 total) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    total.x += shuffle_xor(total.x, mask);
    total.y += shuffle_xor(total.y, mask);
  }
  return total;
}

// Two sums over the threads of a block that have the same column, `lanes` beside each other in
// `lane_rows` rows, in the order of the rows; by planes: over all elements of the block. Thread j
// has the result of the block's column j.
template <int kVec, bool kByRows>
__device__ float2 sum_columns(SumsShared<kVec>& shared, int lanes, int lane_rows,
                              const float (&a)[kVec], const float (&b)[kVec]) {
  const int t = static_cast<int>(threadIdx.x);
  float2 total = make_float2(0, 0);
  if constexpr (kByRows) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      shared.a[t * kVec + i] = a[i];
      shared.b[t * kVec + i] = b[i];
    }
    block_sync();
    const int width = lanes * kVec;
    if (t >= width) return total;
    for (int row = 0; row < lane_rows; ++row) {
      total.x += shared.a[row * width + t];
      total.y += shared.b[row * width + t];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      total.x += a[i];
      total.y += b[i];
    }
    total = sum_warp(total);
    if (t % kWarpSize == 0) {
      shared.a[t / kWarpSize] = total.x;
      shared.b[t / kWarpSize] = total.y;
    }
    block_sync();
    total = make_float2(0, 0);
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
      total.x += shared.a[warp];
      total.y += shared.b[warp];
    }
  }
  return total;
}

// Two sums over the columns and rows of each share of a plane, a warp per share, into
// sums[blockIdx.y][share.index].
template <int kVec>
__device__ void store_shares(SumsShared<kVec>& shared, const BatchNormWalk& w,
                             const float (&a)[kVec], const float (&b)[kVec], float* sums_a,
                             float* sums_b) {
  const int t = static_cast<int>(threadIdx.x), lane = t % kWarpSize;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    shared.a[t * kVec + i] = a[i];
    shared.b[t * kVec + i] = b[i];
  }
  block_sync();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * w.width;
  const int64_t end = begin + w.width < w.pitch ? begin + w.width : w.pitch;
  for (int64_t p = begin / w.plane + t / kWarpSize; p * w.plane < end; p += kThreads / kWarpSize) {
    const int64_t plane_begin = p * w.plane - begin, plane_end = plane_begin + w.plane;
    const int first = plane_begin > 0 ? static_cast<int>(plane_begin) : 0;
    const int last = static_cast<int>(plane_end < end - begin ? plane_end : end - begin);
    float2 total = make_float2(0, 0);
    for (int row = 0; row < w.lane_rows; ++row) {
      for (int k = row * w.width + first + lane; k < row * w.width + last; k += kWarpSize) {
        total.x += shared.a[k];
        total.y += shared.b[k];
      }
    }
    total = sum_warp(total);
    if (lane == 0) {
      const int64_t at = blockIdx.y * w.columns + blockIdx.x + p;
      store<float>(sums_a + at, total.x);
      store<float>(sums_b + at, total.y);
    }
  }
}

// Two sums of a block into sums[blockIdx.y][column].
template <int kVec, bool kByRows>
__device__ void store_sums(SumsShared<kVec>& shared, const BatchNormWalk& w, const float (&a)[kVec],
                           const float (&b)[kVec], float* sums_a, float* sums_b) {
  if (kByRows && w.plane > 1) return store_shares<kVec>(shared, w, a, b, sums_a, sums_b);
  const float2 total = sum_columns<kVec, kByRows>(shared, w.lanes, w.lane_rows, a, b);
  const int width = kByRows ? w.width : 1, t = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * width + t;
  if (t >= width || column >= w.columns) return;
  const int64_t at = blockIdx.y * w.columns + column;
  store<float>(sums_a + at, total.x);
  store<float>(sums_b + at, total.y);
}

// ---- sums of all parts -------------------------------------------------------------------------

constexpr int kFinishChannels = 8;  // in a block of the finalisers, for each of which
constexpr int kFinishLanes = kThreads / kFinishChannels;  // as many threads add up the parts

struct FinishShared {
  double a[kFinishLanes][kFinishChannels];
  double b[kFinishLanes][kFinishChannels];
};

struct Sums {
  double a, b;
};

// The sums of a and b over the threads of one channel, for all of them.
__device__ inline Sums sum_channel(FinishShared& shared, double a, double b) {
  const int c = static_cast<int>(threadIdx.x) % kFinishChannels;
  const int lane = static_cast<int>(threadIdx.x) / kFinishChannels;
  shared.a[lane][c] = a;
  shared.b[lane][c] = b;
  for (int half = kFinishLanes / 2; half > 0; half /= 2) {
    block_sync();
    if (lane < half) {
      shared.a[lane][c] += shared.a[lane + half][c];
      shared.b[lane][c] += shared.b[lane + half][c];
    }
  }
  block_sync();
  const Sums total{shared.a[0][c], shared.b[0][c]};
  block_sync();
  return total;
}

__device__ __forceinline__ int64_t finish_channel() {
  return static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x % kFinishChannels;
}
__device__ __forceinline__ bool writes_channel(const BatchNormWalk& w, int64_t c) {
  return c < w.channels && threadIdx.x < kFinishChannels;
}

// Calls f(part, share, index) for what this thread adds up of the sums that the parts hold of
// channel c; `index` is where they are in [parts][columns] of the workspace.
template <class F>
__device__ __forceinline__ void for_parts(const BatchNormWalk& w, int64_t c, F f) {
  if (c >= w.channels) return;
  const int of_a_part = w.repeats * w.shares, all = w.parts() * of_a_part;
  const int lane = static_cast<int>(threadIdx.x) / kFinishChannels;
#pragma unroll 4
  for (int i = lane; i < all; i += kFinishLanes) {
    const int part = i / of_a_part, which = i % of_a_part;
    const PlaneShare share = w.share(c + which / w.shares * w.channels, which % w.shares);
    if (share.begin < share.end) f(part, share, part * w.columns + share.index);
  }
}

}  // namespace resops::cuda
