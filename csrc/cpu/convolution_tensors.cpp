#include "convolution_tensors.h"

#include <ATen/ops/empty.h>

#include "../common/tensor_checks.h"

namespace resops {

using at::Tensor;

Tensor with_dense_channels(const Tensor& t) {
  const bool dense = t.size(1) == 1 || t.stride(1) == 1;
  return dense ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

ImageView view(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.size(1), t.stride(0), t.stride(2), t.stride(3)};
}

std::vector<float> padded_vector(const Tensor& t) {
  std::vector<float> values(t.numel() + 16);
  visit_values(t, [&](auto& value, int64_t i) { values[i] = static_cast<float>(value); });
  return values;
}

PrologueValues::PrologueValues(const ChannelPrologue& from) {
  prologue.activation = from.activation;
  prologue.negative_slope = static_cast<float>(from.negative_slope);
  if (!from.scale) return;
  scale = padded_vector(*from.scale);
  shift = padded_vector(*from.shift);
  prologue.scale = scale.data();
  prologue.shift = shift.data();
}

WeightView weight_view(const Tensor& w) {
  return {kernel_dtype(w), const_cast<void*>(w.const_data_ptr()),
          w.stride(0),     w.stride(1),
          w.stride(2),     w.stride(3)};
}

OutputValues::OutputValues(const ConvolutionEpilogue& epilogue, const Tensor& out,
                           Tensor (*prepared)(const Tensor&), ConvolutionOutput& output)
    : derivative(epilogue.derivative) {
  output.out = view(out);
  if (epilogue.bias) bias = padded_vector(*epilogue.bias);
  if (epilogue.bias) output.bias = bias.data();
  if (epilogue.addend) {
    addend = prepared(*epilogue.addend);
    output.addend = view(addend);
  }
  output.activation = epilogue.activation;
  output.negative_slope = static_cast<float>(epilogue.negative_slope);
  output.derivative = derivative.prologue;
  if (epilogue.argument) {
    argument = prepared(*epilogue.argument);
    output.argument = view(argument);
  }
  if (epilogue.statistics) output.sums = Sums::statistics;
  if (epilogue.mean) {
    output.sums = Sums::gradient;
    mean = padded_vector(*epilogue.mean);
    output.mean = mean.data();
  }
}

namespace {

Tensor to_tensor(const std::vector<double>& values, int64_t count, const Tensor& like) {
  Tensor t = at::empty({count}, like.options().dtype(at::kFloat));
  float* data = t.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) data[i] = static_cast<float>(values[i]);
  return t;
}

}  // namespace

std::tuple<Tensor, Tensor> BlockSums::merged(Sums sums, const ConvolutionEpilogue& epilogue,
                                             const Tensor& out) {
  if (sums == Sums::statistics) {
    merge_statistics();
  } else if (sums == Sums::gradient) {
    add_up();
    const std::vector<double> invstd = to_vector(*epilogue.invstd);
    for (int64_t c = 0; c < channels; ++c) second[c] *= invstd[c];
  }
  const int64_t count = sums == Sums::none ? 0 : channels;
  return {to_tensor(first, count, out), to_tensor(second, count, out)};
}

}  // namespace resops
