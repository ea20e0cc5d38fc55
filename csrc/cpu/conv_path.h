// Which algorithm a convolution on the CPU takes, and why.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

namespace resops {

enum class ConvDirection { forward, backward_data, backward_weight };

enum class ConvAlgorithm {
  library,             // as torch chooses it
  onednn,              // where torch would take something else
  matrix_product,      // a 1x1 convolution as the product of two matrices
  transposed_product,  // the gradient of its weight as x^T * grad_y, transposed afterwards
  winograd,
  pointwise,  // our own product of matrices for a 1x1 convolution
};

struct ConvCall {
  ConvDirection direction;
  at::ScalarType dtype;
  at::IntArrayRef input_size, output_size, weight_size, stride, padding, dilation;
};

struct ConvPath {
  ConvAlgorithm algorithm;
  const char* reason;
};

// Depends on the call and on the two settings below, and on nothing else.
ConvPath conv_path(const ConvCall& call);

// "high": float32 convolutions may use Winograd's algorithm. "highest": they may not.
// std::invalid_argument for anything else. For all threads.
void set_conv_precision(const std::string& name);

// "auto"; or for tests and benchmarks "winograd", wherever it is possible, "library", or one of the
// four for 1x1 convolutions.
// std::invalid_argument for anything else. For all threads.
void set_conv_algorithm(const std::string& name);
std::string conv_algorithm();

// The name of the algorithm and why it is taken, for a call with these sizes;
// `direction` is "forward", "backward_data" or "backward_weight", `dtype` a name without "torch.".
std::pair<std::string, std::string> describe_conv_path(
    const std::string& direction, const std::string& dtype, const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& output_size, const std::vector<int64_t>& weight_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation);

}  // namespace resops
