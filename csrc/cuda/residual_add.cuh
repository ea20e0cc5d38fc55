// residual_add on a GPU: y = act(alpha * x + beta * residual), and all four gradients.
//
// Both passes are bound by memory: each reads every tensor that it needs once, 16 bytes per access,
// and the gradients of the weights come from the pass that writes those of x and residual. The
// tensors are rows, one per sample where a weight tells samples apart, else one in all. Each warp
// takes a piece of a row: a weight is one value to it, and what it sums is merged by a second
// kernel, in double and in the order of the pieces. docs/math/residual_add.md has the formulas.
//
// A row may begin anywhere, but a vector begins on 16 bytes, and what a warp reads at a time on a
// sector of 32: 16 elements belong to the row in which they begin. So the last ones of a row may
// run into the next rows, with weights of their own, and what these add to the sums of those is
// found by those.

#pragma once

#include "activation.cuh"
#include "residual_add.h"
#include "vector.cuh"

namespace resops::cuda {

constexpr int kWarps = kThreads / kWarpSize;

struct ResidualAddWalk {
  int64_t rows, width;  // elements of a row
  int64_t piece;        // elements of a piece, a multiple of 256
  int64_t pieces;       // of a row
  int64_t mask_bytes;   // what there is of a mask: its one run of bits, and some to be zero
  __host__ __device__ int64_t numel() const { return rows * width; }
};

constexpr int kUnit = 16;  // elements that belong to one row

// The piece of a row that a warp works on; none if `row` is past the last.
template <int kVec>
class PieceCursor {
 public:
  static constexpr bool kShortEnd = true;

  __device__ explicit PieceCursor(const ResidualAddWalk& w)
      : index(static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize),
        row(index / w.pieces),
        row_begin(row * w.width),
        row_end(row_begin + w.width) {
    const int64_t first = ceil_div(row_begin, kUnit) * kUnit;
    const int64_t last = ceil_div(row_end, kUnit) * kUnit;
    const int64_t row_stop = last < w.numel() ? last : w.numel();
    const int64_t begin = first + (index - row * w.pieces) * w.piece;
    end = begin + w.piece < row_stop ? begin + w.piece : row_stop;
    whole_end_ = end < row_end ? end : row_end / 8 * 8;
    steps = ceil_div(end - begin, kWarpSize * kVec);
    at_ = begin + threadIdx.x % kWarpSize * kVec;
    if (begin == first) head = static_cast<int>((first < row_end ? first : row_end) - row_begin);
  }

  __device__ Place next() {
    const Place place{at_, at_ >> 3, (at_ | 7) < whole_end_};
    at_ += kWarpSize * kVec;
    return place;
  }
  __device__ bool has_short_end() const { return whole_end_ < end; }

  int64_t index;  // of the piece
  int64_t row, row_begin, row_end;
  int64_t steps, end;
  int head = 0;  // elements with which the row begins and that the row before has; of its piece 0

 private:
  int64_t at_, whole_end_;
};

// A weight along a piece: one value, or element by element.
template <class T>
__device__ __forceinline__ float row_weight(const ResidualAddWeight& weight, int64_t row) {
  if (weight.values == nullptr) return weight.constant;
  const int64_t i = weight.per_sample ? row : 0;
  if (weight.is_float) return load_nc<float>(static_cast<const float*>(weight.values) + i);
  return to_float(load_nc<T>(static_cast<const T*>(weight.values) + i));
}

struct WeightValues {
  float alpha, beta;
};

template <class T, bool kElementwise>
class RowWeights {
 public:
  __device__ RowWeights(const ResidualAddWeights& weights, int64_t row)
      : complement_(weights.complement),
        alpha_tensor_(weights.alpha.tensor != nullptr),
        beta_tensor_(weights.beta.tensor != nullptr),
        alpha_(row_weight<T>(weights.alpha, row)),
        beta_(complement_ ? 1.0f - alpha_ : row_weight<T>(weights.beta, row)) {}

  // Those of an element of the tensor.
  __device__ static RowWeights of_element(const ResidualAddWeights& weights,
                                          const ResidualAddWalk& w, int64_t offset) {
    return RowWeights(weights, offset / w.width);
  }

  // `alpha` and `beta` are the elements of the tensors, if the weights are tensors.
  __device__ __forceinline__ WeightValues at(float alpha, float beta) const {
    if constexpr (!kElementwise) return {alpha_, beta_};
    const float a = alpha_tensor_ ? alpha : alpha_;
    return {a, complement_ ? 1.0f - a : beta_tensor_ ? beta : beta_};
  }

