// From run-time flags to template parameters.

#pragma once

#include "../common/types.h"
#include "simd.h"

namespace resops::RESOPS_ISA {

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

template <class F>
inline void dispatch_dtype([[maybe_unused]] DType dtype, F f) {
#if defined(__AVX512BF16__)  // compiled for bfloat16 alone
  f(BFloat16{});
#else
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(BFloat16{});
    case DType::f16:
      return f(Float16{});
    case DType::f64:
      return f(double{});
  }
#endif
}

template <class F>
inline void dispatch_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity:
      return f(Constant<Activation::identity>{});
    case Activation::relu:
      return f(Constant<Activation::relu>{});
    case Activation::leaky_relu:
      return f(Constant<Activation::leaky_relu>{});
    case Activation::silu:
      return f(Constant<Activation::silu>{});
    case Activation::gelu:
      return f(Constant<Activation::gelu>{});
  }
}

template <class F>
inline void dispatch_bool(bool flag, F f) {
  return flag ? f(Constant<true>{}) : f(Constant<false>{});
}

}  // namespace resops::RESOPS_ISA
