// residual_add on a CPU: y = act(alpha * x + beta * residual), and all four gradients.
//
// Both passes are bound by memory: each reads every tensor that it needs once, from front to back,
// and computes everything from what it has read; the gradients of the weights come from the pass
// that writes those of x and residual. Sums run in the accumulation type over blocks of 128
// vectors and are then added in double. docs/math/residual_add.md has the formulas.

#include "residual_add_kernels.h"

#include "activation.h"
#include "dispatch.h"
#include "simd.h"

namespace resops::RESOPS_ISA {
namespace {

constexpr int64_t kBlock = 128 * kLanes;  // elements summed in the accumulation type

template <class T>
inline __attribute__((always_inline)) void put(T* p, Pack<acc_t<T>> v, int64_t count,
                                               bool streaming) {
  if (streaming && count == kLanes) {
    stream(p, v);
  } else {
    store(p, v, count);
  }
}

// alpha and beta along one row.
template <class T, Loaded kLoaded>
class Weights {
 public:
  using acc = acc_t<T>;
  static constexpr bool kAlphaLoaded = kLoaded != Loaded::none && kLoaded != Loaded::beta;
  static constexpr bool kBetaLoaded = kLoaded == Loaded::beta || kLoaded == Loaded::both;
  static constexpr bool kComplement = kLoaded == Loaded::complement;

  void start_row(const ResidualAddArgs& a, int64_t row) {
    if constexpr (kAlphaLoaded) {
      alpha_ = static_cast<const T*>(a.alpha) + row * a.width;
    } else {
      row_alpha_ = broadcast(static_cast<acc>(a.alpha_rows[row * a.alpha_step]));
    }
    if constexpr (kBetaLoaded) {
      beta_ = static_cast<const T*>(a.beta) + row * a.width;
    } else if constexpr (!kComplement) {
      row_beta_ = broadcast(static_cast<acc>(a.beta_rows[row * a.beta_step]));
    }
  }
  inline Pack<acc> alpha(int64_t c, int64_t count) const {
    if constexpr (kAlphaLoaded) return load(alpha_ + c, count);
    return row_alpha_;
  }
  inline Pack<acc> beta(Pack<acc> alpha, int64_t c, int64_t count) const {
    if constexpr (kBetaLoaded) return load(beta_ + c, count);
    if constexpr (kComplement) return broadcast(acc(1)) - alpha;
    return row_beta_;
  }

