// How the blocks of a batch_norm kernel share a tensor.
//
// By rows: the tensor is rows of whole vectors, each of which begins with channel 0; the last one
// may be shorter. A block takes neighbouring vectors of a row (blockIdx.x) and every `row_parts`-th
// tile of rows (blockIdx.y); a thread keeps its column, and with it its channels, in registers.
// Channels-last, a row is lcm(C, 8) elements. Contiguous, where a vector runs from one plane into
// the next, it is lcm(C * S, 8), one image or several, and S neighbouring columns are a plane: of
// one channel. What a block has of a plane is a share of it.
//
// By planes: contiguous, where a plane is whole vectors. A block takes one channel (blockIdx.x),
// every `row_parts`-th sample and one of the `plane_parts` pieces of its planes (blockIdx.y), in
// steps of 8 elements.
//
// As many blocks are started as run at the same time. So all together move through the tensor from
// its start to its end, which is what the caches hold after it, and where a pass in reverse begins.

#pragma once

#include "vector.cuh"

namespace resops::cuda {

// Blocks that run at the same time on a multiprocessor.
constexpr int kResidentBlocks = 2;

// The columns of a plane that one block has, and where their sums are among those of a part.
struct PlaneShare {
  int64_t begin, end, index;
};

struct BatchNormWalk {
  int64_t channels, spatial, numel;
  int64_t rows;         // by planes: samples
  int64_t pitch;        // by rows: elements of a row
  int64_t plane;        // by rows: neighbouring columns of one channel, 1 in channels-last
  int64_t columns;      // sums that a part yields: one per share of a plane
  int64_t part_length;  // by planes: elements of a piece of a plane, a multiple of 8
  int64_t mask_bytes;   // by rows: what there is of a mask
  int lanes;            // threads beside each other in a row
  int lane_rows;        // rows (by planes: steps) that a block handles at a time
  int width;            // by rows: columns of a block
  int row_parts, plane_parts;
  int repeats, shares;  // how often a channel is in a row; at most so many blocks share a plane
  bool by_rows, reverse;

  // How many whole rows a part has: part_rows, and of the extra_rows left over a tile, or a part of
  // it, if its turn comes. The last row, if it is shorter, is last_part's.
  int64_t part_rows, extra_rows, last_length;
  int tile_rows, last_part;

  __host__ __device__ int parts() const { return row_parts * plane_parts; }

  // Share `which` of plane `p` of a row, in the order of the blocks; empty past the last one. From
  // one share to the next either the block or the plane is another, so that no two have one index.
  __device__ PlaneShare share(int64_t p, int which) const {
    if (plane == 1) return {p, p + 1, p};
    const int64_t begin = p * plane, end = begin + plane, block = begin / width + which;
    const int64_t block_begin = block * width, block_end = block_begin + width;
    return {begin > block_begin ? begin : block_begin, end < block_end ? end : block_end,
            block + p};
  }

  // Values of which a share of part `part` has the sum.
  __device__ int64_t values(int part, const PlaneShare& share) const {
    const int row_part = part / plane_parts;
    const int64_t extra = extra_rows - static_cast<int64_t>(row_part) * tile_rows;
    const int64_t own = part_rows + (extra < 0 ? 0 : extra < tile_rows ? extra : tile_rows);
    if (by_rows) {
      const int64_t length = share.end - share.begin, last = last_length - share.begin;
      if (part != last_part || last <= 0) return own * length;
      return own * length + (last < length ? last : length);
    }
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
template <int kVec, bool kByRows>
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

  // Where three rows of the part begin (see part_sample), none of them a shorter one if there is a
  // whole one.
  __device__ int64_t sample_row(const BatchNormWalk& w, int which) const {
    const int64_t step = part_sample(steps, which), row = part_sample(w.lane_rows, which);
    const int64_t at = (blockIdx.y + step * w.row_parts) * w.lane_rows + row;
    const int64_t whole = end / w.pitch;
    return (at < whole ? at : whole > 0 ? whole - 1 : 0) * w.pitch;
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
