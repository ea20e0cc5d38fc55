// Every kernel of csrc/cuda/residual_add.cuh, through its launchers, under the emulator: forward
// and all gradients against the definition in double (docs/math/residual_add.md), by rule R.

#include "residual_add.h"

#include "tensors.h"

using namespace resops;
namespace gpu = resops::cuda;  // `cuda` alone is the toolkit's

namespace {

enum class Kind { constant, scalar, per_sample, elementwise };
constexpr Kind kKinds[] = {Kind::constant, Kind::scalar, Kind::per_sample, Kind::elementwise};

struct Config {
  DType dtype;
  int64_t samples, length;
  Activation activation = Activation::relu;
  Kind alpha = Kind::constant, beta = Kind::constant;
  bool complement = false, half_weights = false;
  bool want_x = true, want_residual = true, want_alpha = true, want_beta = true;

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof(text), "%s (%lld, %lld) %s alpha %d beta %d%s%s", name_of(dtype),
                  static_cast<long long>(samples), static_cast<long long>(length),
                  name_of(activation), static_cast<int>(alpha), static_cast<int>(beta),
                  complement ? " complement" : "", half_weights ? " half weights" : "");
    return text;
  }
};

// A weight and its gradient.
struct Weight {
  Weight(const Config& c, Kind kind_, Random& random)
      : kind(kind_),
        is_float(kind != Kind::elementwise && !c.half_weights),
        length(c.length),
        values(is_float ? DType::f32 : c.dtype, kind == Kind::elementwise  ? c.samples * c.length
                                                : kind == Kind::per_sample ? c.samples
                                                                           : 1),
        grad(values.dtype(), values.size()) {
    for (int64_t i = 0; i < values.size(); ++i) values.set(i, random.uniform(-1.5, 1.5));
  }

  int64_t index(int64_t i) const {
    return kind == Kind::elementwise ? i : kind == Kind::per_sample ? i / length : 0;
  }
  double at(int64_t i) const { return kind == Kind::constant ? kConstant : values[index(i)]; }

  gpu::ResidualAddWeight argument() {
    return {kind == Kind::elementwise ? values.data() : nullptr,
            kind == Kind::scalar || kind == Kind::per_sample ? values.data() : nullptr, is_float,
            kind == Kind::per_sample, static_cast<float>(kConstant)};
  }

  // grad[index(i)] = the sum of terms[i]
  void check_grad(const std::string& name, const std::vector<double>& terms,
                  const std::vector<double>& absolute) const {
    Exact exact(grad.size());
    for (int64_t i = 0; i < static_cast<int64_t>(terms.size()); ++i) {
      const auto k = static_cast<size_t>(index(i));
      exact.value[k] += terms[static_cast<size_t>(i)];
      exact.terms[k] += absolute[static_cast<size_t>(i)];
    }
    check_rule_R(name, grad, exact, {0.0});
  }

  static constexpr double kConstant = 0.75;
  Kind kind;
  bool is_float;
  int64_t length;
  Buffer values, grad;
};

