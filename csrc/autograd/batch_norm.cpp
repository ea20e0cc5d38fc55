// batch_norm as one node of the autograd graph; see BatchNormFunction in resops/ops/batch_norm.py.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <string_view>
#include <tuple>

#include "../common/tensor_checks.h"
#include "autograd.h"
#include "operator.h"

namespace resops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, bool, double, double, std::string_view, double);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool,
    std::string_view, double, std::array<bool, 4>);
using Formulas = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, double,
    std::string_view, double, std::array<bool, 4>);

// What is not differentiated.
struct Call {
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  bool training;
  double momentum, eps;
  const std::string& activation;
  double negative_slope;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& residual,
                                                   const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Call& call) {
  static const auto op = find_operator<Forward>("resops::batch_norm_forward");
  return op.call(x, residual, weight, bias, call.running_mean, call.running_var, call.training,
                 call.momentum, call.eps, call.activation, call.negative_slope);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const Call& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, mean, invstd, mask] = resops::forward(x, residual, weight, bias, call);
    const auto given = [](const OptionalTensor& t) { return t ? *t : Tensor(); };
    const Activation act = parse_activation(call.activation);
    const bool smooth = is_smooth(act), masked = residual && is_masked(act);
    ctx->save_for_backward({x, smooth ? given(residual) : Tensor(), given(weight), given(bias),
                            std::move(mean), std::move(invstd),
                            masked ? std::move(mask) : Tensor()});
    // Which of the four inputs stand among the edges, in their order.
    const int64_t inputs = 1 | residual.has_value() << 1 | weight.has_value() << 2 |
                           bias.has_value() << 3 | call.training << 4;
    ctx->saved_data["inputs"] = inputs;
    ctx->saved_data["eps"] = call.eps;
    ctx->saved_data["activation"] = call.activation;
    ctx->saved_data["negative_slope"] = call.negative_slope;
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_y = grads[0];
    if (!grad_y.defined()) return variable_list(5);
    const int64_t inputs = ctx->saved_data["inputs"].toInt();
    const bool training = (inputs >> 4 & 1) != 0;
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    const double negative_slope = ctx->saved_data["negative_slope"].toDouble();
    std::array<bool, 4> needed{};
    size_t edge = 0;
    for (int i = 0; i < 4; ++i) {
      if (inputs >> i & 1) needed[i] = ctx->needs_input_grad(edge++);
    }
    // Without an activation the residual's gradient is grad_y itself: no kernel writes a copy.
    const bool unchanged = needed[1] && activation == "identity";
    needed[1] = needed[1] && !unchanged;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &mean = saved[4], &invstd = saved[5];
    const OptionalTensor residual = optional(saved[1]), weight = optional(saved[2]),
                         bias = optional(saved[3]), mask = optional(saved[6]);
    std::tuple<Tensor, Tensor, Tensor, Tensor> computed;
    if (at::GradMode::is_enabled()) {  // create_graph=True: formulas that autograd can follow
      static const auto op = find_operator<Formulas>("resops::batch_norm_backward_formulas");
      computed = op.call(grad_y, x, residual, mask, weight, bias, mean, invstd, training,
                         ctx->saved_data["eps"].toDouble(), activation, negative_slope, needed);
    } else {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op = find_operator<Backward>("resops::batch_norm_backward");
      computed = op.call(grad_y, x, residual, mask, weight, bias, mean, invstd, training,
                         activation, negative_slope, needed);
    }
    auto& [grad_x, grad_residual, grad_weight, grad_bias] = computed;
    if (unchanged) grad_residual = grad_y;
    return {needed[0] ? grad_x : Tensor(), needed[1] || unchanged ? grad_residual : Tensor(),
            needed[2] ? grad_weight : Tensor(), needed[3] ? grad_bias : Tensor(), Tensor()};
  }
};

bool needs_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

}  // namespace

Tensor batch_norm(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                  const OptionalTensor& bias, const OptionalTensor& running_mean,
                  const OptionalTensor& running_var, bool training, double momentum, double eps,
                  const std::string& activation, double negative_slope) {
  const Call call{running_mean, running_var, training, momentum, eps, activation, negative_slope};
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || needs_grad(residual) || needs_grad(weight) || needs_grad(bias))) {
    return BatchNormFunction::apply(x, residual, weight, bias, call);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return std::get<0>(forward(x, residual, weight, bias, call));
}

}  // namespace resops
