// The forward convolution as an implicit matrix product on tensor cores (mma.sync, sm_80 and
// newer).
//
//   y[m, c] = sum over k of window[m, k] * weight[c, k]
//
// Row m is a pixel of the output and its window of the input; k runs over the taps of the kernel
// and, within a tap, over the input channels. The matrix of windows is never stored: in
// channels-last every tap is a run of neighbouring channels, which cp.async fetches from the image
// 8 at a time, or fills with zeros where the tap lies in the padding.
//
// A block computes kTileM pixels by kTileN channels. In steps of kTileK channels of one tap it
// multiplies what lies in one stage of its shared memory while the copies into the other stages are
// on their way. A prologue act(scale * x + shift) is applied in shared memory, by the thread that
// fetched the 8 channels: it knows which of them are padding, and leaves those zero.
//
// Epilogue: the sums go through shared memory, in float, so that bias, residual and activation see
// 8 neighbouring channels and are rounded once, with y. Statistics are those of the rounded values:
// per channel the mean of the tile's pixels, and the sums of x - mean and of its square. They are
// partial sums of batch_norm (docs/math/conv_bn_act.md), whose finaliser merges them.

#pragma once

#include "activation.cuh"
#include "batch_norm_reduce.cuh"
#include "conv_bn_act.h"

namespace resops::cuda {

constexpr int kTileM = 128;
constexpr int kTileK = 32;
constexpr int kStages = 3;
constexpr int kChunk = 8;  // elements of 16 bits that make 16 bytes
constexpr int kRowChunks = kTileK / kChunk;
constexpr int kRowsAtOnce = kThreads / kRowChunks;  // that the threads of a block fetch

// Eight warps in kTileN / 32 columns, each with 32 channels and kWarpRows pixels.
template <int kTileN>
constexpr int kWarpRows = kTileM * kTileN / 32 / (kThreads / kWarpSize);
// Rows of the tile that go through shared memory together: 32 KB of float.
template <int kTileN>
constexpr int kPassRows = 8192 / kTileN;

template <int kTileN>
struct ConvShared {
  struct Stages {
    uint4 x[kStages][kTileM * kRowChunks];
    uint4 weight[kStages][kTileN * kRowChunks];
  };
  struct Results {
    float tile[kPassRows<kTileN>][kTileN + 8];  // 8: rows start in other banks
    float sums[2][kThreads];
  };
  union {
    Stages in;
    Results out;
  };
};

// Where a chunk of a row is: the eight rows that ldmatrix reads lie in different banks.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kRowChunks + (chunk ^ (row / 2 % kRowChunks));
}

// `count` <= 8 elements into a chunk, and zeros behind them. With kVec == 8 the count is 0 or 8.
template <class T, int kVec>
__device__ __forceinline__ void fetch_chunk(uint4* to, const T* from, int count) {
  if constexpr (kVec == kChunk) {
    cp_async<16>(to, from, static_cast<int>(count * sizeof(T)));
  } else {
    float v[kChunk] = {};
    load_some<T>(from, count, v);
    *to = pack<T, kChunk>(v);
  }
}

// The activation where it is known at run time only.
template <int kCount>
__device__ __forceinline__ void activate_all(Activation activation, float slope,
                                             float (&v)[kCount]) {
  const auto apply = [&](auto act) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = activate<decltype(act)::value>(v[i], slope);
  };
  switch (activation) {
    case Activation::identity:
      return;
    case Activation::relu:
      return apply(std::integral_constant<Activation, Activation::relu>{});
    case Activation::leaky_relu:
      return apply(std::integral_constant<Activation, Activation::leaky_relu>{});
    case Activation::silu:
      return apply(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return apply(std::integral_constant<Activation, Activation::gelu>{});
  }
}

// ---- the product -------------------------------------------------------------------------------

// scale and shift of all channels lie behind the shared struct, filled up with zeros to whole
// chunks: what is past the last channel stays zero.
__host__ __device__ constexpr int affine_length(int channels) {
  return (channels + kChunk - 1) / kChunk * kChunk;
}
template <int kTileN>
__device__ __forceinline__ float* affine_of(ConvShared<kTileN>& shared) {
  return reinterpret_cast<float*>(&shared + 1);
}
template <int kTileN>
__device__ __forceinline__ void read_affine(ConvShared<kTileN>& shared,
                                            const ConvBnActForward& call) {
  const int channels = call.shape.in_channels, length = affine_length(channels);
  float* scale = affine_of(shared);
  for (int i = static_cast<int>(threadIdx.x); i < length; i += kThreads) {
    scale[i] = i < channels ? load_nc<float>(call.scale + i) : 0.0f;
    scale[length + i] = i < channels ? load_nc<float>(call.shift + i) : 0.0f;
  }
  block_sync();
}

