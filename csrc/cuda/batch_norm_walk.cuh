// How the blocks of a batch_norm kernel share a tensor.
//
// channels-last: the tensor is rows of lcm(C, 8) elements, so that every row is whole vectors and
// begins with channel 0; the last row may be shorter. A block takes up to 32 neighbouring vectors
// of a row (blockIdx.x) and every `row_parts`-th tile of rows (blockIdx.y); a thread keeps its
// column, and with it its channels, in registers.
//
// contiguous: a block takes one channel (blockIdx.x), every `row_parts`-th sample and one of the
// `plane_parts` pieces of its planes (blockIdx.y), in steps of 8 elements.
//
// As many blocks are started as run at the same time. So all together move through the tensor from
// its start to its end, which is what the caches hold after it, and where a pass in reverse begins.

#pragma once

#include "vector.cuh"

namespace resops::cuda {

// Blocks that run at the same time on a multiprocessor.
__host__ __device__ constexpr int resident_blocks(int vec) { return vec == 1 ? 3 : 2; }
template <int kVec>
constexpr int kResidentBlocks = resident_blocks(kVec);

struct BatchNormWalk {
  int64_t channels, spatial, numel;
  int64_t rows;         // channels-last: see above; contiguous: samples
  int64_t pitch;        // channels-last: elements of a row
  int64_t columns;      // sums that a part yields: `pitch` or C
  int64_t part_length;  // contiguous: elements of a piece of a plane, a multiple of 8
  int lanes;            // threads beside each other in a row
  int lane_rows;        // rows (contiguous: steps) that a block handles at a time
  int row_parts, plane_parts;
  bool channels_last, reverse;

  // How many whole rows a part has: part_rows, and of the extra_rows left over a tile, or a part of
  // it, if its turn comes. The last row of channels-last, if it is shorter, is last_part's.
  int64_t part_rows, extra_rows, last_length;
  int tile_rows, last_part;

  __host__ __device__ int parts() const { return row_parts * plane_parts; }

  // Values that part `part` adds to one of its columns.
  __device__ int64_t values(int part, int64_t column) const {
    const int row_part = part / plane_parts;
    const int64_t extra = extra_rows - static_cast<int64_t>(row_part) * tile_rows;
    const int64_t own = part_rows + (extra < 0 ? 0 : extra < tile_rows ? extra : tile_rows);
    if (channels_last) return own + (part == last_part && column < last_length ? 1 : 0);
    const int64_t rest = spatial - (part - row_part * plane_parts) * part_length;
    return own * (rest < part_length ? rest : part_length);
  }
};

// Three of `count` things, inside and not at either end, where images have borders; elevenths, so
// that they are seldom all at the start of a row of pixels.
__device__ __forceinline__ int64_t part_sample(int64_t count, int which) {
  return count * (3 * which + 2) / 11;
}

// The vectors of one thread, in the order in which it takes them. The number of steps is the same
// for all threads of a block; a step past the end is not whole.
template <int kVec, bool kChannelsLast>
class Cursor;

template <int kVec>
class Cursor<kVec, true> {
 public:
  static constexpr bool kShortEnd = true;

  __device__ explicit Cursor(const BatchNormWalk& w) : end(w.numel) {
    const int lane = static_cast<int>(threadIdx.x) % w.lanes;
    lane_row = static_cast<int>(threadIdx.x) / w.lanes;
    column = (static_cast<int64_t>(blockIdx.x) * w.lanes + lane) * kVec;
    steps = ceil_div(ceil_div(w.rows, w.lane_rows) - blockIdx.y, w.row_parts);
    step_ = static_cast<int64_t>(w.row_parts) * w.lane_rows * w.pitch;
    offset_ = (static_cast<int64_t>(blockIdx.y) * w.lane_rows + lane_row) * w.pitch + column;
    if (lane_row >= w.lane_rows || column >= w.pitch) {
      offset_ = w.numel;
      step_ = 0;
    } else if (w.reverse) {
      offset_ = (w.rows - 1) * w.pitch + 2 * column - offset_;
      step_ = -step_;
    }
  }

