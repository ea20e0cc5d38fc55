// 3x3 convolution of stride 1 on a CPU by Winograd's minimal filtering.
//
// A direct convolution multiplies 9 times per output, input channel and output channel, F(4x4, 3x3)
// 36 times per 16 outputs: a quarter. A block of tiles is transformed to its 36 points, multiplied
// there by the transformed weight, one small matrix product per point, and transformed back, all
// within the second-level cache; what comes before and after the convolution is applied on the way
// in and on the way out. Everything is float32 inside, whatever the tensors are.

#include "conv_bn_act_kernels.h"

#include <algorithm>

#include "convolution_epilogue.h"
#include "dispatch.h"
#include "matrix.h"
#include "simd.h"
#include "winograd.h"

namespace resops::RESOPS_ISA {
namespace {

template <int kOut>
constexpr int kPoints = Winograd<kOut>::kIn * Winograd<kOut>::kIn;

int64_t plane_size(int64_t channels, int64_t tiles) { return tiles * padded(channels) + kLanes; }
int64_t panel_point_size(int64_t in_channels) { return in_channels * kPanel + kLanes; }

int points_of(int tile) { return (tile + 2) * (tile + 2); }

template <class F>
void dispatch_tile(DType dtype, int tile, F f) {
  const auto with_type = [&](auto tile_constant) {
    switch (dtype) {
      case DType::bf16:
        return f(BFloat16{}, tile_constant);
      case DType::f16:
        return f(Float16{}, tile_constant);
      default:
        return f(float{}, tile_constant);
    }
  };
  return tile == 4 ? with_type(Constant<4>{}) : with_type(Constant<2>{});
}

// Where the outputs of a tile are.
TilePlace place_of(const WinogradGeometry& g, int64_t tile, int size) {
  const int64_t row = tile / g.tile_columns % g.tile_rows * size;
  const int64_t column = tile % g.tile_columns * size;
  return {tile / (g.tile_rows * g.tile_columns), row, column,
          std::min<int64_t>(size, g.out_height - row),
          std::min<int64_t>(size, g.out_width - column)};
}

// ---- on the way in ------------------------------------------------------------------------

// A square of kSide x kSide values of one vector of channels, of which rows [row_begin, row_end)
// and columns likewise lie in the image; zeros around them.
struct Window {
  Window(int64_t row, int64_t column, int64_t height, int64_t width, int side)
      : row_begin(std::clamp<int64_t>(-row, 0, side)),
        row_end(std::clamp<int64_t>(height - row, row_begin, side)),
        column_begin(std::clamp<int64_t>(-column, 0, side)),
        column_end(std::clamp<int64_t>(width - column, column_begin, side)),
        whole(row_begin == 0 && row_end == side && column_begin == 0 && column_end == side) {}
  int64_t row_begin, row_end, column_begin, column_end;
  bool whole;
};

template <class T, int kSide>
inline void read_window(const ImageView& view, int64_t offset, const Window& window, int64_t count,
                        const Prologue& prologue, int64_t channel, Value (&d)[kSide][kSide]) {
  const T* data = static_cast<const T*>(view.data);
  if (window.whole && count == kLanes) {
    const T* row = data + offset;
#pragma GCC unroll 6
    for (int r = 0; r < kSide; ++r, row += view.row_stride) {
#pragma GCC unroll 6
      for (int s = 0; s < kSide; ++s) d[r][s] = load(row + s * view.column_stride);
    }
    if (prologue.scale) apply_prologue(prologue, channel, &d[0][0], kSide * kSide);
    return;
  }
  for (int r = 0; r < kSide; ++r) {
    for (int s = 0; s < kSide; ++s) d[r][s] = broadcast(0.0f);
  }
  const int64_t columns = window.column_end - window.column_begin;
  for (int64_t r = window.row_begin; r < window.row_end; ++r) {
    for (int64_t s = window.column_begin; s < window.column_end; ++s) {
      d[r][s] = load(data + offset + r * view.row_stride + s * view.column_stride, count);
    }
    if (prologue.scale) {
      apply_prologue(prologue, channel, &d[r][window.column_begin], static_cast<int>(columns));
    }
  }
}

// One tile of the input, at all points.
template <class T, int kOut>
void transform_input_tile(const WinogradGeometry& g, int64_t tile, float* out, int64_t plane) {
  using W = Winograd<kOut>;
  const TilePlace place = place_of(g, tile, kOut);
  const int64_t row = place.row - g.pad_h, column = place.column - g.pad_w;
  const Window window(row, column, g.height, g.width, W::kIn);
  int64_t first = 0;  // channel of the slice
  for (int64_t i = 0; i < g.input_count; ++i) {
    const ImageView& view = g.inputs[i];
    const int64_t offset =
        place.image * view.batch_stride + row * view.row_stride + column * view.column_stride;
    for (int64_t c = 0; c < view.channels; c += kLanes) {
      Value d[W::kIn][W::kIn];
      const int64_t count = std::min<int64_t>(view.channels - c, kLanes);
      read_window<T>(view, offset + c, window, count, g.prologue, first + c, d);
      // The last vector of a slice writes past it; the next slice, or nobody, comes there.
      float* at = out + first + c;
      both_sides<W::kIn, W::kIn>(d, W::input,
                                 [&](int i, int j, Value v) __attribute__((always_inline)) {
                                   store(at + (i * W::kIn + j) * plane, v);
                                 });
    }
    first += view.channels;
  }
}

// One tile of the output's gradient, at all points.
template <class T, int kOut>
void transform_gradient_tile(const WinogradGeometry& g, const ImageView& grad, int64_t tile,
                             float* out, int64_t plane) {
  using W = Winograd<kOut>;
  const TilePlace place = place_of(g, tile, kOut);
  const Window window(place.row, place.column, g.out_height, g.out_width, kOut);
  const int64_t offset = place.image * grad.batch_stride + place.row * grad.row_stride +
                         place.column * grad.column_stride;
  for (int64_t k = 0; k < grad.channels; k += kLanes) {
    Value d[kOut][kOut];
    const int64_t count = std::min<int64_t>(grad.channels - k, kLanes);
    read_window<T>(grad, offset + k, window, count, Prologue{}, 0, d);
    float* at = out + k;
    both_sides<kOut, W::kIn>(d, W::output_transposed,
                             [&](int i, int j, Value v) __attribute__((always_inline)) {
                               store(at + (i * W::kIn + j) * plane, v);
                             });
  }
}

// ---- the weight ---------------------------------------------------------------------------

int64_t weight_size(int tile, int64_t in_channels, int64_t out_channels) {
  const int64_t panels = (out_channels + kPanel - 1) / kPanel;
  return panels * points_of(tile) * panel_point_size(in_channels);
}

// 3x3 taps of 16 x 16 weights, with output channels as lanes.
struct WeightBlock {
  alignas(64) Value taps[9][kLanes];

