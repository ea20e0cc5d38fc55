// Every kernel of csrc/cuda/dense_block.cuh under the emulator, against the definition in double
// (docs/math/dense_block.md), by rule R. What a consumer does not read of the buffer and of the sum
// is NaN, and stays.

#include "dense_block.h"

#include <utility>

#include "tensors.h"

using namespace resops;
namespace gpu = resops::cuda;  // `cuda` alone is the toolkit's

namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};

struct Config {
  DType dtype;
  int64_t rows, channels, total;  // of the buffer
  int64_t begin = 0;              // of the slice whose gradient is made
  bool training = true, first = false, wide_sum = false;
  bool affine = true, half_parameters = false;
  int64_t shift = 16;  // of addresses, see Buffer

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof(text), "%s (%lld, %lld of %lld from %lld)%s%s%s%s%s shift %lld",
                  name_of(dtype), static_cast<long long>(rows), static_cast<long long>(channels),
                  static_cast<long long>(total), static_cast<long long>(begin),
                  training ? "" : " constant", first ? " first" : "", wide_sum ? " wide" : "",
                  affine ? "" : " no affine", half_parameters ? " half parameters" : "",
                  static_cast<long long>(shift));
    return text;
  }
};

size_t at(int64_t i) { return static_cast<size_t>(i); }

// The tensors of one consumer, and what is exact. Element i of it is at place(i, total) of a tensor
// with `total` channels.
class Call {
 public:
  explicit Call(const Config& config)
      : c(config),
        numel(c.rows * c.channels),
        shape{c.dtype, c.rows, c.channels},
        parameter(c.half_parameters ? c.dtype : DType::f32),
        x(c.dtype, c.rows * c.total, c.shift),
        sum(c.wide_sum ? DType::f32 : c.dtype, c.rows * c.total, c.shift),
        outside(c.dtype, c.rows * c.total, c.shift),
        grad_y(c.dtype, numel, c.shift),
        weight(parameter, c.channels),
        bias(parameter, c.channels),
        kappa(at(c.channels)) {
    Random random(static_cast<unsigned>(numel + 3 * c.total));
    for (int64_t k = 0; k < c.channels; ++k) {
      mean.set(k, random.uniform(-2, 2));
      invstd.set(k, random.uniform(0.5, 2));
      weight.set(k, random.uniform(-1.5, 1.5));
      bias.set(k, random.uniform(-1, 1));
      mean_grad.set(k, random.normal());
      mean_grad_xhat.set(k, random.normal());
    }
    for (int64_t i = 0; i < numel; ++i) {
      x.set(place(i), mean[i % c.channels] + random.normal());
      outside.set(place(i), random.normal());
      if (!c.first) sum.set(place(i), random.normal());
      grad_y.set(i, std::abs(z(i)) < 1e-4 * z_terms(i) ? 0 : random.normal() + 0.3);
      kappa[at(i % c.channels)] += std::abs(x[place(i)]) * invstd[i % c.channels] /
                                   static_cast<double>(std::max<int64_t>(c.rows, 1));
    }
  }

  void run() {
    apply();
    accumulate();
    gradient(true, true);
    gradient(false, true);
    gradient(true, false);
    gradient(false, false);
  }

  int64_t place(int64_t i) const { return i / c.channels * c.total + c.begin + i % c.channels; }
  double centred(int64_t i) const { return x[place(i)] - mean[i % c.channels]; }
  double xhat(int64_t i) const { return centred(i) * invstd[i % c.channels]; }
  double w(int64_t i) const { return c.affine ? weight[i % c.channels] : 1; }
  double b(int64_t i) const { return c.affine ? bias[i % c.channels] : 0; }
  double z(int64_t i) const { return w(i) * xhat(i) + b(i); }
  double z_terms(int64_t i) const { return std::abs(w(i) * xhat(i)) + std::abs(b(i)); }

  gpu::BatchNormAffine affine() {
    const bool is_float = parameter == DType::f32;
    return {mean.as<float>(),
            invstd.as<float>(),
            {c.affine ? weight.data() : nullptr, is_float},
            {c.affine ? bias.data() : nullptr, is_float}};
  }
  gpu::Rows rows(Buffer& t) { return {address(t), c.total}; }
  gpu::DenseBlockSum sum_rows() { return {address(sum), c.total, sum.dtype() == DType::f32}; }

