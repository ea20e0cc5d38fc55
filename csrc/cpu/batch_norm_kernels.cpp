// batch_norm on a CPU: statistics, apply, backward_reduce, backward_apply.
//
// Every pass is bound by memory, so each reads its tensors once, from front to back within a piece,
// and keeps everything per channel in the first-level cache. Sums run in the accumulation type over
// blocks of 128 or 256 rows and are then merged in double: the statistics as (count, mean, M2) of
// values shifted by a per-channel constant near their mean, so that a mean of 1e4 standard
// deviations costs nothing (Chan, Golub and LeVeque, 1983). docs/math/batch_norm.md has the
// formulas.

#include "batch_norm_kernels.h"

#include <algorithm>
#include <vector>

#include "activation.h"
#include "dispatch.h"
#include "simd.h"

namespace resops::RESOPS_ISA {
namespace {

constexpr int64_t kBlockVectors = 128;  // additions in the accumulation type before a merge

// In channels-last, in rows: a merge takes as long for rows of fewer bytes.
template <class T>
constexpr int64_t kBlockRows = sizeof(T) == 2 ? 256 : 128;

// A parameter along one row: vectors in channels-last, one value in contiguous.
template <class acc, bool kChannelsLast>
class RowParameter {
 public:
  explicit RowParameter(const void* values) : values_(static_cast<const acc*>(values)) {}
  void start_row(int64_t channel) {
    if constexpr (!kChannelsLast) {
      same_ = broadcast(values_ ? values_[channel] : acc(0));
    }
  }
  Pack<acc> operator[](int64_t column) const {
    if constexpr (kChannelsLast) return load(values_ + column);
    return same_;
  }