void run(const Config& c) {
  constexpr float kSlope = 0.01f;
  Random random(static_cast<unsigned>(c.samples * 1000 + c.length));
  const int64_t numel = c.samples * c.length, step = (c.length + 7) / 8;
  const bool masked = is_masked(c.activation);
  Buffer x(c.dtype, numel), residual(c.dtype, numel), grad_y(c.dtype, numel), y(c.dtype, numel);
  Buffer mask(DType::f16, (c.samples * step + 1) / 2);
  Weight alpha(c, c.alpha, random), beta(c, c.beta, random);
  for (int64_t i = 0; i < numel; ++i) {
    x.set(i, random.normal());
    residual.set(i, random.normal());
    grad_y.set(i, random.normal());
  }
  const auto beta_at = [&](int64_t i) { return c.complement ? 1 - alpha.at(i) : beta.at(i); };
  const auto z = [&](int64_t i) { return alpha.at(i) * x[i] + beta_at(i) * residual[i]; };
  const auto z_terms = [&](int64_t i) {
    return std::abs(alpha.at(i) * x[i]) + std::abs(beta_at(i) * residual[i]);
  };

  // ---- forward
  const gpu::ResidualAddShape shape{c.dtype, c.samples, c.length};
  gpu::ResidualAddWeights weights{alpha.argument(), beta.argument(), c.complement};
  if (c.complement) {  // as the bindings say it
    weights.beta = {nullptr, nullptr, true, false, static_cast<float>(1 - Weight::kConstant)};
  }
  gpu::launch_residual_add_forward({shape, weights, c.activation, kSlope, x.data(), residual.data(),
                                    y.data(), masked ? mask.as<uint8_t>() : nullptr},
                                   nullptr);
  Exact exact(numel);
  for (int64_t i = 0; i < numel; ++i) {
    exact.set(i, 0, activation_at(c.activation, z(i), kSlope).value, z_terms(i));
  }
  check_rule_R(c.describe() + ": y", y, exact, {0.0});
  if (masked) {
    mask.check_margins("mask");
    for (int64_t i = 0; i < 8 * step * c.samples; ++i) {
      const bool set = (mask.as<uint8_t>()[i / 8] >> i % 8 & 1) != 0;
      if (i >= numel ? set : std::abs(z(i)) > 1e-4 * z_terms(i) && set != (z(i) > 0)) {
        fail(c.describe() + ": mask bit " + std::to_string(i));
      }
    }
  }

  // ---- backward
  std::vector<double> g(static_cast<size_t>(numel)), g_terms(g), by_alpha(g), by_alpha_terms(g),
      by_beta(g), by_beta_terms(g);
  for (int64_t i = 0; i < numel; ++i) {
    const auto k = static_cast<size_t>(i);
    if (masked && std::abs(z(i)) < 1e-4 * z_terms(i)) grad_y.set(i, 0);
    const ActivationValue a = activation_at(c.activation, z(i), kSlope);
    g[k] = grad_y[i] * a.first;
    g_terms[k] = std::abs(g[k]);
    if (is_smooth(c.activation)) {
      g_terms[k] = std::abs(grad_y[i]) * (std::abs(a.first) + z_terms(i) * std::abs(a.second));
    }
    by_alpha[k] = g[k] * (c.complement ? x[i] - residual[i] : x[i]);
    by_alpha_terms[k] = g_terms[k] * (std::abs(x[i]) + (c.complement ? std::abs(residual[i]) : 0));
    by_beta[k] = g[k] * residual[i];
    by_beta_terms[k] = g_terms[k] * std::abs(residual[i]);
  }
  const bool want_alpha = c.want_alpha && c.alpha != Kind::constant;
  const bool want_beta = c.want_beta && c.beta != Kind::constant && !c.complement;
  const bool smooth = is_smooth(c.activation);
  Buffer grad_x(c.dtype, numel), grad_residual(c.dtype, numel);
  const gpu::ResidualAddBackward call{
      shape,
      weights,
      c.activation,
      kSlope,
      grad_y.data(),
      smooth || want_alpha ? x.data() : nullptr,
      smooth || want_beta || (want_alpha && c.complement) ? residual.data() : nullptr,
      masked ? mask.as<uint8_t>() : nullptr,
      c.want_x ? grad_x.data() : nullptr,
      c.want_residual ? grad_residual.data() : nullptr,
      want_alpha ? alpha.grad.data() : nullptr,
      want_beta ? beta.grad.data() : nullptr};
  Workspace workspace(gpu::residual_add_workspace(call));
  gpu::launch_residual_add_backward(call, workspace.as<float>(), nullptr);
  workspace.check_margins("workspace");
  Exact for_x(numel), for_residual(numel);
  for (int64_t i = 0; i < numel; ++i) {
    const auto k = static_cast<size_t>(i);
    for_x.set(i, 0, alpha.at(i) * g[k], std::abs(alpha.at(i)) * g_terms[k]);
    for_residual.set(
        i, 0, beta_at(i) * g[k],
        (c.complement ? 1 + std::abs(alpha.at(i)) : std::abs(beta_at(i))) * g_terms[k]);
  }
  if (c.want_x) check_rule_R(c.describe() + ": grad_x", grad_x, for_x, {0.0});
  if (c.want_residual) {
    check_rule_R(c.describe() + ": grad_residual", grad_residual, for_residual, {0.0});
  }
  if (want_alpha) alpha.check_grad(c.describe() + ": grad_alpha", by_alpha, by_alpha_terms);
  if (want_beta) beta.check_grad(c.describe() + ": grad_beta", by_beta, by_beta_terms);
}

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr Activation kActivations[] = {Activation::identity, Activation::relu,
                                       Activation::leaky_relu, Activation::silu, Activation::gelu};

