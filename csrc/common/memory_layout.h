// Which strides an output gets. resops/reference/layout.py states the same rules in Python, where
// the fake kernels use them.

#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

  // As one number, for a backward pass that must know it.
  int64_t code() const { return channels_last_1d ? -1 : static_cast<int64_t>(format); }
  static MemoryLayout from_code(int64_t code) {
    return code == -1 ? MemoryLayout{at::MemoryFormat::Contiguous, true}
                      : MemoryLayout{static_cast<at::MemoryFormat>(code), false};
  }

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

 private:
  MemoryLayout(at::MemoryFormat format_, bool channels_last_1d_)
      : format(format_), channels_last_1d(channels_last_1d_) {}
};

// Uninitialised, of size (N, C, *spatial), stored as (N, *spatial, C).
inline at::Tensor empty_channels_last(at::IntArrayRef size, const at::TensorOptions& options) {
  at::DimVector stored(size);
  stored.erase(stored.begin() + 1);
  stored.push_back(size[1]);
  return at::empty(stored, options).movedim(-1, 1);
}

}  // namespace resops