 private:
  const acc* values_;
  Pack<acc> same_;
};

template <class acc>
inline Pack<acc> pre_activation(Pack<acc> centred, Pack<acc> scale, Pack<acc> bias) {
  return fma(centred, scale, bias);
}

template <bool kStream, class T>
inline void put(T* p, Line<T> v, int64_t count) {
  if constexpr (kStream) {
    stream_line(p, v);
  } else {
    store_line(p, v, count);
  }
}

// ---- forward
// --------------------------------------------------------------------------------------

template <class T, Activation kAct, bool kResidual, bool kStream, bool kChannelsLast>
void apply_rows(const BatchNormArgs& a, BatchNormSpan span) {
  using acc = acc_t<T>;
  const acc slope = static_cast<acc>(a.negative_slope);
  RowParameter<acc, kChannelsLast> mean(a.mean), scale(a.scale), bias(a.bias);
  for (int64_t row = span.row_begin; row < span.row_end; ++row) {
    if constexpr (!kChannelsLast) {
      const int64_t channel = row % a.channels;
      mean.start_row(channel);
      scale.start_row(channel);
      bias.start_row(channel);
    }
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const T* residual = static_cast<const T*>(a.residual) + (kResidual ? row * a.width : 0);
    T* y = static_cast<T*>(a.y) + row * a.width;
    uint8_t* mask = a.mask_out + (kResidual && is_masked(kAct) ? row * a.mask_step : 0);
    for_lines<T>(
        span.begin, span.end, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
          prefetch_line<kResidual ? 2 : 1>(x + c);
          if constexpr (kResidual) prefetch_line<2>(residual + c);
          if constexpr (!kStream) prefetch_written(y + c);
          const Line<T> xs = load_line(x + c, count);
          Line<T> residuals, out{};
          if constexpr (kResidual) residuals = load_line(residual + c, count);
          for_packs<T>(c, count,
                       [&](int i, int64_t at, int64_t left) __attribute__((always_inline)) {
                         Pack<acc> z = pre_activation(xs.pack[i] - mean[at], scale[at], bias[at]);
                         if constexpr (kResidual) {
                           z = z + residuals.pack[i];
                           if constexpr (is_masked(kAct))
                             store_mask_bits(mask + at / 8, to_bits(passes(z)), left);
                         }
                         out.pack[i] = activate<kAct>(z, slope);
                       });
          put<kStream>(y + c, out, count);
        });
  }
  if constexpr (kStream) stream_fence();
}

// Calls f(Constant<kChannelsLast>, Constant<kStream>). Nothing is streamed where memory is not what
// a pass waits for.
template <class T, Activation kAct, class F>
void dispatch_walk(const BatchNormArgs& a, F f) {
  dispatch_bool(a.channels_last, [&](auto channels_last) {
    if constexpr (!kCanStream || std::is_same_v<T, double> || is_smooth(kAct)) {
      f(channels_last, Constant<false>{});
    } else {
      dispatch_bool(a.streaming, [&](auto streams) { f(channels_last, streams); });
    }
  });
}

void apply(const BatchNormArgs& a, BatchNormSpan span) {
  dispatch_dtype(a.dtype, [&]<class T>(T) {
    dispatch_activation(a.activation, [&]<Activation kAct>(Constant<kAct>) {
      dispatch_bool(a.has_residual, [&]<bool kResidual>(Constant<kResidual>) {
        dispatch_walk<T, kAct>(a,
                               [&]<bool kLast, bool kStream>(Constant<kLast>, Constant<kStream>) {
                                 apply_rows<T, kAct, kResidual, kStream, kLast>(a, span);
                               });
      });
    });
  });
}

// The sums are of x - shift, with a shift per channel that has to lie within a few standard
// deviations of the mean. It begins as the average of the middle two of four values, which one
// outlier does not move and which is exact where they have a bit to spare, so that exact data give
// exact statistics; a mean further from it than two standard deviations replaces it.
template <class acc>
inline bool is_far(acc offset, acc count, acc m2) {
  return offset * offset * count > 4 * m2;
}

template <class acc>
inline acc middle(acc a, acc b, acc c, acc d) {
  const acc low = std::max(std::min(a, b), std::min(c, d));
  const acc high = std::min(std::max(a, b), std::max(c, d));
  return low / 2 + high / 2;
}

// Which of `count` values is the i-th of the four.
inline int64_t pilot_index(int64_t count, int64_t i) { return (count - 1) * i / 3; }

template <class T>
inline acc_t<T> first_shift(const T* x, int64_t count) {
  const auto value = [&](int64_t i) { return to_acc(x[pilot_index(count, i)]); };
  return middle(value(0), value(1), value(2), value(3));
}

// The same for every column of `rows` rows.
template <class T>
void first_shifts(const T* x, int64_t rows, int64_t width, acc_t<T>* shift) {
  using acc = acc_t<T>;
  for (int64_t c = 0; c < width; c += kLanes) {
    acc values[4][kLanes];
    for (int64_t i = 0; i < 4; ++i) {
      store(values[i], load(x + pilot_index(rows, i) * width + c));
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      shift[c + lane] = middle(values[0][lane], values[1][lane], values[2][lane], values[3][lane]);
    }
  }
}

// Running (count, mean, M2) in double of `width` columns, fed with blocks of shifted sums.
template <class acc>
struct ShiftedSums {
  explicit ShiftedSums(int64_t columns)
      : width(columns), shift(columns), sum(columns), square(columns) {}

  // For the first block: moves shifts that are far from the mean. Then the block is to be summed
  // again, since cancellation would have eaten its variance.
  bool recentre(int64_t rows) {
    const acc n = static_cast<acc>(rows);
    bool moved = false;
    for (int64_t c = 0; c < width; ++c) {
      const acc offset = sum[c] / n;
      moved |= is_far(offset, n, std::max(square[c] - sum[c] * offset, acc(0)));
    }
    if (!moved) return false;
    for (int64_t c = 0; c < width; ++c) {
      const acc offset = sum[c] / n;
      if (is_far(offset, n, std::max(square[c] - sum[c] * offset, acc(0)))) shift[c] += offset;
      sum[c] = square[c] = 0;
    }
    return true;
  }

