// Kernels with one mistake each. test_simt.py says which lane must find which.

#include <cmath>
#include <cstdint>
#include <memory>

#include "case.h"

using namespace resops;

struct Shared {
  float value[64];
};
constexpr size_t kShared = sizeof(Shared);

float y[1024];
alignas(128) float x[1024];

// ---- races -------------------------------------------------------------------------------------

// kFault 0: none. 1: no barrier between writing and reading. 2: none before the memory is used
// again.
template <int kFault>
__global__ void reverse_kernel(float* y) {
  RESOPS_SHARED(Shared, s);
  for (int round = 0; round < 2; ++round) {
    s.value[threadIdx.x] = static_cast<float>(threadIdx.x);
    if constexpr (kFault != 1) block_sync();
    y[threadIdx.x] = s.value[63 - threadIdx.x];
    if constexpr (kFault != 2) block_sync();
  }
}
void no_fault() { RESOPS_LAUNCH(reverse_kernel<0>, 1, 64, kShared, nullptr, y); }
void missing_barrier() { RESOPS_LAUNCH(reverse_kernel<1>, 1, 64, kShared, nullptr, y); }
void missing_barrier_before_reuse() {
  RESOPS_LAUNCH(reverse_kernel<2>, 1, 64, kShared, nullptr, y);
}

// Within a warp, where the threads of old GPUs ran in step. A shuffle orders no memory.
__global__ void warp_race_kernel(float* y) {
  RESOPS_SHARED(Shared, s);
  s.value[threadIdx.x] = 1;
  const float other = shuffle_xor(1.0f, 1);
  y[threadIdx.x] = other + s.value[threadIdx.x ^ 1];
}
void missing_warp_sync() { RESOPS_LAUNCH(warp_race_kernel, 1, 32, kShared, nullptr, y); }

// Each block writes one element too many: where the next one begins.
__global__ void overlap_kernel(float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  store(y + i, 1.0f);
  if (threadIdx.x == 0) store(y + i + blockDim.x, 0.0f);
}
void race_between_blocks() { RESOPS_LAUNCH(overlap_kernel, 5, 64, 0, nullptr, y); }

template <bool kFence>
__global__ void last_block_kernel(float* partial, unsigned* arrived, float* y) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = 1;
  if constexpr (kFence) __threadfence();
  const bool is_last = atomicAdd(arrived, 1) == gridDim.x - 1;
  if constexpr (kFence) __threadfence();
  if (is_last)
    for (unsigned b = 0; b < gridDim.x; ++b) *y += partial[b];
}
void missing_fence() {
  unsigned arrived = 0;
  RESOPS_LAUNCH(last_block_kernel<false>, 4, 32, 0, nullptr, x, &arrived, y);
}

// Read with a plain load while other blocks count with atomics.
__global__ void plain_read_kernel(unsigned* counter, float* y) {
  if (threadIdx.x == 0) atomicAdd(counter, 1);
  if (threadIdx.x == 32) y[blockIdx.x] = static_cast<float>(*counter);
}
void plain_read_of_atomic() {
  unsigned counter = 0;
  RESOPS_LAUNCH(plain_read_kernel, 4, 64, 0, nullptr, &counter, y);
}

__global__ void grid_race_kernel(float* partial, float* y) {
  if (threadIdx.x == 0) partial[blockIdx.x] = 1;
  block_sync();  // of this block only
  y[blockIdx.x * blockDim.x + threadIdx.x] = partial[(blockIdx.x + 1) % gridDim.x];
}
void missing_grid_sync() { RESOPS_LAUNCH_COOPERATIVE(grid_race_kernel, 4, 32, 0, nullptr, x, y); }

