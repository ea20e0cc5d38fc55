// The measured rules by which a convolution's algorithm is chosen: bench/ops/conv_bn_act.py
// measures Winograd's against the library, bench/ops/pointwise.py what there is for 1x1
// convolutions.

#include "conv_path.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../common/tensor_checks.h"

namespace resops {
namespace {

enum class Wanted {
  automatic,
  winograd,
  library,
  onednn,
  matrix_product,
  transposed_product,
  pointwise
};

std::atomic<bool> highest_precision{false};
std::atomic<Wanted> wanted_algorithm{Wanted::automatic};

// The transformed weight is used once per tile: fewer than this do not pay for its transform.
constexpr int64_t kLeastTiles = 8;
// Fewer channels than this leave most lanes of the transforms idle.
constexpr int64_t kLeastChannels = 16;

bool all(at::IntArrayRef values, int64_t value) {
  return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v == value; });
}

bool has_elements(at::IntArrayRef size) {
  return std::none_of(size.begin(), size.end(), [](int64_t n) { return n == 0; });
}

// Why Winograd's algorithm cannot compute the call; null if it can.
const char* winograd_refusal(const ConvCall& call) {
  if (call.weight_size.size() != 4 || call.weight_size[2] != 3 || call.weight_size[3] != 3) {
    return "the kernel is not 3x3";
  }
  if (!all(call.stride, 1)) return "the stride is not 1";
  if (!all(call.dilation, 1)) return "the dilation is not 1";
  if (call.padding[0] > 2 || call.padding[1] > 2) return "the padding is more than 2";
  if (call.dtype == at::kDouble) return "float64 is there for derivative checks";
  if (!has_elements(call.input_size) || !has_elements(call.output_size)) {
    return "there are no elements";
  }
  if (call.dtype == at::kFloat && highest_precision) return "the convolution precision is highest";
  return nullptr;
}

bool is_pointwise(const ConvCall& call) {
  return call.weight_size.size() == 4 && call.weight_size[2] == 1 && call.weight_size[3] == 1 &&
         all(call.padding, 0) && has_elements(call.input_size) && has_elements(call.output_size);
}

// torch computes 1x1 convolutions in float32 by a path of its own, which is slower than all of
// these. What is fastest, by the positions of an image, as measured by bench/ops/pointwise.py.
ConvPath pointwise_path(const ConvCall& call) {
  const int64_t positions = call.output_size[2] * call.output_size[3];
  const int64_t channels = call.weight_size[0], in_channels = call.weight_size[1];
  switch (call.direction) {
    case ConvDirection::forward:
      if (positions > 14 * 14) return {ConvAlgorithm::onednn, "1x1, more than 196 positions"};
      if (positions == 14 * 14 && in_channels >= 4 * channels) {
        return {ConvAlgorithm::onednn, "1x1, 196 positions, four times fewer output channels"};
      }
      break;
    case ConvDirection::backward_data:
      if (positions >= 56 * 56 && all(call.stride, 1)) {
        return {ConvAlgorithm::onednn, "1x1, at least 3136 positions"};
      }
      break;
    case ConvDirection::backward_weight:
      // The library is faster where the result has fewer rows than columns.
      if (positions >= 28 * 28 && channels > in_channels) {
        return {ConvAlgorithm::transposed_product, "1x1, more output than input channels"};
      }
      break;
  }
  return {ConvAlgorithm::matrix_product, "1x1"};
}

// The one that was asked for, where the direction has it.
ConvPath wanted_pointwise_path(const ConvCall& call, Wanted wanted) {
  const bool of_weight = call.direction == ConvDirection::backward_weight;
  const bool strided_data = call.direction == ConvDirection::backward_data && !all(call.stride, 1);
  const char* reason = "the algorithm is set";
  if (wanted == Wanted::pointwise && !strided_data) return {ConvAlgorithm::pointwise, reason};
  if (wanted == Wanted::onednn && !of_weight && !strided_data) {
    return {ConvAlgorithm::onednn, reason};
  }
  if (wanted == Wanted::matrix_product) return {ConvAlgorithm::matrix_product, reason};
  if (wanted == Wanted::transposed_product && of_weight) {
    return {ConvAlgorithm::transposed_product, reason};
  }
  return pointwise_path(call);
}

