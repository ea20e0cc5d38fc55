// Launchers of dense_block: how rows are cut, and how wide accesses are.

#include <algorithm>

#include "dense_block.cuh"
#include "dispatch.h"
#include "row_parts.h"

namespace resops::cuda {
namespace {

// Elements of one access: as many as the channels and every tensor's addresses allow.
class VectorSize {
 public:
  VectorSize(const DenseBlockShape& shape, const DenseBlockSum& sum)
      : bytes_(shape.dtype == DType::f32 ? 4 : 2),
        size_(shape.dtype == DType::f32 || (sum.data && sum.is_float) ? 4 : 8) {
    require(shape.channels);
    if (sum.data) add(sum.data, sum.stride, sum.is_float ? 4 : bytes_);
  }
  VectorSize& dense(const void* data) {
    add(data, 0, bytes_);
    return *this;
  }
  VectorSize& rows(const Rows& t) {
    if (t.data) add(t.data, t.stride, bytes_);
    return *this;
  }
  int get() const { return size_; }

 private:
  void add(const void* data, int64_t stride, int bytes) {
    require(stride);
    while (size_ > 1 && reinterpret_cast<uintptr_t>(data) %
                                (static_cast<uintptr_t>(size_) * static_cast<uintptr_t>(bytes)) !=
                            0) {
      narrow();
    }
  }
  void require(int64_t count) {
    while (count % size_ != 0) narrow();
  }
  void narrow() { size_ = size_ == 8 ? 4 : 1; }

