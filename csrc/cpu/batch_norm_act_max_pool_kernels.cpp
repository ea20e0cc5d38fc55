// batch_norm_act_max_pool on a CPU.
//
// Forward keeps as many rows of act(z) as a window is high, so that each element of x is read and
// normalised once. Backward gathers, row by row of x, what the windows above it hand down to each
// element: there is no tensor for the gradient between pooling and activation, and no two threads
// add to one place.

#include "batch_norm_act_max_pool_kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "activation.h"
#include "dispatch.h"
#include "simd.h"

namespace resops::RESOPS_ISA {
namespace {

using Args = BatchNormActMaxPoolArgs;

constexpr int64_t kBlock = 128;  // additions in the accumulation type before one in double

// Calls f(at, c, count) for the vectors of a row of pixels; `at` is where the vector is in the row,
// `c` its first channel within the pixel.
template <bool kDeep, class F>
inline void for_row(const Args& a, F f) {
  if constexpr (kDeep) {
    for (int64_t w = 0; w < a.width; ++w) {
      for (int64_t c = 0; c < a.depth; c += kLanes) {
        f(w * a.depth + c, c, std::min<int64_t>(a.depth - c, kLanes));
      }
    }
  } else {
    for (int64_t w = 0; w < a.width; w += kLanes) f(w, 0, std::min<int64_t>(a.width - w, kLanes));
  }
}

// A parameter per channel: of the channels of a pixel, or of the one channel of a plane.
template <class acc, bool kDeep>
class Parameter {
 public:
  Parameter(const Args& a, const void* values, int64_t image)
      : values_(static_cast<const acc*>(values)) {
    if (!kDeep && values) same_ = broadcast(values_[image % a.channels]);
  }
  Pack<acc> at(int64_t c, int64_t count) const {
    if constexpr (kDeep) return load(values_ + c, count);
    return same_;
  }

