// residual_add on a GPU: y = act(alpha * x + beta * residual), and all four gradients.
//
// Both passes are bound by memory: each reads every tensor that it needs once, 16 bytes per access,
// and the gradients of the weights come from the pass that writes those of x and residual. The
// tensors are rows, one per sample where a weight or the padding of the mask tells samples apart,
// else one in all. Each warp takes a piece of a row: a weight is one value to it, and what it sums
// is merged by a second kernel, in double and in the order of the pieces. docs/math/residual_add.md
// has the formulas.

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
  int64_t mask_step;    // bytes of mask of a row
};

// The piece of a row that a warp works on; none if `row` is past the last.
template <int kVec>
class PieceCursor {
 public:
  static constexpr bool kShortEnd = kVec > 1;

  __device__ explicit PieceCursor(const ResidualAddWalk& w)
      : index(static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize),
        row(index / w.pieces) {
    const int64_t begin = (index - row * w.pieces) * w.piece;
    const int64_t piece_end = begin + w.piece < w.width ? begin + w.piece : w.width;
    row_start_ = row * w.width;
    mask_start_ = row * w.mask_step;
    end_ = piece_end;
    end = row_start_ + piece_end;
    at_ = begin + threadIdx.x % kWarpSize * kVec;
    steps = ceil_div(piece_end - begin, kWarpSize * kVec);
  }

  __device__ Place next() {
    const bool whole = kVec == 1 ? at_ < end_ : (at_ | 7) < end_;
    const Place place{row_start_ + at_, mask_start_ + (at_ >> 3), whole};
    at_ += kWarpSize * kVec;
    return place;
  }
  __device__ bool has_short_end() const { return end_ % 8 != 0; }

  int64_t index;  // of the piece
  int64_t row;
  int64_t steps, end;

 private:
  int64_t row_start_, mask_start_, at_, end_;
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
  PieceCursor<kVec> cursor(w);
  if (cursor.row >= w.rows) return;
  const RowWeights<T, kTensors == 4> row(weights, cursor.row);
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
          const WeightValues s = row.at(v[kTensors - 2][i], v[kTensors - 1][i]);
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

// kTensors: 1, grad_y alone; 3, also x and residual; 5, also alpha and beta. Null: not needed.
template <class T, int kVec, Activation kAct, int kTensors>
__global__ void __launch_bounds__(kThreads, 2)
    residual_add_backward_kernel(ResidualAddWalk w, ResidualAddWeights weights,
                                 float negative_slope, const T* __restrict__ grad_y,
                                 const T* __restrict__ x, const T* __restrict__ residual,
                                 const uint8_t* __restrict__ mask, ResidualAddGradients<T> out) {
  PieceCursor<kVec> cursor(w);
  if (cursor.row >= w.rows) return;
  const RowWeights<T, kTensors == 5> row(weights, cursor.row);
  const T* tensors[kTensors] = {grad_y};
  if constexpr (kTensors >= 3) {
    tensors[1] = x;
    tensors[2] = residual;
  }
  if constexpr (kTensors == 5) {
    tensors[3] = static_cast<const T*>(weights.alpha.tensor);
    tensors[4] = static_cast<const T*>(weights.beta.tensor);
  }
  float sum_alpha[kVec] = {}, sum_beta[kVec] = {};
  // The erf of gelu needs the registers that a second step would take (ptxas spills on sm_100).
  constexpr int kSteps = kAct == Activation::gelu ? 1 : kUnroll<kVec, kTensors>;
  for_vectors<T, kVec, kTensors, kIsMasked<kAct>, kSteps>(
      cursor, tensors, mask,
      [&](const Place& place, int count, float (&v)[kTensors][kVec], unsigned bits, auto is_short) {
        float grad_x[kVec], grad_residual[kVec], grad_alpha[kVec], grad_beta[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float xi = kTensors >= 3 ? v[1 % kTensors][i] : 0;
          const float ri = kTensors >= 3 ? v[2 % kTensors][i] : 0;
          const WeightValues s = row.at(v[3 % kTensors][i], v[4 % kTensors][i]);
          float g = v[0][i];
          if constexpr (kIsMasked<kAct>) {
            g = masked_gradient<kAct>(g, (bits >> i & 1) != 0, negative_slope);
          } else if constexpr (kIsSmooth<kAct>) {
            g = activation_gradient<kAct>(g, fmaf(s.alpha, xi, s.beta * ri), negative_slope);
          }
          grad_x[i] = s.alpha * g;
          grad_residual[i] = s.beta * g;
          grad_alpha[i] = g * (weights.complement ? xi - ri : xi);
          grad_beta[i] = g * ri;
          if (i < count) {
            sum_alpha[i] += grad_alpha[i];
            sum_beta[i] += grad_beta[i];
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