  int bytes_, size_;
};

DenseBlockWalk make_walk(const DenseBlockShape& shape, int vec, bool reduction) {
  DenseBlockWalk w{};
  w.rows = shape.rows;
  w.channels = shape.channels;
  const int64_t vectors = shape.channels / vec;
  w.lanes = static_cast<int>(ceil_div(vectors, ceil_div(vectors, kWarpSize)));
  w.lane_rows = kThreads / w.lanes;
  const int64_t steps = ceil_div(w.rows, w.lane_rows);
  w.row_parts =
      static_cast<int>(parts_for(ceil_div(vectors, w.lanes), steps, kResidentBlocks, reduction));
  return w;
}

dim3 grid_of(const DenseBlockWalk& w, int vec) {
  return dim3(static_cast<unsigned>(ceil_div(w.channels, static_cast<int64_t>(w.lanes) * vec)),
              static_cast<unsigned>(w.row_parts));
}

// f(T{}, Constant<kVec>{})
template <class F>
void dispatch_vector(DType dtype, int vec, F f) {
  dispatch_dtype(dtype, [&](auto type) {
    if constexpr (kVectorSize<decltype(type)> == 8) {
      if (vec == 8) return f(type, Constant<8>{});
    }
    if (vec == 4) return f(type, Constant<4>{});
    f(type, Constant<1>{});
  });
}

// f(T{}, S{}, Constant<kVec>{}) with S what the sum is stored as.
template <class F>
void dispatch_sum(DType dtype, const DenseBlockSum& sum, int vec, F f) {
  dispatch_vector(dtype, vec, [&](auto type, auto size) {
    if constexpr (size() != 8 && !std::is_same_v<decltype(type), float>) {
      if (sum.data && sum.is_float) return f(type, float{}, size);
    }
    f(type, type, size);
  });
}

int vector_size(const DenseBlockShape& shape, const DenseBlockAccumulate& call) {
  return VectorSize(shape, call.grad_sum).dense(call.grad_y).rows(call.x).get();
}

bool is_aligned(const BatchNormAffine& affine) {
  return are_aligned({affine.mean, affine.invstd, affine.weight.data, affine.bias.data});
}

}  // namespace

void launch_dense_block_apply(const DenseBlockShape& shape, const DenseBlockApply& call,
                              Stream stream) {
  const int size = VectorSize(shape, {}).dense(call.y).rows(call.x).get();
  const DenseBlockWalk w = make_walk(shape, size, false);
  dispatch_vector(shape.dtype, size, [&](auto type, auto vec) {
    using T = decltype(type);
    constexpr int kVec = vec();
    RESOPS_LAUNCH((dense_block_apply_kernel<T, kVec>), grid_of(w, kVec), kThreads, 0,
                  static_cast<cudaStream_t>(stream), w, call.affine, is_aligned(call.affine),
                  static_cast<const T*>(call.x.data), call.x.stride, static_cast<T*>(call.y));
  });
}

int64_t dense_block_workspace(const DenseBlockShape& shape, const DenseBlockAccumulate& call) {
  if (shape.rows == 0 || shape.channels == 0) return 0;
  return 2 * make_walk(shape, vector_size(shape, call), true).row_parts * shape.channels;
}

void launch_dense_block_accumulate(const DenseBlockShape& shape, const DenseBlockAccumulate& call,
                                   float* workspace, const BatchNormSums& out, Stream stream) {
  if (shape.channels == 0) return;
  DenseBlockWalk w{};  // no parts
  if (shape.rows > 0) {
    const int size = vector_size(shape, call);
    w = make_walk(shape, size, true);
    dispatch_sum(shape.dtype, call.grad_sum, size, [&](auto type, auto stored, auto vec) {
      dispatch_bool(call.first, [&](auto first) {
        using T = decltype(type);
        using S = decltype(stored);
        constexpr int kVec = vec();
        constexpr bool kFirst = first();
        RESOPS_LAUNCH((dense_block_accumulate_kernel<T, S, kVec, kFirst>), grid_of(w, kVec),
                      kThreads, sizeof(SumsShared<kVec>), static_cast<cudaStream_t>(stream), w,
                      call.affine, is_aligned(call.affine), call.training,
                      static_cast<const T*>(call.grad_y), static_cast<const T*>(call.x.data),
                      call.x.stride, static_cast<S*>(call.grad_sum.data), call.grad_sum.stride,
                      workspace);
      });
    });
  }
  launch_batch_norm_merge_sums(shape.dtype, shape.channels, shape.channels, w.row_parts, workspace,
                               call.affine.invstd, out, stream);
}

void launch_dense_block_gradient(const DenseBlockShape& shape, const DenseBlockGradient& call,
                                 Stream stream) {
  const int size =
      VectorSize(shape, call.grad_sum).dense(call.out).rows(call.x).rows(call.grad_y).get();
  const DenseBlockWalk w = make_walk(shape, size, false);
  const bool aligned = are_aligned({call.mean, call.invstd, call.mean_grad, call.mean_grad_xhat});
  dispatch_sum(shape.dtype, call.grad_sum, size, [&](auto type, auto stored, auto vec) {
    using T = decltype(type);
    using S = decltype(stored);
    constexpr int kVec = vec();
    RESOPS_LAUNCH((dense_block_gradient_kernel<T, S, kVec>), grid_of(w, kVec), kThreads, 0,
                  static_cast<cudaStream_t>(stream), w, aligned,
                  static_cast<const T*>(call.grad_y.data), call.grad_y.stride,
                  static_cast<const T*>(call.x.data), call.x.stride,
                  static_cast<const S*>(call.grad_sum.data), call.grad_sum.stride, call.mean,
                  call.invstd, call.mean_grad, call.mean_grad_xhat, static_cast<T*>(call.out));
  });
}

void launch_dense_block_update_running(DType dtype, const float* mean, const float* var,
                                       double unbiased,
                                       const std::vector<DenseBlockRunning>& consumers,
                                       Stream stream) {
  for (size_t begin = 0; begin < consumers.size(); begin += kMostConsumers) {
    const size_t count = std::min<size_t>(consumers.size() - begin, kMostConsumers);
    DenseBlockRunningTable table{mean, var, unbiased, {}};
    int64_t channels = 0;
    for (size_t i = 0; i < count; ++i) {
      table.consumers[i] = consumers[begin + i];
      channels = std::max(channels, consumers[begin + i].channels);
    }
    if (channels == 0) continue;
    const dim3 grid(static_cast<unsigned>(ceil_div(channels, kThreads)),
                    static_cast<unsigned>(count));
    dispatch_dtype(dtype, [&](auto type) {
      RESOPS_LAUNCH(dense_block_update_running_kernel<decltype(type)>, grid, kThreads, 0,
                    static_cast<cudaStream_t>(stream), table);
    });
  }
}

}  // namespace resops::cuda
