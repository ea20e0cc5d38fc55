// Launcher of the forward convolution: which tile a call takes, and the merge of its statistics.

#include <limits>

#include "batch_norm.cuh"
#include "conv_bn_act.cuh"
#include "dispatch.h"

namespace resops::cuda {
namespace {

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // of a grid in x

// Whether x, the weight, y and the residual can be accessed by whole vectors.
bool has_vectors(const ConvBnActForward& call) {
  const ConvShape& s = call.shape;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return s.in_channels % kChunk == 0 && s.out_channels % kChunk == 0 && s.pitch % kChunk == 0 &&
         aligned(call.x) && aligned(call.weight) && aligned(call.y) && aligned(call.residual);
}

// Channels of a tile. The wide one reads x half as often, but has no registers left for a prologue.
int tile_of(const ConvBnActForward& call) {
  return call.shape.out_channels > 64 && call.scale == nullptr && has_vectors(call) ? 128 : 64;
}

// Pixels of a part of the statistics.
int64_t part_rows(const ConvBnActForward& call) {
  return tile_of(call) == 128 ? kPassRows<128> : kPassRows<64>;
}

int64_t steps_of(const ConvShape& s) {
  return static_cast<int64_t>(s.height.kernel) * s.width.kernel * ceil_div(s.in_channels, kTileK);
}
int64_t blocks_of(const ConvShape& s, int tile) {
  return ceil_div(s.pixels(), kTileM) * ceil_div(s.out_channels, tile);
}

// f(T{}, Constant<kVec>{}, Constant<kTileN>{}, Constant<kPrologue>{})
template <class F>
void dispatch_tile(const ConvBnActForward& call, F f) {
  const auto with_type = [&](auto type) {
    if (tile_of(call) == 128)
      return f(type, Constant<kChunk>{}, Constant<128>{}, Constant<false>{});
    dispatch_bool(call.scale != nullptr, [&](auto prologue) {
      if (has_vectors(call)) {
        f(type, Constant<kChunk>{}, Constant<64>{}, prologue);
      } else {
        f(type, Constant<1>{}, Constant<64>{}, prologue);
      }
    });
  };
  if (call.shape.dtype == DType::bf16) {
    with_type(__nv_bfloat16{});
  } else if (call.shape.dtype == DType::f16) {
    with_type(__half{});
  } else {
    throw std::invalid_argument("resops: the CUDA convolution takes bfloat16 and float16");
  }
}

}  // namespace

int64_t conv_bn_act_workspace(const ConvBnActForward& call) {
  return 3 * ceil_div(call.shape.pixels(), part_rows(call)) * call.shape.out_channels;
}

void launch_conv_bn_act_forward(const ConvBnActForward& call, float* workspace, float* mean,
                                float* var, Stream stream) {
  const ConvShape& s = call.shape;
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t pixels = s.pixels();
  if (pixels > 0) {
    if (device_limits().compute_capability < kConvArchitecture) {
      throw std::runtime_error(
          "resops: conv_bn_act needs a GPU of compute capability 8.0 or newer, but " +
          device_limits().name + " is older; resops.set_backend(\"auto\") takes cuDNN's kernels");
    }
    if (blocks_of(s, 64) > kMostBlocks) {
      throw std::runtime_error("resops: conv_bn_act has more pixels than one launch can count");
    }
    const size_t affine_bytes = 2 * sizeof(float) * affine_length(s.in_channels);
    dispatch_tile(call, [&](auto type, auto vec, auto tile, auto prologue) {
      using T = decltype(type);
      constexpr int kVec = vec(), kTileN = tile();
      constexpr bool kPrologue = prologue();
      RESOPS_LAUNCH((conv_bn_act_forward_kernel<T, kVec, kTileN, kPrologue>),
                    static_cast<unsigned>(blocks_of(s, kTileN)), kThreads,
                    sizeof(ConvShared<kTileN>) + (kPrologue ? affine_bytes : 0), on, call,
                    static_cast<int>(steps_of(s)), pixels, mean != nullptr ? workspace : nullptr);
    });
  }
  if (mean == nullptr) return;
  // The parts as batch_norm's finaliser counts them: runs of part_rows pixels.
  BatchNormWalk w{};
  w.channels = w.columns = s.out_channels;
  w.by_rows = true;
  w.plane = w.repeats = w.shares = 1;
  w.row_parts = static_cast<int>(ceil_div(pixels, part_rows(call)));
  w.plane_parts = 1;
  w.tile_rows = static_cast<int>(part_rows(call));
  w.extra_rows = pixels;
  BatchNormStatistics out{};
  out.mean = mean;
  out.var = var;
  RESOPS_LAUNCH(batch_norm_finish_kernel<float>,
                static_cast<unsigned>(ceil_div(s.out_channels, kFinishChannels)), kThreads,
                sizeof(FinishShared), on, w, workspace, out);
}

}  // namespace resops::cuda
