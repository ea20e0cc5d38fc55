// The emulator's side of csrc/cuda/portable.cuh, which lists and explains the functions below and
// includes this file. docs/simt.md says what the emulator finds and what it cannot see.
//
// What touches the kernel's memory is a template or inline here, so that the sanitizer of the
// kernel's own translation unit watches it. What does not is in simt.cpp, which ThreadSanitizer
// never instruments.

#pragma once

#include <atomic>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_types.h"

namespace resops {

// The faked device: small, so that small inputs reach every regime of a launcher.
struct DeviceLimits {
  std::string name = "emulator";
  int compute_capability = 90;
  int multiprocessors = 3;
  int threads_per_multiprocessor = 2048;
  size_t shared_per_block = 16 * 1024;
  size_t shared_per_multiprocessor = 32 * 1024;
  size_t l2_bytes = 1 << 20;
  int blocks_per_cluster = 8;
};

struct LaunchConfig {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  bool cooperative = false;
  unsigned cluster = 1;
};

}  // namespace resops

// ---- for tests ---------------------------------------------------------------------------------

namespace simt {

// Whatever the emulator refuses. It stops the launch and is thrown there.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  resops::DeviceLimits device;  // its shared_per_block: RESOPS_SIMT_SHARED
  // 0: blocks and threads run in their natural order, else in an order shuffled by this seed.
  unsigned long long seed = 0;  // RESOPS_SIMT_SEED
  // Every byte of fresh shared memory. 0xff makes each float, half and bfloat16 a NaN; results that
  // change with another value have read what nobody wrote.
  unsigned char poison = 0xff;  // RESOPS_SIMT_POISON
};
Options& options();

// load, store and cp_async, counted per warp instruction: the same place in the source, the same
// number of times since the warp last met. A sector is 32 bytes; requests are warp instructions;
// bytes are what the lanes asked for. Not counted under ThreadSanitizer.
struct Traffic {
  uint64_t load_requests = 0, load_sectors = 0, load_bytes = 0;
  uint64_t store_requests = 0, store_sectors = 0, store_bytes = 0;
};
struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  Traffic traffic;
};
const std::vector<LaunchRecord>& launches();  // since the last reset_launches
Traffic traffic();                            // their sum
void reset_launches();

// ---- for the functions below -------------------------------------------------------------------

using Site = std::source_location;
enum class Scope { warp, block, cluster, grid };
enum class Access { load, load_read_only, store };

struct Words {
  uint64_t word[4];
};
struct Exchange {  // what each lane of a warp brought to a shuffle, a vote, an mma
  Words from[32];
  unsigned lanes;  // bit mask of those that take part
};

struct AsyncCopy {
  void* shared;
  const void* global;
  int bytes, valid_bytes;
};

[[noreturn]] void fail(const std::string& what, Site site);
struct KernelCall {  // one thread's call of a kernel: run(arguments)
  void (*run)(const void* arguments);
  const void* arguments;
};
void launch(const resops::LaunchConfig& config, KernelCall kernel);
void* shared_memory(size_t bytes, Site site);
void check_shared(const void* pointer, size_t bytes, Site site);
void* map_shared(const void* pointer, unsigned rank, Site site);
unsigned cluster_rank();
unsigned cluster_size();
unsigned lane();
void synchronize(Scope scope, Site site);
const Exchange& exchange(const Words& mine, const char* what, Site site);
void access(Access kind, const void* pointer, size_t bytes, size_t alignment, Site site);
void queue_copy(AsyncCopy copy);
void commit_copies();
const AsyncCopy* next_due_copy(size_t outstanding_groups);
void before_atomic(const void* pointer, size_t bytes, Site site);
void after_atomic(const void* pointer, bool changed);
void fence();

template <class T>
Words to_words(const T& value) {
  static_assert(sizeof(T) <= sizeof(Words));
  Words words = {};
  std::memcpy(&words, &value, sizeof(T));
  return words;
}
template <class T>
T from_words(const Words& words) {
  T value;
  std::memcpy(&value, &words, sizeof(T));
  return value;
}

template <class T>
T shuffle_from(T v, unsigned lane, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  const Exchange& all = exchange(to_words(v), "shuffle", site);
  if ((all.lanes >> lane & 1) == 0)
    fail("shuffle reads lane " + std::to_string(lane) + ", which is not there or has exited", site);
  return from_words<T>(all.from[lane]);
}

