// Every kernel of csrc/cuda/batch_norm_act_max_pool.cuh under the emulator: forward and backward
// against the definition in double, by rule R, and what exact data and special values give.

#include "batch_norm_act_max_pool.h"

#include "tensors.h"

using namespace resops;
namespace gpu = resops::cuda;  // `cuda` alone is the toolkit's

namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr Activation kActivations[] = {Activation::identity, Activation::relu,
                                       Activation::leaky_relu, Activation::silu, Activation::gelu};
constexpr float kSlope = 0.125f;

struct Windows {
  int kernel[2] = {3, 3}, stride[2] = {2, 2}, padding[2] = {1, 1};
};

gpu::PoolShape make_shape(DType dtype, int64_t samples, int64_t channels, int height, int width,
                          bool channels_last, const Windows& v) {
  gpu::PoolShape s{};
  s.dtype = dtype;
  s.samples = samples;
  s.channels = channels;
  s.channels_last = channels_last;
  s.height = height;
  s.width = width;
  s.out_height = (height + 2 * v.padding[0] - v.kernel[0]) / v.stride[0] + 1;
  s.out_width = (width + 2 * v.padding[1] - v.kernel[1]) / v.stride[1] + 1;
  for (int d = 0; d < 2; ++d) {
    s.kernel[d] = v.kernel[d];
    s.stride[d] = v.stride[d];
    s.padding[d] = v.padding[d];
  }
  return s;
}

// The tensors of one call, and what is exact: the values around each window, one after the other.
class Call {
 public:
  Call(const gpu::PoolShape& shape, Activation activation_, bool training_ = true,
       bool half_parameters = false, int64_t shift = 16)
      : s(shape),
        activation(activation_),
        training(training_),
        parameter(half_parameters ? s.dtype : DType::f32),
        numel(s.samples * s.channels * s.height * s.width),
        pooled(s.samples * s.channels * s.out_height * s.out_width),
        x(s.dtype, numel, shift),
        grad_y(s.dtype, pooled, shift),
        y(s.dtype, pooled, shift),
        grad_x(s.dtype, numel, shift),
        index(DType::f16, (pooled + 1) / 2, shift),
        weight(parameter, s.channels),
        bias(parameter, s.channels),
        mean(DType::f32, s.channels),
        invstd(DType::f32, s.channels) {
    Random random(static_cast<unsigned>(numel + 7 * s.channels));
    for (int64_t k = 0; k < s.channels; ++k) {
      weight.set(k, random.uniform(-1.5, 1.5));
      bias.set(k, random.uniform(-1, 1));
      mean.set(k, random.uniform(-3, 3));
      invstd.set(k, random.uniform(0.5, 2));
    }
    for (int64_t i = 0; i < numel; ++i) x.set(i, mean[channel(i, area())] + random.normal());
    for (int64_t i = 0; i < pooled; ++i) grad_y.set(i, random.normal() + 0.3);
  }

  int64_t area() const { return int64_t{s.height} * s.width; }
  int64_t pooled_area() const { return int64_t{s.out_height} * s.out_width; }
  int64_t channel(int64_t i, int64_t plane) const {
    return s.channels_last ? i % s.channels : i / plane % s.channels;
  }
  // Element of sample n, channel k, position p of planes of `plane`.
  int64_t element(int64_t n, int64_t k, int64_t p, int64_t plane) const {
    return s.channels_last ? (n * plane + p) * s.channels + k : (n * s.channels + k) * plane + p;
  }
  double xhat(int64_t i) const {
    const int64_t k = channel(i, area());
    return (x[i] - mean[k]) * invstd[k];
  }
  double z(int64_t i) const {
    const int64_t k = channel(i, area());
    return weight[k] * xhat(i) + bias[k];
  }
  double z_terms(int64_t i) const {
    const int64_t k = channel(i, area());
    return std::abs(weight[k] * xhat(i)) + std::abs(bias[k]);
  }
  double kappa() const { return 8; }  // |x| and |mean| are some 4 and invstd is at most 2

  gpu::BatchNormAffine affine() {
    const bool is_float = parameter == DType::f32;
    return {
        mean.as<float>(), invstd.as<float>(), {weight.data(), is_float}, {bias.data(), is_float}};
  }