// The window of one pixel of the output: where its first tap lies in the image, perhaps outside.
struct ConvWindow {
  int row, column;
  int64_t offset;  // in x

  __device__ ConvWindow(const ConvShape& s, int64_t m) {
    const int64_t line = m / s.width.out_size, sample = line / s.height.out_size;
    row = static_cast<int>(line - sample * s.height.out_size) * s.height.stride - s.height.padding;
    column = static_cast<int>(m - line * s.width.out_size) * s.width.stride - s.width.padding;
    offset = ((sample * s.height.size + row) * s.width.size + column) * s.pitch;
    if (sample >= s.samples) row = -kOutside;
  }
  __device__ bool holds(const ConvShape& s, int tap_h, int tap_w) const {
    const int h = row + tap_h * s.height.dilation, w = column + tap_w * s.width.dilation;
    return h >= 0 && h < s.height.size && w >= 0 && w < s.width.size;
  }
  static constexpr int kOutside = 1 << 30;  // further than a kernel reaches
};

// What a thread fetches of each step: a chunk of kTileK channels of one tap, for one pixel and one
// filter in kRowsAtOnce.
template <class T, int kTileN, int kVec, bool kPrologue>
class ConvFetch {
 public:
  __device__ ConvFetch(const ConvBnActForward& call, int64_t first_row, int first_channel)
      : call_(call),
        window_{{call.shape, first_row + own_row()},
                {call.shape, first_row + own_row() + kRowsAtOnce}},
        filter_(first_channel + own_row()) {
    static_assert(kTileM == 2 * kRowsAtOnce);
  }

  // Begins the copies of the next step, if there is one.
  __device__ void fetch(ConvShared<kTileN>& shared, int stage, bool there) {
    history_ <<= 2;
    if (!there) return;
    const ConvShape& s = call_.shape;
    const T* const x = static_cast<const T*>(call_.x);
    const int own = channel_ + kChunk * own_chunk(), count = chunk_at(own);
    const int64_t tap = (static_cast<int64_t>(tap_h_) * s.height.dilation * s.width.size +
                         static_cast<int64_t>(tap_w_) * s.width.dilation) *
                            s.pitch +
                        own;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool holds = count > 0 && window_[i].holds(s, tap_h_, tap_w_);
      fetch_chunk<T, kVec>(&shared.in.x[stage][place(i)],
                           holds ? x + window_[i].offset + tap : nothing(), holds ? count : 0);
      history_ |= static_cast<unsigned>(holds) << i;
    }
    const int position = (tap_h_ * s.width.kernel + tap_w_) * s.in_channels + own;
#pragma unroll
    for (int i = 0; i < kTileN / kRowsAtOnce; ++i) {
      const int filter = filter_ + i * kRowsAtOnce;
      const bool holds = count > 0 && filter < s.out_channels;
      const int taken = holds ? filter * s.filter_length + position : 0;
      fetch_chunk<T, kVec>(&shared.in.weight[stage][place(i)],
                           static_cast<const T*>(call_.weight) + taken, holds ? count : 0);
    }
    next_tap(s);
  }

  // Applies the prologue to the own chunks of the step that was fetched kStages - 1 calls ago, and
  // whose copies have arrived. What is padding, or past the last pixel or channel, stays zero.
  __device__ void transform(ConvShared<kTileN>& shared, int stage) {
    if constexpr (kPrologue) {
      const int own = transformed_ + kChunk * own_chunk();
      transformed_ += kTileK;
      if (transformed_ >= call_.shape.in_channels) transformed_ = 0;
      const unsigned holds = history_ >> 2 * (kStages - 2) & 3;
      if (holds == 0) return;
      const float* scale = affine_of(shared) + own;
      const float* shift = scale + affine_length(call_.shape.in_channels);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((holds >> i & 1) == 0) continue;
        uint4& chunk = shared.in.x[stage][place(i)];
        float v[kChunk];
        unpack<T, kChunk>(chunk, v);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) v[j] = fmaf(v[j], scale[j], shift[j]);
        activate_all(call_.prologue, call_.prologue_slope, v);
        chunk = pack<T, kChunk>(v);
      }
    }
  }

 private:
  static __device__ int own_row() { return static_cast<int>(threadIdx.x) / kRowChunks; }
  static __device__ int own_chunk() { return static_cast<int>(threadIdx.x) % kRowChunks; }
  static __device__ int place(int i) { return place_of(own_row() + i * kRowsAtOnce, own_chunk()); }
  // Where a copy of no bytes is from: the weight is never empty.
  __device__ const T* nothing() const { return static_cast<const T*>(call_.weight); }
  // Channels that a chunk has.
  __device__ int chunk_at(int channel) const {
    const int left = call_.shape.in_channels - channel;
    return left < 0 ? 0 : left < kChunk ? left : kChunk;
  }
  __device__ void next_tap(const ConvShape& s) {
    channel_ += kTileK;
    if (channel_ < s.in_channels) return;
    channel_ = 0;
    if (++tap_w_ < s.width.kernel) return;
    tap_w_ = 0;
    ++tap_h_;
  }

  const ConvBnActForward& call_;
  ConvWindow window_[2];
  int filter_;
  int tap_h_ = 0, tap_w_ = 0, channel_ = 0;  // of the next step
  int transformed_ = 0;                      // channel of the step that is transformed next
  unsigned history_ = 0;  // two bits for each fetch: whether its pixels were in the image
};

