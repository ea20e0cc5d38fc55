// Every kernel of csrc/cuda/batch_norm.cuh under the emulator: forward and backward against the
// definition in double, by rule R, and what exact data, outliers and special values give.

#include "batch_norm_call.h"

namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr Activation kActivations[] = {Activation::identity, Activation::relu,
                                       Activation::leaky_relu, Activation::silu, Activation::gelu};

void run(const Config& config) { Call(config).run(); }

// Odd shapes in both layouts: channels that fill no vector, rows that fill no tile, one row, empty.
void shapes() {
  struct Size {
    int64_t samples, channels, spatial;
  };
  const Size sizes[] = {{2, 1, 35},   {3, 3, 49},  {2, 17, 21}, {3, 65, 7},   {2, 8, 9},
                        {2, 64, 15},  {1, 17, 2},  {5, 3, 1},   {7, 24, 1},   {2, 300, 3},
                        {2, 520, 2},  {2, 4, 196}, {0, 5, 3},   {2, 3, 0},    {1, 2, 64},
                        {2, 2, 1003}, {1, 1, 2},   {37, 33, 4}, {70, 16, 49}, {9, 3, 343}};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const Size& s : sizes) {
      for (const bool channels_last : {true, false}) {
        Config c{dtype, s.samples, s.channels, s.spatial, channels_last};
        if (!kSlowEmulator) run(c);  // slow, and finds the same with a residual
        c.residual = true;
        run(c);
      }
    }
  }
}

// Every instantiation: dtype, activation, residual, layout and access width.
void flags() {
  for (const DType dtype : kTypes) {
    for (const Activation activation : kActivations) {
      for (const bool residual : {false, true}) {
        run({dtype, 2, 12, 21, true, activation, residual});
        run({dtype, 2, 3, 24, false, activation, residual});
        run({dtype, 2, 3, 21, false, activation, residual});
      }
    }
  }
}

void parameters() {
  for (const DType dtype : kTypes) {
    for (const int64_t channels : {16, 5}) {
      for (const bool channels_last : {true, false}) {
        Config c{dtype, 3, channels, 16, channels_last, Activation::relu, true};
        c.affine = false;
        run(c);
        c.affine = true;
        c.half_parameters = dtype != DType::f32;
        run(c);
        c.training = false;
        run(c);
        c.activation = Activation::identity;
        c.residual = false;
        run(c);
      }
    }
  }
}

// The second pass from the end, and grids of one block and of many.
void walks() {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool channels_last : {true, false}) {
      for (const int blocks : {1, 2, 40}) {
        Config c{dtype, 9, 17, 45, channels_last, Activation::relu, true};
        c.reverse = true;
        c.blocks = blocks;
        run(c);
        c.channels = 16;
        c.spatial = 72;
        run(c);
      }
    }
  }
}

// Means far from 0, as one-pass formulas cannot take them.
void means() {
  for (const bool channels_last : {true, false}) {
    for (const double mean : {100.0, 10000.0}) {
      Config c{DType::f32, 4, 9, 300, channels_last};
      c.mean = mean;
      run(c);
    }
  }
}

// Arguments far below 0, where all that is left of gelu and silu is the difference of small terms.
void tails() {
  for (const DType dtype : kTypes) {
    for (const Activation activation : {Activation::silu, Activation::gelu}) {
      for (const bool residual : {false, true}) {
        Config c{dtype, 4, 9, 21, true, activation, residual};
        c.offset = -10;
        run(c);
      }
    }
  }
}

// More samples than a grid has blocks in y.
void large_batch() {
  if (kSlowEmulator) return;
  for (const bool channels_last : {true, false}) {
    run({DType::f32, 131073, 2, 3, channels_last, Activation::relu, true});
  }
  run({DType::bf16, 131073, 1, 1, true});
}

struct Statistics {
  Buffer mean, var;
};
Statistics statistics_of(const BatchNormShape& shape, Buffer& x) {
  Workspace workspace(gpu::batch_norm_workspace(shape));
  Statistics s{Buffer(DType::f32, shape.channels), Buffer(DType::f32, shape.channels)};
  gpu::launch_batch_norm_statistics(
      shape, x.data(), workspace.as<float>(),
      {s.mean.as<float>(), s.var.as<float>(), nullptr, 1e-5, {}, {}, 0}, nullptr);
  return s;
}

