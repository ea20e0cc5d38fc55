// Launchers of batch_norm with a single read: how wide a slab is, and how many blocks share it.

#include <algorithm>
#include <stdexcept>

#include "batch_norm_slab.cuh"
#include "dispatch.h"

namespace resops::cuda {
namespace {

constexpr int64_t kLongestSum = 512;     // additions in float one after the other
constexpr size_t kStaticReserve = 1024;  // of shared memory, what the driver takes of a block's

int vector_size(const BatchNormShape& shape) { return shape.dtype == DType::f32 ? 4 : 8; }

size_t header_bytes(int lanes, int vec) {
  return static_cast<size_t>(slab_header_floats(lanes * vec)) * sizeof(float);
}

// Rows that fit beside the header into the shared memory of a block.
int64_t rows_in(size_t shared, int lanes, int vec, int tensors) {
  const size_t header = header_bytes(lanes, vec);
  if (shared <= header) return 0;
  return static_cast<int64_t>((shared - header) / (size_t{16} * lanes * tensors));
}

struct Candidate {
  BatchNormSlabs slabs;
  double busy;  // share of the multiprocessors that work, over all rounds

  // Idle multiprocessors cost most; then a merge; then narrow slabs, short runs of memory.
  bool better_than(const Candidate& other) const {
    const double mine = std::min(busy, 0.75), theirs = std::min(other.busy, 0.75);
    if (mine != theirs) return mine > theirs;
    if (slabs.regime != other.slabs.regime) return slabs.regime < other.slabs.regime;
    if (slabs.lanes != other.slabs.lanes) return slabs.lanes > other.slabs.lanes;
    return slabs.blocks < other.slabs.blocks;
  }
};

// A slab in the shared memory of `blocks` blocks; no rows where it does not fit.
std::optional<Candidate> in_shared_memory(const BatchNormShape& shape, int tensors, int lanes,
                                          int blocks) {
  const DeviceLimits& device = device_limits();
  const int vec = vector_size(shape);
  const int64_t slabs = ceil_div(shape.channels, int64_t{lanes} * vec);
  const int64_t rows = ceil_div(shape.count(), blocks);
  if (rows > rows_in(device.shared_per_block, lanes, vec, tensors)) return {};
  if (slabs * blocks > 0x7fffffff) return {};
  const size_t bytes = header_bytes(lanes, vec) + static_cast<size_t>(rows) * 16 * lanes * tensors;
  const int64_t beside = std::max<int64_t>(
      1, static_cast<int64_t>(device.shared_per_multiprocessor / (bytes + kStaticReserve)));
  const int64_t together = device.multiprocessors * std::min<int64_t>(beside, kSlabBlocks);
  if (blocks > together) return {};
  const double waves = static_cast<double>(ceil_div(slabs * blocks, together));
  return Candidate{{blocks == 1 ? SlabRegime::block : SlabRegime::cluster, lanes, blocks,
                    static_cast<int>(slabs), rows, rows, bytes},
                   static_cast<double>(slabs * blocks) / (waves * static_cast<double>(together))};
}

// Slabs by turns over the whole device: what does not fit into shared memory is to stay in half of
// the L2 cache.
std::optional<Candidate> over_the_grid(const BatchNormShape& shape, int tensors, int lanes) {
  const DeviceLimits& device = device_limits();
  const int vec = vector_size(shape);
  const int64_t row_bytes = int64_t{16} * lanes * tensors;
  const int64_t slabs = ceil_div(shape.channels, int64_t{lanes} * vec);
  const int64_t fit = rows_in(device.shared_per_block, lanes, vec, tensors);
  if (fit < kThreads / lanes) return {};
  const int64_t in_l2 = static_cast<int64_t>(device.l2_bytes / 2) / row_bytes;
  const int64_t on_chip = fit * device.multiprocessors + in_l2;
  if (shape.count() > on_chip) return {};
  const int64_t at_a_time = std::clamp<int64_t>(on_chip / shape.count(), 1,
                                                std::min<int64_t>(slabs, device.multiprocessors));
  const int64_t blocks = device.multiprocessors / at_a_time;
  const int64_t rows = ceil_div(shape.count(), blocks), kept = std::min(rows, fit);
  if (ceil_div(rows, kThreads / lanes) > kLongestSum) return {};
  const double rounds = static_cast<double>(ceil_div(slabs, at_a_time));
  return Candidate{{SlabRegime::grid, lanes, static_cast<int>(blocks), static_cast<int>(at_a_time),
                    rows, kept, header_bytes(lanes, vec) + static_cast<size_t>(kept * row_bytes)},
                   static_cast<double>(slabs * blocks) / (rounds * device.multiprocessors)};
}

SlabWalk make_walk(const BatchNormShape& shape, const BatchNormSlabs& slabs) {
  SlabWalk w{};
  w.rows = shape.count();
  w.channels = shape.channels;
  w.block_rows = slabs.block_rows;
  w.kept = slabs.kept;
  w.lanes = slabs.lanes;
  w.blocks = slabs.blocks;
  w.slabs = static_cast<int>(ceil_div(shape.channels, int64_t{slabs.lanes} * vector_size(shape)));
  w.at_a_time = slabs.at_a_time;
  w.regime = slabs.regime;
  return w;
}

bool is_aligned(const BatchNormAffine& affine) {
  return are_aligned({affine.mean, affine.invstd, affine.weight.data, affine.bias.data});
}

// f(T{}, Constant<kAct>{})
template <class F>
void dispatch(const BatchNormShape& shape, Activation activation, F f) {
  dispatch_dtype(shape.dtype, [&](auto type) {
    dispatch_activation(activation, [&](auto act) { f(type, act); });
  });
}

// By one of the three launches; `arguments` are those of the kernel.
template <class Kernel, class... A>
void launch_slabs(const char* name, Kernel kernel, const BatchNormSlabs& slabs, Stream stream,
                  A... arguments) {
  const bool cooperative = slabs.regime == SlabRegime::grid;
  const int cluster = slabs.regime == SlabRegime::cluster ? slabs.blocks : 1;
  launch(LaunchConfig{name, static_cast<unsigned>(slabs.blocks * slabs.at_a_time), kThreads,
                      slabs.shared_bytes, static_cast<cudaStream_t>(stream), cooperative,
                      static_cast<unsigned>(cluster)},
         kernel, arguments...);
}

}  // namespace

std::optional<BatchNormSlabs> choose_batch_norm_slabs(const BatchNormShape& shape, int tensors,
                                                      std::optional<SlabRegime> regime) {
  // Vectors are whole, and so are the bytes of a mask.
  if (!shape.channels_last || shape.channels % 8 != 0 || shape.numel() == 0) return {};
  const auto wanted = [&](SlabRegime r) { return !regime || *regime == r; };
  const int most_blocks = device_limits().blocks_per_cluster;
  std::optional<Candidate> best;
  const auto consider = [&](const std::optional<Candidate>& c) {
    if (c && (!best || c->better_than(*best))) best = c;
  };
  // 64 bytes and more, as powers of two.
  for (int lanes = 4; lanes <= kWarpSize; lanes *= 2) {
    if (lanes > 4 && int64_t{lanes} * vector_size(shape) > shape.channels) break;
    if (wanted(SlabRegime::block)) consider(in_shared_memory(shape, tensors, lanes, 1));
    for (int blocks = 2; blocks <= most_blocks && wanted(SlabRegime::cluster); blocks *= 2) {
      consider(in_shared_memory(shape, tensors, lanes, blocks));
    }
  }
  // A barrier of the whole device for every round: only where nothing smaller holds a slab.
  for (int lanes = 4; !best && lanes <= kWarpSize && wanted(SlabRegime::grid); lanes *= 2) {
    if (lanes > 4 && int64_t{lanes} * vector_size(shape) > shape.channels) break;
    consider(over_the_grid(shape, tensors, lanes));
  }
  if (!best) return {};
  return best->slabs;
}

int64_t batch_norm_slab_workspace(const BatchNormShape& shape, const BatchNormSlabs& slabs) {
  if (slabs.regime != SlabRegime::grid) return 0;
  return int64_t{2} * slabs.at_a_time * slabs.blocks * 2 * slabs.lanes * vector_size(shape);
}

void launch_batch_norm_slab_forward(const BatchNormShape& shape, const BatchNormSlabs& slabs,
                                    const BatchNormStatistics& statistics,
                                    const BatchNormApply& call, float* workspace, Stream stream) {
  const SlabWalk w = make_walk(shape, slabs);
  dispatch(shape, call.activation, [&](auto type, auto act) {
    dispatch_bool(call.residual != nullptr, [&](auto has_residual) {
      using T = decltype(type);
      constexpr int kVec = kVectorSize<T>;
      constexpr Activation kAct = act();
      constexpr bool kResidual = has_residual();
      launch_slabs("batch_norm_slab_forward_kernel",
                   batch_norm_slab_forward_kernel<T, kVec, kAct, kResidual>, slabs, stream, w,
                   call.affine, is_aligned(call.affine), call.negative_slope,
                   static_cast<const T*>(call.x), static_cast<const T*>(call.residual),
                   static_cast<T*>(call.y), call.mask, statistics, workspace);
    });
  });
}

void launch_batch_norm_slab_backward(const BatchNormShape& shape, const BatchNormSlabs& slabs,
                                     const BatchNormGradient& call, const BatchNormSums& sums,
                                     const BatchNormGradientOut& out, float* workspace,
                                     Stream stream) {
  const SlabWalk w = make_walk(shape, slabs);
  const bool with_residual = call.mask != nullptr || call.residual != nullptr;
  dispatch(shape, call.activation, [&](auto type, auto act) {
    const auto launch = [&](auto residual) {
      using T = decltype(type);
      constexpr int kVec = kVectorSize<T>;
      constexpr Activation kAct = act();
      constexpr bool kResidual = residual();
      launch_slabs("batch_norm_slab_backward_kernel",
                   batch_norm_slab_backward_kernel<T, kVec, kAct, kResidual>, slabs, stream, w,
                   call.affine, is_aligned(call.affine), call.negative_slope,
                   static_cast<const T*>(call.grad_y), static_cast<const T*>(call.x),
                   static_cast<const T*>(call.residual), call.mask, sums, out.sum_grad == nullptr,
                   out.factor, static_cast<T*>(out.grad_x), static_cast<T*>(out.grad_residual),
                   workspace);
    };
    if constexpr (!slab_backward_takes(act())) {
      throw std::invalid_argument("resops: the backward slabs do not take this activation");
    } else if constexpr (act() == Activation::identity) {
      launch(Constant<false>{});
    } else {
      dispatch_bool(with_residual, launch);
    }
  });
}

}  // namespace resops::cuda