 private:
  bool complement_, alpha_tensor_, beta_tensor_;
  float alpha_, beta_;
};

// ---- forward -----------------------------------------------------------------------------------

// kTensors: 2, x and residual; 4, also alpha and beta, which are null where they are no tensors.
template <class T, int kVec, Activation kAct, int kTensors>
__global__ void __launch_bounds__(kThreads, 2)
    residual_add_forward_kernel(ResidualAddWalk w, ResidualAddWeights weights, float negative_slope,
                                const T* __restrict__ x, const T* __restrict__ residual,
                                T* __restrict__ y, uint8_t* __restrict__ mask) {
  using Weights = RowWeights<T, kTensors == 4>;
  if constexpr (kIsMasked<kAct>) clear_bytes(mask, ceil_div(w.numel(), 8), w.mask_bytes);
  PieceCursor<kVec> cursor(w);
  if (cursor.row >= w.rows) return;
  const Weights row(weights, cursor.row);
  const T* tensors[kTensors] = {x, residual};
  if constexpr (kTensors == 4) {
    tensors[2] = static_cast<const T*>(weights.alpha.tensor);
    tensors[3] = static_cast<const T*>(weights.beta.tensor);
  }
  for_vectors<T, kVec, kTensors, false>(
      cursor, tensors, nullptr,
      [&](const Place& place, int count, float (&v)[kTensors][kVec], unsigned, auto is_short) {
        float (&z)[kVec] = v[0];
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          Weights own = row;
          if constexpr (decltype(is_short)::value) {
            if (i < count) own = Weights::of_element(weights, w, place.offset + i);
          }
          const WeightValues s = own.at(v[kTensors - 2][i], v[kTensors - 1][i]);
          z[i] = fmaf(s.alpha, z[i], s.beta * v[1][i]);
          if (kIsMasked<kAct> && i < count && passes(z[i])) bits |= 1u << i;
          z[i] = activate<kAct>(z[i], negative_slope);
        }
        if constexpr (kIsMasked<kAct>) store_bits<kVec>(mask + place.byte, bits, count > 0);
        put(y + place.offset, count, z, is_short);
      });
}

// ---- backward ----------------------------------------------------------------------------------

// What a backward pass writes: tensors like x, and the sums of its pieces for weights that are not.
// Null: not wanted.
template <class T>
struct ResidualAddGradients {
  T* x;
  T* residual;
  T* alpha;
  T* beta;
  float* alpha_sums;
  float* beta_sums;
};

// What an element hands down, and what it adds to the gradients of its weights.
struct ElementGradients {
  float x, residual, alpha, beta;
};

template <Activation kAct>
__device__ __forceinline__ ElementGradients element_gradients(float g, float x, float residual,
                                                              bool bit, const WeightValues& s,
                                                              bool complement,
                                                              float negative_slope) {
  if constexpr (kIsMasked<kAct>) {
    g = masked_gradient<kAct>(g, bit, negative_slope);
  } else if constexpr (kIsSmooth<kAct>) {
    g = activation_gradient<kAct>(g, fmaf(s.alpha, x, s.beta * residual), negative_slope);
  }
  return {s.alpha * g, s.beta * g, g * (complement ? x - residual : x), g * residual};
}

