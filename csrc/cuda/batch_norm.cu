// Launchers of batch_norm: how a tensor is cut, and which kernel a call takes.

#include <algorithm>
#include <numeric>

#include "batch_norm.cuh"
#include "dispatch.h"

namespace resops::cuda {
namespace {

constexpr int64_t kLongestSum = 512;  // additions in float one after the other
constexpr int64_t kShortestWalk =
    4;  // steps of a thread, for which it reads what its channels need
constexpr int64_t kMostParts = 65535;  // blocks in y

// In how many parts the rows are cut, where `beside` blocks share a row and a part that were all of
// them had `steps`.
int64_t parts_for(int64_t beside, int64_t steps, int blocks_per_multiprocessor, bool reduction) {
  const int64_t together =
      static_cast<int64_t>(device_limits().multiprocessors) * blocks_per_multiprocessor;
  int64_t parts = together / beside;
  // Where that leaves a tenth idle or more: several rounds of blocks, of which only the last does.
  if (10 * parts * beside < 9 * together) parts = ceil_div(4 * together, beside);
  parts = std::min(parts, ceil_div(steps, kShortestWalk));
  if (reduction) parts = std::max(parts, ceil_div(steps, kLongestSum));
  return std::clamp<int64_t>(parts, 1, kMostParts);
}

// By rows: at most so many threads beside each other. Where planes are, few rows may be all that
// there are, and the sums of a block are no longer per column.
int most_lanes(const BatchNormWalk& w) {
  int lanes = kWarpSize;
  while (w.plane > 1 && lanes < kThreads && w.rows * lanes < kShortestWalk * kThreads) lanes *= 2;
  return lanes;
}

BatchNormWalk make_walk(const BatchNormShape& shape, bool reduction,
                        const BatchNormOptions& options = {}) {
  const int vec = shape.vector_size();
  const int blocks =
      options.blocks_per_multiprocessor > 0 ? options.blocks_per_multiprocessor : kResidentBlocks;
  BatchNormWalk w{};
  w.channels = shape.channels;
  w.spatial = shape.spatial;
  w.numel = shape.numel();
  w.by_rows = shape.by_rows();
  w.reverse = options.reverse;
  w.row_parts = w.plane_parts = 1;
  w.plane = w.repeats = w.shares = 1;
  if (w.by_rows) {
    if (!shape.channels_last) w.plane = shape.spatial;
    w.pitch = std::lcm(shape.channels * w.plane, int64_t{8});
    w.rows = ceil_div(w.numel, w.pitch);
    // Neighbours that share a byte of a mask; where blocks cut planes, a sector of 32 bytes.
    const int64_t vectors = w.pitch / vec, sharing = w.plane > 1 ? 2 : 8 / vec;
    const int64_t slabs = ceil_div(vectors, most_lanes(w));
    w.lanes = static_cast<int>(ceil_div(ceil_div(vectors, slabs), sharing) * sharing);
    w.lane_rows = kThreads / w.lanes;
    w.width = w.lanes * vec;
    w.repeats = static_cast<int>(w.pitch / (shape.channels * w.plane));
    w.shares = static_cast<int>(ceil_div(w.plane - 1, w.width) + 1);
    // The indices of shares: see there.
    w.columns = w.pitch / w.plane + (w.plane > 1 ? ceil_div(w.pitch, w.width) - 1 : 0);
    w.mask_bytes = shape.mask_bytes();
    // An odd number of 16-byte vectors: an even number of rows, so that warps start on 32 bytes.
    if (w.lanes % 2 != 0 && w.lane_rows > 1) w.lane_rows -= w.lane_rows % 2;
    w.tile_rows = w.lane_rows;
    const int64_t steps = ceil_div(w.rows, w.lane_rows);
    w.row_parts = static_cast<int>(parts_for(ceil_div(vectors, w.lanes), steps, blocks, reduction));
    const int64_t whole = w.numel / w.pitch;
    const int64_t round = static_cast<int64_t>(w.lane_rows) * w.row_parts;
    w.part_rows = whole / round * w.lane_rows;
    w.extra_rows = whole % round;
    w.last_length = w.numel % w.pitch;
    w.last_part = static_cast<int>(whole / w.lane_rows % w.row_parts);
  } else {
    w.columns = shape.channels;
    w.lanes = 8 / vec;
    w.lane_rows = kThreads / w.lanes;
    w.tile_rows = 1;
    w.rows = shape.samples;
    const int64_t steps = ceil_div(w.rows * ceil_div(shape.spatial, 8), w.lane_rows);
    const int64_t parts = parts_for(shape.channels, steps, blocks, reduction);
    w.row_parts = static_cast<int>(std::min(parts, w.rows));
    const int64_t pieces = std::min(ceil_div(parts, w.row_parts), kMostParts / w.row_parts);
    w.part_length = ceil_div(ceil_div(shape.spatial, pieces), 8) * 8;
    w.plane_parts = static_cast<int>(ceil_div(shape.spatial, w.part_length));
    w.part_rows = w.rows / w.row_parts;
    w.extra_rows = w.rows % w.row_parts;
  }
  return w;
}

dim3 grid_of(const BatchNormWalk& w) {
  const int64_t beside = w.by_rows ? ceil_div(w.pitch, w.width) : w.channels;
  return dim3(static_cast<unsigned>(beside), static_cast<unsigned>(w.parts()));
}

// f(T{}, Constant<kVec>{}, Constant<kByRows>{})
template <class F>
void dispatch_layout(const BatchNormShape& shape, F f) {
  dispatch_dtype(shape.dtype, [&](auto type) {
    constexpr int kVec = kVectorSize<decltype(type)>;
    dispatch_bool(shape.by_rows(), [&](auto by_rows) { f(type, Constant<kVec>{}, by_rows); });
  });
}

// Whether a thread's channels can be read as whole vectors.
bool is_aligned(const BatchNormShape& shape, const BatchNormAffine& affine,
                const float* other1 = nullptr, const float* other2 = nullptr) {
  return shape.channels_last && shape.channels % shape.vector_size() == 0 &&
         are_aligned(
             {affine.mean, affine.invstd, affine.weight.data, affine.bias.data, other1, other2});
}

unsigned finish_blocks(int64_t channels) {
  return static_cast<unsigned>(ceil_div(channels, kFinishChannels));
}

}  // namespace

int64_t batch_norm_workspace(const BatchNormShape& shape) {
  if (shape.numel() == 0) return 0;
  const BatchNormWalk w = make_walk(shape, true);
  return 3 * w.parts() * w.columns;
}

// ---- forward -----------------------------------------------------------------------------------

void launch_batch_norm_statistics(const BatchNormShape& shape, const void* x, float* workspace,
                                  const BatchNormStatistics& out, Stream stream) {
  if (shape.channels == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  BatchNormWalk w{};
  if (shape.numel() > 0) {
    w = make_walk(shape, true);
    dispatch_layout(shape, [&](auto type, auto vec, auto by_rows) {
      using T = decltype(type);
      constexpr int kVec = vec();
      constexpr bool kByRows = by_rows();
      RESOPS_LAUNCH((batch_norm_statistics_kernel<T, kVec, kByRows>), grid_of(w), kThreads,
                    sizeof(SumsShared<kVec>), on, w, static_cast<const T*>(x), workspace);
    });
  } else {
    w.channels = w.columns = shape.channels;  // and no parts
  }
  dispatch_dtype(shape.dtype, [&](auto type) {
    RESOPS_LAUNCH(batch_norm_finish_kernel<decltype(type)>, finish_blocks(w.channels), kThreads,
                  sizeof(FinishShared), on, w, workspace, out);
  });
}

void launch_batch_norm_frozen(int64_t channels, DType dtype, const BatchNormStatistics& out,
                              Stream stream) {
  if (channels == 0) return;
  dispatch_dtype(dtype, [&](auto type) {
    RESOPS_LAUNCH(batch_norm_frozen_kernel<decltype(type)>,
                  static_cast<unsigned>(ceil_div(channels, kThreads)), kThreads, 0,
                  static_cast<cudaStream_t>(stream), channels, out);
  });
}

void launch_batch_norm_apply(const BatchNormShape& shape, const BatchNormApply& call,
                             const BatchNormOptions& options, Stream stream) {
  const BatchNormWalk w = make_walk(shape, false, options);
  const bool aligned = is_aligned(shape, call.affine);
  dispatch_layout(shape, [&](auto type, auto vec, auto by_rows) {
    dispatch_activation(call.activation, [&](auto act) {
      dispatch_bool(call.residual != nullptr, [&](auto has_residual) {
        using T = decltype(type);
        constexpr int kVec = vec();
        constexpr bool kByRows = by_rows(), kResidual = has_residual();
        constexpr Activation kAct = act();
        RESOPS_LAUNCH((batch_norm_apply_kernel<T, kVec, kByRows, kAct, kResidual>), grid_of(w),
                      kThreads, 0, static_cast<cudaStream_t>(stream), w, call.affine, aligned,
                      call.negative_slope, static_cast<const T*>(call.x),
                      static_cast<const T*>(call.residual), static_cast<T*>(call.y), call.mask);
      });
    });
  });
}

// ---- backward ----------------------------------------------------------------------------------

namespace {

// f(T{}, Constant<kVec>{}, Constant<kByRows>{}, Constant<kAct>{}, Constant<kResidual>{}); of
// the identity there is one variant only.
template <class F>
void dispatch_gradient(const BatchNormShape& shape, const BatchNormGradient& call, F f) {
  const bool with_residual = call.mask != nullptr || call.residual != nullptr;
  dispatch_layout(shape, [&](auto type, auto vec, auto by_rows) {
    dispatch_activation(call.activation, [&](auto act) {
      if constexpr (act() == Activation::identity) {
        f(type, vec, by_rows, act, Constant<false>{});
      } else {
        dispatch_bool(with_residual, [&](auto residual) { f(type, vec, by_rows, act, residual); });
      }
    });
  });
}

void merge_sums(DType dtype, const BatchNormWalk& w, const float* workspace, const float* invstd,
                const BatchNormSums& out, Stream stream) {
  dispatch_dtype(dtype, [&](auto type) {
    RESOPS_LAUNCH(batch_norm_backward_finish_kernel<decltype(type)>, finish_blocks(w.channels),
                  kThreads, sizeof(FinishShared), static_cast<cudaStream_t>(stream), w, workspace,
                  invstd, out);
  });
}

}  // namespace

void launch_batch_norm_backward_reduce(const BatchNormShape& shape, const BatchNormGradient& call,
                                       float* workspace, const BatchNormSums& out, Stream stream) {
  if (shape.channels == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  BatchNormWalk w{};
  if (shape.numel() > 0) {
    w = make_walk(shape, true);
    const bool aligned = is_aligned(shape, call.affine);
    dispatch_gradient(shape, call, [&](auto type, auto vec, auto by_rows, auto act, auto residual) {
      using T = decltype(type);
      constexpr int kVec = vec();
      constexpr bool kByRows = by_rows(), kResidual = residual();
      constexpr Activation kAct = act();
      RESOPS_LAUNCH((batch_norm_backward_reduce_kernel<T, kVec, kByRows, kAct, kResidual>),
                    grid_of(w), kThreads, sizeof(SumsShared<kVec>), on, w, call.affine, aligned,
                    call.negative_slope, static_cast<const T*>(call.grad_y),
                    static_cast<const T*>(call.x), static_cast<const T*>(call.residual), call.mask,
                    workspace);
    });
  } else {
    w.channels = w.columns = shape.channels;  // and no parts
  }
  merge_sums(shape.dtype, w, workspace, call.affine.invstd, out, stream);
}

void launch_batch_norm_merge_sums(DType dtype, int64_t channels, int64_t columns, int parts,
                                  const float* workspace, const float* invstd,
                                  const BatchNormSums& out, Stream stream) {
  BatchNormWalk w{};
  w.channels = channels;
  w.columns = columns;
  w.repeats = static_cast<int>(columns / channels);
  w.row_parts = parts;
  w.plane = w.shares = w.plane_parts = 1;
  merge_sums(dtype, w, workspace, invstd, out, stream);
}

void launch_batch_norm_backward_apply(const BatchNormShape& shape, const BatchNormGradient& call,
                                      const BatchNormGradientOut& out,
                                      const BatchNormOptions& options, Stream stream) {
  const BatchNormWalk w = make_walk(shape, false, options);
  const bool aligned = is_aligned(shape, call.affine, out.sum_grad, out.sum_grad_xhat);
  const bool recomputes = call.activation != Activation::identity && call.mask == nullptr;
  const bool needs_x = recomputes || (out.grad_x != nullptr && out.sum_grad != nullptr);
  dispatch_gradient(shape, call, [&](auto type, auto vec, auto by_rows, auto act, auto residual) {
    using T = decltype(type);
    constexpr int kVec = vec();
    constexpr bool kByRows = by_rows(), kResidual = residual();
    constexpr Activation kAct = act();
    RESOPS_LAUNCH((batch_norm_backward_apply_kernel<T, kVec, kByRows, kAct, kResidual>), grid_of(w),
                  kThreads, 0, static_cast<cudaStream_t>(stream), w, call.affine, aligned,
                  call.negative_slope, static_cast<const T*>(call.grad_y),
                  needs_x ? static_cast<const T*>(call.x) : nullptr,
                  static_cast<const T*>(call.residual), call.mask, out.sum_grad, out.sum_grad_xhat,
                  out.factor, static_cast<T*>(out.grad_x), static_cast<T*>(out.grad_residual));
  });
}

}  // namespace resops::cuda