  // Adds a block of `rows` rows whose sums of (x - shift) and (x - shift)^2 are in sum and square.
  void merge_block(int64_t rows, double* mean, double* m2) {
    const double n = static_cast<double>(count), b = static_cast<double>(rows), total = n + b;
    const double mean_weight = b / total, m2_weight = n * b / total, inverse = 1 / b;
    for (int64_t c = 0; c < width; ++c) {
      const double s = static_cast<double>(sum[c]);
      const double offset = s * inverse;
      const double block_m2 = std::max(static_cast<double>(square[c]) - s * offset, 0.0);
      const double delta = static_cast<double>(shift[c]) + offset - mean[c];
      const double merged_mean = mean[c] + delta * mean_weight;
      const double merged_m2 = m2[c] + block_m2 + delta * delta * m2_weight;
      mean[c] = merged_mean;
      m2[c] = merged_m2;
      const double away = merged_mean - static_cast<double>(shift[c]);
      shift[c] = is_far(away, total, merged_m2) ? static_cast<acc>(merged_mean) : shift[c];
      sum[c] = square[c] = 0;
    }
    count += rows;
  }

  int64_t count = 0;
  int64_t width;
  std::vector<acc> shift, sum, square;
};

// Sums rows [begin, end) of (x - shift) and (x - shift)^2, column by column.
template <class T>
void sum_block(const T* x, int64_t width, int64_t begin, int64_t end, ShiftedSums<acc_t<T>>& sums) {
  using acc = acc_t<T>;
  constexpr int kRows = 8;  // share one load and store of the sums
  const int64_t ahead = std::max<int64_t>(kPrefetchBytes / (width * sizeof(T)), kRows) * width;
  const acc* const shift = sums.shift.data();
  acc* const sum = sums.sum.data();
  acc* const square = sums.square.data();
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    const T* p = x + row * width;
    for (int64_t c = 0; c < width; c += kLine<T>) {
      if constexpr (sizeof(T) == 2) {  // in the order of memory: 7 % faster here
        prefetch(p + ahead + c * kRows, kRows * kLine<T> * sizeof(T));
      }
      Pack<acc> s[2][kPacks<T>], q[2][kPacks<T>], k[kPacks<T>];
      for_packs<T>(c, kLine<T>, [&](int i, int64_t at, int64_t) {
        k[i] = load(shift + at);
        s[0][i] = load(sum + at);
        q[0][i] = load(square + at);
        s[1][i] = q[1][i] = broadcast(acc(0));
      });
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if constexpr (sizeof(T) > 2) {  // as they are read: 12 % faster here
          prefetch(p + ahead + r * width + c, kLine<T> * sizeof(T));
        }
        const Line<T> xs = load_line(p + r * width + c);
#pragma GCC unroll 2
        for (int i = 0; i < kPacks<T>; ++i) {
          const Pack<acc> d = xs.pack[i] - k[i];
          s[r % 2][i] = s[r % 2][i] + d;
          q[r % 2][i] = fma(d, d, q[r % 2][i]);
        }
      }
      for_packs<T>(c, kLine<T>, [&](int i, int64_t at, int64_t) {
        store(sum + at, s[0][i] + s[1][i]);
        store(square + at, q[0][i] + q[1][i]);
      });
    }
  }
  for (; row < end; ++row) {
    const T* p = x + row * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Pack<acc> d = load(p + c) - load(shift + c);
      store(sum + c, load(sum + c) + d);
      store(square + c, fma(d, d, load(square + c)));
    }
  }
}

template <class T>
void statistics_channels_last(const BatchNormArgs& a, BatchNormSpan span, double* mean,
                              double* m2) {
  const int64_t width = a.width, rows = span.row_end - span.row_begin;
  const T* x = static_cast<const T*>(a.x);
  std::fill(mean, mean + width, 0.0);
  std::fill(m2, m2 + width, 0.0);
  if (span.end < width) {  // the shorter last row: every value is its own mean
    for (int64_t c = span.begin; c < span.end; ++c) {
      mean[c] = static_cast<double>(to_acc(x[span.row_begin * width + c]));
    }
    return;
  }
  ShiftedSums<acc_t<T>> sums(width);
  const int64_t first_rows = std::min(rows, kBlockRows<T>);
  first_shifts(x + span.row_begin * width, first_rows, width, sums.shift.data());
  for (int64_t begin = span.row_begin; begin < span.row_end; begin += kBlockRows<T>) {
    const int64_t end = std::min(begin + kBlockRows<T>, span.row_end);
    sum_block(x, width, begin, end, sums);
    if (begin == span.row_begin && sums.recentre(end - begin)) {
      sum_block(x, width, begin, end, sums);
    }
    sums.merge_block(end - begin, mean, m2);
  }
}

