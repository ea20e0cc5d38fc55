// In how many parts a launcher cuts the rows of a tensor.

#pragma once

#include <algorithm>

#include "vector.cuh"

namespace resops::cuda {

constexpr int64_t kLongestSum = 512;  // additions in float one after the other
// Steps of a thread, for which it reads what its channels need.
constexpr int64_t kShortestWalk = 4;
constexpr int64_t kMostParts = 65535;  // blocks in y

// In how many parts the rows are cut, where `beside` blocks share a row and a part that were all of
// them had `steps`.
inline int64_t parts_for(int64_t beside, int64_t steps, int blocks_per_multiprocessor,
                         bool reduction) {
  const int64_t together =
      static_cast<int64_t>(device_limits().multiprocessors) * blocks_per_multiprocessor;
  int64_t parts = together / beside;
  // Where that leaves a tenth idle or more: several rounds of blocks, of which only the last does.
  if (10 * parts * beside < 9 * together) parts = ceil_div(4 * together, beside);
  parts = std::min(parts, ceil_div(steps, kShortestWalk));
  if (reduction) parts = std::max(parts, ceil_div(steps, kLongestSum));
  return std::clamp<int64_t>(parts, 1, kMostParts);
}

}  // namespace resops::cuda
