// dense_block on a CPU: a norm that reads the first channels of a buffer, its backward pass into a
// sum over all such norms, and the gradient of a slice of the buffer from that sum.
//
// Each pass reads its tensors once. Four rows share the loads of what is kept per channel. The
// formulas are in docs/math/dense_block.md.

#include "dense_block_kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "simd.h"

namespace resops::RESOPS_ISA {
namespace {

constexpr int kRows = 4;             // at a time
constexpr int64_t kBlockRows = 128;  // sums in the accumulation type before they go on in double

// Calls f(row, Constant<rows>) for all rows, kRows of them at a time and the rest one by one.
template <class F>
inline __attribute__((always_inline)) void for_rows(int64_t begin, int64_t end, F f) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) f(row, Constant<kRows>{});
  for (; row < end; ++row) f(row, Constant<1>{});
}

// Where a row of a tensor begins.
template <class T>
inline T* at_row(void* p, int64_t row, int64_t stride) {
  return static_cast<T*>(p) + row * stride;
}
template <class T>
inline const T* at_row(const void* p, int64_t row, int64_t stride) {
  return static_cast<const T*>(p) + row * stride;
}

// A vector of parameters at a column.
template <class acc>
inline Pack<acc> parameter(const void* values, int64_t column) {
  return load(static_cast<const acc*>(values) + column);
}

// The argument of the ReLU. Forward and backward must agree on its sign to the last bit.
template <class acc>
inline Pack<acc> pre_activation(const DenseBlockArgs& a, Pack<acc> centred, int64_t column) {
  return fma(centred, parameter<acc>(a.scale, column), parameter<acc>(a.bias, column));
}

template <class T>
void apply_rows(const DenseBlockArgs& a, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  for_rows(begin, end, [&](int64_t row, auto rows) __attribute__((always_inline)) {
    const T* const x = at_row<T>(a.x, row, a.x_stride);
    T* const y = at_row<T>(a.out, row, a.channels);
    for_lines<T>(0, a.channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Line<T> lines[rows.value];
#pragma GCC unroll 4
      for (int r = 0; r < rows.value; ++r) {
        prefetch_line<1>(x + r * a.x_stride + c);
        lines[r] = load_line(x + r * a.x_stride + c, count);
      }
      for_packs<T>(c, count, [&](int i, int64_t at, int64_t) __attribute__((always_inline)) {
        const Pack<acc> mean = parameter<acc>(a.mean, at);
#pragma GCC unroll 4
        for (int r = 0; r < rows.value; ++r) {
          lines[r].pack[i] = relu(pre_activation(a, lines[r].pack[i] - mean, at));
        }
      });
#pragma GCC unroll 4
      for (int r = 0; r < rows.value; ++r) store_line(y + r * a.channels + c, lines[r], count);
    });
  });
}