// Calls f(c, count) for the vectors of [begin, end), in blocks of kBlockVectors vectors after each
// of which flush(elements) is called.
template <class F, class Flush>
inline void for_blocks(int64_t begin, int64_t end, int64_t& pending, F f, Flush flush) {
  int64_t c = begin;
  while (c < end) {
    const int64_t stop =
        std::min(end, c + (kBlockVectors * kLanes - pending + kLanes - 1) / kLanes * kLanes);
    pending += stop - c;
    for (; c + kLanes <= stop; c += kLanes) f(c, kLanes);
    if (c < stop) {
      f(c, stop - c);
      c = stop;
    }
    if (pending >= kBlockVectors * kLanes) flush();
  }
}

// A shift for a channel, from the first values of one of its planes.
template <class T>
acc_t<T> pilot_shift(const T* x, int64_t count) {
  using acc = acc_t<T>;
  const acc shift = first_shift(x, count);
  Pack<acc> sum = broadcast(acc(0)), square = sum;
  for (int64_t c = 0; c < count; c += kLanes) {
    const Pack<acc> d = keep(load(x + c, count - c) - broadcast(shift), count - c);
    sum = sum + d;
    square = fma(d, d, square);
  }
  const acc n = static_cast<acc>(count), total = static_cast<acc>(horizontal_sum(sum));
  const acc offset = total / n;
  const acc m2 = static_cast<acc>(horizontal_sum(square)) - total * offset;
  return is_far(offset, n, std::max(m2, acc(0))) ? shift + offset : shift;
}

