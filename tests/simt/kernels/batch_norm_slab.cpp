// The kernels of csrc/cuda/batch_norm_slab.cuh, in each of their regimes, under the emulator:
// against the definition in double, by rule R, and against themselves.

#include "batch_norm_call.h"

namespace {

using gpu::SlabRegime;

constexpr SlabRegime kRegimes[] = {SlabRegime::block, SlabRegime::cluster, SlabRegime::grid};

// A device on which each regime has its turn at small sizes.
void use_device(size_t shared, size_t l2 = 1 << 20) {
#ifdef RESOPS_SIMT
  auto& device = simt::options().device;
  device.shared_per_block = shared;
  device.shared_per_multiprocessor = shared + 1024;
  device.l2_bytes = l2;
  device.multiprocessors = 8;
#else
  (void)shared, (void)l2;
#endif
}

void run(const Config& config) { Call(config).run(); }

// Every instance: relu with a residual in every regime, each of the others in one, which goes round
// so that a regime meets every dtype and every activation.
void flags() {
  use_device(24 * 1024);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Activation activation :
         {Activation::identity, Activation::relu, Activation::leaky_relu, Activation::silu,
          Activation::gelu}) {
      for (const bool residual : {false, true}) {
        const int turn = static_cast<int>(dtype) + static_cast<int>(activation) + residual;
        const bool in_all = residual && activation == Activation::relu;
        for (int regime = 0; regime < 3; ++regime) {
          if (!in_all && (kSlowEmulator || regime != turn % 3)) continue;
          Config c{dtype, 2, 40, 21, true, activation, residual};
          c.slab = kRegimes[regime];
          run(c);
        }
      }
    }
  }
}

// One row, fewer rows than threads, rows that end within a block; channels that end within a slab;
// several slabs at a time and several rounds; rows that are kept and rows that are not.
void shapes() {
  for (const SlabRegime regime : kRegimes) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const int64_t channels : {8, 40, 64, 264}) {
        for (const int64_t samples : {2, 3, 37}) {
          if (kSlowEmulator && (channels != 40 || samples != 3)) continue;
          use_device(32 * 1024);
          Config c{dtype, samples, channels, 5, true, Activation::relu, true};
          c.slab = regime;
          run(c);
          if (kSlowEmulator || samples != 3) continue;
          c.training = false;  // then the sums are not in grad_x
          run(c);
        }
      }
    }
  }
  // Some rows stay in the L2 cache only.
  use_device(12 * 1024);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Config c{dtype, 3, 16, 300, true, Activation::relu, true};
    c.slab = SlabRegime::grid;
    const auto cut = gpu::choose_batch_norm_slabs({dtype, c.samples, c.channels, c.spatial, true},
                                                  2, SlabRegime::grid);
    CHECK(cut && cut->kept < cut->block_rows);
    run(c);
  }
}

void means() {
  use_device(64 * 1024);
  for (const SlabRegime regime : kRegimes) {
    for (const double mean : {100.0, 10000.0}) {
      Config c{DType::f32, 4, 8, 100, true, Activation::relu};
      c.mean = mean;
      c.slab = regime;
      run(c);
    }
  }
}

// What is chosen, of limits that are read when it is asked for.
void choice() {
#ifdef RESOPS_SIMT
  auto& device = simt::options().device;
  device.shared_per_block = 227 * 1024;
  device.shared_per_multiprocessor = 228 * 1024;
  device.l2_bytes = 50 << 20;
  device.multiprocessors = 132;
  const auto regime = [](int64_t samples, int64_t channels, int64_t spatial) {
    const auto cut =
        gpu::choose_batch_norm_slabs({DType::bf16, samples, channels, spatial, true}, 1);
    return cut ? static_cast<int>(cut->regime) : -1;
  };
  CHECK(regime(32, 8192, 49) == static_cast<int>(SlabRegime::block));
  CHECK(regime(32, 512, 49) == static_cast<int>(SlabRegime::cluster));
  CHECK(regime(256, 64, 784) == static_cast<int>(SlabRegime::grid));
  CHECK(regime(256, 64, 112 * 112) == -1);
  CHECK(regime(32, 65, 49) == -1);
  device.blocks_per_cluster = 1;  // before sm_90
  CHECK(regime(32, 512, 49) != static_cast<int>(SlabRegime::cluster));
  device.blocks_per_cluster = 8;
#endif
}

