// Bandwidth against the width of a slab: how fast channels-last rows are read when each block takes
// only some neighbouring bytes of every row, as the kernels do that read a tensor once.
//
//   nvcc -std=c++20 -O3 -I csrc/cuda -arch=native bench/slab_bandwidth.cu -o slab_bandwidth
//   ./slab_bandwidth [MEGABYTES]
//
// A row of the table for every length of a row and every width; "whole" is a read of the same bytes
// in order. What was read is checked. Under the emulator (docs/simt.md) the times mean nothing.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "portable.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 8;  // loads of a thread on their way at a time

// Sums of the 16-byte vectors of a slab, one for each thread, as unsigned numbers that wrap around.
// Blocks: slabs in x, parts of the rows in y.
__global__ void __launch_bounds__(kThreads)
    slab_read_kernel(const uint4* __restrict__ x, int64_t rows, int row_vectors, int lanes,
                     unsigned* __restrict__ sums) {
  using namespace resops;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t step = int64_t{kThreads} / lanes * gridDim.y;
  const int column = static_cast<int>(blockIdx.x) * lanes + lane;
  unsigned sum = 0;
  int64_t row = blockIdx.y + static_cast<int64_t>(threadIdx.x / lanes) * gridDim.y;
  for (; row < rows; row += kSteps * step) {
    uint4 v[kSteps] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (row + u * step < rows) v[u] = load_nc<uint4>(x + (row + u * step) * row_vectors + column);
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) sum += v[u].x + v[u].y + v[u].z + v[u].w;
  }
  const int64_t block = blockIdx.x + static_cast<int64_t>(blockIdx.y) * gridDim.x;
  store<unsigned>(sums + block * kThreads + threadIdx.x, sum);
}

struct Vector {
  alignas(16) unsigned word[4];
};

// An array on the device, with the values of one on the host.
template <class T>
class Array {
 public:
  explicit Array(std::vector<T> values) : values_(std::move(values)) {
#ifndef RESOPS_SIMT
    RESOPS_CUDA_CHECK(cudaMalloc(&data_, values_.size() * sizeof(T)));
    RESOPS_CUDA_CHECK(
        cudaMemcpy(data_, values_.data(), values_.size() * sizeof(T), cudaMemcpyHostToDevice));
#else
    data_ = values_.data();
#endif
  }
  ~Array() {
#ifndef RESOPS_SIMT
    cudaFree(data_);
#endif
  }
  Array(const Array&) = delete;
  T* data() { return data_; }
  const std::vector<T>& read() {
#ifndef RESOPS_SIMT
    RESOPS_CUDA_CHECK(
        cudaMemcpy(values_.data(), data_, values_.size() * sizeof(T), cudaMemcpyDeviceToHost));
#endif
    return values_;
  }

 private:
  std::vector<T> values_;
  T* data_ = nullptr;
};

void synchronize() {
#ifndef RESOPS_SIMT
  RESOPS_CUDA_CHECK(cudaDeviceSynchronize());
#endif
}

template <class F>
double seconds_of(F launch, int repeats) {
  launch();
  synchronize();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) launch();
  synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / repeats;
}

int run(int64_t megabytes, int repeats) {
  const int64_t vectors = megabytes * (1 << 20) / 16;
  std::vector<Vector> values(static_cast<size_t>(vectors));
  unsigned expected = 0, state = 1;
  for (Vector& v : values) {
    for (unsigned& word : v.word) expected += word = state = state * 1664525u + 1013904223u;
  }
  const resops::DeviceLimits& device = resops::device_limits();
  Array<Vector> x(std::move(values));
  const int blocks = device.multiprocessors * 8;
  Array<unsigned> sums(std::vector<unsigned>(size_t{kThreads} * (blocks + 2048)));
  std::printf("%s (sm_%d), %lld MB\nrow bytes  slab bytes      GB/s\n", device.name.c_str(),
              device.compute_capability, static_cast<long long>(megabytes));
  for (int row_bytes = 128; row_bytes <= 4096; row_bytes *= 2) {
    const int row_vectors = row_bytes / 16;
    for (int lanes = 2; lanes <= std::min(row_vectors, kThreads); lanes *= 2) {
      const int slabs = row_vectors / lanes, parts = std::max(blocks / slabs, 1);
      const auto launch = [&] {
        RESOPS_LAUNCH(slab_read_kernel,
                      dim3(static_cast<unsigned>(slabs), static_cast<unsigned>(parts)), kThreads, 0,
                      nullptr, reinterpret_cast<const uint4*>(x.data()), vectors / row_vectors,
                      row_vectors, lanes, sums.data());
      };
      const double seconds = seconds_of(launch, repeats);
      unsigned sum = 0;
      const std::vector<unsigned>& found = sums.read();
      for (int i = 0; i < slabs * parts * kThreads; ++i) sum += found[static_cast<size_t>(i)];
      if (sum != expected) {
        std::printf("wrong sum with slabs of %d bytes in rows of %d\n", 16 * lanes, row_bytes);
        return 1;
      }
      std::printf("%9d  %10s  %8.1f\n", row_bytes,
                  slabs == 1 ? "whole" : std::to_string(16 * lanes).c_str(),
                  static_cast<double>(vectors) * 16e-9 / seconds);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // Several times the L2 cache of any GPU so far.
  const int64_t megabytes = argc > 1 ? std::atoll(argv[1]) : 1024;
  if (megabytes < 1) {
    std::printf("usage: %s [MEGABYTES]\n", argv[0]);
    return 2;
  }
  try {
    return run(megabytes, megabytes > 64 ? 20 : 1);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
}