  template <class T>
  void read(const WeightView& w, int64_t out, int64_t out_count, int64_t in, int64_t in_count) {
    const T* data = static_cast<const T*>(w.data) + out * w.out_stride + in * w.in_stride;
    const bool whole = out_count == kLanes && in_count == kLanes;
    if (whole && w.in_stride == 1) {  // channels-last
      for (int tap = 0; tap < 9; ++tap) {
        const T* first = data + tap / 3 * w.row_stride + tap % 3 * w.column_stride;
        for (int o = 0; o < kLanes; ++o) {
          taps[tap][o] = load(first + o * w.out_stride);
          __builtin_prefetch(first + o * w.out_stride + kLanes);
        }
        transpose(taps[tap]);
      }
    } else if (whole && w.in_stride == 9 && w.row_stride == 3 && w.column_stride == 1) {
      for (int part = 0; part < 9; ++part) {  // contiguous: taps, then input channels
        Value rows[kLanes];
        for (int o = 0; o < kLanes; ++o) {
          rows[o] = load(data + o * w.out_stride + part * kLanes);
          __builtin_prefetch(data + o * w.out_stride + (part + 9) * kLanes);
        }
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) {
          taps[(part * kLanes + i) % 9][(part * kLanes + i) / 9] = rows[i];
        }
      }
    } else {
      for (int tap = 0; tap < 9; ++tap) {
        const T* first = data + tap / 3 * w.row_stride + tap % 3 * w.column_stride;
        for (int64_t i = 0; i < in_count; ++i) {
          taps[tap][i] = gather(first + i * w.in_stride, w.out_stride, out_count);
        }
      }
    }
  }

