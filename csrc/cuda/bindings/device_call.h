// What every binding begins with: the device of its tensors, their stream, and their memory as the
// kernels take it.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "../../common/memory_layout.h"
#include "../device.h"

// The dispatch key that the bindings are registered for. The emulator's tensors are on the CPU.
#ifdef RESOPS_SIMT
#define RESOPS_CUDA_KEY CPU
#else
#define RESOPS_CUDA_KEY CUDA
#endif

namespace resops::cuda {

// Makes x's device the current one, in torch and in the kernels' own CUDA runtime. Through the
// virtual guard no CUDA header of torch is needed, and a torch without CUDA can load this library.
class DeviceCall {
 public:
  explicit DeviceCall(const at::Tensor& x) : guard_(x.device()) {
#ifndef RESOPS_SIMT
    set_device(x.device().index());
    stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
#endif
  }
  Stream stream = nullptr;

 private:
  c10::DeviceGuard guard_;
};

inline void check_dtype(const char* op, const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() != at::kDouble, "\"", op,
                              "\" not implemented for 'Double' by the CUDA kernels; "
                              "resops.set_backend(\"reference\") takes it");
}

// The values of a dense tensor, from an address that 16-byte accesses can start at.
inline at::Tensor aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : t.clone();
}

// The values of `t`, dense in a layout and aligned.
inline at::Tensor dense(const MemoryLayout& layout, const at::Tensor& t) {
  return aligned(layout.dense(t));
}

inline at::TensorOptions plain(const at::Tensor& x, at::ScalarType dtype) {
  return x.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
}

}  // namespace resops::cuda