template <class T>
void statistics_contiguous(const BatchNormArgs& a, BatchNormSpan span, int64_t channel_begin,
                           int64_t channel_end, double* mean, double* m2) {
  using acc = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  const int64_t channels = channel_end - channel_begin;
  struct Sums {
    Pack<acc> sum, square;
    acc shift;
    int64_t count, pending;  // values merged, and values in sum and square
  };
  const auto plane = [&](int64_t n, int64_t i) {
    return x + (n * a.channels + channel_begin + i) * a.width;
  };
  std::vector<Sums> all(channels);
  const int64_t pilot = std::min(span.end - span.begin, kBlockVectors * kLanes);
  for (int64_t i = 0; i < channels; ++i) {
    const acc shift = pilot_shift(plane(span.row_begin, i) + span.begin, pilot);
    all[i] = {broadcast(acc(0)), broadcast(acc(0)), shift, 0, 0};
    mean[i] = m2[i] = 0;
  }
  const auto flush = [&](int64_t i) {
    Sums& s = all[i];
    const double sum = horizontal_sum(s.sum), b = static_cast<double>(s.pending);
    const double n = static_cast<double>(s.count), total = n + b, offset = sum / b;
    const double block_m2 = std::max(horizontal_sum(s.square) - sum * offset, 0.0);
    const double delta = static_cast<double>(s.shift) + offset - mean[i];
    mean[i] += delta * (b / total);
    m2[i] += block_m2 + delta * delta * (n * b / total);
    const bool far = is_far(mean[i] - static_cast<double>(s.shift), total, m2[i]);
    s = {broadcast(acc(0)), broadcast(acc(0)), far ? static_cast<acc>(mean[i]) : s.shift,
         s.count + s.pending, 0};
  };
  for (int64_t n = span.row_begin; n < span.row_end; ++n) {
    for (int64_t i = 0; i < channels; ++i) {
      const T* p = plane(n, i);
      Sums& s = all[i];
      for_blocks(
          span.begin, span.end, s.pending,
          [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Pack<acc> d = load(p + c, count) - broadcast(s.shift);
            if (count < kLanes) d = keep(d, count);
            s.sum = s.sum + d;
            s.square = fma(d, d, s.square);
          },
          [&] { flush(i); });
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    if (all[i].pending > 0) flush(i);
  }
}

void statistics(const BatchNormArgs& a, BatchNormSpan span, int64_t channel_begin,
                int64_t channel_end, double* mean, double* m2) {
  dispatch_dtype(a.dtype, [&]<class T>(T) {
    if (a.channels_last) {
      statistics_channels_last<T>(a, span, mean, m2);
    } else {
      statistics_contiguous<T>(a, span, channel_begin, channel_end, mean, m2);
    }
  });
}

void merge(int64_t width, double count_a, double* mean_a, double* m2_a, double count_b,
           const double* mean_b, const double* m2_b) {
  const double total = count_a + count_b;
  const double mean_weight = count_b / total, m2_weight = count_a * count_b / total;
  for (int64_t c = 0; c < width; ++c) {
    const double delta = mean_b[c] - mean_a[c];
    mean_a[c] += delta * mean_weight;
    m2_a[c] += m2_b[c] + delta * delta * m2_weight;
  }
}

// ---- backward
// -------------------------------------------------------------------------------------

// What the backward passes read of one row, and the gradient before the activation at one pack.
template <class T, Activation kAct, bool kResidual, bool kChannelsLast>
struct GradRow {
  using acc = acc_t<T>;
  static constexpr bool kNeedsZ = kAct != Activation::identity && !(kResidual && is_masked(kAct));

  explicit GradRow(const BatchNormArgs& args)
      : a(args),
        slope(static_cast<acc>(args.negative_slope)),
        mean(args.mean),
        scale(args.scale),
        bias(args.bias) {}

  void start_row(int64_t row) {
    if constexpr (!kChannelsLast) {
      const int64_t channel = row % a.channels;
      mean.start_row(channel);
      scale.start_row(channel);
      bias.start_row(channel);
    }
    grad_y = static_cast<const T*>(a.grad_y) + row * a.width;
    x = static_cast<const T*>(a.x) + row * a.width;
    if constexpr (kResidual && is_masked(kAct)) mask = a.mask + row * a.mask_step;
    if constexpr (kResidual && is_smooth(kAct)) {
      residual = static_cast<const T*>(a.residual) + row * a.width;
    }
  }

  // From the pack `g` of grad_y, `rows` rows below the current one, at column c.
  inline __attribute__((always_inline)) Pack<acc> grad(Pack<acc> g, Pack<acc> centred, int64_t c,
                                                       int64_t count, int64_t rows = 0) const {
    if constexpr (kResidual && is_masked(kAct)) {
      const uint16_t bits = load_mask_bits(mask + rows * a.mask_step + c / 8, count);
      return masked_grad<kAct>(g, from_bits<acc>(bits), slope);
    } else if constexpr (kNeedsZ) {
      Pack<acc> z = pre_activation(centred, scale[c], bias[c]);
      if constexpr (kResidual) z = z + load(residual + rows * a.width + c, count);
      return activation_grad<kAct>(g, z, slope);
    } else {
      return g;
    }
  }

  const BatchNormArgs& a;
  acc slope;
  RowParameter<acc, kChannelsLast> mean, scale, bias;
  const T* grad_y = nullptr;
  const T* x = nullptr;
  const T* residual = nullptr;
  const uint8_t* mask = nullptr;
};

// With kWrite they also store the gradient before the activation, which is grad_residual.
template <class T, Activation kAct, bool kResidual, bool kWrite>
void reduce_channels_last(const BatchNormArgs& a, BatchNormSpan span, double* sum_grad,
                          double* sum_grad_centred) {
  using acc = acc_t<T>;
  const int64_t width = a.width;
  std::vector<acc> sums(2 * width);
  acc* const sum = sums.data();
  acc* const product = sum + width;
  std::fill(sum_grad, sum_grad + width, 0.0);
  std::fill(sum_grad_centred, sum_grad_centred + width, 0.0);
  GradRow<T, kAct, kResidual, true> row_of(a);
  constexpr int kRows = 4;
  const int64_t ahead = std::max<int64_t>(kPrefetchBytes / (width * sizeof(T)), kRows) * width;
  T* const grad_residual = static_cast<T*>(a.grad_residual);
  for (int64_t begin = span.row_begin; begin < span.row_end; begin += kBlockRows<T>) {
    const int64_t end = std::min(begin + kBlockRows<T>, span.row_end);
    int64_t row = begin;
    // Adds `rows` rows, from the current one on, at the line of column c.
    const auto add = [&](int64_t c, int64_t count, auto rows) __attribute__((always_inline)) {
      constexpr int kCount = rows.value;
      Line<T> xs[kCount], gs[kCount], before[kCount]{};
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        xs[r] = load_line(row_of.x + r * width + c, count);
        gs[r] = load_line(row_of.grad_y + r * width + c, count);
      }
      for_packs<T>(c, count, [&](int i, int64_t at, int64_t left) __attribute__((always_inline)) {
        const Pack<acc> mean = row_of.mean[at];
        Pack<acc> s = load(sum + at), q = load(product + at);
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
          const Pack<acc> centred = xs[r].pack[i] - mean;
          const Pack<acc> g = row_of.grad(gs[r].pack[i], centred, at, left, r);
          if constexpr (kWrite) before[r].pack[i] = g;
          s = s + g;
          q = fma(g, centred, q);
        }
        store(sum + at, s);
        store(product + at, q);
      });
      if constexpr (kWrite) {
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
          T* const out = grad_residual + (row + r) * width + c;
          if (a.streaming && count == kLine<T>) {
            stream_line(out, before[r]);
          } else {
            store_line(out, before[r], count);
          }
        }
      }
    };
    for (; row + kRows <= end && span.end == width; row += kRows) {
      row_of.start_row(row);
      for (int64_t c = 0; c < width; c += kLine<T>) {
        prefetch(row_of.x + ahead + c * kRows, kRows * kLine<T> * sizeof(T));
        prefetch(row_of.grad_y + ahead + c * kRows, kRows * kLine<T> * sizeof(T));
        add(c, kLine<T>, Constant<kRows>{});
      }
    }
    for (; row < end; ++row) {
      row_of.start_row(row);
      for_lines<T>(span.begin, span.end,
                   [&](int64_t c, int64_t count) { add(c, count, Constant<1>{}); });
    }
    for (int64_t c = 0; c < width; ++c) {
      sum_grad[c] += static_cast<double>(sum[c]);
      sum_grad_centred[c] += static_cast<double>(product[c]);
      sum[c] = product[c] = 0;
    }
  }
  if (kWrite && a.streaming) stream_fence();
}

