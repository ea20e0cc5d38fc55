// The phases of dense_block on CUDA tensors: checks arguments, allocates outputs and workspaces,
// calls the launchers.

#include "../../dense_block.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../../common/tensor_checks.h"
#include "../dense_block.h"
#include "batch_norm_call.h"

namespace resops::cuda {
namespace {

using at::Tensor;

constexpr auto kFormat = kDenseBlockFormat;

DenseBlockShape shape_of(const Tensor& t, int64_t channels) {
  return {kernel_dtype(t), t.size(0) * t.size(2) * t.size(3), channels};
}

// Of a tensor that is dense in channels-last, its channels from `begin` on.
Rows rows_of(const Tensor& t, int64_t begin = 0) {
  return {static_cast<const char*>(t.const_data_ptr()) + begin * t.element_size(), t.size(1)};
}

DenseBlockSum sum_of(const Tensor& t, void* data) {
  return {data, t.size(1), t.scalar_type() == at::kFloat};
}

void dense_block_apply(const Tensor& buffer_, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd,
                       const Tensor& y) {
  check_dense_block_norm(buffer_, weight, bias, mean, invstd);
  check_dense_block_slice("y", y, mean.numel(), buffer_);
  check_dtype("dense_block", buffer_);
  if (y.numel() == 0) return;
  const DeviceCall call(buffer_);
  const Tensor buffer = buffer_.contiguous(kFormat);
  const Affine affine(mean, invstd, weight, bias);
  const DenseBlockOutput out(y);
  launch_dense_block_apply(shape_of(buffer, mean.numel()),
                           {affine.args, rows_of(buffer), out.data()}, call.stream);
  out.finish();
}

std::tuple<Tensor, Tensor> dense_block_accumulate(const Tensor& grad_y_, const Tensor& buffer_,
                                                  const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const Tensor& mean,
                                                  const Tensor& invstd, const Tensor& grad_sum,
                                                  bool training, bool first) {
  check_dense_block_norm(buffer_, weight, bias, mean, invstd);
  const int64_t channels = mean.numel();
  check_dense_block_slice("grad_y", grad_y_, channels, buffer_);
  check_dense_block_sum(grad_sum, channels, buffer_);
  check_dtype("dense_block", buffer_);
  const DeviceCall device(buffer_);
  const Tensor buffer = buffer_.contiguous(kFormat), grad_y = grad_y_.contiguous(kFormat);
  const Affine affine(mean, invstd, weight, bias);
  const DenseBlockOutput total(grad_sum);
  const DenseBlockShape shape = shape_of(buffer, channels);
  const DenseBlockAccumulate call{affine.args,     grad_y.const_data_ptr(),
                                  rows_of(buffer), sum_of(grad_sum, total.data()),
                                  training,        first};
  const Tensor workspace = empty_vector(buffer, dense_block_workspace(shape, call));
  Tensor sum_grad = empty_vector(buffer, channels), sum_grad_xhat = empty_vector(buffer, channels);
  launch_dense_block_accumulate(shape, call, workspace.mutable_data_ptr<float>(),
                                {sum_grad.mutable_data_ptr<float>(),
                                 sum_grad_xhat.mutable_data_ptr<float>(), nullptr, nullptr},
                                device.stream);
  total.finish();
  return {sum_grad, sum_grad_xhat};
}

Tensor dense_block_gradient(const OptionalTensor& grad_y, const Tensor& buffer_,
                            const OptionalTensor& grad_sum, const OptionalTensor& mean,
                            const OptionalTensor& invstd, const OptionalTensor& mean_grad,
                            const OptionalTensor& mean_grad_xhat, int64_t begin, int64_t end) {
  check_dense_block_gradient(grad_y, buffer_, grad_sum, mean, invstd, mean_grad, mean_grad_xhat,
                             begin, end);
  check_dtype("dense_block", buffer_);
  const DeviceCall device(buffer_);
  Tensor out = at::empty({buffer_.size(0), end - begin, buffer_.size(2), buffer_.size(3)},
                         buffer_.options().memory_format(kFormat));
  if (out.numel() == 0) return out;
  Tensor outside, inside;
  const Tensor buffer = buffer_.contiguous(kFormat);
  DenseBlockGradient call{};
  call.x = rows_of(buffer, begin);
  call.out = out.mutable_data_ptr();
  if (grad_y) {
    outside = grad_y->contiguous(kFormat);
    call.grad_y = rows_of(outside, begin);
  }
  if (grad_sum) {
    inside = grad_sum->contiguous(kFormat);
    call.grad_sum = sum_of(inside, const_cast<void*>(rows_of(inside, begin).data));
  }
  std::vector<Tensor> kept;
  const auto vector = [&kept](const OptionalTensor& t) -> const float* {
    if (!t) return nullptr;
    return kept.emplace_back(t->contiguous()).const_data_ptr<float>();
  };
  call.mean = vector(mean);
  call.invstd = vector(invstd);
  call.mean_grad = vector(mean_grad);
  call.mean_grad_xhat = vector(mean_grad_xhat);
  launch_dense_block_gradient(shape_of(buffer, end - begin), call, device.stream);
  return out;
}

RunningStatistic running_statistic(const Tensor& t) {
  return {t.mutable_data_ptr(), t.scalar_type() == at::kFloat, t.stride(0)};
}

void dense_block_update_running(const Tensor& mean_, const Tensor& var_, int64_t count,
                                at::TensorList running_means, at::TensorList running_vars,
                                at::ArrayRef<double> momenta) {
  check_dense_block_running(mean_, var_, count, running_means, running_vars, momenta);
  check_dtype("dense_block", mean_);
  const DeviceCall call(mean_);
  const Tensor mean = mean_.contiguous(), var = var_.contiguous();
  DType dtype = DType::f32;  // of the statistics that are not float
  std::vector<DenseBlockRunning> consumers;
  for (size_t i = 0; i < momenta.size(); ++i) {
    for (const Tensor& t : {running_means[i], running_vars[i]}) {
      if (is_half(t.scalar_type())) dtype = kernel_dtype(t);
    }
    consumers.push_back({running_statistic(running_means[i]), running_statistic(running_vars[i]),
                         running_means[i].numel(), momenta[i]});
  }
  const double unbiased =
      static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  launch_dense_block_update_running(dtype, mean.const_data_ptr<float>(),
                                    var.const_data_ptr<float>(), unbiased, consumers, call.stream);
}

}  // namespace
}  // namespace resops::cuda

TORCH_LIBRARY_IMPL(resops, RESOPS_CUDA_KEY, m) {
  m.impl("dense_block_apply", &resops::cuda::dense_block_apply);
  m.impl("dense_block_accumulate", &resops::cuda::dense_block_accumulate);
  m.impl("dense_block_gradient", &resops::cuda::dense_block_gradient);
  m.impl("dense_block_update_running", &resops::cuda::dense_block_update_running);
}