 private:
  template <class T>
  static Value gather(const T* data, int64_t stride, int64_t count) {
    if (stride == 1) return load(data, count);
    float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = to_acc(data[i * stride]);
    return load(values);
  }
};

// Input channels `in` of one panel, of which `out` holds the output channels, at all points:
// transformed[point * point_size + i * kPanel + o].
template <class T, int kOut>
void transform_panel(const WeightView& w, ChannelRange in, ChannelRange out, float* transformed,
                     int64_t point_size) {
  using W = Winograd<kOut>;
  WeightBlock block;
  for (int64_t first = in.begin; first < in.end; first += kLanes) {
    const int64_t in_count = std::min<int64_t>(in.end - first, kLanes);
    for (int64_t o = out.begin; o < out.end; o += kLanes) {
      block.read<T>(w, o, std::min<int64_t>(out.end - o, kLanes), first, in_count);
      float* to = transformed + (first - in.begin) * kPanel + o - out.begin;
      for (int64_t i = 0; i < in_count; ++i, to += kPanel) {
        Value taps[3][3];
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
          for (int s = 0; s < 3; ++s) taps[r][s] = block.taps[r * 3 + s][i];
        }
        both_sides<3, W::kIn>(taps, W::weight,
                              [&](int r, int s, Value v) __attribute__((always_inline)) {
                                store(to + (r * W::kIn + s) * point_size, v);
                              });
      }
    }
  }
}

void transform_weight(int tile, const WeightView& w, int64_t in_channels, ChannelRange out_channels,
                      float* transformed) {
  const int64_t point_size = panel_point_size(in_channels);
  dispatch_tile(w.dtype, tile, [&]<class T, int kOut>(T, Constant<kOut>) {
    for (int64_t k = out_channels.begin; k < out_channels.end; k += kPanel) {
      transform_panel<T, kOut>(w, {0, in_channels},
                               {k, std::min<int64_t>(k + kPanel, out_channels.end)},
                               transformed + k / kPanel * kPoints<kOut> * point_size, point_size);
    }
  });
}

// ---- convolution --------------------------------------------------------------------------

// Input channels whose part of a panel is transformed at a time, and then multiplied: at 36 points
// 0.6 MB, which the second-level cache holds beside its outputs.
constexpr int64_t kWeightChannels = 128;

int64_t workspace_size(const WinogradGeometry& g, int64_t tiles, int64_t out_channels) {
  const int points = points_of(g.tile);
  return 6 * padded(out_channels) + points * plane_size(out_channels, tiles) +
         points * panel_point_size(std::min(g.in_channels, kWeightChannels));
}

// The parts of a workspace.
struct Workspace {
  Workspace(float* data, int points, int64_t channels, int64_t tiles)
      : width(padded(channels)),
        plane(plane_size(channels, tiles)),
        totals{reinterpret_cast<double*>(data), reinterpret_cast<double*>(data) + width,
               reinterpret_cast<double*>(data) + 2 * width},
        outputs(data + 6 * width),
        weight(outputs + points * plane) {
    std::fill_n(totals.sum0, 2 * width, 0.0);
  }
  int64_t width, plane;  // steps between tiles and points of `outputs`
  Totals totals;         // three vectors of doubles
  float* outputs;
  float* weight;  // what is transformed on the way
};