// kFault 1: no cluster_sync before another block's memory is read. 2: none before this one exits.
template <int kFault>
__global__ void cluster_kernel(float* y) {
  RESOPS_SHARED(Shared, s);
  s.value[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (kFault == 1)
    block_sync();
  else
    cluster_sync();
  if (kFault == 2 && cluster_rank() == 1) return;
  y[blockIdx.x * blockDim.x + threadIdx.x] = cluster_map(s.value, cluster_rank() ^ 1)[threadIdx.x];
  if constexpr (kFault != 2) cluster_sync();
}
void missing_cluster_sync() {
  RESOPS_LAUNCH_CLUSTER(cluster_kernel<1>, 2, 4, 32, kShared, nullptr, y);
}
void exit_before_cluster_sync() {
  RESOPS_LAUNCH_CLUSTER(cluster_kernel<2>, 2, 4, 32, kShared, nullptr, y);
}

// ---- addresses ---------------------------------------------------------------------------------

__global__ void past_shared_kernel(float* y, int index) {
  RESOPS_SHARED(Shared, s);
  float* first = s.value;
  first[threadIdx.x + static_cast<unsigned>(index)] = 1;
  y[threadIdx.x] = first[threadIdx.x];
}
void past_shared() { RESOPS_LAUNCH(past_shared_kernel, 1, 32, kShared, nullptr, y, 40); }

struct TwoArrays {
  float first[32];
  float second[32];
};
__global__ void past_array_kernel(float* y) {
  RESOPS_SHARED(TwoArrays, s);
  s.second[threadIdx.x] = 0;
  s.first[threadIdx.x + 1] = 1;
  y[threadIdx.x] = s.first[threadIdx.x];
}
void past_array_in_shared() {
  RESOPS_LAUNCH(past_array_kernel, 1, 32, sizeof(TwoArrays), nullptr, y);
}

__global__ void past_global_kernel(const float* x, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  store(y + i, load<float>(x + i) + 1);
}
void past_global() {
  const std::unique_ptr<float[]> small(new float[100]());
  RESOPS_LAUNCH(past_global_kernel, 2, 64, 0, nullptr, small.get(), y);
}

__global__ void misaligned_kernel(const float* x, float* y) { store(y, load<float4>(x + 1)); }
void misaligned_load() { RESOPS_LAUNCH(misaligned_kernel, 1, 1, 0, nullptr, x, y); }

__global__ void misaligned_cast_kernel(const float* x, float* y) {
  *y = reinterpret_cast<const float4*>(x + 1)->w;
}
void misaligned_cast() { RESOPS_LAUNCH(misaligned_cast_kernel, 1, 1, 0, nullptr, x, y); }

__global__ void null_kernel(const float* x, float* y) { store(y, load<float>(x)); }
void null_load() { RESOPS_LAUNCH(null_kernel, 1, 1, 0, nullptr, nullptr, y); }

__global__ void read_only_kernel(float* x) {
  store(x + threadIdx.x, load_nc<float>(x + threadIdx.x) + 1);
}
void write_to_read_only() { RESOPS_LAUNCH(read_only_kernel, 1, 32, 0, nullptr, x); }

// ---- values that nobody wrote ------------------------------------------------------------------

__global__ void uninitialised_kernel(float* y) {
  RESOPS_SHARED(Shared, s);
  if (threadIdx.x != 5) s.value[threadIdx.x] = 1;
  block_sync();
  float sum = 0, largest = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    sum += s.value[i];
    largest = fmaxf(largest, s.value[i]);  // drops a NaN
  }
  if (threadIdx.x == 0) {
    y[0] = sum;
    y[1] = largest;
  }
}
void uninitialised_shared() {
  RESOPS_LAUNCH(uninitialised_kernel, 1, 32, kShared, nullptr, y);
  CHECK(std::isnan(y[0]));
  const float largest = y[1];
  simt::options().poison = 0x7b;
  RESOPS_LAUNCH(uninitialised_kernel, 1, 32, kShared, nullptr, y);
  CHECK(y[1] != largest);
}

// kFault 1: no wait. 2: a wait that leaves the group outstanding. 3: a wait, but no barrier.
template <int kFault>
__global__ void copy_kernel(const float* x, float* y) {
  RESOPS_SHARED(Shared, s);
  const unsigned t = threadIdx.x;
  cp_async<4>(&s.value[t], x + t);
  cp_async_commit();
  if constexpr (kFault == 2) cp_async_wait<1>();
  if constexpr (kFault == 3) cp_async_wait<0>();
  if constexpr (kFault != 3) block_sync();
  y[t] = s.value[63 - t];
}
void forgotten_wait() {
  RESOPS_LAUNCH(copy_kernel<1>, 1, 64, kShared, nullptr, x, y);
  CHECK(std::isnan(y[0]));
}
void wait_for_another_group() {
  RESOPS_LAUNCH(copy_kernel<2>, 1, 64, kShared, nullptr, x, y);
  CHECK(std::isnan(y[0]));
}
void missing_barrier_after_wait() { RESOPS_LAUNCH(copy_kernel<3>, 1, 64, kShared, nullptr, x, y); }

// ---- control flow ------------------------------------------------------------------------------

__global__ void divergent_kernel(float*) {
  if (threadIdx.x < 32)
    block_sync();
  else
    block_sync();
}
void divergent_barrier() { RESOPS_LAUNCH(divergent_kernel, 1, 64, 0, nullptr, y); }

__global__ void skipped_kernel(float* y) {
  if (threadIdx.x < 16)
    block_sync();
  else
    y[threadIdx.x] = shuffle_xor(1.0f, 1);
}
void barrier_against_shuffle() { RESOPS_LAUNCH(skipped_kernel, 1, 32, 0, nullptr, y); }

