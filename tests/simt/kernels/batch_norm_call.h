// One call of batch_norm, forward and backward, through the launchers of csrc/cuda/batch_norm.h,
// and what is exact: the definition in double (docs/math/batch_norm.md).

#pragma once

#include <optional>

#include "batch_norm.h"
#include "batch_norm_slab.h"
#include "tensors.h"

using namespace resops;
namespace gpu = resops::cuda;  // `cuda` alone is the toolkit's
using gpu::BatchNormShape;

struct Config {
  DType dtype;
  int64_t samples, channels, spatial;
  bool channels_last;
  Activation activation = Activation::relu;
  bool residual = false;
  bool affine = true, training = true, half_parameters = false;
  bool reverse = false, frozen_gradient = false;
  int blocks = 0;
  double mean = 3;                           // in standard deviations
  double offset = 0;                         // of every bias
  std::optional<gpu::SlabRegime> slab = {};  // with a single read

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof(text), "%s (%lld, %lld, %lld) %s %s%s%s%s%s blocks %d",
                  name_of(dtype), static_cast<long long>(samples), static_cast<long long>(channels),
                  static_cast<long long>(spatial), channels_last ? "channels-last" : "contiguous",
                  name_of(activation), residual ? " residual" : "", affine ? "" : " no affine",
                  training ? "" : " frozen", reverse ? " reverse" : "", blocks);
    if (slab) return std::string(text) + " slab regime " + std::to_string(static_cast<int>(*slab));
    return text;
  }
};

// The tensors of one call, and what is exact.
class Call {
 public:
  explicit Call(const Config& config)
      : c(config),
        shape{c.dtype, c.samples, c.channels, c.spatial,
              c.channels_last || c.channels == 1 || c.spatial == 1},
        parameter(c.half_parameters ? c.dtype : DType::f32),
        x(c.dtype, shape.numel()),
        residual(c.dtype, shape.numel()),
        grad_y(c.dtype, shape.numel()),
        weight(parameter, c.channels),
        bias(parameter, c.channels),
        running_mean(parameter, c.channels),
        running_var(parameter, c.channels) {
    Random random(static_cast<unsigned>(shape.numel() + 7 * c.channels));
    std::vector<double> centre(channels()), spread(channels());
    for (int64_t k = 0; k < c.channels; ++k) {
      spread[at(k)] = random.uniform(0.5, 2);
      centre[at(k)] = random.uniform(-1, 1) * c.mean * spread[at(k)];
      weight.set(k, random.uniform(-1.5, 1.5));
      bias.set(k, c.offset + random.uniform(-1, 1));
      running_mean.set(k, random.uniform(-3, 3));
      running_var.set(k, random.uniform(0.5, 2));
    }
    for (int64_t i = 0; i < shape.numel(); ++i) {
      const auto k = at(channel(i));
      x.set(i, centre[k] + spread[k] * random.normal());
      residual.set(i, random.normal());
      grad_y.set(i, random.normal() + 0.3);
    }
    compute_exact();
  }

  void run() {
    run_forward();
    run_backward();
  }

  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  size_t channels() const { return at(c.channels); }
  int64_t channel(int64_t i) const {
    return shape.channels_last ? i % c.channels : i / c.spatial % c.channels;
  }
  // Where the bit of element i is.
  int64_t bit(int64_t i) const {
    if (shape.by_rows()) return i;
    const int64_t plane = (c.spatial + 7) / 8 * 8;
    return i / c.spatial * plane + i % c.spatial;
  }
  bool masked() const { return c.residual && is_masked(c.activation); }

