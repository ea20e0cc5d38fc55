// Kernels that are right: the emulator must compute what a GPU would, and no lane may complain.

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

#include "case.h"

using namespace resops;

// ---- shuffles, votes, barriers -----------------------------------------------------------------

struct ReduceShared {
  float partial[32];
};

__device__ float block_sum(float v, ReduceShared& s) {
  for (int step = 16; step > 0; step /= 2) v += shuffle_xor(v, step);
  block_sync();  // the partials of an earlier call have been read
  if (threadIdx.x % 32 == 0) s.partial[threadIdx.x / 32] = v;
  block_sync();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += s.partial[warp];
  return sum;
}

__global__ void row_sums_kernel(const float* __restrict__ x, float* y, int columns) {
  RESOPS_SHARED(ReduceShared, s);
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const float v = load<float>(x + static_cast<int64_t>(blockIdx.x) * columns + i);
    sum += v;
    squares += v * v;
  }
  sum = block_sum(sum, s);
  squares = block_sum(squares, s);
  if (threadIdx.x == 0) store(y + 2 * blockIdx.x, make_float2(sum, squares));
}

void reduction() {
  const int rows = 7;
  for (unsigned threads : {32u, 96u, 256u})
    for (int columns : {1, 33, 1000}) {
      std::vector<float> x(static_cast<size_t>(rows * columns)), y(2 * rows);
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17);
      RESOPS_LAUNCH(row_sums_kernel, rows, threads, sizeof(ReduceShared), nullptr, x.data(),
                    y.data(), columns);
      for (int r = 0; r < rows; ++r) {
        float sum = 0, squares = 0;
        for (int i = 0; i < columns; ++i) {
          const float v = x[static_cast<size_t>(r * columns + i)];
          sum += v;
          squares += v * v;
        }
        CHECK(y[static_cast<size_t>(2 * r)] == sum && y[static_cast<size_t>(2 * r + 1)] == squares);
      }
    }
}

__global__ void warp_kernel(int* scan, int* first_of_next, int* last, unsigned* votes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int sum = static_cast<int>(threadIdx.x);
  for (int step = 1; step < 32; step *= 2) {
    const int below = shuffle_up(sum, step);
    if (lane >= step) sum += below;
  }
  scan[threadIdx.x] = sum;
  first_of_next[threadIdx.x] = shuffle_down(static_cast<int>(threadIdx.x), 1);
  last[threadIdx.x] = shuffle(sum, 31);
  votes[threadIdx.x] = warp_ballot(lane % 3 == 0);
  if (!warp_any(lane == 7) || warp_any(false) || !warp_all(true) || warp_all(lane != 7))
    votes[threadIdx.x] = 0;
}

void shuffles_and_votes() {
  std::vector<int> scan(64), next(64), last(64);
  std::vector<unsigned> votes(64);
  RESOPS_LAUNCH(warp_kernel, 1, 64, 0, nullptr, scan.data(), next.data(), last.data(),
                votes.data());
  for (int t = 0, sum = 0; t < 64; ++t) {
    sum = t == 32 ? t : sum + t;
    const auto i = static_cast<size_t>(t);
    CHECK(scan[i] == sum);
    CHECK(next[i] == (t % 32 == 31 ? t : t + 1));
    CHECK(last[i] == scan[i / 32 * 32 + 31]);
    CHECK(votes[i] == 0x49249249u);
  }
}

__global__ void indices_kernel(unsigned* seen) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  seen[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + thread;
}

void indices() {
  std::vector<unsigned> seen(2 * 3 * 4 * 5 * 3 * 2);
  RESOPS_LAUNCH(indices_kernel, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, seen.data());
  for (size_t i = 0; i < seen.size(); ++i) CHECK(seen[i] == 1 + i % 30);
}

struct ExitShared {
  int value[64];
};

__global__ void early_exit_kernel(int* y, int n) {
  RESOPS_SHARED(ExitShared, s);
  const int t = static_cast<int>(threadIdx.x);
  if (t >= n) return;
  s.value[t] = t;
  block_sync();
  y[t] = s.value[n - 1 - t];
}

void early_exit() {
  std::vector<int> y(64, -1);
  RESOPS_LAUNCH(early_exit_kernel, 1, 64, sizeof(ExitShared), nullptr, y.data(), 40);
  for (int t = 0; t < 64; ++t) CHECK(y[static_cast<size_t>(t)] == (t < 40 ? 39 - t : -1));
}

// ---- across blocks -----------------------------------------------------------------------------

