// Argument checks of dense_block, the same for every device.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace resops {

using OptionalTensor = std::optional<at::Tensor>;

constexpr auto kDenseBlockFormat = at::MemoryFormat::ChannelsLast;

// `t` itself where it is dense in channels-last, else a copy that is written back at the end.
class DenseBlockOutput {
 public:
  explicit DenseBlockOutput(const at::Tensor& t)
      : target_(t), dense_(t.contiguous(kDenseBlockFormat)) {}
  void* data() const { return dense_.mutable_data_ptr(); }
  void finish() const {
    if (!dense_.is_same(target_)) target_.copy_(dense_);
  }

 private:
  at::Tensor target_, dense_;
};

// A norm over the first C channels of the buffer, C the size of `mean`.
void check_dense_block_norm(const at::Tensor& buffer, const OptionalTensor& weight,
                            const OptionalTensor& bias, const at::Tensor& mean,
                            const at::Tensor& invstd);

// (N, channels, H, W) beside the buffer, of its dtype.
void check_dense_block_slice(const char* name, const at::Tensor& t, int64_t channels,
                             const at::Tensor& buffer);

// (N, at least `channels`, H, W), of the buffer's dtype or that of its statistics.
void check_dense_block_sum(const at::Tensor& grad_sum, int64_t channels, const at::Tensor& buffer);

// What `gradient` takes for the channels [begin, end).
void check_dense_block_gradient(const OptionalTensor& grad_y, const at::Tensor& buffer,
                                const OptionalTensor& grad_sum, const OptionalTensor& mean,
                                const OptionalTensor& invstd, const OptionalTensor& mean_grad,
                                const OptionalTensor& mean_grad_xhat, int64_t begin, int64_t end);

// Running statistics of norms that read the first channels of those that mean and var are of. They
// are of the statistics' dtype, or beside float all of one type of 16 bits.
void check_dense_block_running(const at::Tensor& mean, const at::Tensor& var, int64_t count,
                               at::TensorList running_means, at::TensorList running_vars,
                               at::ArrayRef<double> momenta);

}  // namespace resops
