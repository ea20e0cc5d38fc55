// The forward convolution of csrc/cuda/conv_bn_act.h against the definition in double
// (docs/math/conv_bn_act.md).

#include "conv_bn_act.h"

#include "tensors.h"

using namespace resops;
namespace gpu = resops::cuda;  // `cuda` alone is the toolkit's

namespace {

struct Config {
  DType dtype;
  int64_t samples;
  int in_channels, out_channels, height, width;
  int kernel_h = 3, kernel_w = 3, stride = 1, padding = 1, dilation = 1;
  bool prologue = false;
  Activation before = Activation::identity;
  bool bias = false, residual = false, half_bias = false;
  Activation after = Activation::identity;
  bool statistics = false;
  int more_channels = 0;  // of the tensor that x is a slice of
  double mean = 0;        // of a channel of y
  int64_t offset = 16;    // bytes between a multiple of 128 and the tensors

  std::string describe() const {
    char text[240];
    std::snprintf(text, sizeof(text),
                  "%s (%lld, %d, %d, %d) to %d channels, %dx%d stride %d padding %d dilation %d "
                  "%s%s%s%s %s%s",
                  name_of(dtype), static_cast<long long>(samples), in_channels, height, width,
                  out_channels, kernel_h, kernel_w, stride, padding, dilation,
                  prologue ? "prologue " : "", name_of(before), bias ? " bias" : "",
                  residual ? " residual" : "", name_of(after), statistics ? " statistics" : "");
    return text;
  }
};

constexpr float kSlope = 0.1f;

// The tensors of one call, and what is exact.
class Call {
 public:
  explicit Call(const Config& config)
      : c(config),
        h{c.height, out_size(c.height, c.kernel_h), c.kernel_h, c.stride, c.padding, c.dilation},
        w{c.width, out_size(c.width, c.kernel_w), c.kernel_w, c.stride, c.padding, c.dilation},
        pitch(c.in_channels + c.more_channels),
        taps(c.kernel_h * c.kernel_w),
        pixels(c.samples * h.out_size * w.out_size),
        x(c.dtype, c.samples * h.size * w.size * pitch, c.offset),
        weight(c.dtype, int64_t{1} * c.out_channels * taps * c.in_channels, c.offset),
        scale(DType::f32, c.in_channels),
        shift(DType::f32, c.in_channels),
        bias(c.half_bias ? c.dtype : DType::f32, c.out_channels),
        residual(c.dtype, pixels * c.out_channels, c.offset),
        y(c.dtype, pixels * c.out_channels, c.offset),
        mean(DType::f32, c.out_channels),
        var(DType::f32, c.out_channels) {
    Random random(static_cast<unsigned>(x.size() + 7 * c.out_channels + c.kernel_w));
    for (int64_t i = 0; i < x.size(); ++i) {
      // What lies beside the slice is none of the kernel's business.
      x.set(i, i % pitch < c.in_channels ? random.normal() : std::nan(""));
    }
    const double size = 1 / std::sqrt(taps * c.in_channels);
    for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, size * random.normal());
    for (int64_t i = 0; i < c.in_channels; ++i) {
      scale.set(i, random.uniform(-1.5, 1.5));
      shift.set(i, random.uniform(-1, 1));  // what must not be convolved where there is padding
    }
    for (int64_t i = 0; i < c.out_channels; ++i) bias.set(i, c.mean + random.uniform(-1, 1));
    for (int64_t i = 0; i < residual.size(); ++i) residual.set(i, random.normal());
  }

  gpu::ConvBnActForward arguments() {
    gpu::ConvBnActForward call{};
    call.shape = {c.dtype, c.samples, c.in_channels, c.out_channels,
                  h,       w,         pitch,         static_cast<int>(taps * c.in_channels)};
    call.x = x.data();
    if (c.prologue) {
      call.scale = scale.as<float>();
      call.shift = shift.as<float>();
    }
    call.prologue = c.before;
    call.prologue_slope = kSlope;
    call.weight = weight.data();
    if (c.bias) call.bias = {bias.data(), !c.half_bias};
    if (c.residual) call.residual = residual.data();
    call.activation = c.after;
    call.negative_slope = kSlope;
    call.y = y.data();
    return call;
  }

