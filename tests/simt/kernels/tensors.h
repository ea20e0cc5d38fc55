// What the programs of this folder share: tensors between guard bands, and rule R
// (tests/accuracy.py) against exact values in double. Compiled by nvcc, without RESOPS_SIMT, the
// same programs run on a GPU (bench/gpu_gate.py): tensors are then in memory that host and device
// share, and CUDA_LAUNCH_BLOCKING=1 must be set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../../csrc/common/types.h"
#include "../programs/case.h"

using resops::Activation;
using resops::DType;

// Under a sanitizer a CUDA thread costs ten times as much and more: large cases are left out.
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr bool kSlowEmulator = true;
#else
constexpr bool kSlowEmulator = false;
#endif

#ifdef RESOPS_SIMT
template <class T>
using Memory = std::allocator<T>;
#else
template <class T>
struct Memory {
  using value_type = T;
  Memory() = default;
  template <class U>
  Memory(const Memory<U>&) {}
  T* allocate(size_t count) {
    void* p = nullptr;
    RESOPS_CUDA_CHECK(cudaMallocManaged(&p, count * sizeof(T)));
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { cudaFree(p); }
  friend bool operator==(const Memory&, const Memory&) { return true; }
};
#endif

// Values of one dtype between margins that hold NaN, and which nothing may overwrite.
class Buffer {
 public:
  // The data starts `shift` bytes after a multiple of 128; kernels are promised 16.
  Buffer(DType dtype, int64_t size, int64_t shift = 16)
      : dtype_(dtype), size_(size), offset_(kMargin + shift) {
    Line nan;
    std::fill(std::begin(nan.bytes), std::end(nan.bytes), 0xff);
    lines_.assign(static_cast<size_t>((offset_ + size * step() + 2 * kMargin - 1) / kMargin), nan);
  }

  void* data() { return bytes() + offset_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes() + offset_);
  }
  int64_t size() const { return size_; }
  DType dtype() const { return dtype_; }

  double operator[](int64_t i) const {
    const unsigned char* p = lines_.data()->bytes + offset_ + i * step();
    if (dtype_ == DType::f32) return read<float>(p);
    if (dtype_ == DType::f16) return resops::to_float(read<__half>(p));
    return resops::to_float(read<__nv_bfloat16>(p));
  }
  // Rounds to the dtype.
  void set(int64_t i, double value) {
    unsigned char* p = bytes() + offset_ + i * step();
    const auto v = static_cast<float>(value);
    if (dtype_ == DType::f32) return write(p, v);
    if (dtype_ == DType::f16) return write(p, resops::from_float<__half>(v));
    write(p, resops::from_float<__nv_bfloat16>(v));
  }

  void check_margins(const std::string& name) const {
    for (int64_t i = 0; i < static_cast<int64_t>(lines_.size()) * kMargin; ++i) {
      if (i >= offset_ && i < offset_ + size_ * step()) continue;
      if (lines_[static_cast<size_t>(i / kMargin)].bytes[i % kMargin] != 0xff) {
        std::printf("%s: written outside of the tensor, %lld bytes from its start\n", name.c_str(),
                    static_cast<long long>(i - offset_));
        std::exit(1);
      }
    }
  }

 private:
  static constexpr int64_t kMargin = 128;
  struct alignas(kMargin) Line {
    unsigned char bytes[kMargin];
  };
  int64_t step() const { return dtype_ == DType::f32 ? 4 : 2; }
  unsigned char* bytes() { return lines_.data()->bytes; }
  template <class T>
  static T read(const unsigned char* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
  }
  template <class T>
  static void write(unsigned char* p, T value) {
    std::memcpy(p, &value, sizeof(T));
  }

  DType dtype_;
  int64_t size_, offset_;
  std::vector<Line, Memory<Line>> lines_;
};

// Memory in which kernels leave something for kernels. On a GPU it is the device's own, and nothing
// is written to it before: so compute-sanitizer's initcheck sees what a kernel reads there too
// early, and memcheck its ends.
#ifdef RESOPS_SIMT
class Workspace : public Buffer {
 public:
  explicit Workspace(int64_t floats) : Buffer(DType::f32, floats) {}
};
#else
class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    if (floats > 0) RESOPS_CUDA_CHECK(cudaMalloc(&data_, static_cast<size_t>(floats) * 4));
  }
  ~Workspace() { cudaFree(data_); }
  Workspace(const Workspace&) = delete;
  template <class T>
  T* as() {
    return static_cast<T*>(data_);
  }
  void check_margins(const std::string&) const {}

 private:
  void* data_ = nullptr;
};
#endif

inline void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

