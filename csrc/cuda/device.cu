// The current device, of the CUDA runtime that is linked into this library.

#include "device.h"
#include "portable.cuh"

namespace resops::cuda {

void set_device(int index) { RESOPS_CUDA_CHECK(cudaSetDevice(index)); }

}  // namespace resops::cuda