  void run() {
    const gpu::ConvBnActForward call = arguments();
    Buffer workspace(DType::f32, c.statistics ? gpu::conv_bn_act_workspace(call) : 0);
    gpu::launch_conv_bn_act_forward(call, workspace.as<float>(),
                                    c.statistics ? mean.as<float>() : nullptr,
                                    c.statistics ? var.as<float>() : nullptr, nullptr);
    workspace.check_margins("workspace");
  }

  void check() {
    const Buffer input = convolved();
    Exact exact(y.size());
    for (int64_t m = 0; m < pixels; ++m) {
      for (int64_t o = 0; o < c.out_channels; ++o) {
        double sum = c.bias ? bias[o] : 0, terms = std::abs(sum);
        for_taps(m, [&](int64_t tap, int64_t pixel) {
          for (int64_t i = 0; i < c.in_channels; ++i) {
            const double term =
                input[pixel * c.in_channels + i] * weight[(o * taps + tap) * c.in_channels + i];
            sum += term;
            terms += std::abs(term);
          }
        });
        const int64_t at = m * c.out_channels + o;
        if (c.residual) {
          sum += residual[at];
          terms += std::abs(residual[at]);
        }
        exact.set(at, o, activation_at(c.after, sum, kSlope).value, terms);
      }
    }
    const std::vector<double> kappa(static_cast<size_t>(c.out_channels));
    check_rule_R(c.describe() + ": y", y, exact, kappa);
    if (c.statistics) check_statistics();
  }

  Config c;
  gpu::ConvAxis h, w;
  int64_t pitch, taps, pixels;
  Buffer x, weight, scale, shift, bias, residual, y, mean, var;

  // Pixels of x that the taps of all pixels of y read.
  int64_t taps_in_image() const {
    int64_t count = 0;
    for (int64_t m = 0; m < pixels; ++m) for_taps(m, [&](int64_t, int64_t) { ++count; });
    return count;
  }

 private:
  int out_size(int size, int kernel) const {
    return (size + 2 * c.padding - c.dilation * (kernel - 1) - 1) / c.stride + 1;
  }

  // f(tap, pixel of x) for what the window of output pixel m has of the image.
  template <class F>
  void for_taps(int64_t m, F f) const {
    const int64_t column = m % w.out_size, row = m / w.out_size % h.out_size;
    const int64_t sample = m / w.out_size / h.out_size;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t at_h = row * c.stride - c.padding + tap / c.kernel_w * c.dilation;
      const int64_t at_w = column * c.stride - c.padding + tap % c.kernel_w * c.dilation;
      if (at_h < 0 || at_h >= h.size || at_w < 0 || at_w >= w.size) continue;
      f(tap, (sample * h.size + at_h) * w.size + at_w);
    }
  }

  // x after the prologue, in the dtype of x, without what lies beside the slice.
  Buffer convolved() const {
    const int64_t count = x.size() / pitch;
    Buffer result(c.dtype, count * c.in_channels);
    for (int64_t i = 0; i < result.size(); ++i) {
      const int64_t channel = i % c.in_channels;
      const double v = x[i / c.in_channels * pitch + channel];
      const double z = scale[channel] * v + shift[channel];
      result.set(i, c.prologue ? activation_at(c.before, z, kSlope).value : v);
    }
    return result;
  }

  // Those of y as it is stored.
  void check_statistics() {
    const auto channels = static_cast<size_t>(c.out_channels);
    std::vector<double> sum(channels), absolute(channels), square(channels), kappa(channels);
    const double count = static_cast<double>(pixels);
    for (int64_t i = 0; i < y.size(); ++i) {
      sum[static_cast<size_t>(i % c.out_channels)] += y[i];
      absolute[static_cast<size_t>(i % c.out_channels)] += std::abs(y[i]);
    }
    for (int64_t i = 0; i < y.size(); ++i) {
      const auto k = static_cast<size_t>(i % c.out_channels);
      square[k] += std::pow(y[i] - sum[k] / count, 2);
    }
    Exact exact_mean(c.out_channels), exact_var(c.out_channels);
    for (size_t k = 0; k < channels; ++k) {
      const auto channel = static_cast<int64_t>(k);
      const double m = pixels > 0 ? sum[k] / count : 0, v = pixels > 0 ? square[k] / count : 0;
      kappa[k] = pixels > 0 ? absolute[k] / count / std::sqrt(v + 1e-5) : 0;
      exact_mean.set(channel, channel, m, pixels > 0 ? absolute[k] / count : 0);
      exact_var.set(channel, channel, v, 2 * v);  // as in batch_norm_call.h
    }
    check_rule_R(c.describe() + ": mean", mean, exact_mean, kappa);
    check_rule_R(c.describe() + ": var", var, exact_var, kappa);
  }
};