// Means that are powers of two and integer offsets that cancel: any order of summation is exact.
// A constant channel has variance 0; one outlier, wherever it is, changes no other digit.
void exact_statistics() {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool channels_last : {true, false}) {
      for (const int64_t spatial : {1LL, 8LL, 49LL, 1000LL}) {
        const BatchNormShape shape{dtype, 6, 11, spatial, channels_last || spatial == 1};
        const int64_t m = shape.count();
        Buffer x(dtype, shape.numel());
        for (int64_t i = 0; i < shape.numel(); ++i) {
          const int64_t k = shape.channels_last ? i % 11 : i / spatial % 11;
          const int64_t j = shape.channels_last ? i / 11 : i / spatial / 11 * spatial + i % spatial;
          const double centre = k == 0 ? 0.1 : std::ldexp(1, static_cast<int>(k) - 2);
          const int64_t pair = std::min(j, m - 1 - j) % 3, sign = 2 * j < m - 1 ? 1 : -1;
          x.set(i, centre + (k == 0 || 2 * j == m - 1 ? 0 : std::ldexp(pair * sign, -2)));
        }
        const Statistics s = statistics_of(shape, x);
        for (int64_t k = 0; k < 11; ++k) {
          double sum = 0, square = 0;
          std::vector<double> values;
          for (int64_t i = 0; i < shape.numel(); ++i) {
            if ((shape.channels_last ? i % 11 : i / spatial % 11) == k) values.push_back(x[i]);
          }
          for (const double v : values) sum += v;
          const double mean = k == 0 ? values[0] : sum / static_cast<double>(m);
          for (const double v : values) square += (v - mean) * (v - mean);
          CHECK(s.mean[k] == static_cast<float>(mean));
          CHECK(s.var[k] == static_cast<float>(k == 0 ? 0 : square / static_cast<double>(m)));
        }
      }
    }
  }
}

void outliers() {
  for (const bool channels_last : {true, false}) {
    const BatchNormShape shape{DType::f32, 8, 3, 400, channels_last};
    for (const int64_t where : {int64_t{0}, shape.numel() / 2, shape.numel() - 1}) {
      Buffer x(DType::f32, shape.numel());
      Random random(5);
      for (int64_t i = 0; i < shape.numel(); ++i) x.set(i, random.normal());
      x.set(where, 1e6);
      const Statistics s = statistics_of(shape, x);
      const int64_t k = channels_last ? where % 3 : where / 400 % 3;
      double sum = 0, absolute = 0, square = 0;
      const double m = static_cast<double>(shape.count());
      for (int64_t i = 0; i < shape.numel(); ++i) {
        if ((channels_last ? i % 3 : i / 400 % 3) != k) continue;
        sum += x[i];
        absolute += std::abs(x[i]);
      }
      for (int64_t i = 0; i < shape.numel(); ++i) {
        if ((channels_last ? i % 3 : i / 400 % 3) != k) continue;
        square += (x[i] - sum / m) * (x[i] - sum / m);
      }
      CHECK(std::abs(s.mean[k] - sum / m) <= 8 * 0x1p-24 * absolute / m);
      CHECK(std::abs(s.var[k] - square / m) <= 8 * 0x1p-24 * square / m);
    }
    for (const double value : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      Buffer x(DType::f32, shape.numel());
      for (int64_t i = 0; i < shape.numel(); ++i) x.set(i, static_cast<double>(i % 7));
      for (int64_t i = 0; i < shape.numel(); ++i) {
        const int64_t k = channels_last ? i % 3 : i / 400 % 3;
        if (k == 1 && i % 5 < 3) x.set(i, value);
      }
      const Statistics s = statistics_of(shape, x);
      CHECK(std::isfinite(s.mean[0]) && std::isfinite(s.var[2]));
      CHECK(std::isnan(value) ? std::isnan(s.mean[1]) : s.mean[1] == INFINITY);
      CHECK(std::isnan(s.var[1]));
    }
  }
}