// S is what grad_sum is stored as: T, or the accumulation type. kApply: what apply writes is
// written too.
template <class T, class S, bool kFirst, bool kApply>
void accumulate_rows(const DenseBlockArgs& a, int64_t begin, int64_t end, double* sum_grad,
                     double* sum_grad_centred) {
  using acc = acc_t<T>;
  // The last line of a row may be shorter; its pack is written in full.
  const int64_t columns = (a.channels + kLine<T> - 1) / kLine<T> * kLine<T>;
  std::vector<acc> sums(2 * columns);
  acc* const sum = sums.data();
  acc* const product = sum + columns;
  std::fill(sum_grad, sum_grad + a.channels, 0.0);
  std::fill(sum_grad_centred, sum_grad_centred + a.channels, 0.0);
  const auto add = [&](int64_t row, auto rows) __attribute__((always_inline)) {
    const T* const x = at_row<T>(a.x, row, a.x_stride);
    const T* const grad = at_row<T>(a.grad_y, row, a.grad_y_stride);
    S* const total = at_row<S>(a.grad_sum, row, a.grad_sum_stride);
    T* const y = kApply ? at_row<T>(a.out, row, a.channels) : nullptr;
    for_lines<T>(0, a.channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Line<T> xs[rows.value], gs[rows.value];
#pragma GCC unroll 4
      for (int r = 0; r < rows.value; ++r) {
        prefetch_line<2>(x + r * a.x_stride + c);
        prefetch_line<2>(grad + r * a.grad_y_stride + c);
        prefetch_line<2>(total + r * a.grad_sum_stride + c);
        xs[r] = load_line(x + r * a.x_stride + c, count);
        gs[r] = load_line(grad + r * a.grad_y_stride + c, count);
      }
      for_packs<T>(c, count, [&](int i, int64_t at, int64_t left) __attribute__((always_inline)) {
        const Pack<acc> mean = parameter<acc>(a.mean, at), factor = parameter<acc>(a.factor, at);
        Pack<acc> s = load(sum + at), q = load(product + at);
#pragma GCC unroll 4
        for (int r = 0; r < rows.value; ++r) {
          const Pack<acc> centred = xs[r].pack[i] - mean;
          const Pack<acc> z = pre_activation(a, centred, at);
          const Mask<acc> open = passes(z);
          if constexpr (kApply) store(y + r * a.channels + at, relu(z), left);
          const Pack<acc> g = select(open, gs[r].pack[i], broadcast(acc(0)));
          s = s + g;
          q = fma(g, centred, q);
          S* const p = total + r * a.grad_sum_stride + at;
          store(p, kFirst ? g * factor : fma(g, factor, load(p, left)), left);
        }
        store(sum + at, s);
        store(product + at, q);
      });
    });
  };
  for (int64_t block = begin; block < end; block += kBlockRows) {
    for_rows(block, std::min(block + kBlockRows, end), add);
    for (int64_t c = 0; c < a.channels; ++c) {
      sum_grad[c] += static_cast<double>(sum[c]);
      sum_grad_centred[c] += static_cast<double>(product[c]);
    }
    std::fill(sums.begin(), sums.end(), acc(0));
  }
}

template <class T, class S>
void gradient_rows(const DenseBlockArgs& a, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = at_row<T>(a.x, row, a.x_stride);
    const T* const grad = at_row<T>(a.grad_y, row, a.grad_y_stride);
    const S* const total = at_row<S>(a.grad_sum, row, a.grad_sum_stride);
    T* const out = at_row<T>(a.out, row, a.channels);
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      const int64_t left = a.channels - c;
      Pack<acc> g = a.grad_y ? load(grad + c, left) : broadcast(acc(0));
      if (a.grad_sum) g = fma(load(total + c, left), parameter<acc>(a.sum_scale, c), g);
      if (a.mean) {
        const Pack<acc> centred = load(x + c, left) - parameter<acc>(a.mean, c);
        g = g + fma(centred, parameter<acc>(a.sum_slope, c), parameter<acc>(a.sum_offset, c));
      }
      store(out + c, g, left);
    }
  }
}

void apply(const DenseBlockArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&]<class T>(T) { apply_rows<T>(a, begin, end); });
}

// Calls f(T{}, S{}).
template <class F>
void dispatch_sum(const DenseBlockArgs& a, F f) {
  dispatch_dtype(a.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      f(T{}, T{});
    } else if (a.wide_sum) {
      f(T{}, acc_t<T>{});
    } else {
      f(T{}, T{});
    }
  });
}

void accumulate(const DenseBlockArgs& a, int64_t begin, int64_t end, double* sum_grad,
                double* sum_grad_centred) {
  dispatch_sum(a, [&]<class T, class S>(T, S) {
    dispatch_bool(a.first, [&]<bool kFirst>(Constant<kFirst>) {
      if constexpr (std::is_same_v<T, float>) {
        if (a.out)
          return accumulate_rows<T, S, kFirst, true>(a, begin, end, sum_grad, sum_grad_centred);
      }
      accumulate_rows<T, S, kFirst, false>(a, begin, end, sum_grad, sum_grad_centred);
    });
  });
}

void gradient(const DenseBlockArgs& a, int64_t begin, int64_t end) {
  dispatch_sum(a, [&]<class T, class S>(T, S) { gradient_rows<T, S>(a, begin, end); });
}

}  // namespace

const DenseBlockKernels dense_block_kernels = {apply, accumulate, gradient};

}  // namespace resops::RESOPS_ISA