void run(const Config& config) {
  Call call(config);
  call.run();
  call.check();
}

constexpr DType kDTypes[] = {DType::bf16, DType::f16};

// Channel counts that are no multiple of anything, odd images, a single row, a single pixel.
void shapes() {
  for (const DType dtype : kDTypes) {
    for (const int in_channels : {1, 3, 17, 65}) {
      for (const int out_channels : {1, 3, 17, 65}) {
        if (kSlowEmulator && in_channels != out_channels) continue;
        run({dtype, 2, in_channels, out_channels, 5, 7, 1, 1, 1, 0});
        run({dtype, 1, in_channels, out_channels, 7, 5, 3, 3, 2, 1});
      }
    }
    run({dtype, 1, 17, 3, 1, 9});
    run({dtype, 3, 8, 8, 1, 1});
    run({dtype, 2, 16, 24, 9, 11, 1, 1, 2, 0});
    run({dtype, 3, 40, 72, 9, 11, 3, 3, 2, 1});
    run({dtype, 2, 64, 136, 9, 11, 1, 1, 1, 0});
    run({dtype, 1, 72, 64, 12, 13});
  }
}

void windows() {
  for (const DType dtype : kDTypes) {
    for (const int channels : {8, 5}) {
      for (const int padding : {0, 2, 5}) {
        if (kSlowEmulator && padding != 2) continue;
        Config c{dtype, 2, channels, channels, 6, 7};
        c.padding = padding;
        run(c);
        c.kernel_h = 5;
        c.stride = 3;
        run(c);
        c.kernel_h = c.dilation = 2;
        c.prologue = true;
        c.before = Activation::relu;
        run(c);
      }
      Config rows{dtype, 2, channels, 8, 0, 3};  // an image of nothing but padding
      rows.padding = 3;
      rows.bias = true;
      run(rows);
      Config slice{dtype, 2, channels, 8, 5, 6};
      slice.more_channels = channels == 8 ? 16 : 4;
      run(slice);
      slice.prologue = true;
      run(slice);
    }
  }
}

constexpr Activation kActivations[] = {Activation::identity, Activation::relu,
                                       Activation::leaky_relu, Activation::silu, Activation::gelu};

// Everything that goes before and after the product; channels for each of the tiles.
void flags() {
  for (const DType dtype : kDTypes) {
    for (const int channels : {8, 72, 5}) {
      for (const Activation activation : kActivations) {
        if (kSlowEmulator && activation != Activation::gelu) continue;
        Config c{dtype, 1, channels, channels, 5, 3, 1, 1, 1, 0};
        c.bias = true;
        c.after = activation;
        run(c);
        c.residual = true;
        run(c);
        c.prologue = true;
        c.before = activation;
        c.half_bias = true;
        run(c);
        c.kernel_h = c.kernel_w = 3;
        c.padding = 1;
        c.bias = c.residual = false;
        c.after = Activation::identity;
        c.statistics = true;
        run(c);
      }
    }
  }
}

void statistics() {
  for (const DType dtype : kDTypes) {
    for (const int channels : {8, 136, 17}) {
      Config c{dtype, 2, 8, channels, 11, 13, 1, 1, 1, 0};
      c.statistics = c.bias = true;
      for (const double mean : {0.0, 100.0}) {
        c.mean = mean;
        run(c);
      }
      c.height = c.width = 1;
      c.samples = 1;
      run(c);
      c.samples = 0;
      Call empty(c);
      empty.run();
      for (int64_t k = 0; k < channels; ++k) CHECK(empty.mean[k] == 0 && empty.var[k] == 0);
    }
  }
}

