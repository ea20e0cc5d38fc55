// The activation of a fused op and its derivative, over a Pack, chosen at compile time.

#pragma once

#include "../common/types.h"
#include "simd.h"

namespace resops::RESOPS_ISA {

template <Activation kAct, class acc>
inline Pack<acc> activate(Pack<acc> z, acc negative_slope) {
  if constexpr (kAct == Activation::relu) {
    return relu(z);
  } else if constexpr (kAct == Activation::leaky_relu) {
    return select(passes(z), z, z * broadcast(negative_slope));
  } else if constexpr (kAct == Activation::silu) {
    return silu(z);
  } else if constexpr (kAct == Activation::gelu) {
    return gelu(z);
  } else {
    return z;
  }
}

// grad_y * act'(z) where the sign of z decides.
template <Activation kAct, class acc>
inline Pack<acc> masked_grad(Pack<acc> grad_y, Mask<acc> pass, acc negative_slope) {
  if constexpr (kAct == Activation::leaky_relu) {
    return select(pass, grad_y, grad_y * broadcast(negative_slope));
  } else {
    return select(pass, grad_y, broadcast(acc(0)));
  }
}

// grad_y * act'(z) from z itself.
template <Activation kAct, class acc>
inline Pack<acc> activation_grad(Pack<acc> grad_y, Pack<acc> z, acc negative_slope) {
  if constexpr (is_masked(kAct)) {
    return masked_grad<kAct>(grad_y, passes(z), negative_slope);
  } else if constexpr (kAct == Activation::silu) {
    return grad_y * silu_derivative(z);
  } else if constexpr (kAct == Activation::gelu) {
    return grad_y * gelu_derivative(z);
  } else {
    return grad_y;
  }
}

}  // namespace resops::RESOPS_ISA