 private:
  const T* alpha_ = nullptr;
  const T* beta_ = nullptr;
  Pack<acc> row_alpha_, row_beta_;
};

template <class T>
inline T* row_of(T* tensor, int64_t offset) {
  return tensor ? tensor + offset : nullptr;
}

template <class F>
inline void dispatch_loaded(Loaded loaded, F f) {
  switch (loaded) {
    case Loaded::none:
      return f(Constant<Loaded::none>{});
    case Loaded::alpha:
      return f(Constant<Loaded::alpha>{});
    case Loaded::beta:
      return f(Constant<Loaded::beta>{});
    case Loaded::both:
      return f(Constant<Loaded::both>{});
    case Loaded::complement:
      return f(Constant<Loaded::complement>{});
  }
}

template <class F>
void dispatch(const ResidualAddArgs& a, F f) {
  dispatch_dtype(a.dtype, [&]<class T>(T type) {
    dispatch_activation(a.activation, [&]<Activation kAct>(Constant<kAct> act) {
      dispatch_loaded(a.loaded,
                      [&]<Loaded kLoaded>(Constant<kLoaded> loaded) { f(type, act, loaded); });
    });
  });
}

// ---- forward ------------------------------------------------------------------------------

template <class T, Activation kAct, Loaded kLoaded>
__attribute__((flatten)) void forward_rows(const ResidualAddArgs& a, ResidualAddSpan span) {
  using acc = acc_t<T>;
  const acc slope = static_cast<acc>(a.negative_slope);
  const bool streaming = a.streaming;
  Weights<T, kLoaded> weights;
  for (int64_t row = span.row_begin; row < span.row_end; ++row) {
    weights.start_row(a, row);
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const T* residual = static_cast<const T*>(a.residual) + row * a.width;
    T* y = static_cast<T*>(a.y) + row * a.width;
    uint8_t* mask = row_of(a.mask_out, row * a.mask_step);
    const auto at = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const Pack<acc> alpha = weights.alpha(c, count), beta = weights.beta(alpha, c, count);
      const Pack<acc> z = fma(alpha, load(x + c, count), beta * load(residual + c, count));
      if constexpr (is_masked(kAct)) store_mask_bits(mask + c / 8, to_bits(passes(z)), count);
      put(y + c, activate<kAct>(z, slope), count, streaming);
    };
    int64_t c = span.begin;
    for (; c + kLanes <= span.end; c += kLanes) at(c, kLanes);
    if (c < span.end) at(c, span.end - c);
  }
  if (streaming) stream_fence();
}

void forward(const ResidualAddArgs& a, ResidualAddSpan span) {
  dispatch(a, [&]<class T, Activation kAct, Loaded kLoaded>(T, Constant<kAct>, Constant<kLoaded>) {
    forward_rows<T, kAct, kLoaded>(a, span);
  });
}

// ---- backward -----------------------------------------------------------------------------

template <class T, Activation kAct, Loaded kLoaded>
__attribute__((flatten)) void backward_rows(const ResidualAddArgs& a, ResidualAddSpan span,
                                            double* sum_alpha, double* sum_beta) {
  using acc = acc_t<T>;
  using W = Weights<T, kLoaded>;
  const acc slope = static_cast<acc>(a.negative_slope);
  const Pack<acc> zero = broadcast(acc(0));
  const bool streaming = a.streaming;
  W weights;
  for (int64_t row = span.row_begin; row < span.row_end; ++row) {
    weights.start_row(a, row);
    const int64_t offset = row * a.width;
    const T* x = row_of(static_cast<const T*>(a.x), offset);
    const T* residual = row_of(static_cast<const T*>(a.residual), offset);
    const T* grad_y = static_cast<const T*>(a.grad_y) + offset;
    const uint8_t* mask = row_of(a.mask, row * a.mask_step);
    T* grad_x = row_of(static_cast<T*>(a.grad_x), offset);
    T* grad_residual = row_of(static_cast<T*>(a.grad_residual), offset);
    T* grad_alpha = row_of(static_cast<T*>(a.grad_alpha), offset);
    T* grad_beta = row_of(static_cast<T*>(a.grad_beta), offset);
    Pack<acc> block_alpha = zero, block_beta = zero;
    const auto at = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const Pack<acc> alpha = weights.alpha(c, count), beta = weights.beta(alpha, c, count);
      const Pack<acc> xs = x ? load(x + c, count) : zero;
      const Pack<acc> rs = residual ? load(residual + c, count) : zero;
      Pack<acc> g = load(grad_y + c, count);
      if constexpr (is_masked(kAct)) {
        const uint16_t bits = load_mask_bits(mask + c / 8, count);
        g = masked_grad<kAct>(g, from_bits<acc>(bits), slope);
      } else if constexpr (is_smooth(kAct)) {
        g = activation_grad<kAct>(g, fma(alpha, xs, beta * rs), slope);
        if (count < kLanes) g = keep(g, count);
      }
      if (grad_x) put(grad_x + c, alpha * g, count, streaming);
      if (grad_residual) put(grad_residual + c, beta * g, count, streaming);
      // With the complement, alpha multiplies x - residual.
      const Pack<acc> factor = a.complement ? xs - rs : xs;
      if constexpr (W::kAlphaLoaded) {
        if (grad_alpha) put(grad_alpha + c, g * factor, count, streaming);
      } else if (a.sum_alpha) {
        block_alpha = fma(g, factor, block_alpha);
      }
      if constexpr (W::kBetaLoaded) {
        if (grad_beta) put(grad_beta + c, g * rs, count, streaming);
      } else if (a.sum_beta) {
        block_beta = fma(g, rs, block_beta);
      }
    };
    double alpha_total = 0, beta_total = 0;
    for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
      const int64_t end = begin + kBlock < span.end ? begin + kBlock : span.end;
      int64_t c = begin;
      for (; c + kLanes <= end; c += kLanes) at(c, kLanes);
      if (c < end) at(c, end - c);
      if (a.sum_alpha) alpha_total += horizontal_sum(block_alpha);
      if (a.sum_beta) beta_total += horizontal_sum(block_beta);
      block_alpha = block_beta = zero;
    }
    if (a.sum_alpha) sum_alpha[row - span.row_begin] = alpha_total;
    if (a.sum_beta) sum_beta[row - span.row_begin] = beta_total;
  }
  if (streaming) stream_fence();
}

void backward(const ResidualAddArgs& a, ResidualAddSpan span, double* sum_alpha, double* sum_beta) {
  dispatch(a, [&]<class T, Activation kAct, Loaded kLoaded>(T, Constant<kAct>, Constant<kLoaded>) {
    backward_rows<T, kAct, kLoaded>(a, span, sum_alpha, sum_beta);
  });
}

}  // namespace

const ResidualAddKernels residual_add_kernels = {forward, backward};

}  // namespace resops::RESOPS_ISA
