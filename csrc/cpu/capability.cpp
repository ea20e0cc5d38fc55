#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef RESOPS_HAVE_X86_ISA
#include <cpuid.h>
#endif

namespace resops {

namespace {

constexpr int kUnset = -1;
constexpr CpuCapability kKnown[] = {CpuCapability::portable, CpuCapability::avx2,
                                    CpuCapability::avx512, CpuCapability::avx512_bf16};
std::atomic<int> active{kUnset};

#ifdef RESOPS_HAVE_X86_ISA
// Read from cpuid itself: not every compiler's __builtin_cpu_supports knows the name "f16c".
bool has_f16c() {
  constexpr unsigned kF16cBit = 1u << 29;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16cBit) != 0;
}
#endif

CpuCapability detect() {
#ifdef RESOPS_HAVE_X86_ISA
  __builtin_cpu_init();
  // These also ask whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (avx2 && avx512) {
    return bf16 ? CpuCapability::avx512_bf16 : CpuCapability::avx512;
  }
  if (avx2) {
    return CpuCapability::avx2;
  }
#endif
  return CpuCapability::portable;
}

CpuCapability parse(const std::string& text, const std::string& source) {
  std::string names;
  for (CpuCapability known : kKnown) {
    if (text == name(known)) {
      return known;
    }
    names += (names.empty() ? "" : ", ") + std::string(name(known));
  }
  throw std::invalid_argument(source + " must be one of " + names + ", but got '" + text + "'");
}

CpuCapability initial() {
  const CpuCapability best = detect();
  const char* cap = std::getenv("RESOPS_CPU_CAPABILITY");
  if (cap == nullptr || *cap == '\0') {
    return best;
  }
  const CpuCapability wanted = parse(cap, "the environment variable RESOPS_CPU_CAPABILITY");
  return wanted < best ? wanted : best;
}

}  // namespace

const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512_bf16:
      return "avx512_bf16";
    case CpuCapability::avx512:
      return "avx512";
    case CpuCapability::avx2:
      return "avx2";
    case CpuCapability::portable:
      break;
  }
  return "portable";
}

CpuCapability cpu_capability() {
  int current = active.load(std::memory_order_relaxed);
  if (current == kUnset) {
    const int chosen = static_cast<int>(initial());
    // A set_cpu_capability that came in between wins.
    if (active.compare_exchange_strong(current, chosen)) {
      current = chosen;
    }
  }
  return static_cast<CpuCapability>(current);
}

std::vector<CpuCapability> cpu_capabilities() {
  const CpuCapability best = detect();
  std::vector<CpuCapability> found;
  for (CpuCapability known : kKnown) {
    if (known <= best) {
      found.push_back(known);
    }
  }
  return found;
}

void set_cpu_capability(const std::string& name) {
  const CpuCapability wanted = parse(name, "name");
  if (wanted > detect()) {
    throw std::invalid_argument("the CPU capability '" + name +
                                "' cannot run here: this processor and build reach '" +
                                resops::name(detect()) + "'");
  }
  active.store(static_cast<int>(wanted));
}

}  // namespace resops