// Images whose corners are 0 and whose inside is far from it: a shift taken from the border would
// leave nothing of the variance.
void corners() {
  constexpr int64_t kWidth = 28, kPlane = kWidth * kWidth, kSamples = 4, kChannels = 8;
  for (const bool channels_last : {true, false}) {
    const BatchNormShape shape{DType::f32, kSamples, kChannels, kPlane, channels_last};
    Buffer x(DType::f32, shape.numel());
    Random random(6);
    double sum = 0, square = 0;
    const auto index = [&](int64_t n, int64_t k, int64_t s) {
      return channels_last ? (n * kPlane + s) * kChannels + k : (n * kChannels + k) * kPlane + s;
    };
    for (int64_t k = 0; k < kChannels; ++k) {
      for (int64_t n = 0; n < kSamples; ++n) {
        for (int64_t s = 0; s < kPlane; ++s) {
          const bool corner = (n == 0 && s == 0) || (n == kSamples - 1 && s == kPlane - 1);
          x.set(index(n, k, s), corner ? 0 : 1e5 + random.normal());
        }
      }
    }
    const Statistics got = statistics_of(shape, x);
    const double m = static_cast<double>(shape.count());
    for (int64_t k = 0; k < kChannels; ++k) {
      sum = square = 0;
      for (int64_t j = 0; j < shape.count(); ++j) sum += x[index(j / kPlane, k, j % kPlane)];
      for (int64_t j = 0; j < shape.count(); ++j) {
        const double d = x[index(j / kPlane, k, j % kPlane)] - sum / m;
        square += d * d;
      }
      CHECK(std::abs(got.var[k] - square / m) <= 0x1p-21 * square / m);
    }
  }
}

// NaN, zeros of both signs and infinities through the activations and into the mask; mean 0 and
// invstd 1, so that z is x + residual.
void special_values() {
  const float inf = INFINITY,
              values[] = {0.0f, -0.0f, NAN, 1.0f, -1.0f, inf, -inf, 1e-40f, -1e-40f};
  const int64_t count = 9;
  for (const bool channels_last : {true, false}) {
    for (const Activation activation : {Activation::relu, Activation::leaky_relu}) {
      for (const bool with_residual : {false, true}) {
        const BatchNormShape shape{DType::f32, 1, 2, count, channels_last};
        Buffer x(DType::f32, 2 * count), zero(DType::f32, 2 * count), y(DType::f32, 2 * count);
        Buffer grad(DType::f32, 2 * count), grad_x(DType::f32, 2 * count);
        Buffer mean(DType::f32, 2), invstd(DType::f32, 2), mask(DType::f16, 4);
        for (int64_t k = 0; k < 2; ++k) {
          mean.set(k, 0);
          invstd.set(k, 1);
        }
        for (int64_t i = 0; i < 2 * count; ++i) {
          x.as<float>()[i] = values[channels_last ? i / 2 : i % count];
          zero.set(i, 0);
          grad.set(i, 1);
        }
        const gpu::BatchNormAffine affine{mean.as<float>(), invstd.as<float>(), {}, {}};
        gpu::launch_batch_norm_apply(
            shape,
            {affine, activation, 0.5f, x.data(), with_residual ? zero.data() : nullptr, y.data(),
             mask.as<uint8_t>()},
            {}, nullptr);
        const gpu::BatchNormGradient call{affine,   activation,
                                          0.5f,     grad.data(),
                                          x.data(), with_residual ? mask.as<uint8_t>() : nullptr,
                                          nullptr};
        gpu::launch_batch_norm_backward_apply(
            shape, call, {nullptr, nullptr, 0, grad_x.data(), nullptr}, {}, nullptr);
        const double slope = activation == Activation::relu ? 0 : 0.5;
        for (int64_t i = 0; i < 2 * count; ++i) {
          const float v = x.as<float>()[i];
          CHECK(grad_x[i] == (v <= 0 ? slope : 1));
          if (std::isnan(v)) {
            CHECK(std::isnan(y[i]));
          } else {
            CHECK(y[i] == (v > 0 ? v : activation == Activation::relu ? 0 : v * 0.5f));
          }
        }
      }
    }
  }
}