// The products at all points, output panel by output panel.
template <int kOut>
void multiply_transformed(const WinogradGeometry& g, const WinogradOutput& o,
                          const WinogradOperands& operands, ChannelRange range,
                          const Workspace& space) {
  const int64_t in_width = padded(g.in_channels);
  const int64_t in_plane = plane_size(g.in_channels, operands.capacity);
  const int64_t point_size = panel_point_size(g.in_channels);
  for (int point = 0; point < kPoints<kOut>; ++point) {
    for (int64_t k = range.begin; k < range.end; k += kPanel) {
      const Product product{operands.inputs + point * in_plane,
                            in_width,
                            o.weight + (k / kPanel * kPoints<kOut> + point) * point_size,
                            kPanel,
                            space.outputs + point * space.plane + k - range.begin,
                            space.width,
                            g.in_channels};
      multiply<false, false>(product, operands.tiles, range.end - k);
    }
  }
}

// Asks for one of `parts` parts of a block of the weight: its lines are far apart in memory, which
// the processor does not foresee.
template <class T>
void prefetch_weight(const WeightView& w, ChannelRange in, ChannelRange out, int part, int parts) {
  const bool along_in = w.in_stride < w.out_stride;
  const ChannelRange run = along_in ? in : out, runs = along_in ? out : in;
  const int64_t unit = along_in ? w.in_stride : w.out_stride;
  const int64_t step = along_in ? w.out_stride : w.in_stride;
  const int64_t taps = unit == 1 ? 9 : 1;  // else they lie within a run
  const int64_t count = (runs.end - runs.begin) * taps;
  const T* data = static_cast<const T*>(w.data) + run.begin * unit + runs.begin * step;
  for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
    const int64_t tap = i % taps;
    prefetch(data + i / taps * step + tap / 3 * w.row_stride + tap % 3 * w.column_stride,
             (run.end - run.begin) * unit * static_cast<int64_t>(sizeof(T)));
  }
}

// The same with a weight that is transformed on the way. While one block of it is multiplied, the
// next one is fetched.
template <class T, int kOut>
void transform_and_multiply(const WinogradGeometry& g, const WinogradOutput& o,
                            const WinogradOperands& operands, ChannelRange range,
                            const Workspace& space) {
  const int64_t in_width = padded(g.in_channels);
  const int64_t in_plane = plane_size(g.in_channels, operands.capacity);
  const int64_t point_size = panel_point_size(std::min(g.in_channels, kWeightChannels));
  for (int64_t k = range.begin; k < range.end; k += kPanel) {
    const ChannelRange panel{k, std::min<int64_t>(k + kPanel, range.end)};
    for (int64_t c = 0; c < g.in_channels; c += kWeightChannels) {
      const int64_t depth = std::min(g.in_channels - c, kWeightChannels);
      transform_panel<T, kOut>(o.raw_weight, {c, c + depth}, panel, space.weight, point_size);
      const bool same_panel = c + depth < g.in_channels;
      const int64_t next_c = same_panel ? c + depth : 0, next_k = same_panel ? k : panel.end;
      const ChannelRange next_in{next_c, std::min(next_c + kWeightChannels, g.in_channels)};
      const ChannelRange next_out{next_k, std::min<int64_t>(next_k + kPanel, range.end)};
      for (int point = 0; point < kPoints<kOut>; ++point) {
        prefetch_weight<T>(o.raw_weight, next_in, next_out, point, kPoints<kOut>);
        const Product product{operands.inputs + point * in_plane + c,
                              in_width,
                              space.weight + point * point_size,
                              kPanel,
                              space.outputs + point * space.plane + k - range.begin,
                              space.width,
                              depth};
        if (c == 0) {
          multiply<false, false>(product, operands.tiles, panel.end - k);
        } else {
          multiply<false, true>(product, operands.tiles, panel.end - k);
        }
      }
    }
  }
}