template <class T, Activation kAct, bool kResidual, bool kWrite>
void reduce_contiguous(const BatchNormArgs& a, BatchNormSpan span, int64_t channel_begin,
                       int64_t channel_end, double* sum_grad, double* sum_grad_centred) {
  using acc = acc_t<T>;
  const int64_t channels = channel_end - channel_begin;
  std::fill(sum_grad, sum_grad + channels, 0.0);
  std::fill(sum_grad_centred, sum_grad_centred + channels, 0.0);
  GradRow<T, kAct, kResidual, false> row_of(a);
  for (int64_t n = span.row_begin; n < span.row_end; ++n) {
    for (int64_t i = 0; i < channels; ++i) {
      row_of.start_row(n * a.channels + channel_begin + i);
      const int64_t plane = (n * a.channels + channel_begin + i) * a.width;
      T* const grad_residual = static_cast<T*>(a.grad_residual) + (kWrite ? plane : 0);
      const Pack<acc> mean = row_of.mean[0];
      Pack<acc> s = broadcast(acc(0)), q = s;
      int64_t pending = 0;
      const auto flush = [&] {
        sum_grad[i] += horizontal_sum(s);
        sum_grad_centred[i] += horizontal_sum(q);
        s = q = broadcast(acc(0));
        pending = 0;
      };
      for_blocks(
          span.begin, span.end, pending,
          [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            const Pack<acc> centred = load(row_of.x + c, count) - mean;
            const Pack<acc> g = row_of.grad(load(row_of.grad_y + c, count), centred, c, count);
            if constexpr (kWrite) store(grad_residual + c, g, count);
            s = s + g;
            q = fma(g, centred, q);
          },
          flush);
      if (pending > 0) flush();
    }
  }
}