// Run after run the same bits, whatever ran before.
void determinism() {
  use_device(24 * 1024);
  for (const SlabRegime regime : kRegimes) {
    const BatchNormShape shape{DType::f32, 5, 40, 33, true};
    Random random(2);
    Buffer x(DType::f32, shape.numel());
    for (int64_t i = 0; i < shape.numel(); ++i) x.set(i, random.normal() + 5);
    std::vector<float> first;
    for (int repeat = 0; repeat < 3; ++repeat) {
      Buffer y(DType::f32, shape.numel()), mean(DType::f32, 40), invstd(DType::f32, 40);
      const auto cut = gpu::choose_batch_norm_slabs(shape, 1, regime);
      CHECK(cut.has_value());
      Workspace workspace(gpu::batch_norm_slab_workspace(shape, *cut));
      gpu::launch_batch_norm_slab_forward(
          shape, *cut, {mean.as<float>(), nullptr, invstd.as<float>(), 1e-5, {}, {}, 0},
          {{mean.as<float>(), invstd.as<float>(), {}, {}},
           Activation::relu,
           0,
           x.data(),
           nullptr,
           y.data(),
           nullptr},
          workspace.as<float>(), nullptr);
      const std::vector<float> bits(y.as<float>(), y.as<float>() + shape.numel());
      if (repeat == 0) first = bits;
      CHECK(std::equal(first.begin(), first.end(), bits.begin()));
    }
  }
}

#ifdef RESOPS_SIMT  // only the emulator counts
// x is read once where shared memory has room for it.
void traffic() {
  use_device(128 * 1024, 0);
  for (const SlabRegime regime : kRegimes) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const int64_t samples = regime == SlabRegime::block ? 4 : 40;  // of one block, of several
      const BatchNormShape shape{dtype, samples, 64, dtype == DType::f32 ? 100 : 200, true};
      const double bytes = static_cast<double>(shape.numel()) * (dtype == DType::f32 ? 4 : 2);
      Buffer x(dtype, shape.numel(), 0), y(dtype, shape.numel(), 0), grad(dtype, shape.numel(), 0);
      Buffer mean(DType::f32, 64), invstd(DType::f32, 64);
      for (int64_t i = 0; i < shape.numel(); ++i) x.set(i, static_cast<double>(i % 5));
      const gpu::BatchNormAffine affine{mean.as<float>(), invstd.as<float>(), {}, {}};
      const auto measure = [&](const char* pass, int tensors, double least, auto launch) {
        const auto cut = gpu::choose_batch_norm_slabs(shape, tensors, regime);
        CHECK(cut && cut->kept == cut->block_rows);
        Workspace workspace(gpu::batch_norm_slab_workspace(shape, *cut));
        simt::reset_launches();
        launch(*cut, workspace.as<float>());
        check_traffic(std::string(pass) + " " + name_of(dtype) + ", regime " +
                          std::to_string(static_cast<int>(regime)),
                      least);
      };
      measure("forward", 1, 2 * bytes, [&](const gpu::BatchNormSlabs& cut, float* workspace) {
        gpu::launch_batch_norm_slab_forward(
            shape, cut, {mean.as<float>(), nullptr, invstd.as<float>(), 1e-5, {}, {}, 0},
            {affine, Activation::relu, 0, x.data(), nullptr, y.data(), nullptr}, workspace,
            nullptr);
      });
      measure("backward", 2, 3 * bytes, [&](const gpu::BatchNormSlabs& cut, float* workspace) {
        gpu::launch_batch_norm_slab_backward(
            shape, cut, {affine, Activation::relu, 0, y.data(), x.data(), nullptr, nullptr}, {},
            {mean.as<float>(), invstd.as<float>(), 1, grad.data(), nullptr}, workspace, nullptr);
      });
    }
  }
}
#endif

const Cases kCases = {
#ifdef RESOPS_SIMT
    {"traffic", traffic},
#endif
    {"flags", flags},     {"shapes", shapes},           {"means", means},
    {"choice", choice},   {"determinism", determinism},
};

}  // namespace

int main(int argc, char** argv) { return run_kernel_cases(kCases, argc, argv); }