template <class T, class Update>
T atomic(T* pointer, Site site, Update update) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> ||
                std::is_same_v<T, double>);
  before_atomic(pointer, sizeof(T), site);
  std::atomic_ref<T> place(*pointer);
  T old = place.load(std::memory_order_relaxed);
  while (!place.compare_exchange_weak(old, update(old), std::memory_order_relaxed)) {
  }
  after_atomic(pointer, update(old) != old);
  return old;
}

}  // namespace simt

// ---- under CUDA's names ------------------------------------------------------------------------

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::atomic(p, site, [v](T old) { return old + v; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::atomic(p, site, [v](T old) { return std::min(old, v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::atomic(p, site, [v](T old) { return std::max(old, v); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::atomic(p, site, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v,
            simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::atomic(p, site, [=](T old) { return old == expected ? v : old; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::atomic(p, site, [v](T old) { return old | v; });
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::atomic(p, site, [v](T old) { return old & v; });
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}  // orders nothing between blocks, and barriers order the rest

// ---- portable.cuh ------------------------------------------------------------------------------

#define RESOPS_SHARED(Type, name)                                                         \
  static_assert(std::is_trivially_default_constructible_v<Type> && alignof(Type) <= 128); \
  Type& name = *static_cast<Type*>(simt::shared_memory(sizeof(Type), simt::Site::current()))

namespace resops {

using simt::Site;

inline const DeviceLimits& device_limits() { return simt::options().device; }

int max_blocks_per_multiprocessor(int threads, size_t shared_bytes);
template <class... P>
int max_blocks_per_multiprocessor(void (*)(P...), int threads, size_t shared_bytes) {
  return max_blocks_per_multiprocessor(threads, shared_bytes);
}

template <class... P, class... A>
void launch(const LaunchConfig& config, void (*kernel)(P...), A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel has another number of parameters");
  const auto call = [=, ... args = static_cast<P>(std::forward<A>(args))] { kernel(args...); };
  simt::launch(config, {[](const void* c) { (*static_cast<decltype(call)*>(c))(); }, &call});
}

inline void block_sync(Site site = Site::current()) { synchronize(simt::Scope::block, site); }
inline void warp_sync(Site site = Site::current()) { synchronize(simt::Scope::warp, site); }
inline void grid_sync(Site site = Site::current()) { synchronize(simt::Scope::grid, site); }
inline void cluster_sync(Site site = Site::current()) { synchronize(simt::Scope::cluster, site); }
using simt::cluster_rank;
using simt::cluster_size;
template <class T>
T* cluster_map(T* pointer, unsigned rank, Site site = Site::current()) {
  return static_cast<T*>(simt::map_shared(pointer, rank, site));
}

template <class T>
T shuffle_xor(T v, int lane_mask, Site site = Site::current()) {
  return simt::shuffle_from(v, (simt::lane() ^ static_cast<unsigned>(lane_mask)) % 32, site);
}
template <class T>
T shuffle_down(T v, int delta, Site site = Site::current()) {
  const unsigned from = simt::lane() + static_cast<unsigned>(delta);
  return simt::shuffle_from(v, from < 32 ? from : simt::lane(), site);
}
template <class T>
T shuffle_up(T v, int delta, Site site = Site::current()) {
  const auto distance = static_cast<unsigned>(delta);
  return simt::shuffle_from(v, simt::lane() - (distance <= simt::lane() ? distance : 0), site);
}
template <class T>
T shuffle(T v, int lane, Site site = Site::current()) {
  return simt::shuffle_from(v, static_cast<unsigned>(lane) % 32, site);
}

inline unsigned warp_ballot(bool predicate, Site site = Site::current()) {
  const simt::Exchange& all = simt::exchange(simt::to_words(predicate), "vote", site);
  unsigned votes = 0;
  for (unsigned from = 0; from < 32; ++from)
    if ((all.lanes >> from & 1) && simt::from_words<bool>(all.from[from])) votes |= 1u << from;
  return votes;
}
inline bool warp_any(bool predicate, Site site = Site::current()) {
  return warp_ballot(predicate, site) != 0;
}
inline bool warp_all(bool predicate, Site site = Site::current()) {
  return warp_ballot(!predicate, site) == 0;
}

template <class V>
V load(const void* pointer, Site site = Site::current()) {
  simt::access(simt::Access::load, pointer, sizeof(V), sizeof(V), site);
  return *static_cast<const V*>(pointer);
}
template <class V>
V load_nc(const void* pointer, Site site = Site::current()) {
  simt::access(simt::Access::load_read_only, pointer, sizeof(V), sizeof(V), site);
  return *static_cast<const V*>(pointer);
}
template <class V>
V load_cs(const void* pointer, Site site = Site::current()) {
  return load<V>(pointer, site);
}
template <class V>
void store(void* pointer, V v, Site site = Site::current()) {
  simt::access(simt::Access::store, pointer, sizeof(V), sizeof(V), site);
  *static_cast<V*>(pointer) = v;
}
template <class V>
void store_cs(void* pointer, V v, Site site = Site::current()) {
  store<V>(pointer, v, site);
}

// The bytes arrive at the last moment that the hardware allows: when a wait asks for them. Until
// then the destination holds NaNs.
template <int Bytes>
void cp_async(void* shared, const void* global, int valid_bytes = Bytes,
              Site site = Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (valid_bytes < 0 || valid_bytes > Bytes)
    simt::fail("cp_async of " + std::to_string(valid_bytes) + " valid bytes", site);
  simt::check_shared(shared, Bytes, site);
  simt::access(simt::Access::load, global, static_cast<size_t>(valid_bytes), Bytes, site);
  std::memset(shared, 0xff, Bytes);
  simt::queue_copy({shared, global, Bytes, valid_bytes});
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int N>
void cp_async_wait() {
  while (const simt::AsyncCopy* copy = simt::next_due_copy(N)) {
    std::memset(copy->shared, 0, static_cast<size_t>(copy->bytes));
    std::memcpy(copy->shared, copy->global, static_cast<size_t>(copy->valid_bytes));
  }
}

// Lane l receives, of matrix i, elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed,
// those two rows of column l / 4.
template <bool kTranspose, size_t kMatrices>
void load_matrices(unsigned (&r)[kMatrices], const void* row, Site site) {
  if (simt::lane() < 8 * kMatrices) simt::check_shared(row, 16, site);
  const simt::Exchange& all = simt::exchange(simt::to_words(row), "ldmatrix", site);
  if (all.lanes != ~0u) simt::fail("ldmatrix without all 32 lanes", site);
  const unsigned group = simt::lane() / 4, pair = 2 * (simt::lane() % 4);
  for (unsigned i = 0; i < kMatrices; ++i) {
    uint16_t element[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned from_row = kTranspose ? pair + j : group;
      const unsigned column = kTranspose ? group : pair + j;
      element[j] = simt::from_words<const uint16_t*>(all.from[8 * i + from_row])[column];
    }
    r[i] = element[0] | static_cast<unsigned>(element[1]) << 16;
  }
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row, Site site = Site::current()) {
  load_matrices<false>(r, row, site);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, Site site = Site::current()) {
  load_matrices<true>(r, row, site);
}
inline void ldmatrix_x2(unsigned (&r)[2], const void* row, Site site = Site::current()) {
  load_matrices<false>(r, row, site);
}
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* row, Site site = Site::current()) {
  load_matrices<true>(r, row, site);
}

// The fragments of mma.sync.m16n8k16 as the PTX manual tabulates them. A (16 x 16): element (m, k)
// is in lane 4 (m % 8) + (k % 8) / 2, register m / 8 + 2 (k / 8), half k % 2. B (16 x 8): element
// (k, n) is in lane 4 n + (k % 8) / 2, register k / 8, half k % 2. D (16 x 8): d[i] of lane l is
// element (l / 4 + 8 (i / 2), 2 (l % 4) + i % 2). The sum of products is rounded to fp32 once; the
// hardware's rounding is its own.
template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  Site site = Site::current()) {
  struct Registers {
    unsigned word[6];
  };
  const Registers mine = {{a[0], a[1], a[2], a[3], b[0], b[1]}};
  const simt::Exchange& all = simt::exchange(simt::to_words(mine), "mma", site);
  if (all.lanes != ~0u) simt::fail("mma without all 32 lanes", site);
  const auto element = [&](unsigned lane, unsigned word, unsigned half) {
    const auto registers = simt::from_words<Registers>(all.from[lane]);
    const T value = {static_cast<uint16_t>(registers.word[word] >> 16 * half)};
    if constexpr (std::is_same_v<T, __half>) {
      return __half2float(value);
    } else {
      static_assert(std::is_same_v<T, __nv_bfloat16>);
      return __bfloat162float(value);
    }
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned m = simt::lane() / 4 + 8 * (i / 2), n = 2 * (simt::lane() % 4) + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < 16; ++k)
      sum += static_cast<double>(element(4 * (m % 8) + k % 8 / 2, m / 8 + 2 * (k / 8), k % 2)) *
             element(4 * n + k % 8 / 2, 4 + k / 8, k % 2);
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace resops
