// The two ends of a convolution, whatever its kernel: what is applied to the input as it is read,
// and what is applied to the output before it is rounded, with the sums of the rounded values.
//
// Included by *_kernels.cpp only, inside the namespace of one instruction set.

#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "convolution_views.h"
#include "dispatch.h"
#include "simd.h"

namespace resops::RESOPS_ISA {

using Value = Pack<float>;

// Where a tile of outputs begins, and how much of it lies in the image.
struct TilePlace {
  int64_t image, row, column, rows, columns;
};

template <class T>
inline const T* at(const ImageView& view, int64_t image, int64_t row, int64_t column) {
  return static_cast<const T*>(view.data) + image * view.batch_stride + row * view.row_stride +
         column * view.column_stride;
}
template <class T>
inline T* mutable_at(const ImageView& view, int64_t image, int64_t row, int64_t column) {
  return const_cast<T*>(at<T>(view, image, row, column));
}

// ---- on the way in ------------------------------------------------------------------------

inline void apply_prologue(const Prologue& prologue, int64_t channel, Value* values, int count) {
  const Value scale = load(prologue.scale + channel), shift = load(prologue.shift + channel);
  dispatch_activation(prologue.activation, [&]<Activation kAct>(Constant<kAct>) {
    for (int i = 0; i < count; ++i) {
      values[i] = activate<kAct>(fma(values[i], scale, shift), prologue.negative_slope);
    }
  });
}

// ---- on the way out -----------------------------------------------------------------------

// What is added up per channel over the tiles of a span, in double.
struct Totals {
  double* sum0;
  double* sum1;
  double* shift;  // of the statistics: a value of the first tile
};

// Adds a tile's sum of (y - pivot), the pivot being one of its own values, and its sum of squared
// distances from the mean.
inline void add_statistics(const Totals& totals, int64_t channel, Value pivot, Value sum,
                           Value square, int64_t count) {
  float pivots[kLanes], sums[kLanes], squares[kLanes];
  store(pivots, pivot);
  store(sums, sum);
  store(squares, square);
  const double n = static_cast<double>(count), inverse = 1 / n;
  for (int lane = 0; lane < kLanes; ++lane) {
    const double s = static_cast<double>(sums[lane]), offset = s * inverse;
    const double distance =
        static_cast<double>(pivots[lane]) - totals.shift[channel + lane] + offset;
    totals.sum0[channel + lane] += n * distance;
    totals.sum1[channel + lane] += static_cast<double>(squares[lane]) + n * distance * distance;
  }
}

inline void add_gradient_sums(const Totals& totals, int64_t channel, Value sum, Value product) {
  float sums[kLanes], products[kLanes];
  store(sums, sum);
  store(products, product);
  for (int lane = 0; lane < kLanes; ++lane) {
    totals.sum0[channel + lane] += static_cast<double>(sums[lane]);
    totals.sum1[channel + lane] += static_cast<double>(products[lane]);
  }
}

// The outputs of one tile and one vector of channels: epilogue, rounding, sums.
template <class T, int kRows, int kColumns, bool kWhole>
inline __attribute__((always_inline)) void finish_tile(const ConvolutionOutput& o,
                                                       const TilePlace& place, int64_t channel,
                                                       int64_t lanes, int64_t column_of_sums,
                                                       const Totals& totals,
                                                       Value (&y)[kRows][kColumns]) {
  const int64_t count = kWhole ? kLanes : lanes;
  const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < (kWhole ? kRows : place.rows); ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < (kWhole ? kColumns : place.columns); ++s) f(r, s, y[r][s]);
    }
  };
  const auto pixel = [&](const ImageView& view) {
    return at<T>(view, place.image, place.row, place.column) + channel;
  };
  if (o.bias) {
    const Value bias = load(o.bias + channel);
    each([&](int, int, Value& v) { v = v + bias; });
  }
  if (o.addend.data) {
    const T* addend = pixel(o.addend);
    each([&](int r, int s, Value& v) {
      v = v + load(addend + r * o.addend.row_stride + s * o.addend.column_stride, count);
    });
  }
  if (o.activation != Activation::identity) {
    dispatch_activation(o.activation, [&]<Activation kAct>(Constant<kAct>) {
      each([&](int, int, Value& v) { v = activate<kAct>(v, o.negative_slope); });
    });
  }
  const T* argument = o.argument.data ? pixel(o.argument) : nullptr;
  const auto load_argument = [&](int r, int s) {
    return load(argument + r * o.argument.row_stride + s * o.argument.column_stride, count);
  };
  if (o.derivative.scale && o.derivative.activation != Activation::identity) {
    const Value scale = load(o.derivative.scale + channel),
                shift = load(o.derivative.shift + channel);
    dispatch_activation(o.derivative.activation, [&]<Activation kAct>(Constant<kAct>) {
      each([&](int r, int s, Value& v) {
        const Value z = fma(load_argument(r, s), scale, shift);
        v = activation_grad<kAct>(v, z, o.derivative.negative_slope);
      });
    });
  }
  T* out = mutable_at<T>(o.out, place.image, place.row, place.column) + channel;
  each([&](int r, int s, Value& v) {
    T* to = out + r * o.out.row_stride + s * o.out.column_stride;
    store(to, v, count);
    if constexpr (sizeof(T) == 2) {
      if (o.sums != Sums::none) v = load(to, count);
    }
  });
  if (o.sums == Sums::statistics) {
    const Value pivot = y[0][0];
    Value sum = broadcast(0.0f), square = sum;
    each([&](int, int, Value& v) { sum = sum + (v - pivot); });
    const float inverse = 1.0f / static_cast<float>(place.rows * place.columns);
    const Value mean = fma(sum, broadcast(inverse), pivot);
    each([&](int, int, Value& v) {
      const Value distance = v - mean;
      square = fma(distance, distance, square);
    });
    add_statistics(totals, column_of_sums, pivot, sum, square, place.rows * place.columns);
  } else if (o.sums == Sums::gradient) {
    const Value mean = load(o.mean + channel);
    Value sum = broadcast(0.0f), product = sum;
    each([&](int r, int s, Value& v) {
      sum = sum + v;
      product = fma(v, load_argument(r, s) - mean, product);
    });
    add_gradient_sums(totals, column_of_sums, sum, product);
  }
}

// What a span of `count` outputs per channel hands on: mean and M2, or the two sums.
inline void write_sums(const Totals& totals, Sums sums, int64_t channels, int64_t count,
                       double* sum0, double* sum1) {
  if (sums == Sums::statistics) {
    const double n = static_cast<double>(count);
    for (int64_t k = 0; k < channels; ++k) {
      const double offset = totals.sum0[k] / n;
      sum0[k] = totals.shift[k] + offset;
      sum1[k] = std::max(totals.sum1[k] - totals.sum0[k] * offset, 0.0);
    }
  } else if (sums == Sums::gradient) {
    std::copy_n(totals.sum0, channels, sum0);
    std::copy_n(totals.sum1, channels, sum1);
  }
}

}  // namespace resops::RESOPS_ISA
