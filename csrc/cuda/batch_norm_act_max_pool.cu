// Launchers of batch_norm_act_max_pool: how images are cut into blocks.

#include <algorithm>

#include "batch_norm_act_max_pool_planes.cuh"
#include "dispatch.h"

namespace resops::cuda {
namespace {

constexpr int kFewestRows = 14;   // of windows in a band, which reads some rows of the next one too
constexpr int kLongestSum = 512;  // additions in float one after the other
constexpr int kBlocksTogether = 4;  // on a multiprocessor, as far as shared memory goes

int64_t ceil_div(int64_t a, int64_t b) { return cuda::ceil_div(a, b); }
int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Elements of an access.
int vector_size(const PoolShape& shape) {
  const int size = shape.dtype == DType::f32 ? 4 : 8;
  return shape.channels_last && shape.channels % size == 0 ? size : 1;
}

// A pixel is one value, and the rows of a plane are one run.
bool has_planes(const PoolShape& shape) { return !shape.channels_last || shape.channels == 1; }

int64_t images_of(const PoolShape& shape) {
  return shape.channels_last ? shape.samples : shape.samples * shape.channels;
}

size_t shared_budget() {
  const DeviceLimits& device = device_limits();
  return std::min(device.shared_per_block, device.shared_per_multiprocessor / kBlocksTogether);
}

// As many channels beside each other as let a whole row fit into shared memory, but not less than
// fill a sector of 32 bytes of the index; where that is too much, a part of the row.
// `held_columns(tile)` is how many columns a tile needs, `columns` how many there are.
template <class F>
void choose_tile(PoolWalk& w, int vec, int columns, size_t vector_bytes, F held_columns) {
  const size_t row = static_cast<size_t>(w.ring) * vector_bytes, budget = shared_budget();
  const auto vectors = (w.depth + vec - 1) / vec;
  w.lanes = static_cast<int>(std::min<int64_t>(vectors, kWarpSize));
  const int fewest = kWarpSize / vec;
  while (w.lanes > fewest && row * w.lanes * held_columns(columns) > budget) w.lanes /= 2;
  w.tile = columns;
  while (w.tile > 1 && row * w.lanes * held_columns(w.tile) > budget) w.tile = ceil_div(w.tile, 2);
  w.slabs = static_cast<int>((vectors + w.lanes - 1) / w.lanes);
  w.pixels = kThreads / w.lanes;
  w.tiles = ceil_div(columns, w.tile);
  w.held = held_columns(w.tile);
}

// Bands of `rows` rows of windows, of at most `longest` each, so that blocks which run at the same
// time end together, and few rows are read twice.
void choose_band(PoolWalk& w, int rows, int longest) {
  const int64_t together = int64_t{device_limits().multiprocessors} * kBlocksTogether;
  const int fewest = ceil_div(rows, longest), most = ceil_div(rows, kFewestRows);
  int64_t least = 0;
  for (int bands = fewest; bands <= std::max(fewest, most); ++bands) {
    const int64_t band = ceil_div(rows, bands);
    const int64_t rounds = ceil_div(w.images * w.slabs * w.tiles * bands, together);
    const int64_t cost = rounds * (band * w.stride[0] + std::max(w.kernel[0] - w.stride[0], 0));
    if (bands > fewest && cost >= least) continue;
    least = cost;
    w.band = static_cast<int>(band);
  }
  w.bands = ceil_div(rows, w.band);
}

PoolWalk base_walk(const PoolShape& shape) {
  PoolWalk w{};
  w.images = images_of(shape);
  w.channels = shape.channels;
  w.depth = shape.channels_last ? shape.channels : 1;
  w.height = shape.height;
  w.width = shape.width;
  w.out_height = shape.out_height;
  w.out_width = shape.out_width;
  std::copy_n(shape.kernel, 2, w.kernel);
  std::copy_n(shape.stride, 2, w.stride);
  std::copy_n(shape.padding, 2, w.padding);
  return w;
}

size_t element_size(const PoolShape& shape) { return shape.dtype == DType::f32 ? 4 : 2; }

// Bands of whole rows of planes: as many of the `rows`, and at most `most`, as let the run of
// `run(band)` elements of `bytes` each fit into shared memory. In none the walk is not in_runs.
template <class F>
PoolWalk planes_walk(const PoolShape& shape, int rows, int64_t most, size_t bytes, F run) {
  PoolWalk w = base_walk(shape);
  w.lanes = w.slabs = w.tiles = 1;
  w.pixels = kThreads;
  w.ring = ceil_div(w.kernel[0], w.stride[0]);
  // From the first vector of 16 bytes that the run touches to the last, of the index too.
  const auto held = [&](int band) { return ceil_div(run(band) + 32, int64_t{16}) * 16; };
  int longest = 0;
  for (int step = 1 << 30; step > 0; step /= 2) {
    const int64_t more = int64_t{longest} + step;
    if (more > rows || more > most) continue;
    if (held(static_cast<int>(more)) * bytes <= shared_budget()) longest += step;
  }
  w.in_runs = longest > 0;
  if (!w.in_runs) return w;
  choose_band(w, rows, longest);
  w.held = static_cast<int>(held(w.band));
  return w;
}

PoolWalk forward_walk(const PoolShape& shape) {
  if (has_planes(shape)) {
    const PoolWalk w = planes_walk(
        shape, shape.out_height, shape.out_height, element_size(shape), [&](int64_t band) {
          const int64_t rows = (band - 1) * shape.stride[0] + shape.kernel[0];
          return std::min<int64_t>(rows, shape.height) * shape.width;
        });
    if (w.in_runs) return w;
  }
  PoolWalk w = base_walk(shape);
  const int vec = vector_size(shape);
  w.ring = w.kernel[0];
  choose_tile(w, vec, w.out_width, element_size(shape) * vec, [&](int tile) {
    return std::min<int64_t>((tile - int64_t{1}) * w.stride[1] + w.kernel[1], w.width);
  });
  choose_band(w, w.out_height, w.out_height);
  return w;
}

PoolWalk backward_walk(const PoolShape& shape) {
  const int steps = (shape.height - 1 + shape.padding[0]) / shape.stride[0] + 1;
  if (has_planes(shape)) {
    const int64_t most = kLongestSum * kThreads / (int64_t{shape.stride[0]} * shape.width);
    const PoolWalk w = planes_walk(shape, steps, most, element_size(shape) + 1, [&](int64_t band) {
      const int64_t rows = band + ceil_div(shape.kernel[0], shape.stride[0]) - 1;
      return std::min<int64_t>(rows, shape.out_height) * shape.out_width;
    });
    if (w.in_runs) return w;
  }
  PoolWalk w = base_walk(shape);
  const int vec = vector_size(shape);
  w.ring = ceil_div(w.kernel[0], w.stride[0]);
  const auto held = [&](int tile) {
    return std::min<int64_t>((tile + int64_t{w.kernel[1]} - 2) / w.stride[1] + 1, w.out_width);
  };
  choose_tile(w, vec, w.width, (element_size(shape) + 1) * vec, held);
  const int64_t most = std::max(int64_t{kLongestSum} * w.pixels / w.height, int64_t{1});
  if (w.tile > most) {
    w.tile = static_cast<int>(most);
    w.tiles = ceil_div(w.width, w.tile);
    w.held = static_cast<int>(held(w.tile));
  }
  choose_band(w, steps, steps);
  return w;
}

unsigned grid_of(const PoolWalk& w) {
  const int64_t blocks = w.images * w.bands * w.tiles * w.slabs;
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument("resops: batch_norm_act_max_pool: too many images for one launch");
  }
  return static_cast<unsigned>(blocks);
}

size_t forward_bytes(const PoolWalk& w, const PoolShape& shape) {
  if (w.in_runs) return w.held * element_size(shape);
  return std::max<size_t>(
      16, size_t{1} * w.ring * w.held * w.lanes * vector_size(shape) * element_size(shape));
}
size_t backward_bytes(const PoolWalk& w, const PoolShape& shape) {
  if (w.in_runs) return w.held * (element_size(shape) + 1);
  return std::max<size_t>(
      16, size_t{1} * w.ring * w.held * w.lanes * vector_size(shape) * (element_size(shape) + 1));
}

template <int kVec>
size_t reduce_bytes(const PoolWalk& w, const PoolShape& shape) {
  return std::max(sizeof(SumsShared<kVec>), backward_bytes(w, shape));
}

// f(T{}, Constant<kVec>{}, Constant<kAct>{})
template <class F>
void dispatch(const PoolShape& shape, Activation activation, F f) {
  dispatch_dtype(shape.dtype, [&](auto type) {
    dispatch_activation(activation, [&](auto act) {
      constexpr int kVec = kVectorSize<decltype(type)>;
      if (vector_size(shape) == kVec) {
        f(type, Constant<kVec>{}, act);
      } else {
        f(type, Constant<1>{}, act);
      }
    });
  });
}

// The same of the kernels for planes, with whole vectors.
template <class F>
void dispatch_planes(const PoolShape& shape, Activation activation, F f) {
  dispatch_dtype(shape.dtype, [&](auto type) {
    dispatch_activation(activation,
                        [&](auto act) { f(type, Constant<kVectorSize<decltype(type)>>{}, act); });
  });
}

bool is_aligned(const BatchNormAffine& affine, const float* other1 = nullptr,
                const float* other2 = nullptr) {
  return are_aligned(
      {affine.mean, affine.invstd, affine.weight.data, affine.bias.data, other1, other2});
}

}  // namespace

