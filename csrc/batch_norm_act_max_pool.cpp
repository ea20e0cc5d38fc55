// batch_norm_act_max_pool: schemas and argument checks. The kernels are registered per device;
// resops/ops/batch_norm_act_max_pool.py makes them differentiable, and
// resops/reference/batch_norm_act_max_pool.py defines what they compute.

#include "batch_norm_act_max_pool.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "batch_norm.h"
#include "common/tensor_checks.h"

namespace resops {
namespace {

constexpr const char* kOp = "batch_norm_act_max_pool";
constexpr int64_t kMostPositions = 256;  // an index has 8 bits

void check_pair(const char* name, at::IntArrayRef pair, bool may_be_0) {
  TORCH_CHECK(pair.size() == 2, name, " should have 2 elements, but got ", pair);
  TORCH_CHECK(pair[0] >= !may_be_0 && pair[1] >= !may_be_0, name, " should be ",
              may_be_0 ? "at least 0" : "greater than zero", ", but got ", pair);
}

}  // namespace

PoolWindows check_pooling(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(x.dim() == 4, kOp,
                    " expects an input of size (N, C, H, W), but got input of size ", x.sizes());
  check_pair("kernel_size", kernel_size, false);
  check_pair("stride", stride, false);
  check_pair("padding", padding, true);
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK(padding[d] <= kernel_size[d] / 2,
                "padding should be at most half of kernel_size, but got padding=", padding,
                " and kernel_size=", kernel_size);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(kernel_size[0] <= kMostPositions &&
                                  kernel_size[1] <= kMostPositions &&
                                  kernel_size[0] * kernel_size[1] <= kMostPositions,
                              kOp, " takes windows of up to ", kMostPositions,
                              " positions, but got kernel_size=", kernel_size);
  TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, kOp,
              " expects an input whose sizes are not 0, but for the batch, and got input of size ",
              x.sizes());
  const PoolWindows windows{
      {kernel_size[0], kernel_size[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}};
  const bool fits =
      x.size(2) + 2 * padding[0] >= kernel_size[0] && x.size(3) + 2 * padding[1] >= kernel_size[1];
  TORCH_CHECK(fits, "Given input size: ", x.sizes(), ". Calculated output size: [", x.size(0), ", ",
              x.size(1), ", ", fits ? windows.output_size(x.size(2), 0) : 0, ", ",
              fits ? windows.output_size(x.size(3), 1) : 0, "]. Output size is too small");
  return windows;
}

at::Tensor empty_pooled(const at::Tensor& x, const PoolWindows& windows, at::ScalarType dtype) {
  return at::empty(
      {x.size(0), x.size(1), windows.output_size(x.size(2), 0), windows.output_size(x.size(3), 1)},
      x.options().dtype(dtype).memory_format(x.suggest_memory_format()));
}

void check_batch_norm_act_max_pool_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const at::Tensor& mean,
                                            const at::Tensor& invstd, const at::Tensor& index,
                                            const PoolWindows& windows) {
  check_batch_norm_apply(x, std::nullopt, weight, bias, mean, invstd);
  const std::array<int64_t, 4> size{x.size(0), x.size(1), windows.output_size(x.size(2), 0),
                                    windows.output_size(x.size(3), 1)};
  check_device("grad_y", grad_y, x);
  TORCH_CHECK(grad_y.sizes() == at::IntArrayRef(size), "grad_y should have the size ",
              at::IntArrayRef(size), " of the output, but got ", grad_y.sizes());
  TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y should have the dtype ",
              x.scalar_type(), " of the input, got ", grad_y.scalar_type());
  check_device("index", index, x);
  TORCH_CHECK(index.scalar_type() == at::kByte && index.sizes() == at::IntArrayRef(size),
              "index should be a tensor of Byte of size ", at::IntArrayRef(size), ", but got ",
              index.scalar_type(), " of size ", index.sizes());
}

}  // namespace resops

TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def(
      "batch_norm_act_max_pool_forward(Tensor x, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, "
      "float eps, str activation, float negative_slope, int[] kernel_size, int[] stride, "
      "int[] padding) -> (Tensor y, Tensor mean, Tensor invstd, Tensor index)");
  m.def(
      "batch_norm_act_max_pool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor invstd, Tensor index, bool training, str activation, "
      "float negative_slope, int[] kernel_size, int[] stride, int[] padding, "
      "bool[3] output_mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}