  __device__ Place next() {
    const Place place{offset_, offset_ >> 3, offset_ >= 0 && (offset_ | 7) < end};
    offset_ += step_;
    return place;
  }

  __device__ bool has_short_end() const { return end % 8 != 0; }

  // Where this thread's column is in three rows of its part (see part_sample).
  __device__ int64_t sample(const BatchNormWalk& w, int which) const {
    const int64_t step = part_sample(steps, which), row = part_sample(w.lane_rows, which);
    const int64_t at = (blockIdx.y + step * w.row_parts) * w.lane_rows + row;
    const int64_t whole = end / w.pitch;  // the last row may be too short for this column
    return (at < whole ? at : whole > 0 ? whole - 1 : 0) * w.pitch + column;
  }

  int64_t steps, end;
  int64_t column;  // first of kVec
  int lane_row;    // which of the block's rows this thread is in

 private:
  int64_t offset_, step_;
};

template <int kVec>
class Cursor<kVec, false> {
 public:
  static constexpr bool kShortEnd = false;
  static constexpr int kLanes = 8 / kVec;

  __device__ explicit Cursor(const BatchNormWalk& w)
      : column(blockIdx.x), row_parts_(w.row_parts), reverse_(w.reverse) {
    constexpr int kItems = kThreads / kLanes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    lane_row = static_cast<int>(threadIdx.x) / kLanes;
    row_ = static_cast<int>(blockIdx.y) / w.plane_parts;
    rows_ = w.rows;
    begin_ = static_cast<int64_t>(static_cast<int>(blockIdx.y) % w.plane_parts) * w.part_length;
    end_ = begin_ + w.part_length < w.spatial ? begin_ + w.part_length : w.spatial;
    strips_ = ceil_div(end_ - begin_, 8);
    own_rows_ = ceil_div(rows_ - row_, row_parts_);
    steps = ceil_div(own_rows_ * strips_, kItems);
    plane_ = w.spatial;
    row_pitch_ = w.channels * w.spatial;
    mask_plane_ = ceil_div(w.spatial, 8);
    mask_pitch_ = w.channels * mask_plane_;
    first_row_ = row_;
    strip_ = lane_row % strips_;
    row_ += lane_row / strips_ * row_parts_;
    strip_step_ = kItems % strips_;
    row_step_ = kItems / strips_ * row_parts_;
    lane_ = lane * kVec;
  }

  __device__ Place next() {
    const int64_t at = begin_ + strip_ * 8 + lane_;
    const int64_t row = reverse_ ? rows_ - 1 - row_ : row_;
    const Place place{row * row_pitch_ + column * plane_ + at,
                      row * mask_pitch_ + column * mask_plane_ + (at >> 3),
                      row_ < rows_ && at < end_};
    strip_ += strip_step_;
    row_ += row_step_;
    if (strip_ >= strips_) {
      strip_ -= strips_;
      row_ += row_parts_;
    }
    return place;
  }

  __device__ bool has_short_end() const { return false; }

  // Three elements of the part (see part_sample).
  __device__ int64_t sample(const BatchNormWalk&, int which) const {
    const int64_t row = first_row_ + part_sample(own_rows_, which) * row_parts_;
    return row * row_pitch_ + column * plane_ + begin_ + part_sample(end_ - begin_, which);
  }

  int64_t steps, end = 0;
  int64_t column;  // the channel
  int lane_row;    // which of the block's steps this thread is in

 private:
  int64_t rows_, own_rows_, first_row_, begin_, end_, strips_;
  int64_t plane_, row_pitch_, mask_plane_, mask_pitch_;
  int64_t row_, strip_, row_step_, strip_step_;
  int row_parts_, lane_;
  bool reverse_;
};

}  // namespace resops::cuda