  gpu::DenseBlockApply apply_call(Buffer& y) { return {affine(), rows(x), y.data()}; }
  gpu::DenseBlockAccumulate accumulate_call() {
    return {affine(), grad_y.data(), rows(x), sum_rows(), c.training, c.first};
  }
  gpu::DenseBlockGradient gradient_call(bool with_outside, bool with_sum, Buffer& out) {
    gpu::DenseBlockGradient call{};
    call.x = rows(x);
    if (with_outside) call.grad_y = rows(outside);
    if (with_sum) call.grad_sum = sum_rows();
    if (with_sum && c.training) {
      call.mean = mean.as<float>();
      call.invstd = invstd.as<float>();
      call.mean_grad = mean_grad.as<float>();
      call.mean_grad_xhat = mean_grad_xhat.as<float>();
    }
    call.out = out.data();
    return call;
  }

 private:
  void* address(Buffer& t) const {
    return static_cast<char*>(t.data()) + c.begin * (t.dtype() == DType::f32 ? 4 : 2);
  }

  void apply() {
    if (numel == 0) return;
    Buffer y(c.dtype, numel, c.shift);
    gpu::launch_dense_block_apply(shape, apply_call(y), nullptr);
    Exact exact(numel);
    for (int64_t i = 0; i < numel; ++i) {
      exact.set(i, i % c.channels, z(i) > 0 ? z(i) : 0, z_terms(i));
    }
    check_rule_R(c.describe() + ": y", y, exact, kappa);
  }

  void accumulate() {
    const Buffer before = sum;
    Exact exact(numel), exact_sum(c.channels), exact_product(c.channels);
    for (int64_t i = 0; i < numel; ++i) {
      const int64_t k = i % c.channels;
      const double g = z(i) > 0 ? grad_y[i] : 0;
      const double added = g * w(i) * (c.training ? 1 : invstd[k]);
      const double old = c.first ? 0 : before[place(i)];
      exact.set(i, k, old + added, std::abs(old) + std::abs(added));
      exact_sum.value[at(k)] += g;
      exact_sum.terms[at(k)] += std::abs(g);
      exact_product.value[at(k)] += g * xhat(i);
      exact_product.terms[at(k)] += std::abs(g * xhat(i));
    }
    for (int64_t k = 0; k < c.channels; ++k) {
      exact_sum.channel[at(k)] = exact_product.channel[at(k)] = k;
    }
    const gpu::DenseBlockAccumulate call = accumulate_call();
    Workspace workspace(gpu::dense_block_workspace(shape, call));
    Buffer sum_grad(DType::f32, c.channels), sum_grad_xhat(DType::f32, c.channels);
    gpu::launch_dense_block_accumulate(
        shape, call, workspace.as<float>(),
        {sum_grad.as<float>(), sum_grad_xhat.as<float>(), nullptr, nullptr}, nullptr);
    workspace.check_margins("workspace");
    check_rule_R(c.describe() + ": sum_grad", sum_grad, exact_sum, kappa);
    check_rule_R(c.describe() + ": sum_grad_xhat", sum_grad_xhat, exact_product, kappa);
    sum.check_margins("grad_sum");
    Buffer written(sum.dtype(), numel);
    for (int64_t i = 0; i < numel; ++i) written.set(i, sum[place(i)]);
    check_rule_R(c.describe() + ": grad_sum", written, exact, kappa);
    for (int64_t i = 0; i < c.rows * c.total; ++i) {
      const int64_t k = i % c.total;
      if ((k < c.begin || k >= c.begin + c.channels) && !std::isnan(sum[i])) {
        fail(c.describe() + ": written beside the consumer's channels");
      }
    }
  }

  void gradient(bool with_outside, bool with_sum) {
    if (numel == 0) return;
    Buffer out(c.dtype, numel, c.shift);
    gpu::launch_dense_block_gradient(shape, gradient_call(with_outside, with_sum, out), nullptr);
    Exact exact(numel);
    for (int64_t i = 0; i < numel; ++i) {
      const int64_t k = i % c.channels;
      const double y = with_outside ? outside[place(i)] : 0, s = with_sum ? sum[place(i)] : 0;
      const bool closed = with_sum && c.training;
      const double factor = closed ? invstd[k] : 1, first = closed ? mean_grad[k] : 0,
                   second = closed ? xhat(i) * mean_grad_xhat[k] : 0;
      exact.set(i, k, y + factor * (s - first - second),
                std::abs(y) + factor * (std::abs(s) + std::abs(first) + std::abs(second)));
    }
    check_rule_R(c.describe() + ": gradient", out, exact, kappa);
  }