__global__ void atomics_kernel(unsigned* u, int* i, float* f, unsigned long long* l) {
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&u[0], 1);
  atomicMax(&u[1], t);
  atomicOr(&u[2], 1u << t % 32);
  atomicAnd(&u[3], ~(1u << t % 32));
  atomicMin(&i[0], -static_cast<int>(t));
  atomicAdd(&f[0], 0.5f);
  atomicAdd(&l[0], 1ull << 33);
  if (atomicCAS(&u[4], 0, t + 1) == 0) atomicAdd(&u[5], 1);
  atomicAdd(&l[1], static_cast<unsigned long long>(atomicExch(&u[6], t)));
}

void atomics() {
  std::vector<unsigned> u = {0, 0, 0, ~0u, 0, 0, 0};
  int i = 0;
  float f = 0;
  std::vector<unsigned long long> l(2);
  RESOPS_LAUNCH(atomics_kernel, 3, 64, 0, nullptr, u.data(), &i, &f, l.data());
  CHECK(u[0] == 192 && u[1] == 191 && u[2] == ~0u && u[3] == 0);
  CHECK(u[4] >= 1 && u[4] <= 192 && u[5] == 1);
  CHECK(i == -191 && f == 96.0f && l[0] == 192ull << 33);
  CHECK(l[1] + u[6] == 191 * 192 / 2);  // every value was taken out once but the last one
}

__global__ void grid_kernel(float* partial, float* y) {
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1) * (round + 1);
    grid_sync();
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    grid_sync();
    y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  }
}

void cooperative_grid() {
  std::vector<float> partial(4), y(4 * 64);
  CHECK(device_limits().multiprocessors * max_blocks_per_multiprocessor(grid_kernel, 64, 0) >= 4);
  RESOPS_LAUNCH_COOPERATIVE(grid_kernel, 4, 64, 0, nullptr, partial.data(), y.data());
  for (float v : y) CHECK(v == 30.0f);
}

struct ClusterShared {
  float mine, other[7];
};

__global__ void cluster_kernel(float* y) {
  RESOPS_SHARED(ClusterShared, s);
  if (threadIdx.x == 0) s.mine = static_cast<float>(blockIdx.x);
  cluster_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *cluster_map(&s.mine, rank);
    y[blockIdx.x] = sum;
    *cluster_map(&s.other[0], (cluster_rank() + 1) % cluster_size()) = sum + 1;
  }
  cluster_sync();
  if (threadIdx.x == 1) y[blockIdx.x] += s.other[0];
}

void cluster() {
  std::vector<float> y(8);
  RESOPS_LAUNCH_CLUSTER(cluster_kernel, 4, 8, 64, sizeof(ClusterShared), nullptr, y.data());
  for (int b = 0; b < 8; ++b) CHECK(y[static_cast<size_t>(b)] == 2 * (b < 4 ? 6 : 22) + 1);
  RESOPS_LAUNCH(cluster_kernel, 3, 64, sizeof(ClusterShared), nullptr,
                y.data());  // clusters of one
  CHECK(y[2] == 2 + 2 + 1);
}

struct LastShared {
  bool is_last;
};

// The last block to arrive adds up what all have written: fence, atomic, fence.
__global__ void last_block_kernel(float* partial, unsigned* arrived, float* y) {
  RESOPS_SHARED(LastShared, s);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<float>(blockIdx.x);
    __threadfence();
    s.is_last = atomicAdd(arrived, 1) == gridDim.x - 1;
    __threadfence();
  }
  block_sync();
  if (!s.is_last) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
  if (threadIdx.x == 33) *y = sum;
}

void last_block() {
  std::vector<float> partial(9);
  unsigned arrived = 0;
  float y = 0;
  RESOPS_LAUNCH(last_block_kernel, 9, 64, sizeof(LastShared), nullptr, partial.data(), &arrived,
                &y);
  CHECK(y == 36);
}

__global__ void increment_kernel(int* x, int n) {
  const auto i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) store(x + i, load<int>(x + n - 1 - i) + 1);
}

void launches_in_order() {
  std::vector<int> x(1), y(200);
  for (int i = 0; i < 3; ++i) RESOPS_LAUNCH(increment_kernel, 1, 32, 0, nullptr, x.data(), 1);
  CHECK(x[0] == 3);
  RESOPS_LAUNCH(increment_kernel, 1, 32, 0, nullptr, y.data(), 0);
  CHECK(y[0] == 0);
}

// ---- asynchronous copies, tensor cores ---------------------------------------------------------

struct PipelineShared {
  float4 stage[3][32];
};

__global__ void pipeline_kernel(const float* __restrict__ x, float* y, int vectors, int valid) {
  RESOPS_SHARED(PipelineShared, s);
  const auto lane = static_cast<int>(threadIdx.x);
  const int tiles = vectors / 32;
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int first = 4 * (32 * tile + lane);
      const int bytes = std::max(0, std::min(16, 4 * (valid - first)));
      cp_async<16>(&s.stage[tile % 3][lane], x + first, bytes);
    }
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  float4 sum = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<1>();
    block_sync();
    const float4 v = s.stage[tile % 3][31 - lane];
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    fetch(tile + 2);
  }
  store(y + 4 * lane, sum);
}