void backward_reduce(const BatchNormArgs& a, BatchNormSpan span, int64_t channel_begin,
                     int64_t channel_end, double* sum_grad, double* sum_grad_centred) {
  dispatch_dtype(a.dtype, [&]<class T>(T) {
    dispatch_activation(a.activation, [&]<Activation kAct>(Constant<kAct>) {
      dispatch_bool(a.has_residual, [&]<bool kResidual>(Constant<kResidual>) {
        const auto reduce = [&]<bool kWrite>(Constant<kWrite>) {
          if (a.channels_last) {
            reduce_channels_last<T, kAct, kResidual, kWrite>(a, span, sum_grad, sum_grad_centred);
          } else {
            reduce_contiguous<T, kAct, kResidual, kWrite>(a, span, channel_begin, channel_end,
                                                          sum_grad, sum_grad_centred);
          }
        };
        // Of what can stand before the activation, only this loses nothing in the type of grad_y.
        if constexpr (kAct == Activation::relu && kResidual) {
          dispatch_bool(a.grad_residual != nullptr, reduce);
        } else {
          reduce(Constant<false>{});
        }
      });
    });
  });
}

template <class T, Activation kAct, bool kResidual, bool kStream, bool kChannelsLast>
void backward_apply_rows(const BatchNormArgs& a, BatchNormSpan span) {
  using acc = acc_t<T>;
  GradRow<T, kAct, kResidual, kChannelsLast> row_of(a);
  RowParameter<acc, kChannelsLast> grad_slope(a.grad_slope), grad_offset(a.grad_offset);
  const bool frozen = a.grad_slope == nullptr;
  for (int64_t row = span.row_begin; row < span.row_end; ++row) {
    row_of.start_row(row);
    if constexpr (!kChannelsLast) {
      grad_slope.start_row(row % a.channels);
      grad_offset.start_row(row % a.channels);
    }
    T* grad_x = static_cast<T*>(a.grad_x) + (a.grad_x ? row * a.width : 0);
    T* grad_residual = static_cast<T*>(a.grad_residual) + (a.grad_residual ? row * a.width : 0);
    for_lines<T>(
        span.begin, span.end, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
          prefetch_line<2>(row_of.x + c);
          prefetch_line<2>(row_of.grad_y + c);
          if constexpr (!kStream) {
            if (grad_x) prefetch_written(grad_x + c);
            if (grad_residual) prefetch_written(grad_residual + c);
          }
          const Line<T> xs = load_line(row_of.x + c, count),
                        gs = load_line(row_of.grad_y + c, count);
          Line<T> before{}, out{};  // gradients before the activation, and of x
          for_packs<T>(
              c, count, [&](int i, int64_t at, int64_t left) __attribute__((always_inline)) {
                const Pack<acc> centred = xs.pack[i] - row_of.mean[at];
                const Pack<acc> g = row_of.grad(gs.pack[i], centred, at, left);
                before.pack[i] = g;
                out.pack[i] = g * row_of.scale[at];
                if (!frozen)
                  out.pack[i] = out.pack[i] + fma(centred, grad_slope[at], grad_offset[at]);
              });
          if (grad_residual) put<kStream>(grad_residual + c, before, count);
          if (grad_x) put<kStream>(grad_x + c, out, count);
        });
  }
  if constexpr (kStream) stream_fence();
}

void backward_apply(const BatchNormArgs& a, BatchNormSpan span) {
  dispatch_dtype(a.dtype, [&]<class T>(T) {
    dispatch_activation(a.activation, [&]<Activation kAct>(Constant<kAct>) {
      dispatch_bool(a.has_residual, [&]<bool kResidual>(Constant<kResidual>) {
        dispatch_walk<T, kAct>(a,
                               [&]<bool kLast, bool kStream>(Constant<kLast>, Constant<kStream>) {
                                 backward_apply_rows<T, kAct, kResidual, kStream, kLast>(a, span);
                               });
      });
    });
  });
}

}  // namespace

const BatchNormKernels batch_norm_kernels = {apply, backward_apply, statistics, backward_reduce,
                                             merge};

}  // namespace resops::RESOPS_ISA