  Config c;
  int64_t numel;
  gpu::DenseBlockShape shape;
  DType parameter;
  Buffer x, sum, outside, grad_y, weight, bias;
  Buffer mean{DType::f32, c.channels}, invstd{DType::f32, c.channels};
  Buffer mean_grad{DType::f32, c.channels}, mean_grad_xhat{DType::f32, c.channels};
  std::vector<double> kappa;
};

void run(const Config& config) { Call(config).run(); }

// Channels that fill no vector, more than a block's, one row, rows that fill no tile, empty.
void shapes() {
  const int64_t sizes[][4] = {{1, 1, 1, 0},     {7, 3, 5, 1},      {35, 16, 24, 8},
                              {49, 65, 70, 5},  {9, 300, 320, 20}, {1000, 8, 16, 8},
                              {3, 520, 528, 0}, {64, 12, 20, 4},   {5, 40, 40, 0},
                              {0, 5, 8, 0},     {37, 33, 34, 1},   {2, 2, 1003, 1000}};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto& size : sizes) run({dtype, size[0], size[1], size[2], size[3]});
  }
  if (!kSlowEmulator) run({DType::f32, 200000, 4, 8});  // more parts than blocks run at a time
}

// Every instantiation: dtype, that of the sum, access width, first; and the other flags.
void flags() {
  for (const DType dtype : kTypes) {
    for (const int64_t channels : {16, 12, 5}) {
      for (const bool wide_sum : {false, true}) {
        for (const bool first : {false, true}) {
          Config c{dtype, 21, channels, 2 * channels};
          c.wide_sum = wide_sum;
          c.first = first;
          run(c);
          c.training = false;
          c.affine = first;
          run(c);
          c.affine = c.half_parameters = true;
          run(c);
        }
      }
    }
    for (const int64_t shift : {8, 4}) {  // addresses that take no 16 bytes at a time
      Config c{dtype, 21, 16, 32};
      c.shift = shift;
      run(c);
    }
  }
}

// The running statistics of more consumers than one launch takes, each of its own width, some of 16
// bits, at a stride.
void statistics() {
  constexpr int64_t kWidest = 300, kCount = 64;
  constexpr double kUnbiased = 64.0 / 63;
  for (const DType dtype : kTypes) {
    Random random(3);
    Buffer mean(DType::f32, kWidest), var(DType::f32, kWidest);
    for (int64_t k = 0; k < kWidest; ++k) {
      mean.set(k, random.normal());
      var.set(k, random.uniform(0.5, 2));
    }
    std::vector<Buffer> running, before;
    std::vector<gpu::DenseBlockRunning> consumers;
    const auto stride = [](int64_t i) { return i % 3 == 0 ? 2 : 1; };
    const auto width = [](int64_t i) { return i == 5 ? 0 : kWidest - 4 * i; };
    for (int64_t i = 0; i < 2 * kCount; ++i) {
      const int64_t consumer = i / 2;
      Buffer& t = running.emplace_back(i % 4 == 1 ? DType::f32 : dtype, width(consumer) * 2);
      for (int64_t k = 0; k < width(consumer); ++k) t.set(k * stride(consumer), random.normal());
    }
    before = running;
    for (int64_t i = 0; i < kCount; ++i) {
      const auto statistic = [&](Buffer& t) {
        return gpu::RunningStatistic{t.data(), t.dtype() == DType::f32, stride(i)};
      };
      consumers.push_back({statistic(running[at(2 * i)]), statistic(running[at(2 * i + 1)]),
                           width(i), 0.01 * static_cast<double>(i)});
    }
    gpu::launch_dense_block_update_running(dtype, mean.as<float>(), var.as<float>(), kUnbiased,
                                           consumers, nullptr);
    for (int64_t i = 0; i < 2 * kCount; ++i) {
      const int64_t consumer = i / 2, channels = width(consumer);
      const double momentum = 0.01 * static_cast<double>(consumer);
      running[at(i)].check_margins("running");
      Buffer got(running[at(i)].dtype(), channels);
      Exact exact(channels);
      for (int64_t k = 0; k < channels; ++k) {
        const int64_t place = k * stride(consumer);
        const double old = before[at(i)][place];
        const double batch = i % 2 == 0 ? mean[k] : kUnbiased * var[k];
        got.set(k, running[at(i)][place]);
        exact.set(k, 0, (1 - momentum) * old + momentum * batch,
                  std::abs((1 - momentum) * old) + std::abs(momentum * batch));
        if (stride(consumer) == 2 && !std::isnan(running[at(i)][place + 1])) fail("beside");
      }
      check_rule_R("running of consumer " + std::to_string(consumer), got, exact, {0.0});
    }
  }
}