  // f(window, element of x, position in the window) for everything that windows see.
  template <class F>
  void for_windows(F f) const {
    for (int64_t n = 0; n < s.samples; ++n) {
      for (int64_t k = 0; k < s.channels; ++k) {
        for (int oh = 0; oh < s.out_height; ++oh) {
          for (int ow = 0; ow < s.out_width; ++ow) {
            const int64_t o = element(n, k, int64_t{oh} * s.out_width + ow, pooled_area());
            for (int p = 0; p < s.kernel[0] * s.kernel[1]; ++p) {
              const int h = oh * s.stride[0] - s.padding[0] + p / s.kernel[1];
              const int w = ow * s.stride[1] - s.padding[1] + p % s.kernel[1];
              if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
              f(o, element(n, k, int64_t{h} * s.width + w, area()), p);
            }
          }
        }
      }
    }
  }

  void run() {
    forward();
    backward();
  }

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof(text),
                  "%s (%lld, %lld, %d, %d) %s %s, windows %dx%d / %dx%d + %dx%d", name_of(s.dtype),
                  static_cast<long long>(s.samples), static_cast<long long>(s.channels), s.height,
                  s.width, s.channels_last ? "channels-last" : "contiguous", name_of(activation),
                  s.kernel[0], s.kernel[1], s.stride[0], s.stride[1], s.padding[0], s.padding[1]);
    return text;
  }

  void launch_forward() {
    gpu::launch_batch_norm_act_max_pool_forward(
        s, {affine(), activation, kSlope, x.data(), y.data(), index.as<uint8_t>()}, nullptr);
  }

  void forward() {
    launch_forward();
    index.check_margins("index");
    Exact exact(pooled);
    std::vector<double> best(size(pooled), -std::numeric_limits<double>::infinity());
    for_windows([&](int64_t o, int64_t i, int) {
      const double a = activation_at(activation, z(i), kSlope).value;
      if (a <= best[size(o)]) return;
      best[size(o)] = a;
      exact.set(o, 0, a, z_terms(i));
    });
    check_rule_R(describe() + ": y", y, exact, {kappa()});
    // Each index leads to an element of its window that is as large as y.
    const double unit = s.dtype == DType::f32 ? 0x1p-20 : s.dtype == DType::f16 ? 0x1p-9 : 0x1p-6;
    winner.assign(size(pooled), -1);
    for_windows([&](int64_t o, int64_t i, int p) {
      if (index.as<uint8_t>()[o] != p) return;
      winner[size(o)] = i;
      const double a = activation_at(activation, z(i), kSlope).value;
      if (best[size(o)] - a > unit * (z_terms(i) + std::abs(best[size(o)]))) {
        fail(describe() + ": index of a smaller element");
      }
    });
    for (const int64_t i : winner) {
      if (i < 0) fail(describe() + ": index outside of the image");
    }
  }

  void backward() {
    const int64_t m = s.samples * area();
    std::vector<double> g(size(numel)), g_terms(size(numel));
    for (int64_t o = 0; o < pooled; ++o) {
      const int64_t i = winner[size(o)];
      const ActivationValue a = activation_at(activation, z(i), kSlope);
      if (is_masked(activation) && std::abs(z(i)) < 1e-4 * z_terms(i)) grad_y.set(o, 0);
      g[size(i)] += grad_y[o] * a.first;
      g_terms[size(i)] +=
          std::abs(grad_y[o]) * (std::abs(a.first) + z_terms(i) * std::abs(a.second));
    }
    Exact sum(s.channels), sum_xhat(s.channels), exact(numel);
    for (int64_t i = 0; i < numel; ++i) {
      const auto k = size(channel(i, area()));
      sum.value[k] += g[size(i)];
      sum.terms[k] += g_terms[size(i)];
      sum_xhat.value[k] += g[size(i)] * xhat(i);
      sum_xhat.terms[k] += g_terms[size(i)] * std::abs(xhat(i));
      sum.channel[k] = sum_xhat.channel[k] = static_cast<int64_t>(k);
    }
    Buffer sum_grad(DType::f32, s.channels), sum_grad_xhat(DType::f32, s.channels);
    Buffer grad_weight(parameter, s.channels), grad_bias(parameter, s.channels);
    launch_reduce(sum_grad, sum_grad_xhat, grad_weight, grad_bias);
    const std::vector<double> kappas(size(s.channels), kappa());
    check_rule_R(describe() + ": grad_bias", sum_grad, sum, kappas);
    check_rule_R(describe() + ": grad_weight", sum_grad_xhat, sum_xhat, kappas);
    check_rule_R(describe() + ": grad_bias, own dtype", grad_bias, sum, kappas);
    check_rule_R(describe() + ": grad_weight, own dtype", grad_weight, sum_xhat, kappas);

    launch_apply(sum_grad, sum_grad_xhat);
    const double inverse = m > 0 ? 1.0 / static_cast<double>(m) : 0;
    for (int64_t i = 0; i < numel; ++i) {
      const int64_t k = channel(i, area());
      const double scale = weight[k] * invstd[k];
      double value = g[size(i)], terms = g_terms[size(i)];
      if (training) {
        value -= inverse * (sum.value[size(k)] + xhat(i) * sum_xhat.value[size(k)]);
        terms += inverse * (sum.terms[size(k)] + std::abs(xhat(i)) * sum_xhat.terms[size(k)]);
      }
      exact.set(i, 0, scale * value, std::abs(scale) * terms);
    }
    check_rule_R(describe() + ": grad_x", grad_x, exact, {kappa()});
  }

  gpu::PoolGradient gradient() {
    return {affine(), activation, kSlope, x.data(), grad_y.data(), index.as<uint8_t>()};
  }
  void launch_reduce(Buffer& sum_grad, Buffer& sum_grad_xhat, Buffer& grad_weight,
                     Buffer& grad_bias) {
    Workspace workspace(gpu::batch_norm_act_max_pool_workspace(s));
    gpu::launch_batch_norm_act_max_pool_backward_reduce(
        s, gradient(), workspace.as<float>(),
        {sum_grad.as<float>(), sum_grad_xhat.as<float>(),
         parameter == s.dtype ? grad_bias.data() : nullptr,
         parameter == s.dtype ? grad_weight.data() : nullptr},
        nullptr);
    workspace.check_margins("workspace");
    if (parameter == s.dtype) return;
    for (int64_t k = 0; k < s.channels; ++k) {  // what the bindings hand out then
      grad_bias.set(k, sum_grad[k]);
      grad_weight.set(k, sum_grad_xhat[k]);
    }
  }
  void launch_apply(Buffer& sum_grad, Buffer& sum_grad_xhat) {
    const int64_t m = std::max<int64_t>(s.samples * area(), 1);
    gpu::launch_batch_norm_act_max_pool_backward_apply(
        s, gradient(),
        {training ? sum_grad.as<float>() : nullptr, training ? sum_grad_xhat.as<float>() : nullptr,
         1.0f / static_cast<float>(m), grad_x.data(), nullptr},
        nullptr);
  }

  static size_t size(int64_t i) { return static_cast<size_t>(i); }

  gpu::PoolShape s;
  Activation activation;
  bool training;
  DType parameter;
  int64_t numel, pooled;
  Buffer x, grad_y, y, grad_x, index, weight, bias, mean, invstd;
  std::vector<int64_t> winner;  // the element that each index leads to
};