#ifdef RESOPS_SIMT  // only the emulator counts
// Sectors that the passes move, against those of the tensors that they have to move.
void traffic() {
  struct Layout {
    DType dtype;
    int64_t samples, channels, spatial;
    bool channels_last;
  };
  for (const Layout& l :
       {Layout{DType::bf16, 16, 64, 784, true}, Layout{DType::f32, 16, 64, 784, true},
        Layout{DType::bf16, 16, 256, 784, true}, Layout{DType::bf16, 16, 20, 3136, true},
        Layout{DType::bf16, 16, 8, 3136, false}, Layout{DType::f32, 16, 8, 3136, false},
        // Planes that are no whole vectors, smaller and larger than what a block has of a row.
        Layout{DType::bf16, 256, 64, 49, false}, Layout{DType::f32, 256, 32, 49, false},
        Layout{DType::bf16, 64, 16, 1225, false}}) {
    const BatchNormShape shape{l.dtype, l.samples, l.channels, l.spatial, l.channels_last};
    const double bytes = static_cast<double>(shape.numel()) * (l.dtype == DType::f32 ? 4 : 2);
    const double bits = static_cast<double>(shape.mask_bytes());
    Buffer x(l.dtype, shape.numel(), 0), residual(l.dtype, shape.numel(), 0),
        y(l.dtype, shape.numel(), 0), grad(l.dtype, shape.numel(), 0);
    Buffer mean(DType::f32, l.channels), invstd(DType::f32, l.channels);
    Buffer mask(DType::f16, (shape.mask_bytes() + 1) / 2, 0);
    Workspace workspace(gpu::batch_norm_workspace(shape));
    for (int64_t i = 0; i < shape.numel(); ++i) {
      x.set(i, static_cast<double>(i % 5));
      residual.set(i, static_cast<double>(i % 3));
    }
    const gpu::BatchNormAffine affine{mean.as<float>(), invstd.as<float>(), {}, {}};
    const auto measure = [&](const char* pass, double least, auto launch) {
      simt::reset_launches();
      launch();
      char name[100];
      std::snprintf(name, sizeof(name), "%s %s (%lld, %lld, %lld) %s", pass, name_of(l.dtype),
                    static_cast<long long>(l.samples), static_cast<long long>(l.channels),
                    static_cast<long long>(l.spatial),
                    l.channels_last ? "channels-last" : "contiguous");
      check_traffic(name, least);
    };
    measure("statistics", bytes, [&] {
      gpu::launch_batch_norm_statistics(
          shape, x.data(), workspace.as<float>(),
          {mean.as<float>(), nullptr, invstd.as<float>(), 1e-5, {}, {}, 0}, nullptr);
    });
    measure("apply", 2 * bytes, [&] {
      gpu::launch_batch_norm_apply(
          shape, {affine, Activation::relu, 0, x.data(), nullptr, y.data(), nullptr}, {}, nullptr);
    });
    measure("apply, residual", 3 * bytes + bits, [&] {
      gpu::launch_batch_norm_apply(
          shape,
          {affine, Activation::relu, 0, x.data(), residual.data(), y.data(), mask.as<uint8_t>()},
          {}, nullptr);
    });
    for (const bool masked : {false, true}) {
      const gpu::BatchNormGradient call{
          affine, Activation::relu, 0, y.data(), x.data(), masked ? mask.as<uint8_t>() : nullptr,
          nullptr};
      measure(masked ? "reduce, mask" : "reduce", 2 * bytes + (masked ? bits : 0), [&] {
        gpu::launch_batch_norm_backward_reduce(
            shape, call, workspace.as<float>(),
            {mean.as<float>(), invstd.as<float>(), nullptr, nullptr}, nullptr);
      });
      measure(masked ? "backward apply, mask" : "backward apply",
              masked ? 4 * bytes + bits : 3 * bytes, [&] {
                gpu::launch_batch_norm_backward_apply(
                    shape, call,
                    {mean.as<float>(), invstd.as<float>(), 1, grad.data(),
                     masked ? residual.data() : nullptr},
                    {}, nullptr);
              });
    }
  }
}
#endif

const Cases kCases = {
#ifdef RESOPS_SIMT
    {"traffic", traffic},
#endif
    {"shapes", shapes},
    {"flags", flags},
    {"large_batch", large_batch},
    {"parameters", parameters},
    {"walks", walks},
    {"means", means},
    {"tails", tails},
    {"exact_statistics", exact_statistics},
    {"outliers", outliers},
    {"corners", corners},
    {"special_values", special_values},
};

}  // namespace

int main(int argc, char** argv) { return run_kernel_cases(kCases, argc, argv); }