// Rows that fill no vector and no byte, one row, one element, several pieces, empty.
void shapes() {
  const int64_t sizes[][2] = {{3, 35},   {2, 64},  {5, 1},    {1, 1003}, {1, 1},  {4, 12},
                              {2, 1100}, {17, 65}, {1, 5000}, {0, 3},    {3, 0},  {9, 8},
                              {2, 2049}, {1, 0},   {300, 3},  {3, 1028}, {1, 30}, {2, 7}};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto& size : sizes) {
      for (const Kind kind : kKinds) {
        for (const Activation activation : {Activation::identity, Activation::relu}) {
          run({dtype, size[0], size[1], activation, kind, Kind::scalar});
          run({dtype, size[0], size[1], activation, kind, kind});
          run({dtype, size[0], size[1], activation, kind, Kind::constant, true});
        }
      }
    }
  }
}

// Every instantiation: dtype, activation, access width, and each pair of kinds.
void flags() {
  for (const DType dtype : kTypes) {
    for (const Activation activation : kActivations) {
      for (const int64_t length : {40, 21}) {
        for (const Kind alpha : kKinds) {
          for (const Kind beta : kKinds) run({dtype, 3, length, activation, alpha, beta});
          run({dtype, 3, length, activation, alpha, Kind::constant, true});
        }
      }
    }
  }
}

void half_weights() {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const Kind kind : {Kind::scalar, Kind::per_sample}) {
      Config c{dtype, 5, 40, Activation::relu, kind, kind};
      c.half_weights = true;
      run(c);
    }
  }
}

// Every subset of the gradients.
void wanted() {
  for (int subset = 0; subset < 16; ++subset) {
    for (const Kind kind : {Kind::scalar, Kind::elementwise}) {
      for (const Activation activation : {Activation::relu, Activation::silu}) {
        Config c{DType::f32, 3, 21, activation, kind, kind};
        c.want_x = subset & 1;
        c.want_residual = subset & 2;
        c.want_alpha = subset & 4;
        c.want_beta = subset & 8;
        run(c);
      }
    }
  }
}

// More samples than a grid has blocks in y.
void large_batch() {
  if (kSlowEmulator) return;
  run({DType::f32, 65537, 3, Activation::relu, Kind::per_sample, Kind::scalar});
}

#ifdef RESOPS_SIMT  // only the emulator counts
// Sectors that the passes move, against those of the tensors that they have to move; also where
// samples are no whole number of vectors.
void traffic() {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int64_t length : {50176, 25137}) {
      for (const Kind kind : {Kind::constant, Kind::per_sample, Kind::elementwise}) {
        const gpu::ResidualAddShape shape{dtype, 4, length};
        const double bytes = static_cast<double>(shape.numel()) * (dtype == DType::f32 ? 4 : 2);
        const double bits = static_cast<double>(shape.numel()) / 8;
        const bool tensor = kind == Kind::elementwise, weighted = kind != Kind::constant;
        Random random(1);
        const Config config{dtype, 4, length, Activation::relu, kind};
        Weight weight(config, kind, random);
        Buffer x(dtype, shape.numel(), 0), residual(dtype, shape.numel(), 0),
            y(dtype, shape.numel(), 0), grad(dtype, shape.numel(), 0),
            mask(DType::f16, 4 * ((length + 15) / 16), 0);
        const gpu::ResidualAddWeights weights{
            weight.argument(), {nullptr, nullptr, true, false, 1}, false};
        const std::string name = config.describe();
        simt::reset_launches();
        gpu::launch_residual_add_forward({shape, weights, Activation::relu, 0, x.data(),
                                          residual.data(), y.data(), mask.as<uint8_t>()},
                                         nullptr);
        check_traffic("forward " + name, (tensor ? 4 : 3) * bytes + bits);
        const gpu::ResidualAddBackward call{shape,
                                            weights,
                                            Activation::relu,
                                            0,
                                            grad.data(),
                                            weighted ? x.data() : nullptr,
                                            nullptr,
                                            mask.as<uint8_t>(),
                                            y.data(),
                                            residual.data(),
                                            weighted ? weight.grad.data() : nullptr,
                                            nullptr};
        Workspace workspace(gpu::residual_add_workspace(call));
        simt::reset_launches();
        gpu::launch_residual_add_backward(call, workspace.as<float>(), nullptr);
        check_traffic("backward " + name, (tensor ? 6 : weighted ? 4 : 3) * bytes + bits);
      }
    }
  }
}
#endif

const Cases kCases = {
#ifdef RESOPS_SIMT
    {"traffic", traffic},
#endif
    {"shapes", shapes},           {"flags", flags},
    {"large_batch", large_batch}, {"half_weights", half_weights},
    {"wanted", wanted},
};

}  // namespace

int main(int argc, char** argv) { return run_kernel_cases(kCases, argc, argv); }
