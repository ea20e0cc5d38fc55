// What a kernel of this folder may use, so that the same source compiles with nvcc for a GPU and,
// with -DRESOPS_SIMT, as plain C++ for the emulator in tests/simt (docs/simt.md). No torch here.
//
// Under their CUDA names, the same in both: __global__ __device__ __host__ __forceinline__
// __restrict__ __launch_bounds__; threadIdx blockIdx blockDim gridDim; dim3 uint3; float2 float4
// int2 int4 uint2 uint4 and their make_*; __half __half2 __nv_bfloat16 __nv_bfloat162 with
// __float2half_rn __half2float __float2bfloat16_rn __bfloat162float __floats2half2_rn
// __half22float2
// __floats2bfloat162_rn __bfloat1622float2; min max rsqrtf rsqrt fmaf fmaxf fminf expf erff; __popc
// __popcll __clz __ffs __float_as_uint __uint_as_float __float_as_int __int_as_float; atomicAdd
// atomicMin atomicMax atomicCAS atomicExch atomicOr atomicAnd; __threadfence __threadfence_block;
// cudaStream_t.
// Not to be used: __shared__, extern shared arrays, __constant__, <<<...>>>, warp masks that are
// not full, `#if __CUDA_ARCH__` (a template parameter instead, chosen by the launcher).
//
// Host
//   RESOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)
//   RESOPS_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, args...)
//     All blocks run at the same time: grid_sync() is allowed.
//   RESOPS_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, args...)
//     Clusters of `cluster` <= 8 neighbouring blocks in x; grid.x is a multiple of it.
//     A template kernel goes in parentheses: RESOPS_LAUNCH((my_kernel<float, 4>), grid, ...).
//     Arguments are converted to the kernel's parameter types; there is at least one. All three
//     throw std::runtime_error with the kernel, the grid, the block and the device. shared_bytes is
//     at least sizeof of the struct that the kernel asks for, and at most
//     device_limits().shared_per_block; above 48 KB the kernel is opted in here. An empty grid is
//     an error: return before the launch.
//   device_limits()
//     const DeviceLimits& of the current device, read once per device.
//   max_blocks_per_multiprocessor(kernel, threads, shared_bytes)
//     For the grid of a cooperative launch.
//
// A block
//   RESOPS_SHARED(Type, name)
//     Type& name = the block's shared memory, 128-byte aligned, uninitialised; once per kernel, a
//     struct without constructors. A run-time tail starts at &name + 1: ask for its bytes at the
//     launch.
//   block_sync()
//     __syncthreads
//   warp_sync()
//     __syncwarp of all 32 lanes: orders memory among them, which shuffles do not.
//   grid_sync()
//     Only in a cooperative launch.
//   cluster_sync(), cluster_rank(), cluster_size()
//     rank = blockIdx.x % size; without a cluster, one block.
//   cluster_map(pointer, rank)
//     The same place of shared memory in block `rank` of the cluster. cluster_sync() before another
//     block's memory is first accessed, and before any block exits.
//
// A warp, of which all 32 lanes take part
//   shuffle_xor(v, lane_mask), shuffle_down(v, delta), shuffle_up(v, delta), shuffle(v, lane)
//     Arithmetic values of 4 or 8 bytes; down and up return v itself where the source is past the
//     end.
//   warp_ballot(predicate) -> unsigned, warp_any(predicate), warp_all(predicate) -> bool
//
// Global memory; V is a scalar or a vector type of 1 to 16 bytes, at an address aligned to its size
//   load<V>(pointer)
//   load_nc<V>(pointer)
//     Read-only path: the kernel writes nothing there.
//   load_cs<V>(pointer)
//     Streaming: used once.
//   store<V>(pointer, v), store_cs<V>(pointer, v)
//     The emulator counts the 32-byte sectors of these and of cp_async, and of nothing else.
//
// Asynchronous copies and tensor cores (sm_80 and newer)
//   cp_async<Bytes>(shared, global, valid_bytes = Bytes)
//     4, 8 or 16; what is not valid is filled with zeros.
//   cp_async_commit(), cp_async_wait<N>()
//     Wait until at most N of this thread's groups are outstanding.
//   ldmatrix_x4(r, row), ldmatrix_x4_trans(r, row), ldmatrix_x2(r, row), ldmatrix_x2_trans(r, row)
//     unsigned r[4] or r[2]; lane 8 i + j gives the address of row j of matrix i, 16 bytes,
//     aligned.
//   mma_m16n8k16<T>(d, a, b)
//     d += a b with float d[4], unsigned a[4], b[2]; T = __half, __nv_bfloat16.
//
// Conversions
//   to_float(v), from_float<T>(v)
//     T = float, __half, __nv_bfloat16; to nearest, ties to even.