// NaN and inf reach y through relu, and the statistics of their channel.
void special_values() {
  for (const double special : {std::nan(""), HUGE_VAL}) {
    for (const bool prologue : {false, true}) {
      Config c{DType::bf16, 1, 8, 8, 4, 4, 1, 1, 1, 0};
      c.prologue = prologue;
      c.before = Activation::relu;
      c.statistics = true;
      Call call(c);
      call.scale.set(3, 1);
      call.x.set(5 * 8 + 3, special);
      for (int64_t o = 0; o < 8; ++o) call.weight.set(o * 8 + 3, o == 2 ? 1 : 0.5);
      call.run();
      for (int64_t o = 0; o < 8; ++o) {
        const double at = call.y[5 * 8 + o];
        CHECK(std::isnan(special) ? std::isnan(at) : at == special);
        CHECK(!std::isfinite(call.mean[o]) && std::isnan(call.var[o]));
        CHECK(std::isfinite(call.y[4 * 8 + o]));
      }
    }
  }
}

// The same bits, whatever else happens.
void repeats() {
  Config c{DType::f16, 2, 16, 136, 9, 11};
  c.statistics = true;
  Call first(c), second(c);
  first.run();
  second.run();
  for (int64_t i = 0; i < first.y.size(); ++i) CHECK(first.y[i] == second.y[i]);
  for (int64_t k = 0; k < c.out_channels; ++k) {
    CHECK(first.mean[k] == second.mean[k] && first.var[k] == second.var[k]);
  }
}

#ifdef RESOPS_SIMT  // only the emulator counts
// What has to be moved: for every tile of channels each tap that is in the image, for every tile of
// pixels the weight, and y and the residual once. Of the three partial sums of a tile the finaliser
// reads two to find the mean, and then all.
void traffic() {
  for (const DType dtype : kDTypes) {
    for (const int kernel : {1, 3}) {
      for (const int out_channels : {64, 256}) {
        for (const bool prologue : {false, true}) {
          Config c{dtype, 1, 64, out_channels, 16, 16, kernel, kernel, 1, kernel / 2};
          c.prologue = prologue;
          c.before = Activation::relu;
          c.residual = !prologue;
          c.statistics = prologue;
          c.offset = 0;
          Call call(c);
          const double tile = out_channels > 64 && !prologue ? 128 : 64;
          const double windows = 2.0 * static_cast<double>(call.taps_in_image()) * c.in_channels;
          const double weight = 2.0 * static_cast<double>(call.weight.size());
          const double out = 2.0 * static_cast<double>(call.y.size());
          simt::reset_launches();
          const gpu::ConvBnActForward arguments = call.arguments();
          Buffer workspace(DType::f32, gpu::conv_bn_act_workspace(arguments));
          gpu::launch_conv_bn_act_forward(arguments, workspace.as<float>(),
                                          c.statistics ? call.mean.as<float>() : nullptr,
                                          c.statistics ? call.var.as<float>() : nullptr, nullptr);
          double least = windows * out_channels / tile +
                         weight * static_cast<double>((call.pixels + 127) / 128) +
                         out * (c.residual ? 2 : 1);
          if (c.statistics) least += (3 + 5) * 4.0 * static_cast<double>(workspace.size()) / 3;
          check_traffic(c.describe(), least);
        }
      }
    }
  }
}
#endif

const Cases kCases = {
#ifdef RESOPS_SIMT
    {"traffic", traffic},
#endif
    {"shapes", shapes},         {"windows", windows}, {"flags", flags},
    {"statistics", statistics}, {"repeats", repeats}, {"special_values", special_values},
};

}  // namespace

int main(int argc, char** argv) {
#ifdef RESOPS_SIMT
  simt::options().device.shared_per_block = 48 * 1024;
  simt::options().device.shared_per_multiprocessor = 100 * 1024;
#endif
  return run_kernel_cases(kCases, argc, argv);
}