 private:
  void compute_exact() {
    const double m = static_cast<double>(shape.count());
    mean.assign(channels(), 0);
    var.assign(channels(), 0);
    kappa.assign(channels(), 0);
    std::vector<double> absolute(channels());
    for (int64_t i = 0; i < shape.numel(); ++i) {
      mean[at(channel(i))] += x[i] / m;
      absolute[at(channel(i))] += std::abs(x[i]) / m;
    }
    for (int64_t i = 0; i < shape.numel(); ++i) {
      const double d = x[i] - mean[at(channel(i))];
      var[at(channel(i))] += d * d / m;
    }
    mean_terms = absolute;
    batch_mean = mean;
    batch_var = var;
    if (!c.training) {
      for (int64_t k = 0; k < c.channels; ++k) {
        mean[at(k)] = running_mean[k];
        mean_terms[at(k)] = std::abs(running_mean[k]);
        var[at(k)] = running_var[k];
      }
    }
    invstd.resize(channels());
    for (size_t k = 0; k < channels(); ++k) {
      invstd[k] = 1 / std::sqrt(var[k] + kEps);
      kappa[k] = std::max(absolute[k], mean_terms[k]) * invstd[k];
    }
  }

  gpu::BatchNormAffine affine(const Buffer& mean_, const Buffer& invstd_) {
    const bool is_float = parameter == DType::f32;
    return {const_cast<Buffer&>(mean_).as<float>(),
            const_cast<Buffer&>(invstd_).as<float>(),
            {c.affine ? weight.data() : nullptr, is_float},
            {c.affine ? bias.data() : nullptr, is_float}};
  }

  double w(int64_t k) const { return c.affine ? weight[k] : 1; }
  double b(int64_t k) const { return c.affine ? bias[k] : 0; }
  double xhat(int64_t i) const { return (x[i] - mean[at(channel(i))]) * invstd[at(channel(i))]; }
  double z(int64_t i) const {
    return w(channel(i)) * xhat(i) + b(channel(i)) + (c.residual ? residual[i] : 0);
  }
  double z_terms(int64_t i) const {
    return std::abs(w(channel(i)) * xhat(i)) + std::abs(b(channel(i))) +
           (c.residual ? std::abs(residual[i]) : 0);
  }

  void check_channels(const char* what, const Buffer& got, const std::vector<double>& value,
                      const std::vector<double>& terms) const {
    Exact exact(c.channels);
    for (int64_t k = 0; k < c.channels; ++k) exact.set(k, k, value[at(k)], terms[at(k)]);
    check_rule_R(c.describe() + ": " + what, got, exact, kappa);
  }

  gpu::BatchNormSlabs slabs(int tensors) const {
    const auto cut = gpu::choose_batch_norm_slabs(shape, tensors, c.slab);
    if (!cut || (c.slab && cut->regime != *c.slab)) fail(c.describe() + ": does not fit");
    return *cut;
  }

  void run_forward() {
    Workspace workspace(gpu::batch_norm_workspace(shape));
    Buffer variance(DType::f32, c.channels);
    const Buffer old_mean = running_mean, old_var = running_var;
    const bool is_float = parameter == DType::f32;
    gpu::BatchNormStatistics out{mean_out.as<float>(),
                                 nullptr,
                                 invstd_out.as<float>(),
                                 kEps,
                                 {running_mean.data(), is_float, 1},
                                 {running_var.data(), is_float, 1},
                                 kMomentum};
    Buffer y(c.dtype, shape.numel());
    const gpu::BatchNormApply call{affine(mean_out, invstd_out),
                                   c.activation,
                                   kSlope,
                                   x.data(),
                                   c.residual ? residual.data() : nullptr,
                                   y.data(),
                                   masked() ? mask.as<uint8_t>() : nullptr};
    if (c.training) {
      out.var = variance.as<float>();
      if (c.slab) {
        const gpu::BatchNormSlabs cut = slabs(1);
        Workspace merged(gpu::batch_norm_slab_workspace(shape, cut));
        gpu::launch_batch_norm_slab_forward(shape, cut, out, call, merged.as<float>(), nullptr);
        merged.check_margins("workspace");
      } else {
        gpu::launch_batch_norm_statistics(shape, x.data(), workspace.as<float>(), out, nullptr);
      }
      // Rule R has no var; this is what it asks of invstd, whose relative error is half of var's.
      std::vector<double> twice = var;
      for (double& v : twice) v *= 2;
      check_channels("var", variance, var, twice);
      check_running(old_mean, old_var);
    } else {
      gpu::launch_batch_norm_frozen(c.channels, c.dtype, out, nullptr);
    }
    workspace.check_margins("workspace");
    check_channels("mean", mean_out, mean, mean_terms);
    check_channels("invstd", invstd_out, invstd, invstd);
    for (int64_t k = 0; k < c.channels; ++k) {  // what the other phases are given
      mean[at(k)] = mean_out[k];
      invstd[at(k)] = invstd_out[k];
    }
    if (shape.numel() == 0) return;

    if (!c.slab || !c.training)
      gpu::launch_batch_norm_apply(shape, call, {c.reverse, c.blocks}, nullptr);
    Exact exact(shape.numel());
    for (int64_t i = 0; i < shape.numel(); ++i) {
      exact.set(i, channel(i), activation_at(c.activation, z(i), kSlope).value, z_terms(i));
    }
    check_rule_R(c.describe() + ": y", y, exact, kappa);
    if (masked()) check_mask();
  }

