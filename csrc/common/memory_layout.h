// Which strides an output gets. resops/reference/layout.py states the same rules in Python, where
// the fake kernels use them.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

namespace resops {

// A dense memory format that has a name in torch, or (N, L, C) storage of a 3-D input, which has
// none.
struct MemoryLayout {
  at::MemoryFormat format;
  bool channels_last_1d;

  explicit MemoryLayout(const at::Tensor& x)
      : format(x.suggest_memory_format()),
        channels_last_1d(x.dim() == 3 && x.size(1) > 1 && x.size(2) > 1 && x.stride(1) == 1 &&
                         x.stride(2) == x.size(1) && x.stride(0) == x.size(1) * x.size(2)) {}

  bool is_contiguous() const { return format == at::MemoryFormat::Contiguous && !channels_last_1d; }

  // Uninitialised, of x's size and dtype.
  at::Tensor empty(const at::Tensor& x) const {
    if (channels_last_1d) {
      return at::empty_strided(x.sizes(), {x.size(1) * x.size(2), 1, x.size(1)}, x.options());
    }
    return at::empty_like(x, x.options(), format);
  }

  // The values of `t`, dense in this layout: `t` itself where it is.
  at::Tensor dense(const at::Tensor& t) const {
    if (channels_last_1d) return t.transpose(1, 2).contiguous().transpose(1, 2);
    return t.contiguous(format);
  }
};

}  // namespace resops
