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
inline __attribute__((always_inline)) void put(T* p, Line<T> v, int64_t count, bool streaming) {
  if (streaming && count == kLine<T>) {
    stream_line(p, v);
  } else {
    store_line(p, v, count);
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
void forward_rows(const ResidualAddArgs& a, ResidualAddSpan span) {
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
    for_lines<T>(
        span.begin, span.end, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
          prefetch_line<2>(x + c);
          prefetch_line<2>(residual + c);
          if (!streaming) prefetch_written(y + c);
          const Line<T> xs = load_line(x + c, count), rs = load_line(residual + c, count);
          Line<T> out{};
          for_packs<T>(c, count,
                       [&](int i, int64_t at, int64_t left) __attribute__((always_inline)) {
                         const Pack<acc> alpha = weights.alpha(at, left),
                                         beta = weights.beta(alpha, at, left);
                         const Pack<acc> z = fma(alpha, xs.pack[i], beta * rs.pack[i]);
                         if constexpr (is_masked(kAct))
                           store_mask_bits(mask + at / 8, to_bits(passes(z)), left);
                         out.pack[i] = activate<kAct>(z, slope);
                       });
          put(y + c, out, count, streaming);
        });
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
void backward_rows(const ResidualAddArgs& a, ResidualAddSpan span, double* sum_alpha,
                   double* sum_beta) {
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
    const auto line = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      if (x) prefetch_line<2>(x + c);
      if (residual) prefetch_line<2>(residual + c);
      prefetch_line<2>(grad_y + c);
      if (!streaming) {
        if (grad_x) prefetch_written(grad_x + c);
        if (grad_residual) prefetch_written(grad_residual + c);
      }
      const Line<T> xs = x ? load_line(x + c, count) : Line<T>{};
      const Line<T> rs = residual ? load_line(residual + c, count) : Line<T>{};
      const Line<T> gs = load_line(grad_y + c, count);
      Line<T> of_x{}, of_residual{}, of_alpha{}, of_beta{};
      for_packs<T>(c, count, [&](int i, int64_t at, int64_t left) __attribute__((always_inline)) {
        const Pack<acc> alpha = weights.alpha(at, left), beta = weights.beta(alpha, at, left);
        Pack<acc> g = gs.pack[i];
        if constexpr (is_masked(kAct)) {
          const uint16_t bits = load_mask_bits(mask + at / 8, left);
          g = masked_grad<kAct>(g, from_bits<acc>(bits), slope);
        } else if constexpr (is_smooth(kAct)) {
          g = activation_grad<kAct>(g, fma(alpha, xs.pack[i], beta * rs.pack[i]), slope);
          if (left < kLanes) g = keep(g, left);
        }
        of_x.pack[i] = alpha * g;
        of_residual.pack[i] = beta * g;
        // With the complement, alpha multiplies x - residual.
        const Pack<acc> factor = a.complement ? xs.pack[i] - rs.pack[i] : xs.pack[i];
        of_alpha.pack[i] = g * factor;
        of_beta.pack[i] = g * rs.pack[i];
        if constexpr (!W::kAlphaLoaded) {
          if (a.sum_alpha) block_alpha = fma(g, factor, block_alpha);
        }
        if constexpr (!W::kBetaLoaded) {
          if (a.sum_beta) block_beta = fma(g, rs.pack[i], block_beta);
        }
      });
      if (grad_x) put(grad_x + c, of_x, count, streaming);
      if (grad_residual) put(grad_residual + c, of_residual, count, streaming);
      if constexpr (W::kAlphaLoaded) {
        if (grad_alpha) put(grad_alpha + c, of_alpha, count, streaming);
      }
      if constexpr (W::kBetaLoaded) {
        if (grad_beta) put(grad_beta + c, of_beta, count, streaming);
      }
    };
    double alpha_total = 0, beta_total = 0;
    for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
      const int64_t end = begin + kBlock < span.end ? begin + kBlock : span.end;
      for_lines<T>(begin, end, line);
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
