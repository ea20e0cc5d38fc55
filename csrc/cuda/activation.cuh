// The activation of a fused op and its derivative, chosen at compile time.

#pragma once

#include "../common/types.h"
#include "portable.cuh"

namespace resops::cuda {

template <Activation kAct>
constexpr bool kIsMasked = is_masked(kAct);
template <Activation kAct>
constexpr bool kIsSmooth = is_smooth(kAct);

// False for 0 and below, true for NaN: so a NaN stays one through relu.
__device__ __forceinline__ bool passes(float z) { return !(z <= 0.0f); }

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// The distribution function of the normal distribution. By erfc: far below 0, 1 + erf would leave
// rounding alone.
__device__ __forceinline__ float normal_cdf(float z) { return 0.5f * erfcf(-0.707106781f * z); }

template <Activation kAct>
__device__ __forceinline__ float activate(float z, float negative_slope) {
  if constexpr (kAct == Activation::relu) {
    return passes(z) ? z : 0.0f;
  } else if constexpr (kAct == Activation::leaky_relu) {
    return passes(z) ? z : z * negative_slope;
  } else if constexpr (kAct == Activation::silu) {
    return z * sigmoid(z);
  } else if constexpr (kAct == Activation::gelu) {
    return z * normal_cdf(z);
  } else {
    return z;
  }
}

// grad_y * act'(z) where the sign of z decides.
template <Activation kAct>
__device__ __forceinline__ float masked_gradient(float grad_y, bool pass, float negative_slope) {
  static_assert(kIsMasked<kAct>);
  if constexpr (kAct == Activation::leaky_relu) {
    return pass ? grad_y : grad_y * negative_slope;
  } else {
    return pass ? grad_y : 0.0f;
  }
}

// grad_y * act'(z) from z itself.
template <Activation kAct>
__device__ __forceinline__ float activation_gradient(float grad_y, float z, float negative_slope) {
  if constexpr (kIsMasked<kAct>) {
    return masked_gradient<kAct>(grad_y, passes(z), negative_slope);
  } else if constexpr (kAct == Activation::silu) {
    const float s = sigmoid(z);
    return grad_y * (s * fmaf(z, 1.0f - s, 1.0f));
  } else if constexpr (kAct == Activation::gelu) {
    const float density = 0.398942280f * expf(-0.5f * z * z);
    return grad_y * fmaf(z, density, normal_cdf(z));
  } else {
    return grad_y;
  }
}

}  // namespace resops::cuda
