// Which instruction set the CPU kernels use.
//
// Every csrc/cpu/*_kernels.cpp is compiled once per instruction set, inside the namespace that
// RESOPS_ISA names; the drivers ask cpu_capability() which of them to call. No torch header here.

#pragma once

#include <string>
#include <vector>

namespace resops {

// In rising order: each one can run everything that is below it.
enum class CpuCapability { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The capability that kernels use now: the best one that this processor has and this build holds,
// capped by the environment variable RESOPS_CPU_CAPABILITY, or what set_cpu_capability chose.
// Throws std::invalid_argument if the variable holds an unknown name.
CpuCapability cpu_capability();

// Those that this processor has and this build holds, in rising order; never empty.
std::vector<CpuCapability> cpu_capabilities();

// Chooses one of cpu_capabilities() for all threads, from the next kernel call on.
// Throws std::invalid_argument for an unknown name or one that cannot run here.
void set_cpu_capability(const std::string& name);

const char* name(CpuCapability capability);

}  // namespace resops
