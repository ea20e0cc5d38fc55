// batch_norm on a GPU with a single read: forward and backward (batch_norm_slab.h).
//
// A block takes a run of rows of a slab. First pass: it reads them, keeps as many as it can in
// shared memory, as they are, and adds up per channel in float. Then the sums of the blocks of a
// slab are merged in double, in the order of the blocks, by every one of them: so all have the same
// bits. The second pass goes backwards: what was not kept was read last, and is still in the L2
// cache.

#pragma once

#include "batch_norm.cuh"
#include "batch_norm_slab.h"

namespace resops::cuda {

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSlabBlocks = 2;  // on a multiprocessor, where shared memory has room for them

struct SlabWalk {
  int64_t rows, channels;  // M and C
  int64_t block_rows, kept;
  int lanes, blocks, slabs, at_a_time;
  SlabRegime regime;

  __host__ __device__ int rounds() const { return (slabs + at_a_time - 1) / at_a_time; }
};

// Shared memory of a block: sums of its warps, of itself, what is known per channel, kept rows.
struct SlabStart {
  uint4 first;  // of as many as a launch asks for
};
__host__ __device__ constexpr int64_t slab_header_floats(int width) {
  return (2 * kWarps + 2 + 3) * width;  // a multiple of 4, since `width` is
}
template <class T, int kVec>
struct SlabMemory {
  __device__ SlabMemory(SlabStart& start, const SlabWalk& w) : width(w.lanes * kVec) {
    sums = reinterpret_cast<float*>(&start);
    own = sums + 2 * kWarps * width;
    known = own + 2 * width;
    kept = reinterpret_cast<Raw<T, kVec>*>(known + 3 * width);
  }
  int width;     // channels of a slab
  float* sums;   // [2][warps][width]
  float* own;    // [2][width]
  float* known;  // [3][width]
  Raw<T, kVec>* kept;
};

// Where a block and a thread are in a round.
template <int kVec>
struct SlabPlace {
  __device__ SlabPlace(const SlabWalk& w, int round) {
    const int group = static_cast<int>(blockIdx.x) / w.blocks;
    rank = static_cast<int>(blockIdx.x) % w.blocks;
    slab = round * w.at_a_time + group;
    lane = static_cast<int>(threadIdx.x) % w.lanes;
    lane_row = static_cast<int>(threadIdx.x) / w.lanes;
    lane_rows = kThreads / w.lanes;
    column = (static_cast<int64_t>(slab) * w.lanes + lane) * kVec;
    row_begin = rank * w.block_rows;
    row_end = row_begin + w.block_rows < w.rows ? row_begin + w.block_rows : w.rows;
    const int64_t own_rows = row_end > row_begin ? row_end - row_begin : 0;
    steps = slab < w.slabs ? ceil_div(own_rows, lane_rows) : 0;  // the same for all threads
    active = column < w.channels;
  }
  int rank, slab, lane, lane_row, lane_rows;
  int64_t column, row_begin, row_end, steps;
  bool active;
};

// Calls f(offset, present, v, bits) for this thread's rows, from the first to the last or
// backwards. All threads of a warp make the same calls. kKeep: the first pass, which keeps what it
// reads. Fewer accesses at a time than in batch_norm.cuh: there is more to hold in registers.
template <class T, int kVec, int kTensors, bool kMask, bool kKeep,
          int kSteps = kUnroll<kVec, kTensors> / 2, class F>
__device__ __forceinline__ void for_slab_rows(const SlabWalk& w, const SlabPlace<kVec>& p,
                                              Raw<T, kVec>* kept,
                                              const T* const (&tensors)[kTensors],
                                              const uint8_t* mask, F f) {
  for (int64_t first = 0; first < p.steps; first += kSteps) {
    Raw<T, kVec> raw[kSteps][kTensors] = {};
    unsigned byte[kSteps] = {};
    int64_t offset[kSteps];
    bool present[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t step = kKeep ? first + u : p.steps - 1 - first - u;
      const int64_t slot = step * p.lane_rows + p.lane_row, row = p.row_begin + slot;
      offset[u] = row * w.channels + p.column;
      present[u] = p.active && step >= 0 && row < p.row_end;
      if (!present[u]) continue;
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        Raw<T, kVec>* const place = kept + (t * w.kept + slot) * w.lanes + p.lane;
        if (kKeep || slot >= w.kept) {
          raw[u][t] = load_nc<Raw<T, kVec>>(tensors[t] + offset[u]);
          if (kKeep && slot < w.kept) *place = raw[u][t];
        } else {
          raw[u][t] = *place;
        }
      }
      if constexpr (kMask) byte[u] = load_nc<uint8_t>(mask + (offset[u] >> 3));
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float v[kTensors][kVec];
#pragma unroll
      for (int t = 0; t < kTensors; ++t) unpack<T, kVec>(raw[u][t], v[t]);
      f(offset[u], present[u], v, own_bits<kVec>(byte[u]));
    }
  }
}

