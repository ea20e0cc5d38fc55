// What the bindings of the ops with a batch norm in them share.

#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "../../batch_norm.h"
#include "../batch_norm.h"
#include "device_call.h"

namespace resops::cuda {

inline at::Tensor empty_vector(const at::Tensor& x, int64_t size,
                               at::ScalarType dtype = at::kFloat) {
  return at::empty({size}, plain(x, dtype));
}

// The values per channel, in the memory that the kernels read them from.
struct Affine {
  Affine(const at::Tensor& mean_, const at::Tensor& invstd_, const OptionalTensor& weight_,
         const OptionalTensor& bias_)
      : mean(mean_.contiguous()), invstd(invstd_.contiguous()) {
    args.mean = mean.const_data_ptr<float>();
    args.invstd = invstd.const_data_ptr<float>();
    args.weight = vector_of(weight_, weight);
    args.bias = vector_of(bias_, bias);
  }
  static ChannelVector vector_of(const OptionalTensor& t, at::Tensor& kept) {
    if (!t) return {nullptr, true};
    kept = t->contiguous();
    return {kept.const_data_ptr(), kept.scalar_type() == at::kFloat};
  }
  at::Tensor mean, invstd, weight, bias;
  BatchNormAffine args;
};

// Mean and invstd per channel: of the batch when training, and then the running statistics are
// updated; else of the running statistics. `x` is dense; arguments were checked before.
std::pair<at::Tensor, at::Tensor> batch_norm_mean_invstd(const at::Tensor& x,
                                                         const OptionalTensor& running_mean,
                                                         const OptionalTensor& running_var,
                                                         bool training, double momentum, double eps,
                                                         Stream stream);

// The sums of a backward pass, which are the gradients of weight and bias, but for parameters of 16
// bits.
class ParameterGradients {
 public:
  // `sums_anyway`: they are needed for the gradient of x.
  ParameterGradients(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     bool need_weight, bool need_bias, bool sums_anyway)
      : weight_(own(x, weight, need_weight)), bias_(own(x, bias, need_bias)) {
    if (!need_weight && !need_bias && !sums_anyway) return;
    sum_grad_ = empty_vector(x, x.size(1));
    sum_grad_xhat_ = empty_vector(x, x.size(1));
  }
  bool needed() const { return sum_grad_.defined(); }
  BatchNormSums sums() const {
    const auto data = [](const at::Tensor& t) {
      return t.defined() && t.numel() > 0 ? t.mutable_data_ptr() : nullptr;
    };
    return {sum_grad_.mutable_data_ptr<float>(), sum_grad_xhat_.mutable_data_ptr<float>(),
            data(bias_), data(weight_)};
  }
  const at::Tensor& sum_grad() const { return sum_grad_; }
  const at::Tensor& sum_grad_xhat() const { return sum_grad_xhat_; }
  at::Tensor grad_weight() const { return weight_.defined() ? weight_ : sum_grad_xhat_; }
  at::Tensor grad_bias() const { return bias_.defined() ? bias_ : sum_grad_; }

 private:
  // Undefined where the sum itself is the gradient.
  static at::Tensor own(const at::Tensor& x, const OptionalTensor& parameter, bool needed) {
    if (!needed) return empty_vector(x, 0, parameter ? parameter->scalar_type() : at::kFloat);
    if (!parameter || parameter->scalar_type() == at::kFloat) return {};
    return empty_vector(x, x.size(1), parameter->scalar_type());
  }
  at::Tensor weight_, bias_, sum_grad_, sum_grad_xhat_;
};

}  // namespace resops::cuda
