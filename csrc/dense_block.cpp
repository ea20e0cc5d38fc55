// dense_block: schemas and argument checks of its phases. resops/reference/dense_block.py defines
// what they compute, resops/ops/dense_block.py puts them together.

#include "dense_block.h"

#include <torch/library.h>

#include <string>
#include <utility>

#include "common/tensor_checks.h"

namespace resops {
namespace {

void check_buffer(const at::Tensor& buffer) {
  TORCH_CHECK_VALUE(buffer.dim() == 4,
                    "dense_block expects a buffer of size (N, C, H, W), but got ", "size ",
                    buffer.sizes());
  check_input("dense_block", buffer);
}

void check_images(const char* name, const at::Tensor& t, const at::Tensor& buffer) {
  check_device(name, t, buffer);
  TORCH_CHECK(t.dim() == 4 && t.size(0) == buffer.size(0) && t.size(2) == buffer.size(2) &&
                  t.size(3) == buffer.size(3),
              name, " should have the batch and image size of the buffer, ", buffer.sizes(),
              ", but got ", t.sizes());
}

}  // namespace

void check_dense_block_norm(const at::Tensor& buffer, const OptionalTensor& weight,
                            const OptionalTensor& bias, const at::Tensor& mean,
                            const at::Tensor& invstd) {
  check_buffer(buffer);
  check_device("mean", mean, buffer);
  const int64_t channels = mean.numel();
  TORCH_CHECK(channels <= buffer.size(1), "mean should contain at most the ", buffer.size(1),
              " channels of the buffer, but has ", channels, " elements");
  check_statistic("mean", mean, channels, buffer);
  check_statistic("invstd", invstd, channels, buffer);
  for (const auto& [name, t] : {std::pair{"weight", weight}, std::pair{"bias", bias}}) {
    if (!t) continue;
    check_vector(name, *t, channels, buffer);
    check_parameter_dtype(name, *t, buffer);
  }
}

void check_dense_block_slice(const char* name, const at::Tensor& t, int64_t channels,
                             const at::Tensor& buffer) {
  check_images(name, t, buffer);
  TORCH_CHECK(t.size(1) == channels, name, " should have ", channels, " channels, but got size ",
              t.sizes());
  TORCH_CHECK(t.scalar_type() == buffer.scalar_type(), name, " should have the dtype ",
              buffer.scalar_type(), " of the buffer, got ", t.scalar_type());
}

void check_dense_block_sum(const at::Tensor& grad_sum, int64_t channels, const at::Tensor& buffer) {
  check_images("grad_sum", grad_sum, buffer);
  TORCH_CHECK(grad_sum.size(1) >= channels, "grad_sum should have at least ", channels,
              " channels, but got size ", grad_sum.sizes());
  TORCH_CHECK(grad_sum.scalar_type() == buffer.scalar_type() ||
                  grad_sum.scalar_type() == statistic_dtype(buffer),
              "grad_sum should have the dtype ", buffer.scalar_type(), " of the buffer or ",
              statistic_dtype(buffer), ", got ", grad_sum.scalar_type());
}

void check_dense_block_gradient(const OptionalTensor& grad_y, const at::Tensor& buffer,
                                const OptionalTensor& grad_sum, const OptionalTensor& mean,
                                const OptionalTensor& invstd, const OptionalTensor& mean_grad,
                                const OptionalTensor& mean_grad_xhat, int64_t begin, int64_t end) {
  check_buffer(buffer);
  TORCH_CHECK(0 <= begin && begin <= end && end <= buffer.size(1), "channels [", begin, ", ", end,
              ") should lie in the buffer of size ", buffer.sizes());
  if (grad_y) check_dense_block_slice("grad_y", *grad_y, buffer.size(1), buffer);
  if (grad_sum) check_dense_block_sum(*grad_sum, end, buffer);
  const bool any = mean || invstd || mean_grad || mean_grad_xhat;
  const bool all = mean && invstd && mean_grad && mean_grad_xhat && grad_sum;
  TORCH_CHECK(all || !any,
              "mean, invstd, mean_grad and mean_grad_xhat should be given together, with grad_sum, "
              "or not at all");
  if (!all) return;
  check_statistic("mean", *mean, end - begin, buffer);
  check_statistic("invstd", *invstd, end - begin, buffer);
  check_statistic("mean_grad", *mean_grad, end - begin, buffer);
  check_statistic("mean_grad_xhat", *mean_grad_xhat, end - begin, buffer);
}

void check_dense_block_running(const at::Tensor& mean, const at::Tensor& var, int64_t count,
                               at::TensorList running_means, at::TensorList running_vars,
                               at::ArrayRef<double> momenta) {
  check_statistic("mean", mean, mean.numel(), mean);
  check_statistic("var", var, mean.numel(), mean);
  TORCH_CHECK_VALUE(count > 0, "count should be at least 1, but got ", count);
  const size_t consumers = running_means.size();
  TORCH_CHECK(running_vars.size() == consumers && momenta.size() == consumers,
              "running_means, running_vars and momenta should be as many, but got ", consumers,
              ", ", running_vars.size(), " and ", momenta.size());
  std::optional<at::ScalarType> half;
  const auto check = [&](const char* name, const at::Tensor& t, int64_t channels) {
    check_vector(name, t, channels, mean);
    const auto dtype = t.scalar_type();
    if (dtype == mean.scalar_type()) return;
    TORCH_CHECK(is_half(dtype) && mean.scalar_type() == at::kFloat && half.value_or(dtype) == dtype,
                "mixed dtype: expect ", name, " to have dtype ", mean.scalar_type(),
                half ? std::string(" or ") + c10::toString(*half) : std::string(), ", but got ",
                dtype);
    half = dtype;
  };
  for (size_t i = 0; i < consumers; ++i) {
    const int64_t channels = running_means[i].numel();
    TORCH_CHECK(channels <= mean.numel(), "running_means should have at most the ", mean.numel(),
                " elements of mean, but got ", channels);
    check("running_means", running_means[i], channels);
    check("running_vars", running_vars[i], channels);
  }
}

}  // namespace resops

TORCH_LIBRARY_FRAGMENT(resops, m) {
  m.def(
      "dense_block_apply(Tensor buffer, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "Tensor(a!) y) -> ()");
  m.def(
      "dense_block_accumulate(Tensor grad_y, Tensor buffer, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor invstd, Tensor(a!) grad_sum, bool training, bool first) "
      "-> (Tensor sum_grad, Tensor sum_grad_xhat)");
  m.def(
      "dense_block_gradient(Tensor? grad_y, Tensor buffer, Tensor? grad_sum, Tensor? mean, "
      "Tensor? invstd, Tensor? mean_grad, Tensor? mean_grad_xhat, int begin, int end) -> Tensor");
  m.def(
      "dense_block_update_running(Tensor mean, Tensor var, int count, Tensor(a!)[] running_means, "
      "Tensor(b!)[] running_vars, float[] momenta) -> ()");
}