template <class T, int kOut>
void transform_outputs(const WinogradGeometry& g, const WinogradOutput& o,
                       const WinogradOperands& operands, ChannelRange range, Workspace& space) {
  using W = Winograd<kOut>;
  for (int64_t t = 0; t < operands.tiles; ++t) {
    const TilePlace place = place_of(g, operands.first_tile + t, kOut);
    const bool whole = place.rows == kOut && place.columns == kOut;
    for (int64_t k = 0; k < range.end - range.begin; k += kLanes) {
      Value m[W::kIn][W::kIn], y[kOut][kOut];
      const float* from = space.outputs + t * space.width + k;
#pragma GCC unroll 6
      for (int i = 0; i < W::kIn; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < W::kIn; ++j) m[i][j] = load(from + (i * W::kIn + j) * space.plane);
      }
      both_sides<W::kIn, kOut>(
          m, W::output, [&](int i, int j, Value v) __attribute__((always_inline)) { y[i][j] = v; });
      const int64_t lanes = std::min<int64_t>(range.end - range.begin - k, kLanes);
      const int64_t channel = range.begin + k;
      if (t == 0) {
        float first[kLanes];
        store(first, y[0][0]);
        std::copy_n(first, kLanes, space.totals.shift + k);
      }
      if (whole && lanes == kLanes) {
        finish_tile<T, kOut, kOut, true>(o, place, channel, lanes, k, space.totals, y);
      } else {
        finish_tile<T, kOut, kOut, false>(o, place, channel, lanes, k, space.totals, y);
      }
    }
  }
}

// Outputs per channel in the tiles of the operands.
int64_t output_count(const WinogradGeometry& g, const WinogradOperands& operands) {
  int64_t count = 0;
  for (int64_t t = 0; t < operands.tiles; ++t) {
    const TilePlace place = place_of(g, operands.first_tile + t, g.tile);
    count += place.rows * place.columns;
  }
  return count;
}

int64_t convolve(const WinogradGeometry& g, const WinogradOutput& o,
                 const WinogradOperands& operands, ChannelRange range, float* workspace,
                 double* sum0, double* sum1) {
  const int64_t channels = range.end - range.begin, outputs = output_count(g, operands);
  Workspace space(workspace, points_of(g.tile), channels, operands.tiles);
  dispatch_tile(g.dtype, g.tile, [&]<class T, int kOut>(T, Constant<kOut>) {
    if (o.weight) {
      multiply_transformed<kOut>(g, o, operands, range, space);
    } else {
      transform_and_multiply<T, kOut>(g, o, operands, range, space);
    }
    transform_outputs<T, kOut>(g, o, operands, range, space);
  });
  write_sums(space.totals, o.sums, channels, outputs, sum0, sum1);
  return outputs;
}

// ---- gradient of the weight ---------------------------------------------------------------

int64_t operand_size(int tile, int64_t channels, int64_t tiles) {
  return points_of(tile) * plane_size(channels, tiles);
}
// A product is written row after row, and needs no vector more.
int64_t product_width(ChannelRange in) {
  return (in.end - in.begin + kLanes - 1) / kLanes * kLanes;
}
int64_t product_plane(ChannelRange in, ChannelRange out) {
  return product_width(in) * (out.end - out.begin) + kLanes;
}
int64_t product_size(int tile, int64_t in_channels, int64_t out_channels) {
  return points_of(tile) * product_plane({0, in_channels}, {0, out_channels});
}

void transform_inputs(const WinogradGeometry& g, const WinogradOperands& operands, int64_t begin,
                      int64_t end) {
  const int64_t width = padded(g.in_channels);
  const int64_t plane = plane_size(g.in_channels, operands.capacity);
  dispatch_tile(g.dtype, g.tile, [&]<class T, int kOut>(T, Constant<kOut>) {
    for (int64_t t = begin; t < end; ++t) {
      transform_input_tile<T, kOut>(g, operands.first_tile + t, operands.inputs + t * width, plane);
    }
  });
}