  void check_running(const Buffer& old_mean, const Buffer& old_var) const {
    if (shape.numel() == 0) {
      for (int64_t k = 0; k < c.channels; ++k) {
        CHECK(running_mean[k] == old_mean[k] && running_var[k] == old_var[k]);
      }
      return;
    }
    const double m = static_cast<double>(shape.count()), bessel = m / (m - 1);
    std::vector<double> value[2], terms[2];
    for (int64_t k = 0; k < c.channels; ++k) {
      const double variance = batch_var[at(k)] * bessel;
      value[0].push_back((1 - kMomentum) * old_mean[k] + kMomentum * batch_mean[at(k)]);
      terms[0].push_back((1 - kMomentum) * std::abs(old_mean[k]) + kMomentum * mean_terms[at(k)]);
      value[1].push_back((1 - kMomentum) * old_var[k] + kMomentum * variance);
      terms[1].push_back((1 - kMomentum) * old_var[k] + kMomentum * variance);
    }
    check_channels("running_mean", running_mean, value[0], terms[0]);
    check_channels("running_var", running_var, value[1], terms[1]);
  }

  void check_mask() {
    mask.check_margins("mask");
    const auto* bytes = mask.as<uint8_t>();
    std::vector<bool> used(at(8 * shape.mask_bytes()));
    for (int64_t i = 0; i < shape.numel(); ++i) {
      used[at(bit(i))] = true;
      const bool set = (bytes[bit(i) / 8] >> bit(i) % 8 & 1) != 0;
      if (std::abs(z(i)) > 1e-4 * z_terms(i) && set != (z(i) > 0)) {
        fail(c.describe() + ": bit of element " + std::to_string(i));
      }
    }
    for (int64_t i = 0; i < 8 * shape.mask_bytes(); ++i) {
      if (!used[at(i)] && (bytes[i / 8] >> i % 8 & 1) != 0) fail(c.describe() + ": unused bit set");
    }
  }

  void run_slab_backward(const gpu::BatchNormGradient& call, const gpu::BatchNormSums& sums,
                         const gpu::BatchNormGradientOut& out) const {
    const gpu::BatchNormSlabs cut = slabs(call.residual ? 3 : 2);
    Workspace workspace(gpu::batch_norm_slab_workspace(shape, cut));
    gpu::launch_batch_norm_slab_backward(shape, cut, call, sums, out, workspace.as<float>(),
                                         nullptr);
    workspace.check_margins("workspace");
  }