__global__ void grid_exit_kernel(float*) {
  if (blockIdx.x == 0) return;
  grid_sync();
}
void exit_before_grid_sync() { RESOPS_LAUNCH_COOPERATIVE(grid_exit_kernel, 3, 32, 0, nullptr, y); }

__global__ void grid_sync_kernel(float*) { grid_sync(); }
void grid_sync_without_cooperation() { RESOPS_LAUNCH(grid_sync_kernel, 2, 32, 0, nullptr, y); }

__global__ void missing_lane_kernel(float* y) {
  if (threadIdx.x % 32 >= 20) return;
  y[threadIdx.x] = shuffle_xor(1.0f, 16);
}
void shuffle_from_missing_lane() { RESOPS_LAUNCH(missing_lane_kernel, 1, 32, 0, nullptr, y); }

__global__ void spin_kernel(unsigned* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}
void spin() {
  unsigned flag = 0;
  RESOPS_LAUNCH(spin_kernel, 1, 32, 0, nullptr, &flag);
}

// ---- launches ----------------------------------------------------------------------------------

void too_many_threads() { RESOPS_LAUNCH(reverse_kernel<0>, 1, 1025, kShared, nullptr, y); }
void empty_grid() { RESOPS_LAUNCH(reverse_kernel<0>, 0, 64, kShared, nullptr, y); }
void grid_too_large() { RESOPS_LAUNCH(reverse_kernel<0>, dim3(1, 65536), 64, kShared, nullptr, y); }
void too_much_shared() { RESOPS_LAUNCH(reverse_kernel<0>, 1, 64, 17 * 1024, nullptr, y); }
void too_little_shared() { RESOPS_LAUNCH(reverse_kernel<0>, 1, 64, kShared - 4, nullptr, y); }
void grid_not_resident() {
  simt::options().device.threads_per_multiprocessor = 128;
  RESOPS_LAUNCH_COOPERATIVE(grid_race_kernel, 7, 64, 0, nullptr, x, y);
}
void cluster_too_large() {
  RESOPS_LAUNCH_CLUSTER(cluster_kernel<0>, 16, 16, 32, kShared, nullptr, y);
}
void cluster_not_dividing() {
  RESOPS_LAUNCH_CLUSTER(cluster_kernel<0>, 2, 5, 32, kShared, nullptr, y);
}
// After a refusal the next launch must work.
void launch_after_failure() {
  for (int i = 0; i < 3; ++i) {
    bool refused = false;
    try {
      divergent_barrier();
    } catch (const simt::Error&) {
      refused = true;
    }
    CHECK(refused);
    no_fault();
    CHECK(y[0] == 63);
  }
}

int main(int argc, char** argv) {
  const Cases cases = {{"no_fault", no_fault},
                       {"missing_barrier", missing_barrier},
                       {"missing_barrier_before_reuse", missing_barrier_before_reuse},
                       {"missing_warp_sync", missing_warp_sync},
                       {"race_between_blocks", race_between_blocks},
                       {"missing_fence", missing_fence},
                       {"plain_read_of_atomic", plain_read_of_atomic},
                       {"missing_grid_sync", missing_grid_sync},
                       {"missing_cluster_sync", missing_cluster_sync},
                       {"exit_before_cluster_sync", exit_before_cluster_sync},
                       {"past_shared", past_shared},
                       {"past_array_in_shared", past_array_in_shared},
                       {"past_global", past_global},
                       {"misaligned_load", misaligned_load},
                       {"misaligned_cast", misaligned_cast},
                       {"null_load", null_load},
                       {"write_to_read_only", write_to_read_only},
                       {"uninitialised_shared", uninitialised_shared},
                       {"forgotten_wait", forgotten_wait},
                       {"wait_for_another_group", wait_for_another_group},
                       {"missing_barrier_after_wait", missing_barrier_after_wait},
                       {"divergent_barrier", divergent_barrier},
                       {"barrier_against_shuffle", barrier_against_shuffle},
                       {"exit_before_grid_sync", exit_before_grid_sync},
                       {"grid_sync_without_cooperation", grid_sync_without_cooperation},
                       {"shuffle_from_missing_lane", shuffle_from_missing_lane},
                       {"spin", spin},
                       {"too_many_threads", too_many_threads},
                       {"empty_grid", empty_grid},
                       {"grid_too_large", grid_too_large},
                       {"too_much_shared", too_much_shared},
                       {"too_little_shared", too_little_shared},
                       {"grid_not_resident", grid_not_resident},
                       {"cluster_too_large", cluster_too_large},
                       {"cluster_not_dividing", cluster_not_dividing},
                       {"launch_after_failure", launch_after_failure}};
  return run_cases(cases, argc, argv);
}
