// What the drivers on the CPU share: the kernels of the instruction set in use, how large a piece
// of work is, and vectors of a few values on their way in and out of tensors.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "capability.h"

namespace resops {

constexpr int64_t kPieceElements = 32768;  // at least, where there are more: 128 KB in fp32
// Outputs from this size on bypass the caches, which could not hold them until they are read. (On a
// Xeon, of 12.8 MB: 1.2 to 1.5 times as fast. Of 6.4 MB: no difference.)
constexpr int64_t kStreamBytes = int64_t{8} << 20;

template <class Kernels>
const Kernels& active_kernels([[maybe_unused]] const Kernels& portable,
                              [[maybe_unused]] const Kernels& avx2,
                              [[maybe_unused]] const Kernels& avx512) {
  switch (cpu_capability()) {
    case CpuCapability::avx512_bf16:
    case CpuCapability::avx512:
      return avx512;
    case CpuCapability::avx2:
      return avx2;
    default:
      return portable;
  }
}

// The table `name` that <op>_kernels.h declares in the namespace of every instruction set.
// RESOPS_KERNELS_FOR(name, dtype): the same of kernels that are compiled for avx512_bf16 as well,
// for bfloat16 alone.
#ifdef RESOPS_HAVE_X86_ISA
#define RESOPS_ACTIVE_KERNELS(name) \
  ::resops::active_kernels(portable::name, avx2::name, avx512::name)
#define RESOPS_KERNELS_FOR(name, dtype)                                                         \
  ((dtype) == DType::bf16 && ::resops::cpu_capability() == ::resops::CpuCapability::avx512_bf16 \
       ? avx512_bf16::name                                                                      \
       : RESOPS_ACTIVE_KERNELS(name))
#else
#define RESOPS_ACTIVE_KERNELS(name) \
  ::resops::active_kernels(portable::name, portable::name, portable::name)
#define RESOPS_KERNELS_FOR(name, dtype) RESOPS_ACTIVE_KERNELS(name)
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A parameter as kernels take it. A NaN becomes the usual one, whatever bits it had: rounding to
// bfloat16 relies on that (to_half_line in simd.h).
template <class acc>
inline acc kernel_value(double value) {
  return std::isnan(value) ? std::numeric_limits<acc>::quiet_NaN() : static_cast<acc>(value);
}

// Whether kernels may write `out` past the caches; every row of it must start on a whole vector.
inline bool can_stream(const at::Tensor& out, bool whole_rows) {
  return static_cast<int64_t>(out.nbytes()) >= kStreamBytes && whole_rows &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

namespace detail {

template <class F>
void visit_values(at::ScalarType dtype, int64_t count, int64_t stride, void* data, F f) {
  const auto visit = [&](auto* values) {
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) f(values[i], i);
    } else {
      for (int64_t i = 0; i < count; ++i) f(values[i * stride], i);
    }
  };
  switch (dtype) {
    case at::kDouble:
      return visit(static_cast<double*>(data));
    case at::kHalf:
      return visit(static_cast<at::Half*>(data));
    case at::kBFloat16:
      return visit(static_cast<at::BFloat16*>(data));
    default:
      return visit(static_cast<float*>(data));
  }
}

inline int64_t step(const at::Tensor& t) { return t.dim() > 0 ? t.stride(0) : 0; }

}  // namespace detail

// Calls f(value, i) for the values of a tensor of size (n), (n, 1, ..., 1) or with one element, by
// reference: f may write.
template <class F>
void visit_values(const at::Tensor& t, F f) {
  detail::visit_values(t.scalar_type(), t.numel(), detail::step(t), t.mutable_data_ptr(), f);
}

inline std::vector<double> to_vector(const at::Tensor& t) {
  std::vector<double> values(t.numel());
  detail::visit_values(t.scalar_type(), t.numel(), detail::step(t),
                       const_cast<void*>(t.const_data_ptr()),
                       [&](auto& value, int64_t i) { values[i] = static_cast<double>(value); });
  return values;
}

inline void write_vector(const at::Tensor& t, const std::vector<double>& values) {
  visit_values(t, [&](auto& value, int64_t i) {
    value = static_cast<std::remove_reference_t<decltype(value)>>(values[i]);
  });
}

}  // namespace resops