void async_pipeline() {
  std::vector<float4> x(32 * 5), y(32);
  float* flat = &x[0].x;
  std::iota(flat, flat + 640, 0.0f);
  const int valid = 637;
  RESOPS_LAUNCH(pipeline_kernel, 1, 32, sizeof(PipelineShared), nullptr, flat, &y[0].x, 160, valid);
  for (int e = 0; e < 128; ++e) {
    float sum = 0;
    for (int tile = 0; tile < 5; ++tile) {
      const int from = 128 * tile + 4 * (31 - e / 4) + e % 4;
      sum += from < valid ? flat[from] : 0;
    }
    CHECK((&y[0].x)[e] == sum);
  }
}

template <class T>
struct MmaShared {
  alignas(16) T a[16][16];  // row-major
  alignas(16) T b[16][8];   // k-major, as a row-major right factor lies in memory
};

template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  using Shared = MmaShared<T>;
  RESOPS_SHARED(Shared, s);
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = a[i];
  for (unsigned i = lane; i < 128; i += 32) s.b[i / 8][i % 8] = b[i];
  warp_sync();
  unsigned a_fragment[4], b_fragment[2];
  ldmatrix_x4(a_fragment, &s.a[lane % 16][8 * (lane / 16)]);
  ldmatrix_x2_trans(b_fragment, &s.b[lane % 16][0]);
  float sum[4];
  for (unsigned i = 0; i < 4; ++i)
    sum[i] = d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2];
  mma_m16n8k16<T>(sum, a_fragment, b_fragment);
  for (unsigned i = 0; i < 4; ++i)
    d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
}

template <class T>
void check_mma() {
  std::vector<T> a(256), b(128);
  std::vector<float> d(128), expected(128);
  for (unsigned i = 0; i < 256; ++i) a[i] = from_float<T>(static_cast<float>(i * 7 % 31) - 15.0f);
  for (unsigned i = 0; i < 128; ++i)
    b[i] = from_float<T>(static_cast<float>(i * 5 % 23) / 4 - 2.5f);
  for (unsigned i = 0; i < 128; ++i) d[i] = expected[i] = static_cast<float>(i);
  for (unsigned m = 0; m < 16; ++m)
    for (unsigned n = 0; n < 8; ++n)
      for (unsigned k = 0; k < 16; ++k)
        expected[8 * m + n] += to_float(a[16 * m + k]) * to_float(b[8 * k + n]);  // exact: small
  RESOPS_LAUNCH(mma_kernel<T>, 1, 32, sizeof(MmaShared<T>), nullptr, a.data(), b.data(), d.data());
  CHECK(d == expected);
}

void mma() {
  check_mma<__half>();
  check_mma<__nv_bfloat16>();
}

// ldmatrix without and with .trans, against the manual's table read the other way round.
struct MatrixShared {
  alignas(16) uint16_t m[32][8];
};

__global__ void ldmatrix_kernel(unsigned* y) {
  RESOPS_SHARED(MatrixShared, s);
  for (unsigned i = 0; i < 8; ++i) s.m[threadIdx.x][i] = static_cast<uint16_t>(8 * threadIdx.x + i);
  warp_sync();
  unsigned r[4], x2[2];
  ldmatrix_x4(r, s.m[threadIdx.x]);
  for (unsigned i = 0; i < 4; ++i) y[10 * threadIdx.x + i] = r[i];
  ldmatrix_x4_trans(r, s.m[threadIdx.x]);
  for (unsigned i = 0; i < 4; ++i) y[10 * threadIdx.x + 4 + i] = r[i];
  ldmatrix_x2(x2, s.m[threadIdx.x % 16]);
  y[10 * threadIdx.x + 8] = x2[0];
  y[10 * threadIdx.x + 9] = x2[1];
}

void ldmatrix() {
  std::vector<unsigned> y(320);
  RESOPS_LAUNCH(ldmatrix_kernel, 1, 32, sizeof(MatrixShared), nullptr, y.data());
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned row = 0; row < 8; ++row)
      for (unsigned column = 0; column < 8; ++column) {
        const unsigned value = 64 * i + 8 * row + column;
        const unsigned plain = y[10 * (4 * row + column / 2) + i] >> 16 * (column % 2);
        const unsigned trans = y[10 * (4 * column + row / 2) + 4 + i] >> 16 * (row % 2);
        CHECK((plain & 0xffff) == value && (trans & 0xffff) == value);
        if (i < 2)
          CHECK(y[10 * (4 * row + column / 2) + 8 + i] == y[10 * (4 * row + column / 2) + i]);
      }
}

// ---- 16-bit types ------------------------------------------------------------------------------