// Exact values, and the sums of the absolute values of their terms; element i is in `channel[i]`.
struct Exact {
  std::vector<double> value, terms;
  std::vector<int64_t> channel;
  explicit Exact(int64_t size)
      : value(static_cast<size_t>(size)),
        terms(static_cast<size_t>(size)),
        channel(static_cast<size_t>(size)) {}
  void set(int64_t i, int64_t c, double v, double a) {
    value[static_cast<size_t>(i)] = v;
    terms[static_cast<size_t>(i)] = a;
    channel[static_cast<size_t>(i)] = c;
  }
};

// Rule R without the allowance for torch's own error: per channel, the L2 error relative to that of
// the terms is at most F = 2 u + 8 * 2^-24 (1 + kappa), the largest one twice that.
inline void check_rule_R(const std::string& name, const Buffer& got, const Exact& exact,
                         const std::vector<double>& kappa) {
  got.check_margins(name);
  const double u = got.dtype() == DType::f32   ? 0x1p-24
                   : got.dtype() == DType::f16 ? 0x1p-11
                                               : 0x1p-8;
  const double tiny = got.dtype() == DType::f32   ? 0x1p-150
                      : got.dtype() == DType::f16 ? 0x1p-25
                                                  : 0x1p-134;
  std::vector<double> error2(kappa.size()), terms2(kappa.size()), error(kappa.size()),
      terms(kappa.size());
  for (int64_t i = 0; i < got.size(); ++i) {
    const auto k = static_cast<size_t>(i);
    const auto c = static_cast<size_t>(exact.channel[k]);
    double e = std::max(std::abs(got[i] - exact.value[k]) - tiny, 0.0);
    if (std::isnan(got[i])) e = std::numeric_limits<double>::infinity();
    error2[c] += e * e;
    terms2[c] += exact.terms[k] * exact.terms[k];
    error[c] = std::max(error[c], e);
    terms[c] = std::max(terms[c], exact.terms[k]);
  }
  for (size_t c = 0; c < kappa.size(); ++c) {
    const double floor = 2 * u + 8 * 0x1p-24 * (1 + kappa[c]);
    if (!(std::sqrt(error2[c]) <= floor * std::sqrt(terms2[c])) ||
        !(error[c] <= 2 * floor * terms[c])) {
      char text[256];
      std::snprintf(text, sizeof(text),
                    "%s, channel %zu: L2 error %.3g, largest %.3g of the terms; allowed %.3g, %.3g",
                    name.c_str(), c, std::sqrt(error2[c] / terms2[c]), error[c] / terms[c], floor,
                    2 * floor);
      fail(text);
    }
  }
}

// act, act' and act'' in double.
struct ActivationValue {
  double value, first, second;
};
inline ActivationValue activation_at(Activation activation, double z, double slope) {
  switch (activation) {
    case Activation::identity:
      return {z, 1, 0};
    case Activation::relu:
      return {z > 0 ? z : 0, z > 0 ? 1.0 : 0.0, 0};
    case Activation::leaky_relu:
      return {z > 0 ? z : z * slope, z > 0 ? 1.0 : slope, 0};
    case Activation::silu: {
      const double s = 1 / (1 + std::exp(-z));
      return {z * s, s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))};
    }
    case Activation::gelu: {
      const double cdf = 0.5 * std::erfc(-z / std::sqrt(2.0));
      const double density = std::exp(-0.5 * z * z) / std::sqrt(2 * 3.14159265358979323846);
      return {z * cdf, cdf + z * density, density * (2 - z * z)};
    }
  }
  return {};
}

inline const char* name_of(Activation activation) {
  static const char* const names[] = {"identity", "relu", "leaky_relu", "silu", "gelu"};
  return names[static_cast<int>(activation)];
}
inline const char* name_of(DType dtype) {
  static const char* const names[] = {"f32", "bf16", "f16", "f64"};
  return names[static_cast<int>(dtype)];
}

// run_cases, and the names of the kernels that ran.
inline int run_kernel_cases(const Cases& cases, int argc, char** argv) {
  const int status = run_cases(cases, argc, argv);
#ifdef RESOPS_SIMT
  std::set<std::string> names;
  for (const simt::LaunchRecord& launch : simt::launches()) names.insert(launch.kernel);
  for (const std::string& name : names) std::printf("launched %s\n", name.c_str());
#endif
  return status;
}

#ifdef RESOPS_SIMT
// Sectors of the launches since `reset_launches`, and the bytes that their scheme has to move.
inline void check_traffic(const std::string& name, double least_bytes) {
  const simt::Traffic traffic = simt::traffic();
  const double moved = 32.0 * static_cast<double>(traffic.load_sectors + traffic.store_sectors);
  std::printf("traffic %-60s %10.0f bytes, %.3f of the least\n", name.c_str(), moved,
              moved / least_bytes);
  if (moved > 1.05 * least_bytes) fail(name + ": more than 1.05 of the least traffic");
}
#endif

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  double normal() { return normal_(generator_); }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(generator_);
  }

 private:
  std::mt19937_64 generator_;
  std::normal_distribution<double> normal_;
};