  void run_backward() {
    // Where z is nearly 0 its sign is not decided by the input.
    if (is_masked(c.activation)) {
      for (int64_t i = 0; i < shape.numel(); ++i) {
        if (std::abs(z(i)) < 1e-4 * z_terms(i)) grad_y.set(i, 0);
      }
    }
    std::vector<double> g(at(shape.numel())), g_terms(at(shape.numel()));
    std::vector<double> sum(channels()), sum_terms(channels()), product(channels()),
        product_terms(channels());
    for (int64_t i = 0; i < shape.numel(); ++i) {
      const ActivationValue a = activation_at(c.activation, z(i), kSlope);
      g[at(i)] = grad_y[i] * a.first;
      g_terms[at(i)] = std::abs(g[at(i)]);
      if (is_smooth(c.activation)) {
        g_terms[at(i)] =
            std::abs(grad_y[i]) * (std::abs(a.first) + z_terms(i) * std::abs(a.second));
      }
      const size_t k = at(channel(i));
      sum[k] += g[at(i)];
      sum_terms[k] += g_terms[at(i)];
      product[k] += g[at(i)] * xhat(i);
      product_terms[k] += g_terms[at(i)] * std::abs(xhat(i));
    }
    gpu::BatchNormGradient call{affine(mean_out, invstd_out),
                                c.activation,
                                kSlope,
                                grad_y.data(),
                                x.data(),
                                masked() ? mask.as<uint8_t>() : nullptr,
                                c.residual && is_smooth(c.activation) ? residual.data() : nullptr};
    Workspace workspace(gpu::batch_norm_workspace(shape));
    Buffer sum_grad(DType::f32, c.channels), sum_grad_xhat(DType::f32, c.channels);
    Buffer grad_bias(parameter, c.channels), grad_weight(parameter, c.channels);
    gpu::BatchNormSums sums{sum_grad.as<float>(), sum_grad_xhat.as<float>(), nullptr, nullptr};
    if (c.half_parameters) {
      sums.grad_bias = grad_bias.data();
      sums.grad_weight = grad_weight.data();
    }
    const bool slab = c.slab && gpu::slab_backward_takes(c.activation);
    if (slab) {
      run_slab_backward(call, sums, {});
    } else {
      gpu::launch_batch_norm_backward_reduce(shape, call, workspace.as<float>(), sums, nullptr);
    }
    workspace.check_margins("workspace");
    check_channels("sum_grad", sum_grad, sum, sum_terms);
    check_channels("sum_grad_xhat", sum_grad_xhat, product, product_terms);
    if (c.half_parameters) {
      check_channels("grad_bias", grad_bias, sum, sum_terms);
      check_channels("grad_weight", grad_weight, product, product_terms);
    }
    if (shape.numel() == 0) return;

    const double m = static_cast<double>(shape.count());
    for (const bool want_x : {true, false}) {
      Buffer grad_x(c.dtype, shape.numel()), grad_residual(c.dtype, shape.numel());
      gpu::BatchNormGradientOut out{sum_grad.as<float>(), sum_grad_xhat.as<float>(),
                                    static_cast<float>(1 / m), want_x ? grad_x.data() : nullptr,
                                    c.residual ? grad_residual.data() : nullptr};
      if (!c.training) out.sum_grad = out.sum_grad_xhat = nullptr;
      if (!want_x && !c.residual) break;
      if (slab) {
        run_slab_backward(call, {}, out);
      } else {
        gpu::launch_batch_norm_backward_apply(shape, call, out, {c.reverse, c.blocks}, nullptr);
      }
      Exact exact(shape.numel()), exact_residual(shape.numel());
      const double correction = c.training ? 1 / m : 0;
      for (int64_t i = 0; i < shape.numel(); ++i) {
        const size_t k = at(channel(i));
        const double factor = w(channel(i)) * invstd[k];
        exact.set(i, channel(i), factor * (g[at(i)] - correction * (sum[k] + xhat(i) * product[k])),
                  std::abs(factor) *
                      (g_terms[at(i)] +
                       correction * (sum_terms[k] + std::abs(xhat(i)) * product_terms[k])));
        exact_residual.set(i, channel(i), g[at(i)], g_terms[at(i)]);
      }
      if (want_x) check_rule_R(c.describe() + ": grad_x", grad_x, exact, kappa);
      if (c.residual) {
        check_rule_R(c.describe() + ": grad_residual", grad_residual, exact_residual, kappa);
      }
    }
  }

  static constexpr double kEps = 1e-5, kMomentum = 0.1;
  static constexpr float kSlope = 0.01f;
  Config c;
  BatchNormShape shape;
  DType parameter;
  Buffer x, residual, grad_y, weight, bias, running_mean, running_var;
  Buffer mean_out{DType::f32, c.channels}, invstd_out{DType::f32, c.channels};
  Buffer mask{DType::f16, (shape.mask_bytes() + 1) / 2};
  std::vector<double> mean, mean_terms, var, invstd, kappa, batch_mean, batch_var;
};