// Between neighbours, everything below the middle rounds down, above it up, and itself to even.
template <class T, class Round>
void check_rounding(unsigned infinity, float (*widen)(T), Round round) {
  for (unsigned bits = 0; bits < infinity; ++bits)
    for (unsigned sign : {0u, 0x8000u}) {
      const float low = widen({static_cast<uint16_t>(bits | sign)});
      CHECK(round(low).bits == (bits | sign));
      // The format's first value beyond its largest one, were the exponent not used up.
      const float high = bits + 1 == infinity
                             ? 2 * low - widen({static_cast<uint16_t>((bits - 1) | sign)})
                             : widen({static_cast<uint16_t>((bits + 1) | sign)});
      if (std::isinf(high)) continue;
      const float middle = low + (high - low) / 2;
      const float toward = std::copysign(std::numeric_limits<float>::infinity(), low);
      CHECK(round(middle).bits == ((bits + bits % 2) | sign));
      if (low != 0 || sign == 0) {
        CHECK(round(std::nextafter(middle, low)).bits == (bits | sign));
        CHECK(round(std::nextafter(middle, toward)).bits == ((bits + 1) | sign));
      }
    }
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(round(inf).bits == infinity && round(-inf).bits == (infinity | 0x8000));
  CHECK(round(std::nanf("")).bits == 0x7fff && std::isnan(widen({0x7fff})));
  CHECK(std::isinf(widen({static_cast<uint16_t>(infinity)})));
}

void halves() {
  check_rounding<__half>(0x7c00, __half2float, __float2half_rn);
  check_rounding<__nv_bfloat16>(0x7f80, __bfloat162float, __float2bfloat16_rn);
  const float2 f = __half22float2(__floats2half2_rn(1.5f, -2));
  const float2 g = __bfloat1622float2(__floats2bfloat162_rn(1.5f, -2));
  CHECK(f.x == 1.5f && f.y == -2 && g.x == 1.5f && g.y == -2);
}

// ---- traffic -----------------------------------------------------------------------------------

template <class V>
__global__ void copy_kernel(const V* x, V* y, int n, int stride) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    store_cs(y + i, load_nc<V>(x + static_cast<int64_t>(stride) * i));
}

struct Counts {
  uint64_t requests, sectors, bytes;
  bool operator==(const Counts&) const = default;
};

struct alignas(128) Line {  // cudaMalloc aligns at least this well
  char byte[128];
};

template <class V>
Counts loads_of_copy(int n, int stride, unsigned threads) {
  std::vector<Line> x(1 << 11), y(1 << 9);
  simt::reset_launches();
  RESOPS_LAUNCH(copy_kernel<V>, 1, threads, 0, nullptr, reinterpret_cast<const V*>(x.data()),
                reinterpret_cast<V*>(y.data()), n, stride);
  CHECK(simt::launches().size() == 1 && simt::launches()[0].kernel == "copy_kernel<V>");
  const simt::Traffic t = simt::traffic();
  CHECK(t.store_bytes == sizeof(V) * static_cast<size_t>(n));
  CHECK(t.store_requests == t.load_requests);
  return {t.load_requests, t.load_sectors, t.load_bytes};
}

void traffic() {
#ifndef SIMT_TSAN
  CHECK((loads_of_copy<float>(1024, 1, 128) == Counts{32, 128, 4096}));
  CHECK((loads_of_copy<float4>(1024, 1, 128) == Counts{32, 512, 16384}));
  CHECK((loads_of_copy<float>(1024, 2, 128) == Counts{32, 256, 4096}));
  CHECK((loads_of_copy<float>(1024, 16, 128) == Counts{32, 1024, 4096}));
  CHECK(
      (loads_of_copy<float>(1024, 0, 128) == Counts{32, 32, 4096}));  // all lanes read one address
  CHECK((loads_of_copy<__half>(1024, 1, 128) == Counts{32, 64, 2048}));
  CHECK((loads_of_copy<float>(37, 1, 32) == Counts{2, 5, 148}));  // 5 lanes in the second round
  CHECK((loads_of_copy<float>(1, 1, 32) == Counts{1, 1, 4}));
#endif
}

int main(int argc, char** argv) {
  const Cases cases = {{"reduction", reduction},
                       {"shuffles_and_votes", shuffles_and_votes},
                       {"indices", indices},
                       {"early_exit", early_exit},
                       {"atomics", atomics},
                       {"cooperative_grid", cooperative_grid},
                       {"cluster", cluster},
                       {"last_block", last_block},
                       {"launches_in_order", launches_in_order},
                       {"async_pipeline", async_pipeline},
                       {"mma", mma},
                       {"ldmatrix", ldmatrix},
                       {"halves", halves},
                       {"traffic", traffic}};
  return run_cases(cases, argc, argv);
}