 private:
  const acc* values_;
  Pack<acc> same_ = broadcast(acc(0));
};

// z = (x - mean) * scale + bias
template <class acc, bool kDeep>
struct Affine {
  Affine(const Args& a, int64_t image)
      : mean(a, a.mean, image), scale(a, a.scale, image), bias(a, a.bias, image) {}
  Pack<acc> z(Pack<acc> centred, int64_t c, int64_t count) const {
    return fma(centred, scale.at(c, count), bias.at(c, count));
  }
  Parameter<acc, kDeep> mean, scale, bias;
};

// Positions [begin, end) of a window along one dimension that are in the image; `first` is where in
// the image position 0 is.
struct Reach {
  Reach(const Args& a, int dimension, int64_t out)
      : first(out * a.stride[dimension] - a.padding[dimension]),
        begin(std::max<int64_t>(-first, 0)),
        end(std::min(a.kernel[dimension], (dimension == 0 ? a.height : a.width) - first)) {}
  int64_t first, begin, end;
};

// ---- forward -----------------------------------------------------------------------------------

template <class acc>
inline void store_index(uint8_t* p, Pack<acc> where, int64_t count) {
  acc values[kLanes];
  store(values, where);
  uint8_t bytes[kLanes];
  for (int i = 0; i < kLanes; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int>(values[i]));
  std::memcpy(p, bytes, static_cast<size_t>(count));
}

template <class T, Activation kAct, bool kDeep>
void forward_rows(const Args& a, PoolRows rows) {
  using acc = acc_t<T>;
  const acc slope = static_cast<acc>(a.negative_slope);
  const Affine<acc, kDeep> affine(a, rows.image);
  const int64_t pitch = a.width * a.depth, held = pitch + kLanes;
  const int64_t kernel_width = a.kernel[1];
  std::vector<acc> ring(static_cast<size_t>(a.kernel[0] * held));
  const auto held_row = [&](int64_t h) { return ring.data() + h % a.kernel[0] * held; };

  int64_t next = 0;  // row of x that is to be activated next
  for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
    const Reach down(a, 0, oh);
    next = std::max(next, down.first + down.begin);
    for (; next < down.first + down.end; ++next) {
      const T* x = static_cast<const T*>(a.x) + (rows.image * a.height + next) * pitch;
      acc* const out = held_row(next);
      for_row<kDeep>(a, [&](int64_t at, int64_t c, int64_t count) __attribute__((always_inline)) {
        const Pack<acc> centred = load(x + at, count) - affine.mean.at(c, count);
        store(out + at, activate<kAct>(affine.z(centred, c, count), slope));
      });
    }
    const int64_t out_row = (rows.image * a.out_height + oh) * a.out_width;
    T* const y = static_cast<T*>(a.y) + out_row * a.depth;
    uint8_t* const index = a.index_out + out_row * a.depth;
    for (int64_t ow = 0; ow < a.out_width; ++ow) {
      const Reach across(a, 1, ow);
      const int64_t first = down.begin * kernel_width + across.begin;
      if constexpr (kDeep) {
        for (int64_t c = 0; c < a.depth; c += kLanes) {
          Pack<acc> best = broadcast(-static_cast<acc>(INFINITY));
          Pack<acc> where = broadcast(static_cast<acc>(first));
          for (int64_t kh = down.begin; kh < down.end; ++kh) {
            const acc* row = held_row(down.first + kh) + across.first * a.depth + c;
            for (int64_t kw = across.begin; kw < across.end; ++kw) {
              const Pack<acc> v = load(row + kw * a.depth);
              const Mask<acc> better = exceeds(v, best);
              best = select(better, v, best);
              where = select(better, broadcast(static_cast<acc>(kh * kernel_width + kw)), where);
            }
          }
          const int64_t count = std::min<int64_t>(a.depth - c, kLanes);
          store(y + ow * a.depth + c, best, count);
          store_index(index + ow * a.depth + c, where, count);
        }
      } else {
        acc best = -static_cast<acc>(INFINITY);
        int64_t where = first;
        for (int64_t kh = down.begin; kh < down.end; ++kh) {
          const acc* row = held_row(down.first + kh) + across.first;
          for (int64_t kw = across.begin; kw < across.end; ++kw) {
            if (row[kw] > best || row[kw] != row[kw]) {
              best = row[kw];
              where = kh * kernel_width + kw;
            }
          }
        }
        store(y + ow, broadcast(best), 1);
        index[ow] = static_cast<uint8_t>(where);
      }
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------

// What row h of x gets of the windows, in the order of the windows; `out` has kLanes values more
// than the row.
template <class T, bool kDeep>
void gather_row(const Args& a, int64_t image, int64_t h, std::vector<acc_t<T>>& out) {
  using acc = acc_t<T>;
  std::fill(out.begin(), out.end(), acc(0));
  const int64_t above = h + a.padding[0] - a.kernel[0];  // the window that ends before h
  const int64_t begin = above < 0 ? 0 : above / a.stride[0] + 1;
  const int64_t end = std::min((h + a.padding[0]) / a.stride[0] + 1, a.out_height);
  for (int64_t oh = begin; oh < end; ++oh) {
    const int64_t row = (image * a.out_height + oh) * a.out_width * a.depth;
    const T* grad_y = static_cast<const T*>(a.grad_y) + row;
    const uint8_t* index = a.index + row;
    const int64_t before = (h + a.padding[0] - oh * a.stride[0]) * a.kernel[1];
    for (int64_t ow = 0; ow < a.out_width; ++ow) {
      const Reach across(a, 1, ow);
      if constexpr (kDeep) {
        for (int64_t c = 0; c < a.depth; c += kLanes) {
          const int64_t count = std::min<int64_t>(a.depth - c, kLanes);
          const Pack<acc> g = load(grad_y + ow * a.depth + c, count);
          uint8_t copy[kLanes] = {};
          const uint8_t* where = index + ow * a.depth + c;
          if (count < kLanes) {
            std::copy_n(where, count, copy);
            where = copy;
          }
          acc* const to = out.data() + across.first * a.depth + c;
          for (int64_t kw = across.begin; kw < across.end; ++kw) {
            const Mask<acc> here = bytes_equal<acc>(where, static_cast<uint8_t>(before + kw));
            const Pack<acc> sum = load(to + kw * a.depth);
            store(to + kw * a.depth, select(here, sum + g, sum));
          }
        }
      } else {
        const int64_t kw = index[ow] - before;
        if (kw >= across.begin && kw < across.end) out[across.first + kw] += to_acc(grad_y[ow]);
      }
    }
  }
}

template <class T, Activation kAct, bool kDeep>
void reduce_rows(const Args& a, PoolRows rows, double* sum_grad, double* sum_grad_centred) {
  using acc = acc_t<T>;
  const acc slope = static_cast<acc>(a.negative_slope);
  const Affine<acc, kDeep> affine(a, rows.image);
  const int64_t pitch = a.width * a.depth;
  std::vector<acc> grad(static_cast<size_t>(pitch + kLanes));
  std::fill(sum_grad, sum_grad + a.depth, 0.0);
  std::fill(sum_grad_centred, sum_grad_centred + a.depth, 0.0);
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    gather_row<T, kDeep>(a, rows.image, h, grad);
    const T* x = static_cast<const T*>(a.x) + (rows.image * a.height + h) * pitch;
    // Vectors `step` apart, from `begin` on, belong to the same channels.
    const auto add = [&](int64_t begin, int64_t end, int64_t step,
                         int64_t c) __attribute__((always_inline)) {
      Pack<acc> sum = broadcast(acc(0)), product = sum;
      for (int64_t at = begin; at < end; at += step) {
        const int64_t count = std::min<int64_t>(kDeep ? a.depth - c : end - at, kLanes);
        const Pack<acc> centred = load(x + at, count) - affine.mean.at(c, count);
        Pack<acc> g =
            activation_grad<kAct>(load(grad.data() + at), affine.z(centred, c, count), slope);
        if (count < kLanes) g = keep(g, count);
        sum = sum + g;
        product = fma(g, centred, product);
      }
      if constexpr (kDeep) {
        acc sums[kLanes], products[kLanes];
        store(sums, sum);
        store(products, product);
        for (int64_t i = 0; i < std::min<int64_t>(a.depth - c, kLanes); ++i) {
          sum_grad[c + i] += static_cast<double>(sums[i]);
          sum_grad_centred[c + i] += static_cast<double>(products[i]);
        }
      } else {
        *sum_grad += horizontal_sum(sum);
        *sum_grad_centred += horizontal_sum(product);
      }
    };
    const int64_t step = kDeep ? a.depth : kLanes;
    for (int64_t begin = 0; begin < pitch; begin += kBlock * step) {
      const int64_t end = std::min(begin + kBlock * step, pitch);
      for (int64_t c = 0; c < a.depth; c += kLanes) add(begin + c, end, step, c);
    }
  }
}

template <class T, Activation kAct, bool kDeep>
void apply_rows(const Args& a, PoolRows rows) {
  using acc = acc_t<T>;
  const acc slope = static_cast<acc>(a.negative_slope);
  const Affine<acc, kDeep> affine(a, rows.image);
  const Parameter<acc, kDeep> grad_slope(a, a.grad_slope, rows.image),
      grad_offset(a, a.grad_offset, rows.image);
  const int64_t pitch = a.width * a.depth;
  std::vector<acc> grad(static_cast<size_t>(pitch + kLanes));
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    gather_row<T, kDeep>(a, rows.image, h, grad);
    const int64_t row = (rows.image * a.height + h) * pitch;
    const T* x = static_cast<const T*>(a.x) + row;
    T* const grad_x = static_cast<T*>(a.grad_x) + row;
    for_row<kDeep>(a, [&](int64_t at, int64_t c, int64_t count) __attribute__((always_inline)) {
      const Pack<acc> centred = load(x + at, count) - affine.mean.at(c, count);
      const Pack<acc> g =
          activation_grad<kAct>(load(grad.data() + at), affine.z(centred, c, count), slope);
      Pack<acc> out = g * affine.scale.at(c, count);
      if (a.grad_slope) {
        out = fma(g, affine.scale.at(c, count),
                  fma(centred, grad_slope.at(c, count), grad_offset.at(c, count)));
      }
      store(grad_x + at, out, count);
    });
  }
}

// ---- choice of the instance --------------------------------------------------------------------

template <class F>
void dispatch(const Args& a, F f) {
  dispatch_dtype(a.dtype, [&]<class T>(T type) {
    dispatch_activation(a.activation, [&]<Activation kAct>(Constant<kAct> act) {
      dispatch_bool(a.depth > 1, [&]<bool kDeep>(Constant<kDeep> deep) { f(type, act, deep); });
    });
  });
}

void forward(const Args& a, PoolRows rows) {
  dispatch(a, [&]<class T, Activation kAct, bool kDeep>(T, Constant<kAct>, Constant<kDeep>) {
    forward_rows<T, kAct, kDeep>(a, rows);
  });
}

void backward_reduce(const Args& a, PoolRows rows, double* sum_grad, double* sum_grad_centred) {
  dispatch(a, [&]<class T, Activation kAct, bool kDeep>(T, Constant<kAct>, Constant<kDeep>) {
    reduce_rows<T, kAct, kDeep>(a, rows, sum_grad, sum_grad_centred);
  });
}

void backward_apply(const Args& a, PoolRows rows) {
  dispatch(a, [&]<class T, Activation kAct, bool kDeep>(T, Constant<kAct>, Constant<kDeep>) {
    apply_rows<T, kAct, kDeep>(a, rows);
  });
}

}  // namespace

const BatchNormActMaxPoolKernels batch_norm_act_max_pool_kernels = {forward, backward_reduce,
                                                                    backward_apply};

}  // namespace resops::RESOPS_ISA