#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef RESOPS_SIMT
#include "simt.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <utility>
#include <vector>
#endif

#define RESOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                          \
  ::resops::launch(::resops::LaunchConfig{#kernel, grid, block, shared_bytes, stream}, kernel, \
                   __VA_ARGS__)
#define RESOPS_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)            \
  ::resops::launch(::resops::LaunchConfig{#kernel, grid, block, shared_bytes, stream, true}, \
                   kernel, __VA_ARGS__)
#define RESOPS_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...)            \
  ::resops::launch(                                                                               \
      ::resops::LaunchConfig{#kernel, grid, block, shared_bytes, stream, false, cluster}, kernel, \
      __VA_ARGS__)

namespace resops {

constexpr int kWarpSize = 32;

__host__ __device__ inline float to_float(float v) { return v; }
__host__ __device__ inline float to_float(__half v) { return __half2float(v); }
__host__ __device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__host__ __device__ inline T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    static_assert(std::is_same_v<T, float>);
    return v;
  }
}

}  // namespace resops

#ifndef RESOPS_SIMT

#define RESOPS_CUDA_CHECK(call)                                                              \
  do {                                                                                       \
    const cudaError_t status = (call);                                                       \
    if (status != cudaSuccess)                                                               \
      throw std::runtime_error(std::string(#call " failed: ") + cudaGetErrorString(status)); \
  } while (false)

#define RESOPS_SHARED(Type, name)                                                         \
  static_assert(std::is_trivially_default_constructible_v<Type> && alignof(Type) <= 128); \
  extern __shared__ __align__(128) unsigned char resops_shared_memory[];                  \
  Type& name = *reinterpret_cast<Type*>(resops_shared_memory)

namespace resops {

struct LaunchConfig {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  bool cooperative = false;
  unsigned cluster = 1;
};

struct DeviceLimits {
  std::string name;
  int compute_capability;  // 80, 90, ...
  int multiprocessors;
  int threads_per_multiprocessor;
  size_t shared_per_block;  // what a launch may ask for
  size_t shared_per_multiprocessor;
  size_t l2_bytes;
  int blocks_per_cluster;  // 1 where the device has no clusters
};

inline DeviceLimits read_device_limits(int device) {
  cudaDeviceProp p;
  RESOPS_CUDA_CHECK(cudaGetDeviceProperties(&p, device));
  return {p.name,
          10 * p.major + p.minor,
          p.multiProcessorCount,
          p.maxThreadsPerMultiProcessor,
          p.sharedMemPerBlockOptin,
          p.sharedMemPerMultiprocessor,
          static_cast<size_t>(p.l2CacheSize),
          p.major >= 9 ? 8 : 1};
}

inline const DeviceLimits& device_limits() {
  struct Entry {
    std::once_flag once;
    DeviceLimits limits;
  };
  static std::vector<Entry> entries([] {
    int count = 0;
    RESOPS_CUDA_CHECK(cudaGetDeviceCount(&count));
    return static_cast<size_t>(count);
  }());
  int device = 0;
  RESOPS_CUDA_CHECK(cudaGetDevice(&device));
  Entry& entry = entries.at(static_cast<size_t>(device));
  std::call_once(entry.once, [&] { entry.limits = read_device_limits(device); });
  return entry.limits;
}

// A kernel gets more than 48 KB only if it asks; the setting belongs to the current device.
template <class... P>
inline cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

template <class... P>
inline int max_blocks_per_multiprocessor(void (*kernel)(P...), int threads, size_t shared_bytes) {
  int blocks = 0;
  RESOPS_CUDA_CHECK(allow_shared(kernel, shared_bytes));
  RESOPS_CUDA_CHECK(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return blocks;
}

[[noreturn]] inline void launch_failed(const LaunchConfig& c, cudaError_t status) {
  cudaGetLastError();  // the next call starts clean
  std::ostringstream text;
  text << "resops: launch of " << c.kernel << " failed: " << cudaGetErrorString(status)
       << "; grid (" << c.grid.x << ", " << c.grid.y << ", " << c.grid.z << "), block ("
       << c.block.x << ", " << c.block.y << ", " << c.block.z << "), " << c.shared_bytes
       << " bytes of shared memory";
  if (c.cluster > 1) text << ", clusters of " << c.cluster;
  if (c.cooperative) text << ", cooperative";
  const DeviceLimits& device = device_limits();
  text << ", on " << device.name << " (sm_" << device.compute_capability << ")";
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    text << ". This build has no code for it: rebuild resops with TORCH_CUDA_ARCH_LIST="
         << device.compute_capability / 10 << "." << device.compute_capability % 10;
  throw std::runtime_error(text.str());
}

template <class... P, class... A>
inline void launch(const LaunchConfig& c, void (*kernel)(P...), A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel has another number of parameters");
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = c.grid;
  config.blockDim = c.block;
  config.dynamicSmemBytes = c.shared_bytes;
  config.stream = c.stream;
  config.attrs = attributes;
  if (c.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (c.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = c.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  cudaError_t status = allow_shared(kernel, c.shared_bytes);
  if (status == cudaSuccess)
    status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(args))...);
  if (status != cudaSuccess) launch_failed(c, status);
}

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Where the architecture has no clusters, a block is a cluster of its own.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }
template <class T>
__device__ __forceinline__ T* cluster_map(T* pointer, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(pointer, rank));
}
#else
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
template <class T>
__device__ __forceinline__ T* cluster_map(T* pointer, unsigned) {
  return pointer;
}
#endif

constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int lane_mask) {
  return __shfl_xor_sync(kFullWarp, v, lane_mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int delta) {
  return __shfl_down_sync(kFullWarp, v, delta);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T v, int delta) {
  return __shfl_up_sync(kFullWarp, v, delta);
}
template <class T>
__device__ __forceinline__ T shuffle(T v, int lane) {
  return __shfl_sync(kFullWarp, v, lane);
}
__device__ __forceinline__ unsigned warp_ballot(bool p) { return __ballot_sync(kFullWarp, p); }
__device__ __forceinline__ bool warp_any(bool p) { return __any_sync(kFullWarp, p) != 0; }
__device__ __forceinline__ bool warp_all(bool p) { return __all_sync(kFullWarp, p) != 0; }

template <class V>
__device__ __forceinline__ V load(const void* pointer) {
  return *static_cast<const V*>(pointer);
}
template <class V>
__device__ __forceinline__ V load_nc(const void* pointer) {
  return __ldg(static_cast<const V*>(pointer));
}
template <class V>
__device__ __forceinline__ V load_cs(const void* pointer) {
  return __ldcs(static_cast<const V*>(pointer));
}
// Not an assignment: of a vector type the compiler makes four stores, unless it finds that it need
// not. (__stwb is the store with the default cache policy.)
template <class V>
__device__ __forceinline__ void store(void* pointer, V v) {
  __stwb(static_cast<V*>(pointer), v);
}
template <class V>
__device__ __forceinline__ void store_cs(void* pointer, V v) {
  __stcs(static_cast<V*>(pointer), v);
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         int valid_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(valid_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#define RESOPS_LDMATRIX_X4(name, modifier)                                                      \
  __device__ __forceinline__ void name(unsigned (&r)[4], const void* row) {                     \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                               \
                 : "r"(shared_address(row))                                                     \
                 : "memory");                                                                   \
  }
#define RESOPS_LDMATRIX_X2(name, modifier)                                              \
  __device__ __forceinline__ void name(unsigned (&r)[2], const void* row) {             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(r[0]), "=r"(r[1])                                               \
                 : "r"(shared_address(row))                                             \
                 : "memory");                                                           \
  }
RESOPS_LDMATRIX_X4(ldmatrix_x4, "")
RESOPS_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
RESOPS_LDMATRIX_X2(ldmatrix_x2, "")
RESOPS_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")
#undef RESOPS_LDMATRIX_X4
#undef RESOPS_LDMATRIX_X2

#define RESOPS_MMA(types)                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types   \
               ".f32 {%0, %1, %2, %3}, "                        \
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    RESOPS_MMA("f16.f16");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    RESOPS_MMA("bf16.bf16");
  }
}
#undef RESOPS_MMA

}  // namespace resops

#endif  // !RESOPS_SIMT
