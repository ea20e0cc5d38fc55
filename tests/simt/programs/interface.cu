// Everything that csrc/cuda/portable.cuh offers, once: compiled with g++ and with nvcc, never run.

#include "portable.cuh"

using namespace resops;

struct Shared {
  float value[32];
  uint4 tile[256];
};

template <class T, class V>
__global__ void __launch_bounds__(256)
    interface_kernel(const T* __restrict__ x, float* y, int64_t n) {
  RESOPS_SHARED(Shared, s);
  if (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x >= n * gridDim.x) return;

  s.value[threadIdx.x % 32] = to_float(load<T>(x));
  block_sync();
  warp_sync();
  grid_sync();
  cluster_sync();
  float v = *cluster_map(&s.value[3], (cluster_rank() + 1) % cluster_size());

  v += shuffle_xor(v, 1) + shuffle_down(v, 2) + shuffle_up(v, 1) + shuffle(v, 3);
  if (warp_any(v > 1) && warp_all(v < 2)) v += static_cast<float>(__popc(warp_ballot(v > 3)));

  store(y, load<V>(x));
  store_cs<V>(y, load_nc<V>(x));
  store_cs<T>(y, load_nc<T>(x));
  store(y, load_cs<float4>(x));
  store(y, load_cs<V>(x));
  store(y, from_float<T>(v));
  store_cs<unsigned char>(y, load_nc<unsigned char>(x));

  cp_async<16>(&s.tile[0], x, 8);
  cp_async<8>(&s.tile[1], x);
  cp_async<4>(&s.tile[2], x);
  cp_async_commit();
  cp_async_wait<1>();
  unsigned a[4], b[2];
  float d[4] = {};
  ldmatrix_x4(a, &s.tile[threadIdx.x]);
  ldmatrix_x4_trans(a, &s.tile[threadIdx.x]);
  ldmatrix_x2(b, &s.tile[threadIdx.x]);
  ldmatrix_x2_trans(b, &s.tile[threadIdx.x]);
  if constexpr (!std::is_same_v<T, float>) mma_m16n8k16<T>(d, a, b);

  auto* u = reinterpret_cast<unsigned*>(y);
  auto* i = reinterpret_cast<int*>(y);
  auto* l = reinterpret_cast<unsigned long long*>(y);
  atomicAdd(y, d[0]);
  atomicAdd(i, 1);
  atomicAdd(u, 1u);
  atomicAdd(l, 1ull);
  atomicMin(i, 1);
  atomicMax(u, 1u);
  atomicMax(l, 1ull);
  atomicCAS(u, 1u, 2u);
  atomicCAS(l, 1ull, 2ull);
  atomicExch(y, 1.0f);
  atomicOr(u, 1u);
  atomicAnd(u, 1u);
  __threadfence();
  __threadfence_block();

  const float2 h = __half22float2(__floats2half2_rn(v, 1));
  const float2 g = __bfloat1622float2(__floats2bfloat162_rn(v, 1));
  const float4 f = make_float4(h.x, h.y, g.x, g.y);
  const uint4 q = make_uint4(__float_as_uint(f.x), 1, 2, 3);
  const int2 p = make_int2(__float_as_int(f.y), __clz(1));
  y[1] = __uint_as_float(q.x) + __int_as_float(p.x) + fmaf(rsqrtf(v), expf(v), erff(v)) +
         fmaxf(v, fminf(v, 2)) + static_cast<float>(min(p.x, p.y) + max(p.x, __ffs(2))) +
         static_cast<float>(__popcll(l[0]) + rsqrt(2.0));
}

template <class T, class V>
void launch_all(const T* x, float* y, cudaStream_t stream) {
  const int blocks = device_limits().multiprocessors *
                     max_blocks_per_multiprocessor(interface_kernel<T, V>, 256, sizeof(Shared));
  RESOPS_LAUNCH((interface_kernel<T, V>), 3, 256, sizeof(Shared), stream, x, y, 5);
  RESOPS_LAUNCH_COOPERATIVE((interface_kernel<T, V>), dim3(static_cast<unsigned>(blocks)), 256,
                            sizeof(Shared), stream, x, y, 5);
  RESOPS_LAUNCH_CLUSTER((interface_kernel<T, V>), 4, dim3(8, 2), 256, sizeof(Shared), stream, x, y,
                        5);
}

template void launch_all<float, float4>(const float*, float*, cudaStream_t);
template void launch_all<__half, uint4>(const __half*, float*, cudaStream_t);
template void launch_all<__nv_bfloat16, uint2>(const __nv_bfloat16*, float*, cudaStream_t);