void launch_batch_norm_act_max_pool_forward(const PoolShape& shape, const PoolForward& call,
                                            Stream stream) {
  if (shape.empty()) return;
  const PoolWalk w = forward_walk(shape);
  const auto on = static_cast<cudaStream_t>(stream);
  if (w.in_runs) {
    return dispatch_planes(shape, call.activation, [&](auto type, auto vec, auto act) {
      using T = decltype(type);
      constexpr int kVec = vec();
      constexpr Activation kAct = act();
      RESOPS_LAUNCH((batch_norm_act_max_pool_planes_forward_kernel<T, kVec, kAct>), grid_of(w),
                    kThreads, forward_bytes(w, shape), on, w, call.affine, call.negative_slope,
                    static_cast<const T*>(call.x), static_cast<T*>(call.y), call.index);
    });
  }
  dispatch(shape, call.activation, [&](auto type, auto vec, auto act) {
    using T = decltype(type);
    constexpr int kVec = vec();
    constexpr Activation kAct = act();
    RESOPS_LAUNCH((batch_norm_act_max_pool_forward_kernel<T, kVec, kAct>), grid_of(w), kThreads,
                  forward_bytes(w, shape), on, w, call.affine, is_aligned(call.affine),
                  call.negative_slope, static_cast<const T*>(call.x), static_cast<T*>(call.y),
                  call.index);
  });
}

