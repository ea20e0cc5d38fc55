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

template <class T>
__device__ __forceinline__ double read_running(const RunningStatistic& r, int64_t c) {
  if (r.is_float) return static_cast<const float*>(r.data)[c * r.stride];
  return to_float(static_cast<const T*>(r.data)[c * r.stride]);
}

template <class T>
__device__ __forceinline__ void update_running(const RunningStatistic& r, int64_t c, double batch,
                                               double momentum) {
  if (r.data == nullptr) return;
  const float value = static_cast<float>((1 - momentum) * read_running<T>(r, c) + momentum * batch);
  if (r.is_float) {
    static_cast<float*>(r.data)[c * r.stride] = value;
  } else {
    static_cast<T*>(r.data)[c * r.stride] = from_float<T>(value);
  }
}

// Whether vectors of values per channel may start at these addresses, where they are not null.
inline bool are_aligned(std::initializer_list<const void*> vectors) {
  for (const void* p : vectors) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// The channels of a thread's kVec columns, or the one channel of its block.
template <class T, int kCount>
class Channels {
 public:
  __device__ Channels(int64_t column, int64_t channels, bool aligned)
      : first_(column % channels), channels_(channels), aligned_(aligned) {}

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
          unpack<T, kCount>(load_nc<Raw<T, kCount>>(static_cast<const T*>(p.data) + first_), v);
        }
        return;
      }
    }
    int64_t c = first_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = load_channel<T>(p, c, missing);
      c = c + 1 == channels_ ? 0 : c + 1;
    }
  }
  __device__ void read(const float* p, float (&v)[kCount]) const {
    read(ChannelVector{p, true}, 0.0f, v);
  }

 private:
  int64_t first_, channels_;
  bool aligned_;  // whole vectors of channels, from pointers at 16 bytes
};

// ---- sums of a block ---------------------------------------------------------------------------

template <int kVec>
struct SumsShared {
  float a[kThreads * kVec];
  float b[kThreads * kVec];
};

// Two sums over the threads of a block that have the same column, `lanes` beside each other in
// `lane_rows` rows, in the order of the rows;
// contiguous: over all elements of the block. Thread j has the result of the block's column j.
template <int kVec, bool kChannelsLast>
__device__ float2 sum_columns(SumsShared<kVec>& shared, int lanes, int lane_rows,
                              const float (&a)[kVec], const float (&b)[kVec]) {
  const int t = static_cast<int>(threadIdx.x);
  float2 total = make_float2(0, 0);
  if constexpr (kChannelsLast) {
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
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      total.x += shuffle_xor(total.x, mask);
      total.y += shuffle_xor(total.y, mask);
    }
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

// The column whose sums this thread has after sum_columns, or -1.
template <int kVec, bool kChannelsLast>
__device__ int64_t summed_column(const BatchNormWalk& w) {
  const int width = kChannelsLast ? w.lanes * kVec : 1;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x;
  return static_cast<int>(threadIdx.x) < width && column < w.columns ? column : -1;
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

// Calls f(part, column, index) for the share of this thread of what the parts hold of channel c;
// `index` is where it is in a plane of the workspace, [parts][columns].
template <class F>
__device__ __forceinline__ void for_parts(const BatchNormWalk& w, int64_t c, F f) {
  const int repeats = static_cast<int>(w.columns / w.channels), parts = w.parts();
  if (c >= w.channels) return;
  const int lane = static_cast<int>(threadIdx.x) / kFinishChannels;
#pragma unroll 4
  for (int i = lane; i < parts * repeats; i += kFinishLanes) {
    const int part = i / repeats;
    const int64_t column = c + i % repeats * w.channels;
    f(part, column, part * w.columns + column);
  }
}

}  // namespace resops::cuda
