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
#include "cpu/conv_path.h"
#include "cpu/convolution_tensors.h"
#include "cpu/scratch.h"

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
  m.def("set_conv_precision", &resops::set_conv_precision, pybind11::arg("name"),
        "'high': float32 convolutions may use Winograd's algorithm; 'highest': they may not.");
  m.def("set_conv_algorithm", &resops::set_conv_algorithm, pybind11::arg("name"),
        "'auto', or for tests and benchmarks 'winograd', 'library', 'onednn', 'matrix_product', "
        "'transposed_product' or 'pointwise', each where it is possible.");
  m.def("conv_algorithm", &resops::conv_algorithm, "What set_conv_algorithm chose.");
  m.def("conv_path", &resops::describe_conv_path, pybind11::arg("direction"),
        pybind11::arg("dtype"), pybind11::arg("input_size"), pybind11::arg("output_size"),
        pybind11::arg("weight_size"), pybind11::arg("stride"), pybind11::arg("padding"),
        pybind11::arg("dilation"), "The algorithm of a phase of conv_bn_act on the CPU, and why.");
  m.def(
      "scratch_peak", &resops::scratch_peak,
      "Bytes of workspace that convolutions had in use at most since the last call, of the thread "
      "that had most.");
  m.def("prepared_weight", torch::wrap_pybind_function_no_gil(&resops::prepared_weight),
        "A 3x3 weight at all points, or a packed 1x1 one, for "
        "torch.ops.resops.conv_bn_act_folded.");
  // Exceptions as torch's own functions raise them; other threads may run Python code meanwhile.
  m.def("batch_norm", torch::wrap_pybind_function_no_gil(&resops::batch_norm),
        "batch_norm_forward with its gradient: y alone.");
  m.def("residual_add", torch::wrap_pybind_function_no_gil(&resops::residual_add),
        "residual_add_forward with constant weights and its gradient: y alone.");
}