// Sums of a and b over the rows of all blocks of the slab; thread t < width has those of channel t.
template <class T, int kVec>
__device__ Sums merge_slab(const SlabWalk& w, const SlabPlace<kVec>& p,
                           const SlabMemory<T, kVec>& memory, float (&a)[kVec], float (&b)[kVec],
                           float* workspace, int round) {
  const int t = static_cast<int>(threadIdx.x), width = memory.width;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {  // over the rows of a warp
    for (int other = kWarpSize / 2; other >= w.lanes; other /= 2) {
      a[i] += shuffle_xor(a[i], other);
      b[i] += shuffle_xor(b[i], other);
    }
    if (t % kWarpSize < w.lanes) {
      memory.sums[t / kWarpSize * width + p.lane * kVec + i] = a[i];
      memory.sums[(kWarps + t / kWarpSize) * width + p.lane * kVec + i] = b[i];
    }
  }
  block_sync();
  if (t < width) {
    float sum_a = 0, sum_b = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum_a += memory.sums[warp * width + t];
      sum_b += memory.sums[(kWarps + warp) * width + t];
    }
    memory.own[t] = sum_a;
    memory.own[width + t] = sum_b;
  }
  Sums total{0, 0};
  if (w.regime == SlabRegime::grid) {
    // By turns two parts of the workspace: a block may be a round ahead of another.
    const int group = static_cast<int>(blockIdx.x) / w.blocks;
    float* const all =
        workspace + (int64_t{round % 2} * w.at_a_time + group) * w.blocks * 2 * width;
    if (t < width) {
      store<float>(all + (2 * p.rank) * width + t, memory.own[t]);
      store<float>(all + (2 * p.rank + 1) * width + t, memory.own[width + t]);
    }
    grid_sync();
    if (t < width) {
      for (int rank = 0; rank < w.blocks; ++rank) {
        total.a += load<float>(all + 2 * rank * width + t);
        total.b += load<float>(all + (2 * rank + 1) * width + t);
      }
    }
  } else if (w.regime == SlabRegime::cluster) {
    cluster_sync();
    if (t < width) {
      for (int rank = 0; rank < w.blocks; ++rank) {
        const float* const theirs = cluster_map(memory.own, static_cast<unsigned>(rank));
        total.a += theirs[t];
        total.b += theirs[width + t];
      }
    }
  } else if (t < width) {
    total = {memory.own[t], memory.own[width + t]};
  }
  return total;
}

// Before a block ends, or takes the memory for another round.
__device__ __forceinline__ void leave_slab(const SlabWalk& w) {
  if (w.regime == SlabRegime::cluster) {
    cluster_sync();
  } else {
    block_sync();
  }
}

// The channel whose sums thread t has, or -1.
template <class T, int kVec>
__device__ __forceinline__ int64_t slab_channel(const SlabWalk& w, const SlabPlace<kVec>& p,
                                                const SlabMemory<T, kVec>& memory) {
  const int t = static_cast<int>(threadIdx.x);
  const int64_t c = static_cast<int64_t>(p.slab) * memory.width + t;
  return t < memory.width && p.slab < w.slabs && c < w.channels ? c : -1;
}