// Windows that overlap, touch and lie apart; channels that fill no vector; rows that are cut.
void shapes() {
  const Windows all[] = {{},
                         {{2, 2}, {2, 2}, {0, 0}},
                         {{1, 1}, {1, 1}, {0, 0}},
                         {{3, 2}, {1, 3}, {1, 0}},
                         {{5, 4}, {1, 2}, {2, 2}},
                         {{5, 1}, {4, 1}, {0, 0}},
                         {{2, 1}, {7, 5}, {1, 0}}};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const Windows& windows : all) {
      for (const bool channels_last : {true, false}) {
        for (const int64_t channels : {1, 3, 16}) {
          if (kSlowEmulator && (channels == 1 || (dtype != DType::f32 && !channels_last))) continue;
          Call(make_shape(dtype, 2, channels, 9, 11, channels_last, windows), Activation::relu)
              .run();
        }
      }
    }
    if (kSlowEmulator) continue;
    Call(make_shape(dtype, 1, 17, 37, 5, true, {}), Activation::relu).run();
    Call(make_shape(dtype, 2, 72, 33, 30, true, {}), Activation::relu).run();
    Call(make_shape(dtype, 1, 65, 5, 40, true, {}), Activation::relu).run();
    Call(make_shape(dtype, 1, 2, 40, 3000, false, {}), Activation::relu).run();
    Call(make_shape(dtype, 1, 2, 90, 43, false, {}), Activation::relu).run();
    Call(make_shape(dtype, 1, 1, 1, 2, true, {{1, 1}, {1, 1}, {0, 0}}), Activation::relu).run();
    Call(make_shape(dtype, 0, 3, 5, 5, true, {}), Activation::relu).run();
  }
}

