// Launchers of residual_add: how the tensors are cut, and which kernel a call takes.

#include <algorithm>

#include "dispatch.h"
#include "residual_add.cuh"

namespace resops::cuda {
namespace {

// A piece is what a warp streams with one set of weights: long enough that reading these and
// writing sums costs nothing, short enough that every multiprocessor gets kPiecesPerMultiprocessor.
constexpr int64_t kShortestPiece = 1024, kLongestPiece = 8192;
constexpr int64_t kPiecesPerMultiprocessor = 64;

bool is_per_sample(const ResidualAddWeight& w) { return w.values != nullptr && w.per_sample; }
bool is_elementwise(const ResidualAddWeights& w) {
  return w.alpha.tensor != nullptr || w.beta.tensor != nullptr;
}

ResidualAddWalk make_walk(const ResidualAddShape& shape, const ResidualAddWeights& weights) {
  const bool one_row = !is_per_sample(weights.alpha) && !is_per_sample(weights.beta);
  ResidualAddWalk w{};
  w.rows = one_row ? 1 : shape.samples;
  w.width = one_row ? shape.numel() : shape.length;
  const int64_t share =
      shape.numel() / (device_limits().multiprocessors * kPiecesPerMultiprocessor);
  w.piece = ceil_div(std::clamp(share, kShortestPiece, kLongestPiece), 256) * 256;
  w.pieces = ceil_div(w.width, w.piece);
  w.mask_bytes = shape.samples * ceil_div(shape.length, 8);
  return w;
}

unsigned blocks_of(const ResidualAddWalk& w) {
  return static_cast<unsigned>(ceil_div(w.rows * w.pieces, kWarps));
}

// f(Constant<kTensors>{}) with what the backward kernel reads; z of silu and gelu takes x and
// residual.
template <Activation kAct, class F>
void dispatch_tensors(const ResidualAddBackward& call, F f) {
  if (is_elementwise(call.weights)) return f(Constant<5>{});
  if constexpr (!is_smooth(kAct)) {
    if (!call.x && !call.residual) return f(Constant<1>{});
  }
  f(Constant<3>{});
}

void finish(const ResidualAddWalk& w, const ResidualAddWeight& weight, DType dtype,
            const float* sums, void* out, cudaStream_t stream) {
  const int64_t outputs = weight.per_sample ? w.rows : 1;
  if (outputs == 0) return;
  const int64_t count = weight.per_sample ? w.pieces : w.rows * w.pieces;
  dispatch_dtype(weight.is_float ? DType::f32 : dtype, [&](auto type) {
    using T = decltype(type);
    RESOPS_LAUNCH(residual_add_finish_kernel<T>, static_cast<unsigned>(ceil_div(outputs, kWarps)),
                  kThreads, sizeof(ResidualAddFinishShared), stream, outputs, count, sums,
                  static_cast<T*>(out));
  });
}

}  // namespace

void launch_residual_add_forward(const ResidualAddForward& call, Stream stream) {
  if (call.shape.numel() == 0) return;
  const ResidualAddWalk w = make_walk(call.shape, call.weights);
  dispatch_dtype(call.shape.dtype, [&](auto type) {
    dispatch_activation(call.activation, [&](auto act) {
      dispatch_bool(is_elementwise(call.weights), [&](auto elementwise) {
        using T = decltype(type);
        constexpr int kVec = kVectorSize<T>;
        constexpr Activation kAct = act();
        constexpr int kTensors = elementwise() ? 4 : 2;
        RESOPS_LAUNCH((residual_add_forward_kernel<T, kVec, kAct, kTensors>), blocks_of(w),
                      kThreads, 0, static_cast<cudaStream_t>(stream), w, call.weights,
                      call.negative_slope, static_cast<const T*>(call.x),
                      static_cast<const T*>(call.residual), static_cast<T*>(call.y), call.mask);
      });
    });
  });
}

int64_t residual_add_workspace(const ResidualAddBackward& call) {
  const ResidualAddWalk w = make_walk(call.shape, call.weights);
  return 2 * w.rows * w.pieces;
}

void launch_residual_add_backward(const ResidualAddBackward& call, float* workspace,
                                  Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const ResidualAddWalk w = make_walk(call.shape, call.weights);
  const ResidualAddWeight &alpha = call.weights.alpha, &beta = call.weights.beta;
  const bool sums_alpha = call.grad_alpha && !alpha.tensor;
  const bool sums_beta = call.grad_beta && !beta.tensor;
  float* const alpha_sums = sums_alpha ? workspace : nullptr;
  float* const beta_sums = sums_beta ? workspace + w.rows * w.pieces : nullptr;
  if (call.shape.numel() > 0) {
    dispatch_dtype(call.shape.dtype, [&](auto type) {
      using T = decltype(type);
      const ResidualAddGradients<T> out{static_cast<T*>(call.grad_x),
                                        static_cast<T*>(call.grad_residual),
                                        sums_alpha ? nullptr : static_cast<T*>(call.grad_alpha),
                                        sums_beta ? nullptr : static_cast<T*>(call.grad_beta),
                                        alpha_sums,
                                        beta_sums};
      dispatch_activation(call.activation, [&](auto act) {
        dispatch_tensors<act()>(call, [&](auto tensors) {
          constexpr int kVec = kVectorSize<T>, kTensors = tensors();
          constexpr Activation kAct = act();
          RESOPS_LAUNCH((residual_add_backward_kernel<T, kVec, kAct, kTensors>), blocks_of(w),
                        kThreads, 0, on, w, call.weights, call.negative_slope,
                        static_cast<const T*>(call.grad_y), static_cast<const T*>(call.x),
                        static_cast<const T*>(call.residual), call.mask, out);
        });
      });
    });
  }
  if (sums_alpha) finish(w, alpha, call.shape.dtype, alpha_sums, call.grad_alpha, on);
  if (sums_beta) finish(w, beta, call.shape.dtype, beta_sums, call.grad_beta, on);
}

}  // namespace resops::cuda
