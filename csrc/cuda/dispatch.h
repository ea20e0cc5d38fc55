// From values that are known at run time to template arguments.

#pragma once

#include <stdexcept>
#include <type_traits>

#include "../common/types.h"
#include "portable.cuh"

namespace resops::cuda {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// f(T{})
template <class F>
void dispatch_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
    case DType::f64:
      break;
  }
  throw std::invalid_argument("resops: the CUDA kernels take float32, bfloat16 and float16");
}

// f(Constant<kAct>{})
template <class F>
void dispatch_activation(Activation activation, F f) {
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

// f(Constant<true>{}) or f(Constant<false>{})
template <class F>
void dispatch_bool(bool value, F f) {
  if (value) {
    f(Constant<true>{});
  } else {
    f(Constant<false>{});
  }
}

}  // namespace resops::cuda
