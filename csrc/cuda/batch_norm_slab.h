// batch_norm on a GPU with a single read of its tensors: what the bindings call, under the rules of
// batch_norm.h.
//
// Channels are independent. So a slab of channels, small enough that the blocks which share it can
// keep it on the chip, is read once: statistics, merge between the blocks, apply. The merge is one
// of three things, by how much memory the slab takes.

#pragma once

#include <optional>

#include "batch_norm.h"

namespace resops::cuda {

enum class SlabRegime {
  block,    // one block has the slab in its shared memory: nothing to merge
  cluster,  // a cluster of blocks has it, and merges through distributed shared memory (sm_90)
  grid,     // all blocks that run at a time share some slabs, in shared memory and, as far as that
            // does not go, in the L2 cache; a cooperative launch with a barrier for every round
};

// How a tensor is cut.
struct BatchNormSlabs {
  SlabRegime regime;
  int lanes;           // 16-byte vectors beside each other in a slab
  int blocks;          // of a slab
  int at_a_time;       // slabs
  int64_t block_rows;  // rows of a block: pixels
  int64_t kept;        // of which it keeps so many in shared memory
  size_t shared_bytes;
};

// None where the tensor is not channels-last with a multiple of 8 channels, where a slab would not
// fit in the regime (any, if it is not given), or where the device has no such launch. `tensors`:
// how many are kept, x, and in backward grad_y and, for silu and gelu, the residual.
std::optional<BatchNormSlabs> choose_batch_norm_slabs(const BatchNormShape& shape, int tensors,
                                                      std::optional<SlabRegime> regime = {});

// Floats.
int64_t batch_norm_slab_workspace(const BatchNormShape& shape, const BatchNormSlabs& slabs);

// statistics and apply; mean and invstd of `call.affine` are not read.
void launch_batch_norm_slab_forward(const BatchNormShape& shape, const BatchNormSlabs& slabs,
                                    const BatchNormStatistics& statistics,
                                    const BatchNormApply& call, float* workspace, Stream stream);

// Not gelu: its derivative takes more registers than a thread has beside what it keeps here.
constexpr bool slab_backward_takes(Activation activation) { return activation != Activation::gelu; }

// backward_reduce and backward_apply; the sums of `out` are not read, but null for frozen
// statistics.
void launch_batch_norm_slab_backward(const BatchNormShape& shape, const BatchNormSlabs& slabs,
                                     const BatchNormGradient& call, const BatchNormSums& sums,
                                     const BatchNormGradientOut& out, float* workspace,
                                     Stream stream);

}  // namespace resops::cuda
