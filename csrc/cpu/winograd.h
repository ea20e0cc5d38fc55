// The transforms of Winograd's minimal filtering, F(4x4, 3x3) and F(2x2, 3x3), over Packs.
//
// y = A^T [ (G w G^T) * (B^T d B) ] A  for a tile of kOut x kOut outputs, kIn = kOut + 2 inputs
// along a side, interpolated at 0, 1, -1 (, 2, -2) and infinity: Lavin and Gray, "Fast Algorithms
// for Convolutional Neural Networks", 2016. The gradient of w is the same product transposed: G^T [
// (A g A^T) * (B^T d B) ] G.
//
// Included by *_kernels.cpp only, inside the namespace of one instruction set.

#pragma once

#include "simd.h"

namespace resops::RESOPS_ISA {

using Value = Pack<float>;

inline Value scaled(Value v, float factor) { return v * broadcast(factor); }
// a * factor + b
inline Value plus(Value a, float factor, Value b) { return fma(a, broadcast(factor), b); }

// The matrices, each applied to one vector: B^T, A^T, A, G and G^T.
template <int kOut>
struct Winograd;

template <>
struct Winograd<4> {
  static constexpr int kIn = 6;
  static inline void input(const Value* d, Value* o) {
    o[0] = plus(d[0], 4, plus(d[2], -5, d[4]));
    const Value even = plus(d[2], -4, d[4]), odd = plus(d[1], -4, d[3]);
    o[1] = even + odd;
    o[2] = even - odd;
    const Value even2 = d[4] - d[2], odd2 = scaled(d[3] - d[1], 2);
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = plus(d[1], 4, plus(d[3], -5, d[5]));
  }
  static inline void output(const Value* m, Value* o) {
    const Value sum1 = m[1] + m[2], difference1 = m[1] - m[2];
    const Value sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    o[0] = m[0] + sum1 + sum2;
    o[1] = plus(difference2, 2, difference1);
    o[2] = plus(sum2, 4, sum1);
    o[3] = plus(difference2, 8, difference1) + m[5];
  }
  static inline void output_transposed(const Value* g, Value* o) {
    const Value even = g[0] + g[2], odd = g[1] + g[3];
    const Value even2 = plus(g[2], 4, g[0]), odd2 = scaled(plus(g[3], 4, g[1]), 2);
    o[0] = g[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = g[3];
  }
  static inline void weight(const Value* w, Value* o) {
    const Value even = scaled(w[0] + w[2], -1.0f / 6), odd = scaled(w[1], 1.0f / 6);
    const Value even2 = plus(w[0], 1.0f / 24, scaled(w[2], 1.0f / 6));
    const Value odd2 = scaled(w[1], 1.0f / 12);
    o[0] = scaled(w[0], 0.25f);
    o[1] = even - odd;
    o[2] = even + odd;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = w[2];
  }
  static inline void weight_transposed(const Value* u, Value* o) {
    const Value sum1 = scaled(u[1] + u[2], -1.0f / 6), sum2 = u[3] + u[4];
    o[0] = plus(u[0], 0.25f, plus(sum2, 1.0f / 24, sum1));
    o[1] = plus(u[2] - u[1], 1.0f / 6, scaled(u[3] - u[4], 1.0f / 12));
    o[2] = plus(sum2, 1.0f / 6, sum1) + u[5];
  }
};

template <>
struct Winograd<2> {
  static constexpr int kIn = 4;
  static inline void input(const Value* d, Value* o) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[1] - d[3];
  }
  static inline void output(const Value* m, Value* o) {
    o[0] = m[0] + m[1] + m[2];
    o[1] = m[1] - m[2] - m[3];
  }
  static inline void output_transposed(const Value* g, Value* o) {
    o[0] = g[0];
    o[1] = g[0] + g[1];
    o[2] = g[0] - g[1];
    o[3] = broadcast(0.0f) - g[1];
  }
  static inline void weight(const Value* w, Value* o) {
    const Value even = scaled(w[0] + w[2], 0.5f), odd = scaled(w[1], 0.5f);
    o[0] = w[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = w[2];
  }
  static inline void weight_transposed(const Value* u, Value* o) {
    const Value sum = scaled(u[1] + u[2], 0.5f);
    o[0] = u[0] + sum;
    o[1] = scaled(u[1] - u[2], 0.5f);
    o[2] = sum + u[3];
  }
};

// Applies a matrix of kTo rows to both sides of a square of kFrom x kFrom values:
// out(i, j, value) is called for the kTo x kTo results, row by row.
template <int kFrom, int kTo, class Matrix, class Out>
inline __attribute__((always_inline)) void both_sides(const Value (&in)[kFrom][kFrom],
                                                      Matrix matrix, Out out) {
  Value half[kFrom][kTo];  // one side done: half[j] is column j of matrix * in, transposed
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    Value column[kFrom];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) column[i] = in[i][j];
    matrix(column, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) {
    Value row[kFrom], result[kTo];
#pragma GCC unroll 6
    for (int j = 0; j < kFrom; ++j) row[j] = half[j][i];
    matrix(row, result);
#pragma GCC unroll 6
    for (int j = 0; j < kTo; ++j) out(i, j, result[j]);
  }
}

}  // namespace resops::RESOPS_ISA