// sum += x weight^T of one step, for the part of the tile that this warp has.
template <class T, int kTileN>
__device__ __forceinline__ void multiply(const ConvShared<kTileN>& shared, int stage, int warp_row,
                                         int warp_column,
                                         float (&sum)[kWarpRows<kTileN> / 16][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, matrix = lane / 8;
#pragma unroll
  for (int k = 0; k < kRowChunks; k += 2) {
    unsigned weight[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = warp_column + 16 * j + 8 * (matrix / 2) + lane % 8;
      ldmatrix_x4(weight[j], &shared.in.weight[stage][place_of(row, k + matrix % 2)]);
    }
#pragma unroll
    for (int i = 0; i < kWarpRows<kTileN> / 16; ++i) {
      unsigned x[4];
      const int row = warp_row + 16 * i + 8 * (matrix % 2) + lane % 8;
      ldmatrix_x4(x, &shared.in.x[stage][place_of(row, k + matrix / 2)]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned pair[2] = {weight[j / 2][2 * (j % 2)], weight[j / 2][2 * (j % 2) + 1]};
        mma_m16n8k16<T>(sum[i][j], x, pair);
      }
    }
  }
}

// ---- the epilogue ------------------------------------------------------------------------------

// Rounds the rows that lie in shared memory and stores them; the rounded values stay there. A
// thread has the same 8 channels of every row that it takes.
template <class T, int kTileN, int kVec>
__device__ __forceinline__ void store_rows(const ConvBnActForward& call, ConvShared<kTileN>& shared,
                                           int64_t first_row, int rows, int first_channel) {
  constexpr int kChunks = kTileN / kChunk;
  const int column = static_cast<int>(threadIdx.x) % kChunks * kChunk;
  const int channels = call.shape.out_channels, channel = first_channel + column;
  const int left = channels - channel, count = left < kChunk ? left : kChunk;
  if (count <= 0) return;
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.y);
  float bias[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    bias[i] = i < count ? load_channel<T>(call.bias, channel + i, 0.0f) : 0.0f;
  }
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kChunks; row < rows; row += kThreads / kChunks) {
    float* tile = &shared.out.tile[row][column];
    const int64_t at = (first_row + row) * channels + channel;
    float v[kChunk], other[kChunk] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = tile[i] + bias[i];
    if (residual != nullptr) {
      if constexpr (kVec == kChunk) {
        unpack<T, kChunk>(load_nc<uint4>(residual + at), other);
      } else {
        load_some<T>(residual + at, count, other);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] += other[i];
    }
    activate_all(call.activation, call.negative_slope, v);
    const uint4 rounded = pack<T, kChunk>(v);
    unpack<T, kChunk>(rounded, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) tile[i] = v[i];
    if constexpr (kVec == kChunk) {
      store<uint4>(y + at, rounded);
    } else {
      store_some<T>(y + at, count, v);
    }
  }
}

// The sum of what the threads of a column of the tile bring, for all of them.
template <int kTileN>
__device__ __forceinline__ float sum_column(ConvShared<kTileN>& shared, float (&sums)[kThreads],
                                            float v) {
  sums[threadIdx.x] = v;
  block_sync();
  float total = 0;
  for (int t = static_cast<int>(threadIdx.x) % kTileN; t < kThreads; t += kTileN) total += sums[t];
  block_sync();
  return total;
}