int64_t batch_norm_act_max_pool_workspace(const PoolShape& shape) {
  if (shape.empty()) return 0;
  const PoolWalk w = backward_walk(shape);
  return 2 * w.parts() * shape.channels;
}

void launch_batch_norm_act_max_pool_backward_reduce(const PoolShape& shape,
                                                    const PoolGradient& call, float* workspace,
                                                    const BatchNormSums& out, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  int64_t parts = 0;
  PoolWalk w{};
  if (!shape.empty()) {
    w = backward_walk(shape);
    parts = w.parts();
  }
  if (w.in_runs) {
    dispatch_planes(shape, call.activation, [&](auto type, auto vec, auto act) {
      using T = decltype(type);
      constexpr int kVec = vec();
      constexpr Activation kAct = act();
      RESOPS_LAUNCH((batch_norm_act_max_pool_planes_backward_reduce_kernel<T, kVec, kAct>),
                    grid_of(w), kThreads, reduce_bytes<kVec>(w, shape), on, w, parts, call.affine,
                    call.negative_slope, static_cast<const T*>(call.x),
                    static_cast<const T*>(call.grad_y), call.index, workspace);
    });
  } else if (!shape.empty()) {
    dispatch(shape, call.activation, [&](auto type, auto vec, auto act) {
      using T = decltype(type);
      constexpr int kVec = vec();
      constexpr Activation kAct = act();
      const auto launch = [&](auto channels_last) {
        constexpr bool kChannelsLast = channels_last();
        RESOPS_LAUNCH(
            (batch_norm_act_max_pool_backward_reduce_kernel<T, kVec, kChannelsLast, kAct>),
            grid_of(w), kThreads, reduce_bytes<kVec>(w, shape), on, w, parts, call.affine,
            is_aligned(call.affine), call.negative_slope, static_cast<const T*>(call.x),
            static_cast<const T*>(call.grad_y), call.index, workspace);
      };
      if constexpr (kVec == 1) {
        dispatch_bool(shape.channels_last, launch);
      } else {
        launch(Constant<true>{});
      }
    });
  }
  if (shape.channels == 0) return;
  launch_batch_norm_merge_sums(shape.dtype, shape.channels, shape.channels, static_cast<int>(parts),
                               workspace, call.affine.invstd, out, stream);
}

void launch_batch_norm_act_max_pool_backward_apply(const PoolShape& shape, const PoolGradient& call,
                                                   const BatchNormGradientOut& out, Stream stream) {
  if (shape.empty()) return;
  const PoolWalk w = backward_walk(shape);
  const auto on = static_cast<cudaStream_t>(stream);
  if (w.in_runs) {
    return dispatch_planes(shape, call.activation, [&](auto type, auto vec, auto act) {
      using T = decltype(type);
      constexpr int kVec = vec();
      constexpr Activation kAct = act();
      RESOPS_LAUNCH((batch_norm_act_max_pool_planes_backward_apply_kernel<T, kVec, kAct>),
                    grid_of(w), kThreads, backward_bytes(w, shape), on, w, call.affine,
                    call.negative_slope, static_cast<const T*>(call.x),
                    static_cast<const T*>(call.grad_y), call.index, out.sum_grad, out.sum_grad_xhat,
                    out.factor, static_cast<T*>(out.grad_x));
    });
  }
  const bool aligned = is_aligned(call.affine, out.sum_grad, out.sum_grad_xhat);
  dispatch(shape, call.activation, [&](auto type, auto vec, auto act) {
    using T = decltype(type);
    constexpr int kVec = vec();
    constexpr Activation kAct = act();
    RESOPS_LAUNCH((batch_norm_act_max_pool_backward_apply_kernel<T, kVec, kAct>), grid_of(w),
                  kThreads, backward_bytes(w, shape), on, w, call.affine, aligned,
                  call.negative_slope, static_cast<const T*>(call.x),
                  static_cast<const T*>(call.grad_y), call.index, out.sum_grad, out.sum_grad_xhat,
                  out.factor, static_cast<T*>(out.grad_x));
  });
}

}  // namespace resops::cuda