// Every instantiation: dtype, activation, layout and access width.
void flags() {
  for (const DType dtype : kTypes) {
    for (const Activation activation : kActivations) {
      // Accesses and barriers are the same for all; gelu has the most to compute.
      const bool extreme = activation == Activation::relu || activation == Activation::gelu;
      if (kSlowEmulator && !extreme) continue;
      for (const bool training : {true, false}) {
        for (const bool half : {false, true}) {
          if (half && (dtype == DType::f32 || !training)) continue;
          Call(make_shape(dtype, 2, 16, 7, 6, true, {}), activation, training, half).run();
          Call(make_shape(dtype, 2, 5, 7, 6, true, {}), activation, training, half).run();
          Call(make_shape(dtype, 2, 3, 7, 6, false, {}), activation, training, half).run();
        }
      }
    }
  }
}

// Ties, for which the first element counts; NaN, which is the largest; infinities.
void special_values() {
  const float inf = INFINITY, choices[] = {0, 1, -1, 1, 0, NAN, inf, -inf, -inf, -inf, -inf};
  for (const bool channels_last : {true, false}) {
    for (const int64_t channels : {3, 4}) {
      Call call(make_shape(DType::f32, 2, channels, 15, 14, channels_last, {}),
                Activation::identity);
      Random random(3);
      for (int64_t k = 0; k < channels; ++k) {
        call.weight.set(k, 1);
        call.bias.set(k, 0);
        call.mean.set(k, 0);
        call.invstd.set(k, 1);
      }
      for (int64_t i = 0; i < call.numel; ++i) {
        call.x.set(i, choices[static_cast<size_t>(random.uniform(0, 10.99))]);
      }
      call.launch_forward();
      std::vector<double> best(Call::size(call.pooled), -INFINITY);
      std::vector<int> where(Call::size(call.pooled), -1);
      call.for_windows([&](int64_t o, int64_t i, int p) {
        if (where[Call::size(o)] < 0) where[Call::size(o)] = p;
        if (call.x[i] > best[Call::size(o)] || std::isnan(call.x[i])) {
          best[Call::size(o)] = call.x[i];
          where[Call::size(o)] = p;
        }
      });
      for (int64_t o = 0; o < call.pooled; ++o) {
        const double expected = best[Call::size(o)];
        CHECK(std::isnan(expected) ? std::isnan(call.y[o]) : call.y[o] == expected);
        CHECK(call.index.as<uint8_t>()[o] == where[Call::size(o)]);
      }
    }
  }
}

#ifdef RESOPS_SIMT  // only the emulator counts
// Sectors that the passes move, against those of the tensors that they have to move, with the
// shared memory of an H200: with less, blocks are smaller and share more rows and columns.
void traffic() {
  simt::options().device.shared_per_block = 227 * 1024;
  simt::options().device.shared_per_multiprocessor = 228 * 1024;
  struct Layout {
    DType dtype;
    int64_t channels;
    bool channels_last;
    int width = 112;
  };
  for (const Layout& l : {Layout{DType::bf16, 64, true}, Layout{DType::f32, 64, true},
                          Layout{DType::bf16, 4, false}, Layout{DType::f32, 4, false},
                          Layout{DType::bf16, 4, false, 111}, Layout{DType::f32, 4, false, 111}}) {
    const int width = l.width;
    Call call(make_shape(l.dtype, 6, l.channels, 112, width, l.channels_last, {}), Activation::relu,
              true, false, 0);
    const double size = l.dtype == DType::f32 ? 4 : 2;
    const double whole = size * static_cast<double>(call.numel);
    const double windows = (size + 1) * static_cast<double>(call.pooled);
    const auto measure = [&](const char* pass, double least, auto launch) {
      simt::reset_launches();
      launch();
      char name[100];
      std::snprintf(name, sizeof(name), "%s %s (6, %lld, 112, %d) %s", pass, name_of(l.dtype),
                    static_cast<long long>(l.channels), width,
                    l.channels_last ? "channels-last" : "contiguous");
      check_traffic(name, least);
    };
    Buffer a(DType::f32, l.channels), b(DType::f32, l.channels);
    Buffer c(DType::f32, l.channels), d(DType::f32, l.channels);
    measure("forward", whole + windows, [&] { call.launch_forward(); });
    measure("backward reduce", whole + windows, [&] { call.launch_reduce(a, b, c, d); });
    measure("backward apply", 2 * whole + windows, [&] { call.launch_apply(a, b); });
  }
}
#endif

const Cases kCases = {
#ifdef RESOPS_SIMT
    {"traffic", traffic},
#endif
    {"shapes", shapes},
    {"flags", flags},
    {"special_values", special_values},
};

}  // namespace

int main(int argc, char** argv) { return run_kernel_cases(kCases, argc, argv); }
