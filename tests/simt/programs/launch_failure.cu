// What csrc/cuda/portable.cuh says where a GPU refuses a launch: built by nvcc with the functions
// of the CUDA runtime below in the place of the runtime, so that no GPU is needed to refuse.
//
//   launch_failure STATUS COMPUTE_CAPABILITY

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "portable.cuh"

#ifndef __CUDA_ARCH__  // kernels have a runtime of their own
static cudaError_t refusal = cudaSuccess;
static int capability = 0;

extern "C" {
cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return refusal;
}
cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetLastError() { return refusal; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorNoKernelImageForDevice ? "no kernel image" : "another reason";
}
cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof(*p));
  std::strcpy(p->name, "Some GPU");
  p->major = capability / 10;
  p->minor = capability % 10;
  return cudaSuccess;
}

// With these nvcc's own code says which kernels there are: none.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}

static void fill_kernel(int) {}  // only its address is used

int main(int, char** argv) {
  refusal = static_cast<cudaError_t>(std::atoi(argv[1]));
  capability = std::atoi(argv[2]);
  try {
    RESOPS_LAUNCH(fill_kernel, dim3(7, 2), 256, 64, nullptr, 1);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 0;
  }
  std::puts("launched");
  return 0;
}
#endif