// partial: [3][parts][C], a mean, the sum of x - mean and of its square, of the rows that lie in
// shared memory. All threads take part.
template <int kTileN>
__device__ __forceinline__ void store_statistics(ConvShared<kTileN>& shared, float* partial,
                                                 int64_t part, int64_t parts, int rows,
                                                 int first_channel, int channels) {
  const int column = static_cast<int>(threadIdx.x) % kTileN;
  const int first = static_cast<int>(threadIdx.x) / kTileN;
  float sum = 0, square = 0;
  for (int r = first; r < rows; r += kThreads / kTileN) sum += shared.out.tile[r][column];
  const float total = sum_column(shared, shared.out.sums[0], sum);
  const float estimate = total / static_cast<float>(rows);
  const float mean = estimate - estimate == 0 ? estimate : 0;  // an inf or NaN shows in the sums
  sum = 0;
  for (int r = first; r < rows; r += kThreads / kTileN) {
    const float d = shared.out.tile[r][column] - mean;
    sum += d;
    square = fmaf(d, d, square);
  }
  sum = sum_column(shared, shared.out.sums[0], sum);
  square = sum_column(shared, shared.out.sums[1], square);
  if (first != 0 || first_channel + column >= channels) return;
  float* to = partial + part * channels + first_channel + column;
  store<float>(to, mean);
  store<float>(to + parts * channels, sum);
  store<float>(to + 2 * parts * channels, square);
}

// ---- the kernel --------------------------------------------------------------------------------

// partial is null where no statistics are wanted.
template <class T, int kVec, int kTileN, bool kPrologue>
__global__ void __launch_bounds__(kThreads, 2)
    conv_bn_act_forward_kernel(ConvBnActForward call, int steps, int64_t pixels,
                               float* __restrict__ partial) {
  RESOPS_SHARED(ConvShared<kTileN>, shared);
  constexpr int kPasses = kTileM / kPassRows<kTileN>, kFragments = kWarpRows<kTileN> / 16;
  const int channels = call.shape.out_channels, tiles = (channels + kTileN - 1) / kTileN;
  const int tile = static_cast<int>(blockIdx.x) / tiles;
  const int first_channel = static_cast<int>(blockIdx.x) % tiles * kTileN;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warp_row = warp / (kTileN / 32) * kWarpRows<kTileN>;
  const int warp_column = warp % (kTileN / 32) * 32;

  ConvFetch<T, kTileN, kVec, kPrologue> copies(call, static_cast<int64_t>(tile) * kTileM,
                                               first_channel);
  for (int step = 0; step < kStages - 1; ++step) {
    copies.fetch(shared, step, step < steps);
    cp_async_commit();
  }
  if constexpr (kPrologue) read_affine(shared, call);
  float sum[kFragments][4][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    copies.transform(shared, step % kStages);
    block_sync();  // this step is there for all, and all have done with the one before
    const int next = step + kStages - 1;
    copies.fetch(shared, next % kStages, next < steps);
    cp_async_commit();
    multiply<T, kTileN>(shared, step % kStages, warp_row, warp_column, sum);
  }

  const int64_t first_row = static_cast<int64_t>(tile) * kTileM, rows_left = pixels - first_row;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int before = pass * kPassRows<kTileN>;
    const int64_t left = rows_left - before;
    const int rows = left < kPassRows<kTileN> ? static_cast<int>(left) : kPassRows<kTileN>;
    if (rows <= 0) break;
    block_sync();  // the stages, or the rows before these, have been read
    if (warp_row / kPassRows<kTileN> == pass) {
      const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = warp_row - before + 16 * i + 8 * half + lane / 4;
            float* to = &shared.out.tile[row][warp_column + 8 * j + 2 * (lane % 4)];
            to[0] = sum[i][j][2 * half];
            to[1] = sum[i][j][2 * half + 1];
          }
        }
      }
    }
    block_sync();
    store_rows<T, kTileN, kVec>(call, shared, first_row + before, rows, first_channel);
    if (partial != nullptr) {
      block_sync();
      store_statistics(shared, partial, static_cast<int64_t>(tile) * kPasses + pass,
                       ceil_div(pixels, kPassRows<kTileN>), rows, first_channel, channels);
    }
  }
}

}  // namespace resops::cuda
