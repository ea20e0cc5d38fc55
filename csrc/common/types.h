// Names that kernels and drivers share. No torch header here.

#pragma once

namespace resops {

enum class DType { f32, bf16, f16, f64 };

enum class Activation { identity, relu, leaky_relu, silu, gelu };

// After these the sign of z = bn + residual decides the derivative, so that one bit per element
// is kept for backward; after silu and gelu z itself is needed again.
constexpr bool is_masked(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu;
}
constexpr bool is_smooth(Activation activation) {
  return activation == Activation::silu || activation == Activation::gelu;
}

}  // namespace resops