// NaN lets the gradient pass and stays NaN, zeros of both signs block it; mean 0 and invstd 1.
void special_values() {
  const float inf = INFINITY, values[] = {0.0f, -0.0f, NAN, 1.0f, -1.0f, inf, -inf, 1e-40f};
  Buffer x(DType::f32, 8), y(DType::f32, 8), grad(DType::f32, 8), sum(DType::f32, 8),
      mean(DType::f32, 1), invstd(DType::f32, 1), total(DType::f32, 2);
  mean.set(0, 0);
  invstd.set(0, 1);
  for (int64_t i = 0; i < 8; ++i) {
    x.set(i, static_cast<double>(values[i]));
    grad.set(i, 1);
  }
  const gpu::DenseBlockShape shape{DType::f32, 8, 1};
  const gpu::BatchNormAffine affine{mean.as<float>(), invstd.as<float>(), {}, {}};
  const gpu::Rows rows{x.data(), 1};
  gpu::launch_dense_block_apply(shape, {affine, rows, y.data()}, nullptr);
  const gpu::DenseBlockAccumulate call{affine, grad.data(), rows, {sum.data(), 1, true},
                                       true,   true};
  Workspace workspace(gpu::dense_block_workspace(shape, call));
  gpu::launch_dense_block_accumulate(shape, call, workspace.as<float>(),
                                     {total.as<float>(), total.as<float>() + 1, nullptr, nullptr},
                                     nullptr);
  for (int64_t i = 0; i < 8; ++i) {
    const float v = values[i];
    CHECK(std::isnan(v) ? std::isnan(y[i]) : y[i] == (v > 0 ? v : 0));
    CHECK(sum[i] == (v <= 0 ? 0 : 1));
  }
  CHECK(total[0] == 4);
}

#ifdef RESOPS_SIMT  // only the emulator counts
// Sectors that the passes move, against those of the channels that they have to move.
void traffic() {
  struct Kind {
    DType dtype;
    bool wide_sum;
  };
  for (const Kind& kind :
       {Kind{DType::f32, false}, Kind{DType::bf16, false}, Kind{DType::bf16, true}}) {
    Config config{kind.dtype, 12544, 64, 128, 32};
    config.shift = 0;
    config.wide_sum = kind.wide_sum;
    const double size = static_cast<double>(config.rows * config.channels);
    const double bytes = size * (kind.dtype == DType::f32 ? 4 : 2);
    const double sum_bytes = kind.wide_sum ? 4 * size : bytes;
    const gpu::DenseBlockShape shape{config.dtype, config.rows, config.channels};
    const auto measure = [&](const char* pass, double least, auto launch) {
      simt::reset_launches();
      launch();
      check_traffic(
          std::string(pass) + " " + name_of(kind.dtype) + (kind.wide_sum ? ", sum in float" : ""),
          least);
    };
    Buffer out(config.dtype, config.rows * config.channels, 0), vectors(DType::f32, 128);
    for (const bool first : {true, false}) {
      config.first = first;
      Call call(config);
      if (first) {
        measure("apply", 2 * bytes,
                [&] { gpu::launch_dense_block_apply(shape, call.apply_call(out), nullptr); });
      }
      const gpu::DenseBlockAccumulate arguments = call.accumulate_call();
      Workspace workspace(gpu::dense_block_workspace(shape, arguments));
      measure(first ? "accumulate, first" : "accumulate", 2 * bytes + (first ? 1 : 2) * sum_bytes,
              [&] {
                gpu::launch_dense_block_accumulate(
                    shape, arguments, workspace.as<float>(),
                    {vectors.as<float>(), vectors.as<float>() + 64, nullptr, nullptr}, nullptr);
              });
      for (const bool with_outside : {true, false}) {
        if (first) continue;
        measure(with_outside ? "gradient" : "gradient, nothing from outside",
                (with_outside ? 3 : 2) * bytes + sum_bytes, [&] {
                  gpu::launch_dense_block_gradient(
                      shape, call.gradient_call(with_outside, true, out), nullptr);
                });
      }
    }
  }
}
#endif

const Cases kCases = {
#ifdef RESOPS_SIMT
    {"traffic", traffic},
#endif
    {"shapes", shapes},         {"flags", flags},
    {"statistics", statistics}, {"special_values", special_values},
};

}  // namespace

int main(int argc, char** argv) { return run_kernel_cases(kCases, argc, argv); }