void transform_gradients(const WinogradGeometry& g, const ImageView& grad,
                         const WinogradOperands& operands, int64_t begin, int64_t end) {
  const int64_t width = padded(g.out_channels);
  const int64_t plane = plane_size(g.out_channels, operands.capacity);
  dispatch_tile(g.dtype, g.tile, [&]<class T, int kOut>(T, Constant<kOut>) {
    for (int64_t t = begin; t < end; ++t) {
      transform_gradient_tile<T, kOut>(g, grad, operands.first_tile + t,
                                       operands.gradients + t * width, plane);
    }
  });
}

// Output channels are rows, input channels columns: those are neighbours in a weight.
template <int kOut>
void multiply_operands(const WinogradGeometry& g, const WinogradOperands& operands, ChannelRange in,
                       ChannelRange out, bool accumulate, float* product) {
  const int64_t in_plane = plane_size(g.in_channels, operands.capacity);
  const int64_t out_plane = plane_size(g.out_channels, operands.capacity);
  const int64_t rows = out.end - out.begin, width = product_width(in);
  const int64_t plane = product_plane(in, out);
  for (int point = 0; point < kPoints<kOut>; ++point) {
    for (int64_t c = in.begin; c < in.end; c += kPanel) {
      const Product block{operands.gradients + point * out_plane + out.begin,
                          padded(g.out_channels),
                          operands.inputs + point * in_plane + c,
                          padded(g.in_channels),
                          product + point * plane + c - in.begin,
                          width,
                          operands.tiles};
      if (accumulate) {
        multiply<true, true>(block, rows, in.end - c);
      } else {
        multiply<true, false>(block, rows, in.end - c);
      }
    }
  }
}

template <class T, int kOut>
void finish_gradient(ChannelRange in, ChannelRange out, const float* product,
                     const WeightView& grad_weight) {
  using W = Winograd<kOut>;
  const int64_t width = product_width(in), plane = product_plane(in, out);
  for (int64_t k = out.begin; k < out.end; ++k) {
    for (int64_t c = in.begin; c < in.end; c += kLanes) {
      Value u[W::kIn][W::kIn];
      const float* from = product + (k - out.begin) * width + c - in.begin;
#pragma GCC unroll 6
      for (int i = 0; i < W::kIn; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < W::kIn; ++j) u[i][j] = load(from + (i * W::kIn + j) * plane);
      }
      const int64_t count = std::min<int64_t>(in.end - c, kLanes);
      T* to = static_cast<T*>(grad_weight.data) + k * grad_weight.out_stride +
              c * grad_weight.in_stride;
      both_sides<W::kIn, 3>(u, W::weight_transposed, [&](int r, int s, Value v) {
        T* tap = to + r * grad_weight.row_stride + s * grad_weight.column_stride;
        if (grad_weight.in_stride == 1) {
          store(tap, v, count);
          return;
        }
        T values[kLanes];
        store(values, v);
        for (int64_t i = 0; i < count; ++i) tap[i * grad_weight.in_stride] = values[i];
      });
    }
  }
}

void gradient(const WinogradGeometry& g, const WinogradOperands& operands, ChannelRange in,
              ChannelRange out, bool accumulate, bool finish, float* product,
              const WeightView& grad_weight) {
  dispatch_tile(g.dtype, g.tile, [&]<class T, int kOut>(T, Constant<kOut>) {
    multiply_operands<kOut>(g, operands, in, out, accumulate, product);
    if (finish) finish_gradient<T, kOut>(in, out, product, grad_weight);
  });
}

}  // namespace

const WinogradKernels winograd_kernels = {
    kPanel,           weight_size,      operand_size,        workspace_size, product_size,
    transform_weight, transform_inputs, transform_gradients, convolve,       gradient,
};

}  // namespace resops::RESOPS_ISA
