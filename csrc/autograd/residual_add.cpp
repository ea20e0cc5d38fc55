// residual_add with constant weights as one node of the autograd graph; see ResidualAddFunction in
// resops/ops/residual_add.py.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <string_view>
#include <tuple>

#include "../common/memory_layout.h"
#include "../common/tensor_checks.h"
#include "autograd.h"
#include "operator.h"

namespace resops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, double, double, bool,
                                           std::string_view, double);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, double, double, bool, const OptionalTensor&, std::string_view, double,
    std::array<bool, 4>);

// What is not differentiated.
struct Call {
  double alpha, beta;
  const std::string& activation;
  double negative_slope;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& residual, const Call& call) {
  static const auto op = find_operator<Forward>("resops::residual_add_forward");
  return op.call(x, residual, std::nullopt, std::nullopt, call.alpha, call.beta, false,
                 call.activation, call.negative_slope);
}

struct ResidualAddFunction : torch::autograd::Function<ResidualAddFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                        const Call& call) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, mask] = resops::forward(x, residual, call);
    const Activation act = parse_activation(call.activation);
    const bool smooth = is_smooth(act), masked = is_masked(act);
    ctx->save_for_backward(
        {smooth ? x : Tensor(), smooth ? residual : Tensor(), masked ? std::move(mask) : Tensor()});
    ctx->saved_data["alpha"] = call.alpha;
    ctx->saved_data["beta"] = call.beta;
    ctx->saved_data["activation"] = call.activation;
    ctx->saved_data["negative_slope"] = call.negative_slope;
    ctx->saved_data["layout"] = static_cast<int64_t>(MemoryLayout(y).code());
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_y = grads[0];
    if (!grad_y.defined()) return variable_list(3);
    const double alpha = ctx->saved_data["alpha"].toDouble();
    const double beta = ctx->saved_data["beta"].toDouble();
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    const bool need_x = ctx->needs_input_grad(0), need_residual = ctx->needs_input_grad(1);
    // As PyTorch's own +: a gradient that equals grad_y is grad_y, and two equal ones are one.
    const bool identity = activation == "identity";
    const bool same_x = need_x && identity && alpha == 1;
    const bool same_residual = need_residual && identity && beta == 1;
    const bool shared = need_x && need_residual && alpha == beta;
    const std::array<bool, 4> computed{need_x && !same_x,
                                       need_residual && !same_residual && !shared, false, false};
    Tensor grad_x, grad_residual;
    if (computed[0] || computed[1]) {
      const variable_list saved = ctx->get_saved_variables();
      const auto optional = [](const Tensor& t) {
        return t.defined() ? OptionalTensor(t) : std::nullopt;
      };
      // In the memory order of y, in which the mask is.
      const Tensor dense = MemoryLayout::from_code(ctx->saved_data["layout"].toInt()).dense(grad_y);
      // create_graph=True: formulas that autograd can follow
      const bool twice = at::GradMode::is_enabled();
      std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
      if (!twice) below_autograd.emplace();
      static const auto kernel = find_operator<Backward>("resops::residual_add_backward");
      static const auto formulas =
          find_operator<Backward>("resops::residual_add_backward_formulas");
      std::tie(grad_x, grad_residual, std::ignore, std::ignore) =
          (twice ? formulas : kernel)
              .call(dense, optional(saved[0]), optional(saved[1]), std::nullopt, std::nullopt,
                    alpha, beta, false, optional(saved[2]), activation,
                    ctx->saved_data["negative_slope"].toDouble(), computed);
    }
    if (same_x) grad_x = grad_y;
    if (same_residual) grad_residual = grad_y;
    if (shared) grad_residual = grad_x;
    return {need_x ? grad_x : Tensor(), need_residual ? grad_residual : Tensor(), Tensor()};
  }
};

}  // namespace

Tensor residual_add(const Tensor& x, const Tensor& residual, double alpha, double beta,
                    const std::string& activation, double negative_slope) {
  const Call call{alpha, beta, activation, negative_slope};
  if (at::GradMode::is_enabled() && (x.requires_grad() || residual.requires_grad())) {
    return ResidualAddFunction::apply(x, residual, call);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return std::get<0>(forward(x, residual, call));
}

}  // namespace resops