template <int kVec>
__device__ __forceinline__ void read_known(const float* known, int lane, float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = known[lane * kVec + i];
}

// ---- forward -----------------------------------------------------------------------------------

template <class T, int kVec, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kSlabBlocks)
    batch_norm_slab_forward_kernel(SlabWalk w, BatchNormAffine affine, bool aligned,
                                   float negative_slope, const T* __restrict__ x,
                                   const T* __restrict__ residual, T* __restrict__ y,
                                   uint8_t* __restrict__ mask, BatchNormStatistics out,
                                   float* workspace) {
  RESOPS_SHARED(SlabStart, shared);
  constexpr bool kMask = kResidual && kIsMasked<kAct>;
  const SlabMemory<T, kVec> memory(shared, w);
  for (int round = 0; round < w.rounds(); ++round) {
    const SlabPlace<kVec> p(w, round);
    // The shift of a channel: the median of three values, for all blocks the same.
    float shift[kVec] = {}, sum[kVec] = {}, square[kVec] = {};
    if (p.active && p.slab < w.slabs) {
      float sample[3][kVec];
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        unpack<T, kVec>(load_nc<Raw<T, kVec>>(x + part_sample(w.rows, s) * w.channels + p.column),
                        sample[s]);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float m = median(sample[0][i], sample[1][i], sample[2][i]);
        shift[i] = m - m == 0 ? m : 0;  // an inf or NaN shows in the sums
      }
    }
    if (p.lane_row == 0) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) memory.known[2 * memory.width + p.lane * kVec + i] = shift[i];
    }
    const T* const read[1] = {x};
    for_slab_rows<T, kVec, 1, false, true>(
        w, p, memory.kept, read, nullptr,
        [&](int64_t, bool present, const float (&v)[1][kVec], unsigned) {
          if (!present) return;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float d = v[0][i] - shift[i];
            sum[i] += d;
            square[i] = fmaf(d, d, square[i]);
          }
        });
    const Sums total = merge_slab<T, kVec>(w, p, memory, sum, square, workspace, round);
    const int64_t c = slab_channel<T, kVec>(w, p, memory);
    if (c >= 0) {
      const int t = static_cast<int>(threadIdx.x);
      const double m = static_cast<double>(w.rows), away = total.a / m;
      const double mean = memory.known[2 * memory.width + t] + away;
      const double m2 = total.b - total.a * away, var = m2 < 0 ? 0 : m2 / m;
      memory.known[t] = static_cast<float>(mean);
      memory.known[memory.width + t] = static_cast<float>(rsqrt(var + out.eps));
      if (p.rank == 0) {
        write_statistics(out, c, mean, var);
        update_running<T>(out.running_mean, c, mean, out.momentum);
        update_running<T>(out.running_var, c, var * (m / (m - 1)), out.momentum);
      }
    }
    block_sync();

    float mean[kVec], scale[kVec], weight[kVec], bias[kVec];
    const Channels<T, kVec> channels(p.column, w.channels, aligned);
    read_known<kVec>(memory.known, p.lane, mean);
    read_known<kVec>(memory.known + memory.width, p.lane, scale);
    channels.read(affine.weight, 1.0f, weight);
    channels.read(affine.bias, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) scale[i] *= weight[i];
    for_slab_rows<T, kVec, 1, false, false>(
        w, p, memory.kept, read, nullptr,
        [&](int64_t offset, bool present, float (&v)[1][kVec], unsigned) {
          float (&z)[kVec] = v[0];
          float added[kVec] = {};
          unsigned bits = 0;
          if constexpr (kResidual) {
            if (present) unpack<T, kVec>(load_nc<Raw<T, kVec>>(residual + offset), added);
          }
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            z[i] = fmaf(z[i] - mean[i], scale[i], bias[i]);
            if constexpr (kResidual) z[i] += added[i];
            if (kMask && present && passes(z[i])) bits |= 1u << i;
            z[i] = activate<kAct>(z[i], negative_slope);
          }
          if constexpr (kMask) store_bits<kVec>(mask + (offset >> 3), bits, present);
          if (present) store<Raw<T, kVec>>(y + offset, pack<T, kVec>(z));
        });
    leave_slab(w);
  }
}

