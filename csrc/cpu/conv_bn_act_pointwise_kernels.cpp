// 1x1 convolution on a CPU as a product of matrices: positions by input channels times input
// channels by output channels.
//
// The rows of a channels-last image are an operand as they are, or where something has to be done
// to them first, as a copy. A tile of outputs stays in the first-level cache until the epilogue has
// been through it, so nothing is written twice. Everything is float32 inside, whatever the tensors
// are.

#include "conv_bn_act_pointwise_kernels.h"

#include <algorithm>

#include "convolution_epilogue.h"
#include "dispatch.h"
#include "matrix.h"
#include "simd.h"

namespace resops::RESOPS_ISA {
namespace {

// Rows that are multiplied, and then finished by the epilogue, together.
constexpr int kBlockRows = 14 / kRows * kRows;
constexpr int64_t kTileRows = 4 * kBlockRows;  // of a panel of outputs: 7 KB
// Input channels that are multiplied at a time: of a panel of the weight 16 KB, which stay in the
// first-level cache for all rows of a tile.
constexpr int64_t kDepth = 128;

template <class F>
void dispatch_float_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(BFloat16{});
    case DType::f16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_packs(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

// ---- rows ---------------------------------------------------------------------------------

int64_t offset_of(const PointwiseRows& rows, const ImageView& view, int64_t row) {
  return row / (rows.height * rows.width) * view.batch_stride +
         row / rows.width % rows.height * view.row_stride + row % rows.width * view.column_stride;
}

// Whether rows up to `end` are an operand where they are.
bool is_operand(const PointwiseRows& rows, int64_t end) {
  return rows.dtype == DType::f32 && rows.slice_count == 1 && rows.prologue.scale == nullptr &&
         rows.height == 1 && end <= rows.width;
}

// Calls f(slice, its first of all channels, [begin, end) of its own) for what is in `channels`.
template <class F>
void for_slices(const PointwiseRows& rows, ChannelRange channels, F f) {
  int64_t first = 0;
  for (int64_t i = 0; i < rows.slice_count; ++i) {
    const ImageView& slice = rows.slices[i];
    const int64_t begin = std::max<int64_t>(channels.begin - first, 0);
    const int64_t end = std::min(channels.end - first, slice.channels);
    if (begin < end) f(slice, first, begin, end);
    first += slice.channels;
  }
}

// Copies rows as float32, after the prologue, to places `step` apart. The last vector of a slice
// writes past it; the next slice, or nobody, comes there.
template <class T>
void read_rows(const PointwiseRows& from, RowRange rows, ChannelRange channels, float* to,
               int64_t step) {
  constexpr int kTogether = 4;
  for_slices(from, channels,
             [&](const ImageView& slice, int64_t first, int64_t begin, int64_t end) {
               float* out = to + first + begin - channels.begin;
               for (int64_t row = rows.begin; row < rows.end; row += kTogether) {
                 const int count = static_cast<int>(std::min<int64_t>(kTogether, rows.end - row));
                 const T* in[kTogether];
                 for (int r = 0; r < count; ++r) {
                   in[r] = static_cast<const T*>(slice.data) + offset_of(from, slice, row + r);
                 }
                 for (int64_t c = begin; c < end; c += kLanes) {
                   Value values[kTogether];
                   for (int r = 0; r < count; ++r) values[r] = load(in[r] + c, end - c);
                   if (from.prologue.scale) apply_prologue(from.prologue, first + c, values, count);
                   for (int r = 0; r < count; ++r) store(out + r * step + c - begin, values[r]);
                 }
                 out += kTogether * step;
               }
             });
}

// Rows that are needed later, a run of neighbouring lines at a time, in `calls` runs or more.
template <class T>
class Fetch {
 public:
  Fetch(const PointwiseRows& from, RowRange rows, ChannelRange channels, int64_t calls)
      : from_(from), rows_(rows), row_(rows.begin) {
    // Of several slices the first, which is most of what there is where there are several.
    const ImageView& slice = from.slices[0];
    begin_ = std::min(channels.begin, slice.channels);
    end_ = std::min(channels.end, slice.channels);
    whole_ = from.height == 1 && end_ - begin_ == slice.column_stride;
    const int64_t bytes = (end_ - begin_) * static_cast<int64_t>(sizeof(T));
    row_lines_ = (bytes + kLineBytes - 1) / kLineBytes;
    lines_ = ((rows.end - rows.begin) * row_lines_ + calls - 1) / std::max<int64_t>(calls, 1);
  }

  // The next run of at most `most` lines.
  void operator()(Product& product) {
    product.ahead_lines = 0;
    if (row_ >= rows_.end) return;
    const int64_t left = (whole_ ? rows_.end - row_ : 1) * row_lines_ - line_;
    const ImageView& slice = from_.slices[0];
    product.ahead = reinterpret_cast<const char*>(static_cast<const T*>(slice.data) +
                                                  offset_of(from_, slice, row_) + begin_) +
                    line_ * kLineBytes;
    product.ahead_lines = std::min({lines_, left, product.depth});
    line_ += product.ahead_lines;
    row_ += line_ / row_lines_;
    line_ %= row_lines_;
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const PointwiseRows& from_;
  RowRange rows_;
  int64_t row_, line_ = 0, begin_, end_, row_lines_, lines_;
  bool whole_;  // the rows have nothing between them
};

// ---- the weight ---------------------------------------------------------------------------

// One row of a panel more than needed: so no two widths of a panel have the same size.
int64_t weight_size(int64_t in_channels, int64_t out_channels) {
  return ceil_div(out_channels, kPanel) * kPanel * in_channels + kPanel;
}

// One panel, of which `out` are the output channels: packed[i * kPanel + o].
template <class T>
void pack_panel(const WeightView& w, int64_t in_channels, ChannelRange out, float* packed) {
  const T* data = static_cast<const T*>(w.data);
  for (int64_t o = out.begin; o < out.end; o += kLanes) {
    const int64_t out_count = std::min<int64_t>(out.end - o, kLanes);
    for (int64_t i = 0; i < in_channels; i += kLanes) {
      const int64_t in_count = std::min<int64_t>(in_channels - i, kLanes);
      Value block[kLanes];
      if (w.out_stride == 1) {
        for (int64_t r = 0; r < in_count; ++r) {
          block[r] = load(data + (i + r) * w.in_stride + o, out_count);
        }
      } else {
        for (int64_t r = 0; r < kLanes; ++r) {
          const int64_t row = std::min(r, out_count - 1);  // beyond them: any value
          block[r] = load(data + (o + row) * w.out_stride + i, in_count);
        }
        transpose(block);
      }
      float* to = packed + i * kPanel + o - out.begin;
      for (int64_t r = 0; r < in_count; ++r) store(to + r * kPanel, block[r]);
    }
  }
}

void pack_weight(const WeightView& w, int64_t in_channels, ChannelRange out_channels,
                 float* packed) {
  dispatch_float_dtype(w.dtype, [&]<class T>(T) {
    for (int64_t k = out_channels.begin; k < out_channels.end; k += kPanel) {
      pack_panel<T>(w, in_channels, {k, std::min<int64_t>(k + kPanel, out_channels.end)},
                    packed + k * in_channels);
    }
  });
}

// ---- convolution --------------------------------------------------------------------------

int64_t workspace_size(const PointwiseRows& inputs, int64_t rows, int64_t out_channels) {
  return 6 * padded(out_channels) + kTileRows * kPanel + inputs.channels * kPanel +
         rows * padded(inputs.channels);
}

// The parts of a workspace.
struct Workspace {
  Workspace(float* data, int64_t in_channels, int64_t out_channels)
      : totals{reinterpret_cast<double*>(data),
               reinterpret_cast<double*>(data) + padded(out_channels),
               reinterpret_cast<double*>(data) + 2 * padded(out_channels)},
        tile(data + 6 * padded(out_channels)),
        panel(tile + kTileRows * kPanel),
        rows(panel + in_channels * kPanel) {
    std::fill_n(totals.sum0, 2 * padded(out_channels), 0.0);
  }
  Totals totals;  // three vectors of doubles
  float* tile;    // products of one panel
  float* panel;   // of the weight, where it is packed on the way
  float* rows;    // copied ones
};

// Where the first operand is, and the step between its rows.
struct Operand {
  const float* data;
  int64_t step;
};

// The inputs of `rows`: where they are, or copied to `copy`.
template <class T>
Operand operand_of(const PointwiseRows& inputs, RowRange rows, float* copy) {
  const ImageView& slice = inputs.slices[0];
  if (is_operand(inputs, rows.end)) {
    return {static_cast<const float*>(slice.data) + offset_of(inputs, slice, rows.begin),
            slice.column_stride};
  }
  const int64_t step = padded(inputs.channels);
  read_rows<T>(inputs, rows, {0, inputs.channels}, copy, step);
  return {copy, step};
}

// The epilogue of a block of rows, whose products with the panel of output channels are in `tile`.
template <class T>
void finish_block(const ConvolutionOutput& o, RowRange rows, ChannelRange panel, const float* tile,
                  int64_t column_of_sums, bool first, const Totals& totals) {
  const int64_t count = rows.end - rows.begin;
  const TilePlace place{0, rows.begin, 0, count, 1};
  for (int64_t k = panel.begin; k < panel.end; k += kLanes) {
    const int64_t lanes = std::min<int64_t>(panel.end - k, kLanes);
    const int64_t column = column_of_sums + k - panel.begin;
    const float* from = tile + k - panel.begin;
    Value y[kBlockRows][1];
    if (first) {
      float values[kLanes];
      store(values, load(from));
      std::copy_n(values, kLanes, totals.shift + column);
    }
    if (count == kBlockRows && lanes == kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kBlockRows; ++r) y[r][0] = load(from + r * kPanel);
      finish_tile<T, kBlockRows, 1, true>(o, place, k, lanes, column, totals, y);
    } else {
      for (int64_t r = 0; r < count; ++r) y[r][0] = load(from + r * kPanel);
      finish_tile<T, kBlockRows, 1, false>(o, place, k, lanes, column, totals, y);
    }
  }
}

template <class T>
void convolve_rows(const PointwiseRows& inputs, const PointwiseWeight& weight,
                   const ConvolutionOutput& o, RowRange rows, RowRange next, ChannelRange range,
                   const Workspace& space) {
  const Operand a = operand_of<T>(inputs, rows, space.rows);
  const int64_t depth = inputs.channels, panels = ceil_div(range.end - range.begin, kPanel);
  Fetch<T> fetch(inputs, next, {0, depth},
                 panels * ceil_div(rows.end - rows.begin, kBlockRows) * ceil_div(depth, kDepth));
  for (int64_t k = range.begin; k < range.end; k += kPanel) {
    const ChannelRange panel{k, std::min<int64_t>(k + kPanel, range.end)};
    const float* b = weight.packed + k * depth;
    if (weight.packed == nullptr) {
      pack_panel<T>(weight.raw, depth, panel, space.panel);
      b = space.panel;
    }
    for (int64_t tile = rows.begin; tile < rows.end; tile += kTileRows) {
      const int64_t tile_end = std::min(tile + kTileRows, rows.end);
      for (int64_t c = 0; c < depth; c += kDepth) {
        for (int64_t row = tile; row < tile_end; row += kBlockRows) {
          const int64_t end = std::min(row + kBlockRows, tile_end);
          float* const out = space.tile + (row - tile) * kPanel;
          Product product{a.data + (row - rows.begin) * a.step + c,
                          a.step,
                          b + c * kPanel,
                          kPanel,
                          out,
                          kPanel,
                          std::min(depth - c, kDepth)};
          fetch(product);
          if (c == 0) {
            multiply<false, false, true>(product, end - row, panel.end - k);
          } else {
            multiply<false, true, true>(product, end - row, panel.end - k);
          }
          if (c + kDepth >= depth) {
            finish_block<T>(o, {row, end}, panel, out, k - range.begin, row == rows.begin,
                            space.totals);
          }
        }
      }
    }
  }
}

void convolve(const PointwiseRows& inputs, const PointwiseWeight& weight,
              const ConvolutionOutput& o, RowRange rows, RowRange next, ChannelRange range,
              float* workspace, double* sum0, double* sum1) {
  const int64_t channels = range.end - range.begin;
  const Workspace space(workspace, inputs.channels, channels);
  dispatch_float_dtype(inputs.dtype, [&]<class T>(T) {
    convolve_rows<T>(inputs, weight, o, rows, next, range, space);
  });
  write_sums(space.totals, o.sums, channels, rows.end - rows.begin, sum0, sum1);
}

// ---- gradient of the weight ---------------------------------------------------------------

// A panel of the inputs; of several slices one writes past its columns.
constexpr int64_t kInputStep = kPanel + kLanes;

int64_t gradient_workspace_size(int64_t step, ChannelRange in, ChannelRange out) {
  const int64_t rows = out.end - out.begin;
  return step * (kInputStep + padded(rows)) + rows * whole_packs(in.end - in.begin);
}

template <class T>
void write_product(const float* product, int64_t width, ChannelRange in, ChannelRange out,
                   const WeightView& w) {
  for (int64_t k = out.begin; k < out.end; ++k, product += width) {
    T* to = static_cast<T*>(w.data) + k * w.out_stride;
    for (int64_t c = in.begin; c < in.end; c += kLanes) {
      store(to + c, load(product + c - in.begin), std::min<int64_t>(in.end - c, kLanes));
    }
  }
}

template <class T>
void gradient_of_rows(const PointwiseRows& inputs, const PointwiseRows& gradients, int64_t rows,
                      int64_t step, ChannelRange in, ChannelRange out, float* workspace,
                      const WeightView& grad_weight) {
  const int64_t out_count = out.end - out.begin, in_count = in.end - in.begin;
  float* const b = workspace;
  float* const copy = b + step * kInputStep;
  float* sums = copy + step * padded(out_count);
  int64_t width = whole_packs(in_count);
  // In its place, where the last vector of a row ends with the row.
  const bool in_place = grad_weight.dtype == DType::f32 && in_count == width;
  if (in_place) {
    sums = static_cast<float*>(grad_weight.data) + out.begin * grad_weight.out_stride + in.begin;
    width = grad_weight.out_stride;
  }
  const int64_t b_step = inputs.slice_count == 1 ? kPanel : kInputStep;
  for (int64_t row = 0; row < rows; row += step) {
    const RowRange taken{row, std::min(row + step, rows)};
    const RowRange next{taken.end, std::min(taken.end + step, rows)};
    Operand a{copy, padded(out_count)};
    if (is_operand(gradients, taken.end)) {
      const ImageView& slice = gradients.slices[0];
      a = {static_cast<const float*>(slice.data) + offset_of(gradients, slice, row) + out.begin,
           slice.column_stride};
    } else {
      read_rows<T>(gradients, taken, out, copy, a.step);
    }
    const int64_t calls = ceil_div(in_count, kPanel) * ceil_div(out_count, kRows);
    Fetch<T> fetch_inputs(inputs, next, in, (calls + 1) / 2);
    Fetch<T> fetch_gradients(gradients, next, out, (calls + 1) / 2);
    int64_t call = 0;
    for (int64_t c = in.begin; c < in.end; c += kPanel) {
      const ChannelRange panel{c, std::min<int64_t>(c + kPanel, in.end)};
      read_rows<T>(inputs, taken, panel, b, b_step);
      for (int64_t k = 0; k < out_count; k += kRows, ++call) {
        Product product{a.data + k, a.step,         b, b_step, sums + k * width + c - in.begin,
                        width,      taken.end - row};
        call % 2 == 0 ? fetch_inputs(product) : fetch_gradients(product);
        const int64_t count = std::min<int64_t>(out_count - k, kRows);
        if (row == 0) {
          multiply<true, false, true>(product, count, panel.end - c);
        } else {
          multiply<true, true, true>(product, count, panel.end - c);
        }
      }
    }
  }
  if (!in_place) write_product<T>(sums, width, in, out, grad_weight);
}

void gradient(const PointwiseRows& inputs, const PointwiseRows& gradients, int64_t rows,
              int64_t step, ChannelRange in, ChannelRange out, float* workspace,
              const WeightView& grad_weight) {
  dispatch_float_dtype(inputs.dtype, [&]<class T>(T) {
    gradient_of_rows<T>(inputs, gradients, rows, step, in, out, workspace, grad_weight);
  });
}

}  // namespace

const PointwiseKernels pointwise_kernels = {
    kPanel, weight_size, workspace_size, gradient_workspace_size, pack_weight, convolve, gradient,
};

}  // namespace resops::RESOPS_ISA
