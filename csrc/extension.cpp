// The module resops._C: what was built, and which instruction set the CPU kernels use.
// The ops themselves are registered as torch.ops.resops by <op>.cpp when this module loads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>
#include <vector>

#include "autograd/autograd.h"
#include "build_facts.h"  // written by CMake into the build folder
#include "cpu/capability.h"

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> facts;
  for (const auto& fact : resops::kBuildFacts) {
    facts.emplace(fact.key, fact.value);
  }
  return facts;
}

std::string cpu_capability() { return resops::name(resops::cpu_capability()); }

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (resops::CpuCapability capability : resops::cpu_capabilities()) {
    names.emplace_back(resops::name(capability));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of resops; importing it registers torch.ops.resops.";
  m.def("build_info", &build_info, "Facts of this build: a dict of str to str.");
  m.def("cpu_capability", &cpu_capability,
        "The instruction set that CPU kernels use: 'portable', 'avx2', 'avx512' or "
        "'avx512_bf16'.");
  m.def("cpu_capabilities", &cpu_capabilities,
        "The instruction sets that can run here, in rising order.");
  m.def("set_cpu_capability", &resops::set_cpu_capability, pybind11::arg("name"),
        "Make all CPU kernels use one of cpu_capabilities(). ValueError if it cannot run here.");
  // Exceptions as torch's own functions raise them; other threads may run Python code meanwhile.
  m.def("batch_norm", torch::wrap_pybind_function_no_gil(&resops::batch_norm),
        "batch_norm_forward with its gradient: y alone.");
  m.def("residual_add", torch::wrap_pybind_function_no_gil(&resops::residual_add),
        "residual_add_forward with constant weights and its gradient: y alone.");
}
