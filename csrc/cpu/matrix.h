// A small matrix product that stays in registers, from which the convolutions build theirs.
//
// out[r][j] (+)= sum over i of a(r, i) * b(i, j) for up to kRows rows and one panel of kPanel
// columns. Every element is one chain of fused multiply-adds in the order of i, whatever the rows
// around it: how a product is cut does not change its bits.
//
// Included by *_kernels.cpp only, inside the namespace of one instruction set.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace resops::RESOPS_ISA {

// The accumulators fill the registers, but for the row of b and one broadcast value of a.
#if defined(__AVX512F__)
constexpr int kRows = 14, kPanelPacks = 2;  // 28 of 32 registers of 16 floats
#elif defined(__AVX2__)
constexpr int kRows = 6, kPanelPacks = 1;  // 12 of 16 registers of 8 floats
#else
constexpr int kRows = 2, kPanelPacks = 1;  // 8 of 16 registers of 4 floats
#endif
constexpr int kPanel = kPanelPacks * kLanes;

// The step between rows of a copied operand. One vector more than needed: what lies in one column
// of many rows does not all compete for one set of a cache.
inline int64_t padded(int64_t channels) {
  return (channels + kLanes - 1) / kLanes * kLanes + kLanes;
}

// Where a block of the product lies; steps in elements.
struct Product {
  const float* a;
  int64_t a_step;  // between a(r, i) and a(r + 1, i); or, transposed, a(r, i + 1)
  const float* b;
  int64_t b_step;  // between b(i, j) and b(i + 1, j)
  float* out;
  int64_t out_step;  // between rows
  int64_t depth;     // values of i
  // Memory that is needed later, in lines of 64 bytes, of which `depth` are asked for at most: one
  // with each step, so that the products hide the wait. In one go they would fill the buffers that
  // loads need as well.
  const char* ahead = nullptr;
  int64_t ahead_lines = 0;
};

// kTransposed: neighbours in memory of a are rows, else they are values of i.
template <int kCount, int kPacks, bool kTransposed, bool kAccumulate, bool kAhead>
void multiply_rows(const Product& m) {
  const int64_t a_row = kTransposed ? 1 : m.a_step, a_column = kTransposed ? m.a_step : 1;
  Pack<float> sum[kCount][kPacks];
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kPacks; ++p) {
      sum[r][p] = kAccumulate ? load(m.out + r * m.out_step + p * kLanes) : broadcast(0.0f);
    }
  }
  // A pointer to every third row: the rows between are one or two steps away, which the addressing
  // modes of x86 say in one instruction; a pointer to each would not fit the registers.
  constexpr int kPointers = (kCount + 2) / 3;
  const float* a[kPointers];
#pragma GCC unroll 8
  for (int q = 0; q < kPointers; ++q) a[q] = m.a + 3 * q * a_row;
  const float* b = m.b;
  const char* ahead = m.ahead;
  for (int64_t i = 0; i < m.depth; ++i) {
    if constexpr (kAhead) {
      if (i < m.ahead_lines) __builtin_prefetch(ahead, 0, 2);
      ahead += 64;
    }
    Pack<float> row[kPacks];
#pragma GCC unroll 2
    for (int p = 0; p < kPacks; ++p) row[p] = load(b + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
      const Pack<float> value = broadcast(a[r / 3][r % 3 * a_row]);
#pragma GCC unroll 2
      for (int p = 0; p < kPacks; ++p) sum[r][p] = fma(value, row[p], sum[r][p]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kPointers; ++q) a[q] += a_column;
    b += m.b_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kPacks; ++p) store(m.out + r * m.out_step + p * kLanes, sum[r][p]);
  }
}

// out (+)= a * b for any number of rows and up to kPanel columns; 16 * ceil(columns / 16) are
// written. kAhead: fetches what the product names; with more rows than kRows several times.
template <bool kTransposed, bool kAccumulate, bool kAhead = false>
void multiply(Product m, int64_t rows, int64_t columns) {
  using Kernel = void (*)(const Product&);
  const auto table = []<int... kCount>(std::integer_sequence<int, kCount...>, auto packs) {
    return std::array<Kernel, kRows>{
        &multiply_rows<kCount + 1, decltype(packs)::value, kTransposed, kAccumulate, kAhead>...};
  };
  using Counts = std::make_integer_sequence<int, kRows>;
  static const std::array<Kernel, kRows> whole =
      table(Counts{}, std::integral_constant<int, kPanelPacks>{});
  static const std::array<Kernel, kRows> half = table(Counts{}, std::integral_constant<int, 1>{});
  const auto& kernels = columns > kLanes ? whole : half;
  // Blocks of equal height: a last block of one or two rows would wait for its own additions.
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t count = rows / (blocks - block) + (rows % (blocks - block) != 0);
    kernels[count - 1](m);
    m.a += count * (kTransposed ? 1 : m.a_step);
    m.out += count * m.out_step;
    rows -= count;
  }
}

}  // namespace resops::RESOPS_ISA