// Whether oneDNN has instructions for products in this dtype, which four times fewer products in
// float32 do not make up for.
bool has_products(at::ScalarType dtype) {
#ifdef RESOPS_HAVE_X86_ISA
  if (dtype == at::kBFloat16) return __builtin_cpu_supports("avx512bf16");
  return dtype == at::kHalf && __builtin_cpu_supports("avx512fp16");
#else
  return true;
#endif
}

template <class T, size_t kCount>
T by_name(const std::array<std::pair<const char*, T>, kCount>& names, const std::string& name,
          const char* what) {
  std::string all;
  for (const auto& [known, value] : names) {
    if (name == known) return value;
    all += (all.empty() ? "" : ", ") + std::string(known);
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + all + ", but got '" + name +
                              "'");
}

constexpr std::array<std::pair<const char*, bool>, 2> kPrecisions{
    {{"high", false}, {"highest", true}}};
constexpr std::array<std::pair<const char*, Wanted>, 7> kAlgorithms{
    {{"auto", Wanted::automatic},
     {"winograd", Wanted::winograd},
     {"library", Wanted::library},
     {"onednn", Wanted::onednn},
     {"matrix_product", Wanted::matrix_product},
     {"transposed_product", Wanted::transposed_product},
     {"pointwise", Wanted::pointwise}}};
constexpr std::array<std::pair<const char*, ConvDirection>, 3> kDirections{
    {{"forward", ConvDirection::forward},
     {"backward_data", ConvDirection::backward_data},
     {"backward_weight", ConvDirection::backward_weight}}};
constexpr std::array<const char*, 6> kAlgorithmNames{
    "library", "onednn", "matrix_product", "transposed_product", "winograd", "pointwise"};
constexpr std::array<std::pair<const char*, at::ScalarType>, 4> kDtypes{
    {{"float32", at::kFloat},
     {"bfloat16", at::kBFloat16},
     {"float16", at::kHalf},
     {"float64", at::kDouble}}};

}  // namespace

ConvPath conv_path(const ConvCall& call) {
  const Wanted wanted = wanted_algorithm;
  // In 16 bits the library's, but where our kernel is asked for.
  const bool has_kernels =
      call.dtype == at::kFloat || (wanted == Wanted::pointwise && is_half(call.dtype));
  if (wanted != Wanted::library && has_kernels && is_pointwise(call)) {
    const ConvPath path = wanted_pointwise_path(call, wanted);
    if (call.dtype == at::kFloat || path.algorithm == ConvAlgorithm::pointwise) return path;
  }
  if (const char* refusal = winograd_refusal(call)) return {ConvAlgorithm::library, refusal};
  if (wanted == Wanted::library) return {ConvAlgorithm::library, "the algorithm is set"};
  if (wanted == Wanted::winograd) return {ConvAlgorithm::winograd, "the algorithm is set"};
  if (is_half(call.dtype) && has_products(call.dtype)) {
    return {ConvAlgorithm::library, "the processor multiplies in this dtype"};
  }
  if (std::min(call.weight_size[0], call.weight_size[1]) < kLeastChannels) {
    return {ConvAlgorithm::library, "there are fewer than 16 channels"};
  }
  const int64_t height = (call.output_size[2] + 3) / 4, width = (call.output_size[3] + 3) / 4;
  if (call.output_size[0] * height * width < kLeastTiles) {
    return {ConvAlgorithm::library, "there are fewer than 8 tiles of 4x4 outputs"};
  }
  return {ConvAlgorithm::winograd, "3x3 of stride 1"};
}

void set_conv_precision(const std::string& name) {
  highest_precision = by_name(kPrecisions, name, "conv_precision");
}

void set_conv_algorithm(const std::string& name) {
  wanted_algorithm = by_name(kAlgorithms, name, "conv_algorithm");
}

std::string conv_algorithm() {
  const Wanted now = wanted_algorithm;
  return std::find_if(kAlgorithms.begin(), kAlgorithms.end(),
                      [&](const auto& entry) { return entry.second == now; })
      ->first;
}

std::pair<std::string, std::string> describe_conv_path(
    const std::string& direction, const std::string& dtype, const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& output_size, const std::vector<int64_t>& weight_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation) {
  const ConvPath path =
      conv_path({by_name(kDirections, direction, "direction"), by_name(kDtypes, dtype, "dtype"),
                 input_size, output_size, weight_size, stride, padding, dilation});
  return {kAlgorithmNames[static_cast<size_t>(path.algorithm)], path.reason};
}

}  // namespace resops