// kTensors: 1, grad_y alone; 3, also x and residual; 5, also alpha and beta. Null: not needed.
template <class T, int kVec, Activation kAct, int kTensors>
__global__ void __launch_bounds__(kThreads, 2)
    residual_add_backward_kernel(ResidualAddWalk w, ResidualAddWeights weights,
                                 float negative_slope, const T* __restrict__ grad_y,
                                 const T* __restrict__ x, const T* __restrict__ residual,
                                 const uint8_t* __restrict__ mask, ResidualAddGradients<T> out) {
  using Weights = RowWeights<T, kTensors == 5>;
  PieceCursor<kVec> cursor(w);
  if (cursor.row >= w.rows) return;
  const Weights row(weights, cursor.row);
  const T* tensors[kTensors] = {grad_y};
  if constexpr (kTensors >= 3) {
    tensors[1] = x;
    tensors[2] = residual;
  }
  if constexpr (kTensors == 5) {
    tensors[3] = static_cast<const T*>(weights.alpha.tensor);
    tensors[4] = static_cast<const T*>(weights.beta.tensor);
  }
  // Of the element with the values v[...][i].
  const auto gradients = [&](const auto& v, int i, bool bit, const Weights& own) {
    const float x_i = kTensors >= 3 ? v[1 % kTensors][i] : 0;
    const float residual_i = kTensors >= 3 ? v[2 % kTensors][i] : 0;
    const WeightValues s = own.at(v[3 % kTensors][i], v[4 % kTensors][i]);
    return element_gradients<kAct>(v[0][i], x_i, residual_i, bit, s, weights.complement,
                                   negative_slope);
  };
  float sum_alpha[kVec] = {}, sum_beta[kVec] = {};
  // The erf of gelu needs the registers that a second step would take (ptxas spills on sm_100).
  constexpr int kSteps = kAct == Activation::gelu ? 1 : kUnroll<kVec, kTensors>;
  for_vectors<T, kVec, kTensors, kIsMasked<kAct>, kSteps>(
      cursor, tensors, mask,
      [&](const Place& place, int count, float (&v)[kTensors][kVec], unsigned bits, auto is_short) {
        float grad_x[kVec], grad_residual[kVec], grad_alpha[kVec], grad_beta[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          Weights own = row;
          bool of_row = i < count;
          if constexpr (decltype(is_short)::value) {
            if (i < count) own = Weights::of_element(weights, w, place.offset + i);
            of_row = of_row && place.offset + i < cursor.row_end;
          }
          const ElementGradients grad = gradients(v, i, (bits >> i & 1) != 0, own);
          grad_x[i] = grad.x;
          grad_residual[i] = grad.residual;
          grad_alpha[i] = grad.alpha;
          grad_beta[i] = grad.beta;
          if (of_row) {
            sum_alpha[i] += grad.alpha;
            sum_beta[i] += grad.beta;
          }
        }
        if (out.x) put(out.x + place.offset, count, grad_x, is_short);
        if (out.residual) put(out.residual + place.offset, count, grad_residual, is_short);
        if constexpr (kTensors == 5) {
          if (out.alpha) put(out.alpha + place.offset, count, grad_alpha, is_short);
          if (out.beta) put(out.beta + place.offset, count, grad_beta, is_short);
        }
      });
  if constexpr (kTensors >= 3) {
    if (!out.alpha_sums && !out.beta_sums) return;
    if (const int lane = threadIdx.x % kWarpSize; lane < cursor.head) {
      const int64_t at = cursor.row_begin + lane;
      float v[kTensors][1] = {};
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        if (tensors[t]) load_some<T>(tensors[t] + at, 1, v[t]);
      }
      const bool bit = kIsMasked<kAct> && (load_nc<uint8_t>(mask + (at >> 3)) >> (at & 7) & 1) != 0;
      const ElementGradients grad = gradients(v, 0, bit, row);
      sum_alpha[0] += grad.alpha;
      sum_beta[0] += grad.beta;
    }
    float alpha = 0, beta = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      alpha += sum_alpha[i];
      beta += sum_beta[i];
    }
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      alpha += shuffle_xor(alpha, lanes);
      beta += shuffle_xor(beta, lanes);
    }
    if (threadIdx.x % kWarpSize != 0) return;
    if (out.alpha_sums) store<float>(out.alpha_sums + cursor.index, alpha);
    if (out.beta_sums) store<float>(out.beta_sums + cursor.index, beta);
  }
}

struct ResidualAddFinishShared {
  double sums[kWarps];
};

// out[i] = the sum of sums[i * count], ..., sums[(i + 1) * count - 1]. A warp makes one output, or,
// if there is but one, the block does.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    residual_add_finish_kernel(int64_t outputs, int64_t count, const float* __restrict__ sums,
                               T* __restrict__ out) {
  RESOPS_SHARED(ResidualAddFinishShared, shared);
  const int warps = outputs == 1 ? kWarps : 1;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t output = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) / warps;
  double total = 0;
  if (output < outputs) {
#pragma unroll 4
    for (int64_t i = threadIdx.x % (warps * kWarpSize); i < count; i += warps * kWarpSize) {
      total += load_nc<float>(sums + output * count + i);
    }
  }
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) total += shuffle_xor(total, lanes);
  if (threadIdx.x % kWarpSize == 0) shared.sums[warp] = total;
  block_sync();
  if (output >= outputs || threadIdx.x % (warps * kWarpSize) != 0) return;
  total = 0;
  for (int i = warp; i < warp + warps; ++i) total += shared.sums[i];
  out[output] = from_float<T>(static_cast<float>(total));
}

}  // namespace resops::cuda