// ---- backward ----------------------------------------------------------------------------------

template <class T, int kVec, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kSlabBlocks)
    batch_norm_slab_backward_kernel(SlabWalk w, BatchNormAffine affine, bool aligned,
                                    float negative_slope, const T* __restrict__ grad_y,
                                    const T* __restrict__ x, const T* __restrict__ residual,
                                    const uint8_t* __restrict__ mask, BatchNormSums out,
                                    bool frozen, float factor, T* __restrict__ grad_x,
                                    T* __restrict__ grad_residual, float* workspace) {
  RESOPS_SHARED(SlabStart, shared);
  using Pass = Backward<T, kVec, true, kAct, kResidual>;
  const SlabMemory<T, kVec> memory(shared, w);
  const T* tensors[Pass::kTensors] = {grad_y, x};
  if constexpr (Pass::kTensors == 3) tensors[2] = residual;
  for (int round = 0; round < w.rounds(); ++round) {
    const SlabPlace<kVec> p(w, round);
    const Channels<T, kVec> channels(p.column, w.channels, aligned);
    const Pass pass(channels, affine, negative_slope);
    float sum[kVec] = {}, product[kVec] = {};
    for_slab_rows<T, kVec, Pass::kTensors, Pass::kMask, true>(
        w, p, memory.kept, tensors, mask,
        [&](int64_t, bool present, float (&v)[Pass::kTensors][kVec], unsigned bits) {
          if (!present) return;
          pass(v, bits);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            sum[i] += v[0][i];
            product[i] = fmaf(v[0][i], v[1][i], product[i]);
          }
        });
    const Sums total = merge_slab<T, kVec>(w, p, memory, sum, product, workspace, round);
    const int64_t c = slab_channel<T, kVec>(w, p, memory);
    if (c >= 0) {
      const int t = static_cast<int>(threadIdx.x);
      const float sum_grad = static_cast<float>(total.a);
      const float sum_grad_xhat = static_cast<float>(total.b * affine.invstd[c]);
      memory.known[t] = frozen ? 0 : sum_grad;
      memory.known[memory.width + t] = frozen ? 0 : sum_grad_xhat;
      if (p.rank == 0) {
        if (out.sum_grad) out.sum_grad[c] = sum_grad;
        if (out.sum_grad_xhat) out.sum_grad_xhat[c] = sum_grad_xhat;
        if (out.grad_bias) static_cast<T*>(out.grad_bias)[c] = from_float<T>(sum_grad);
        if (out.grad_weight) static_cast<T*>(out.grad_weight)[c] = from_float<T>(sum_grad_xhat);
      }
    }
    block_sync();

    // grad_x = scale * g + slope * (x - mean) + offset
    float slope[kVec], offset[kVec], invstd[kVec];
    channels.read(affine.invstd, invstd);
    read_known<kVec>(memory.known, p.lane, offset);
    read_known<kVec>(memory.known + memory.width, p.lane, slope);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      offset[i] *= -factor * pass.scale[i];
      slope[i] *= -factor * pass.scale[i] * invstd[i];
    }
    for_slab_rows<T, kVec, Pass::kTensors, Pass::kMask, false>(
        w, p, memory.kept, tensors, mask,
        [&](int64_t at, bool present, float (&v)[Pass::kTensors][kVec], unsigned bits) {
          if (!present) return;
          pass(v, bits);
          if (grad_residual) store<Raw<T, kVec>>(grad_residual + at, pack<T, kVec>(v[0]));
          if (!grad_x) return;
          float result[kVec];
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float rest = frozen ? 0 : fmaf(v[1][i], slope[i], offset[i]);
            result[i] = fmaf(v[0][i], pass.scale[i], rest);
          }
          store<Raw<T, kVec>>(grad_x + at, pack<T, kVec>(result));
        });
    leave_slab(w);
  }
}

}  // namespace resops::cuda
