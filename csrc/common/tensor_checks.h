// Argument checks that the ops share. Every registered op validates all of its arguments before a
// pointer is read; the messages name the argument, what came and what was expected, in torch's own
// wording where torch has one. resops/ops/<op>.py raises the same for the other backends.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "types.h"

namespace resops {

inline bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

// Statistics and sums: fp32, or fp64 for fp64.
inline at::ScalarType statistic_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline DType kernel_dtype(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kDouble:
      return DType::f64;
    default:
      return DType::f32;
  }
}

inline Activation parse_activation(std::string_view name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu") return Activation::leaky_relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  TORCH_CHECK_VALUE(false,
                    "activation must be one of identity, relu, leaky_relu, silu, gelu, but got '",
                    std::string(name), "'");
}

inline void check_input(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, op, " expects an input of size (N, C, *spatial), but got ",
                    x.dim(), "-D input of size ", x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble || is_half(dtype), "\"",
                              op, "\" not implemented for '", c10::toString(dtype), "'");
  TORCH_CHECK_NOT_IMPLEMENTED(x.layout() == at::kStrided, "\"", op,
                              "\" not implemented for layout ", x.layout());
}

inline void check_device(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.device() == x.device(),
              "Expected all tensors to be on the same device, but input is on ", x.device(),
              " and ", name, " is on ", t.device());
  TORCH_CHECK(t.layout() == at::kStrided, name, " should be a strided tensor, but has layout ",
              t.layout());
}

// A tensor with the size, dtype and device of the input.
inline void check_like(const char* name, const at::Tensor& t, const at::Tensor& x) {
  check_device(name, t, x);
  TORCH_CHECK(t.sizes() == x.sizes(), name, " should have the size ", x.sizes(),
              " of the input, but got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " should have the dtype ", x.scalar_type(),
              " of the input, got ", t.scalar_type());
}

inline void check_vector(const char* name, const at::Tensor& t, int64_t channels,
                         const at::Tensor& x) {
  check_device(name, t, x);
  TORCH_CHECK(t.numel() == channels, name, " should contain ", channels, " elements not ",
              t.numel());
  TORCH_CHECK(t.dim() == 1, name, " should be a vector of ", channels, " elements, but got size ",
              t.sizes());
}

// Statistics of an earlier phase: vectors of C values in the statistics' dtype.
inline void check_statistic(const char* name, const at::Tensor& t, int64_t channels,
                            const at::Tensor& x) {
  check_vector(name, t, channels, x);
  TORCH_CHECK(t.scalar_type() == statistic_dtype(x), name, " should have dtype ",
              statistic_dtype(x), " for an input of ", x.scalar_type(), ", but got ",
              t.scalar_type());
}
inline void check_statistic(const char* name, const at::Tensor& t, const at::Tensor& x) {
  check_statistic(name, t, x.size(1), x);
}

// The input's dtype, or fp32 beside a 16-bit input.
inline void check_parameter_dtype(const char* name, const at::Tensor& t, const at::Tensor& x) {
  const bool half = is_half(x.scalar_type());
  TORCH_CHECK(t.scalar_type() == x.scalar_type() || (half && t.scalar_type() == at::kFloat),
              "mixed dtype: expect ", name, " to have dtype ", x.scalar_type(),
              half ? " or Float" : "", " for an input of ", x.scalar_type(), ", but got ",
              t.scalar_type());
}

// Two optional vectors of C values, of one dtype: the input's, or fp32 beside a 16-bit input.
inline void check_pair(const char* name1, const std::optional<at::Tensor>& t1, const char* name2,
                       const std::optional<at::Tensor>& t2, const at::Tensor& x) {
  const auto check = [&x](const char* name, const std::optional<at::Tensor>& t) {
    if (!t) return;
    check_vector(name, *t, x.size(1), x);
    check_parameter_dtype(name, *t, x);
  };
  check(name1, t1);
  check(name2, t2);
  TORCH_CHECK(!t1 || !t2 || t1->scalar_type() == t2->scalar_type(), "mixed dtype: expect ", name1,
              " and ", name2, " to have one dtype, but got ", t1->scalar_type(), " and ",
              t2->scalar_type());
}

}  // namespace resops
