// Sixteen values at a time, written once for AVX-512, AVX2 and any other processor.
//
// A Pack<acc> holds 16 values of the accumulation type (float, or double for float64 tensors) in as
// many registers as the instruction set needs: one ZMM, two YMM, four XMM. Arithmetic goes through
// the compiler's vector types; only what those cannot say (fused multiply-add, half conversions,
// movemask, non-temporal stores) is an intrinsic. The number of values is the same everywhere, so
// the order of every sum is too.
//
// Included by *_kernels.cpp only, inside the namespace of one instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef RESOPS_ISA
#error "RESOPS_ISA must name the namespace of this instruction set"
#endif

namespace resops::RESOPS_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

template <class acc>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <class acc>
struct Pack {
  typedef acc Register __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kRegisters = kLanes * sizeof(acc) / kRegisterBytes;
  static constexpr int kPerRegister = kRegisterBytes / sizeof(acc);
  Register r[kRegisters];
};

#define RESOPS_EACH_REGISTER(i) \
  _Pragma("GCC unroll 8") for (int i = 0; i < Pack<acc>::kRegisters; ++i)

template <class acc>
inline Pack<acc> broadcast(acc value) {
  Pack<acc> out;
  RESOPS_EACH_REGISTER(i) out.r[i] = value - typename Pack<acc>::Register{};
  return out;
}

template <class acc>
inline Pack<acc> operator+(Pack<acc> a, Pack<acc> b) {
  RESOPS_EACH_REGISTER(i) a.r[i] += b.r[i];
  return a;
}
template <class acc>
inline Pack<acc> operator-(Pack<acc> a, Pack<acc> b) {
  RESOPS_EACH_REGISTER(i) a.r[i] -= b.r[i];
  return a;
}
template <class acc>
inline Pack<acc> operator*(Pack<acc> a, Pack<acc> b) {
  RESOPS_EACH_REGISTER(i) a.r[i] *= b.r[i];
  return a;
}
template <class acc>
inline Pack<acc> operator/(Pack<acc> a, Pack<acc> b) {
  RESOPS_EACH_REGISTER(i) a.r[i] /= b.r[i];
  return a;
}

// a * b + c, rounded once where the instruction set can.
inline Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  for (int i = 0; i < Pack<float>::kRegisters; ++i) {
#if defined(__AVX512F__)
    c.r[i] = _mm512_fmadd_ps(a.r[i], b.r[i], c.r[i]);
#elif defined(__FMA__)
    c.r[i] = _mm256_fmadd_ps(a.r[i], b.r[i], c.r[i]);
#else
    c.r[i] += a.r[i] * b.r[i];
#endif
  }
  return c;
}
inline Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  for (int i = 0; i < Pack<double>::kRegisters; ++i) {
#if defined(__AVX512F__)
    c.r[i] = _mm512_fmadd_pd(a.r[i], b.r[i], c.r[i]);
#elif defined(__FMA__)
    c.r[i] = _mm256_fmadd_pd(a.r[i], b.r[i], c.r[i]);
#else
    c.r[i] += a.r[i] * b.r[i];
#endif
  }
  return c;
}

// Lane-wise conditions. AVX-512 has registers for them; elsewhere a lane is all ones or all zeros.

template <class acc>
struct Mask {
  typedef typename IntOf<acc>::type Register __attribute__((vector_size(kRegisterBytes)));
  Register r[Pack<acc>::kRegisters];
};

// Where the gradient of relu passes: not (z <= 0), so that a NaN passes.
template <class acc>
inline Mask<acc> passes(Pack<acc> z) {
  Mask<acc> out;
  RESOPS_EACH_REGISTER(i) out.r[i] = ~(z.r[i] <= acc(0));
  return out;
}
template <class acc>
inline Mask<acc> greater(Pack<acc> a, acc b) {
  Mask<acc> out;
  RESOPS_EACH_REGISTER(i) out.r[i] = a.r[i] > b;
  return out;
}
// Where a takes the place of b as the maximum so far: it is greater, or a NaN.
template <class acc>
inline Mask<acc> exceeds(Pack<acc> a, Pack<acc> b) {
  Mask<acc> out;
  RESOPS_EACH_REGISTER(i) out.r[i] = (a.r[i] > b.r[i]) | (a.r[i] != a.r[i]);
  return out;
}
template <class acc>
inline Pack<acc> select(Mask<acc> mask, Pack<acc> yes, Pack<acc> no) {
  RESOPS_EACH_REGISTER(i) yes.r[i] = mask.r[i] ? yes.r[i] : no.r[i];
  return yes;
}
template <class acc>
inline uint16_t to_bits(Mask<acc> mask) {
  unsigned bits = 0;
  RESOPS_EACH_REGISTER(i) {
    for (int lane = 0; lane < Pack<acc>::kPerRegister; ++lane) {
      bits |= static_cast<unsigned>(mask.r[i][lane] & 1) << (i * Pack<acc>::kPerRegister + lane);
    }
  }
  return static_cast<uint16_t>(bits);
}
template <class acc>
inline Mask<acc> from_bits(uint16_t bits) {
  using Int = typename IntOf<acc>::type;
  Mask<acc> out;
  RESOPS_EACH_REGISTER(i) {
    typename Mask<acc>::Register lane_bit;
    for (int lane = 0; lane < Pack<acc>::kPerRegister; ++lane) {
      lane_bit[lane] = Int(1) << (i * Pack<acc>::kPerRegister + lane);
    }
    out.r[i] = (lane_bit & Int(bits)) != 0;
  }
  return out;
}

// Where 16 bytes are `value`.
template <class acc>
inline Mask<acc> bytes_equal(const uint8_t* p, uint8_t value) {
  using Int = typename IntOf<acc>::type;
  Mask<acc> out;
  RESOPS_EACH_REGISTER(i) {
    for (int lane = 0; lane < Pack<acc>::kPerRegister; ++lane) {
      out.r[i][lane] = -static_cast<Int>(p[i * Pack<acc>::kPerRegister + lane] == value);
    }
  }
  return out;
}

#if defined(__AVX512F__)
template <>
struct Mask<float> {
  __mmask16 bits;
};
template <>
inline Mask<float> passes(Pack<float> z) {
  return {_mm512_cmp_ps_mask(z.r[0], _mm512_setzero_ps(), _CMP_NLE_UQ)};
}
template <>
inline Mask<float> greater(Pack<float> a, float b) {
  return {_mm512_cmp_ps_mask(a.r[0], _mm512_set1_ps(b), _CMP_GT_OQ)};
}
template <>
inline Mask<float> bytes_equal<float>(const uint8_t* p, uint8_t value) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(value)))};
}
template <>
inline Mask<float> exceeds(Pack<float> a, Pack<float> b) {
  return {static_cast<__mmask16>(_mm512_cmp_ps_mask(a.r[0], b.r[0], _CMP_GT_OQ) |
                                 _mm512_cmp_ps_mask(a.r[0], a.r[0], _CMP_UNORD_Q))};
}
template <>
inline Pack<float> select(Mask<float> mask, Pack<float> yes, Pack<float> no) {
  return {_mm512_mask_blend_ps(mask.bits, no.r[0], yes.r[0])};
}
template <>
inline uint16_t to_bits(Mask<float> mask) {
  return mask.bits;
}
template <>
inline Mask<float> from_bits<float>(uint16_t bits) {
  return {bits};
}
#elif defined(__AVX2__)
template <>
inline Mask<float> bytes_equal<float>(const uint8_t* p, uint8_t value) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i same = _mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)));
  Mask<float> out;
  out.r[0] = reinterpret_cast<Mask<float>::Register>(_mm256_cvtepi8_epi32(same));
  out.r[1] =
      reinterpret_cast<Mask<float>::Register>(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(same, same)));
  return out;
}
template <>
inline uint16_t to_bits(Mask<float> mask) {
  return static_cast<uint16_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask.r[0])) |
                               _mm256_movemask_ps(reinterpret_cast<__m256>(mask.r[1])) << 8);
}
#endif

// max(z, 0), and NaN for a NaN.
template <class acc>
inline Pack<acc> relu(Pack<acc> z) {
  return select(passes(z), z, broadcast(acc(0)));
}
#if defined(__AVX512F__)
// The instruction returns its second operand where one of the two is a NaN.
template <>
inline Pack<float> relu(Pack<float> z) {
  return {_mm512_max_ps(_mm512_setzero_ps(), z.r[0])};
}
#endif

// Loads: 16 values from anywhere, widened to the accumulation type.

inline Pack<float> load(const float* p) {
  Pack<float> out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
inline Pack<double> load(const double* p) {
  Pack<double> out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// IEEE binary16 by its fields: sign 1, exponent 5 (bias 15), mantissa 10.
inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1f;
  const uint32_t mantissa = value.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
  } else if (exponent == 31) {  // infinity or NaN
    bits = 0x7f800000u | mantissa << 13;
  } else {
    bits = (exponent + 127 - 15) << 23 | mantissa << 13;
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// Round to nearest, ties to even; a NaN becomes a quiet one.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  }
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Float16 to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t out;
  if (bits > 0x7f800000) {
    out = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
    out = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: subnormal, a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;  // whose unit in the last place is 2^-24: the addition rounds
    std::memcpy(&out, &magnitude, sizeof(out));
    out -= 0x3f000000;
  } else {
    out = (bits - ((127 - 15) << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(out | sign)};
}

// One value in the accumulation type.
inline float to_acc(float value) { return value; }
inline double to_acc(double value) { return value; }
inline float to_acc(BFloat16 value) { return to_float(value); }
inline float to_acc(Float16 value) { return to_float(value); }

inline Pack<float> load(const BFloat16* p) {
  Pack<float> out;
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out.r[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    out.r[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(p[i]);
  std::memcpy(&out, values, sizeof(out));
#endif
  return out;
}

inline Pack<float> load(const Float16* p) {
  Pack<float> out;
#if defined(__AVX512F__)
  out.r[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    out.r[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
  }
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(p[i]);
  std::memcpy(&out, values, sizeof(out));
#endif
  return out;
}

// Stores: 16 values, rounded to the tensor's type.

inline void store(float* p, Pack<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Pack<double> v) { std::memcpy(p, &v, sizeof(v)); }

#if defined(__AVX512F__)
inline __m256i to_half_bits(BFloat16, Pack<float> v) {
  const __m512i bits = _mm512_castps_si512(v.r[0]);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v.r[0], v.r[0], _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
inline __m256i to_half_bits(Float16, Pack<float> v) {
  return _mm512_cvtps_ph(v.r[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
inline __m256i to_half_bits(BFloat16, Pack<float> v) {
  __m256i half[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(v.r[i]);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.r[i], v.r[i], _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    half[i] = _mm256_blendv_epi8(rounded, quiet, nan);
  }
  // packus works within 128-bit lanes: put the four quarters back in order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0b11011000);
}
inline __m256i to_half_bits(Float16, Pack<float> v) {
  const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(v.r[1], nearest), _mm256_cvtps_ph(v.r[0], nearest));
}
#else
inline BFloat16 to_half(BFloat16, float value) { return to_bfloat16(value); }
inline Float16 to_half(Float16, float value) { return to_float16(value); }
#endif

template <class Half>
inline void store_half(Half* p, Pack<float> v) {
#if defined(__AVX2__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half_bits(Half{}, v));
#else
  float values[kLanes];
  std::memcpy(values, &v, sizeof(v));
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(Half{}, values[i]);
#endif
}
inline void store(BFloat16* p, Pack<float> v) { store_half(p, v); }
inline void store(Float16* p, Pack<float> v) { store_half(p, v); }

// A line of a tensor: 64 bytes of 16-bit or float values, 128 of double. What a loop over a tensor
// takes at a time; 16-bit values are unpacked and packed more quickly by two packs.
template <class T>
constexpr int kPacks = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kLine = kLanes * kPacks<T>;
template <class T>
struct Line {
  Pack<acc_t<T>> pack[kPacks<T>];
};

template <class T>
inline Line<T> load_line(const T* p) {
  Line<T> out;
  for (int i = 0; i < kPacks<T>; ++i) out.pack[i] = load(p + i * kLanes);
  return out;
}
template <class T>
inline void store_line(T* p, Line<T> v) {
  for (int i = 0; i < kPacks<T>; ++i) store(p + i * kLanes, v.pack[i]);
}
#if defined(__AVX512F__)
// 16 of the 32 words of a line as the upper halves of lanes, above zeros.
inline Pack<float> widen_words(__m512i words, bool upper) {
#if defined(__AVX512VBMI__)
  alignas(64) static constexpr int8_t kByte[2][64] = {
      {0,  0,  0,  1,  0,  0,  2,  3,  0,  0,  4,  5,  0,  0,  6,  7,  0,  0,  8,  9, 0,  0,
       10, 11, 0,  0,  12, 13, 0,  0,  14, 15, 0,  0,  16, 17, 0,  0,  18, 19, 0,  0, 20, 21,
       0,  0,  22, 23, 0,  0,  24, 25, 0,  0,  26, 27, 0,  0,  28, 29, 0,  0,  30, 31},
      {0,  0,  32, 33, 0,  0,  34, 35, 0,  0,  36, 37, 0,  0,  38, 39, 0,  0,  40, 41, 0,  0,
       42, 43, 0,  0,  44, 45, 0,  0,  46, 47, 0,  0,  48, 49, 0,  0,  50, 51, 0,  0,  52, 53,
       0,  0,  54, 55, 0,  0,  56, 57, 0,  0,  58, 59, 0,  0,  60, 61, 0,  0,  62, 63}};
  const __m512i index = _mm512_load_si512(kByte[upper]);
  const __m512i bits = _mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, index, words);
#else
  const __m256i half = upper ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words);
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#endif
  return {_mm512_castsi512_ps(bits)};
}
#if defined(__AVX512VBMI__)
template <>
inline Line<BFloat16> load_line(const BFloat16* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {widen_words(words, false), widen_words(words, true)};
}
#endif
inline __m512i to_half_line(Line<BFloat16> v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v.pack[1].r[0], v.pack[0].r[0]));
#else
  const __m512i low = _mm512_castsi256_si512(to_half_bits(BFloat16{}, v.pack[0]));
  return _mm512_inserti64x4(low, to_half_bits(BFloat16{}, v.pack[1]), 1);
#endif
}
inline __m512i to_half_line(Line<Float16> v) {
  const __m512i low = _mm512_castsi256_si512(to_half_bits(Float16{}, v.pack[0]));
  return _mm512_inserti64x4(low, to_half_bits(Float16{}, v.pack[1]), 1);
}
template <>
inline void store_line(BFloat16* p, Line<BFloat16> v) {
  _mm512_storeu_si512(p, to_half_line(v));
}
#endif

// Past the caches, for outputs that no cache would hold: a plain store reads the line first.
// `p` is a multiple of 64 bytes; stream_fence() ends a run of them. (Half a line at a time, the
// processor may write each half to memory on its own.)
#if defined(__AVX2__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif
template <class T>
inline void stream_line(T* p, Line<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_half_line(v));
  } else {
    for (int i = 0; i < Pack<acc_t<T>>::kRegisters; ++i) {
      const __m512i bits = reinterpret_cast<__m512i>(v.pack[0].r[i]);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p) + i, bits);
    }
  }
#elif defined(__AVX2__)
  __m256i* const half_line = reinterpret_cast<__m256i*>(p);
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 2; ++i) {
      _mm256_stream_si256(half_line + i, to_half_bits(T{}, v.pack[i]));
    }
  } else {
    for (int i = 0; i < Pack<acc_t<T>>::kRegisters; ++i) {
      _mm256_stream_si256(half_line + i, reinterpret_cast<__m256i>(v.pack[0].r[i]));
    }
  }
#else
  store_line(p, v);
#endif
}
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` of 16 values: the end of a row.
template <class T>
inline Pack<acc_t<T>> load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T values[kLanes] = {};
  std::memcpy(values, p, count * sizeof(T));
  return load(values);
}
template <class T>
inline void store(T* p, Pack<acc_t<T>> v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T values[kLanes];
  store(values, v);
  std::memcpy(p, values, count * sizeof(T));
}

// The first `count` values of a line; zeros are loaded after them.
template <class T>
inline Line<T> load_line(const T* p, int64_t count) {
  if (count >= kLine<T>) return load_line(p);
  T values[kLine<T>] = {};
  std::memcpy(values, p, count * sizeof(T));
  return load_line<T>(values);
}
template <class T>
inline void store_line(T* p, Line<T> v, int64_t count) {
  if (count >= kLine<T>) return store_line(p, v);
  T values[kLine<T>];
  store_line<T>(values, v);
  std::memcpy(p, values, count * sizeof(T));
}

// The first `count` of 16 values, zeros after them.
template <class acc>
inline Pack<acc> keep(Pack<acc> v, int64_t count) {
  acc values[kLanes];
  std::memcpy(values, &v, sizeof(v));
  for (int64_t i = count; i < kLanes; ++i) values[i] = 0;
  std::memcpy(&v, values, sizeof(v));
  return v;
}

inline uint16_t load_mask_bits(const uint8_t* p, int64_t count) {
  uint16_t bits = 0;
  std::memcpy(&bits, p, count > 8 ? 2 : 1);
  return bits;
}
inline void store_mask_bits(uint8_t* p, uint16_t bits, int64_t count) {
  if (count < kLanes) bits &= (1u << count) - 1;
  std::memcpy(p, &bits, count > 8 ? 2 : 1);
}

// Calls f(c, count) for the lines of [begin, end), of which the last may have fewer elements.
template <class T, class F>
inline __attribute__((always_inline)) void for_lines(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + kLine<T> <= end; c += kLine<T>) f(c, kLine<T>);
  if (c < end) f(c, end - c);
}

// Calls f(index of the pack, its column, elements of it) for the packs of a line at c.
template <class T, class F>
inline __attribute__((always_inline)) void for_packs(int64_t c, int64_t count, F f) {
#pragma GCC unroll 2
  for (int i = 0; i < kPacks<T>; ++i) {
    if (i == 0 || count > i * kLanes) f(i, c + i * kLanes, count - i * kLanes);
  }
}

// Memory asked for ahead of a pass: how far into the second-level cache, how far into the first,
// and how far for cache lines that the pass will write.
constexpr int64_t kPrefetchBytes = 16384;
constexpr int64_t kNearBytes = 1024;
constexpr int64_t kOwnBytes = 4096;

// Asks for `bytes` of memory around `p` to come to the second-level cache. The reductions walk
// several rows at once, which the hardware's own prefetcher loses at 256 channels and more.
template <class T>
inline void prefetch(const T* p, int64_t bytes) {
  const char* line = reinterpret_cast<const char*>(p);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
}

// The same for the cache line at one line of an elementwise pass that reads kTensors tensors. One
// is best asked for early and into the second-level cache; two or more late and into the first.
template <int kTensors, class T>
inline void prefetch_line(const T* p) {
  const char* line = reinterpret_cast<const char*>(p);
  if constexpr (kTensors == 1) {
    __builtin_prefetch(line + kPrefetchBytes, 0, 2);
  } else {
    __builtin_prefetch(line + kNearBytes, 0, 3);
  }
}
// For a line that is to be written: a store to a line that is not there waits for it. (Past the end
// of a tensor this asks for memory of somebody else, which does no harm.)
template <class T>
inline void prefetch_written(T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kOwnBytes, 1, 3);
}

// 16 x 16 values, rows to columns.
inline void transpose(Pack<float> (&rows)[kLanes]) {
#if defined(__AVX512F__)
  // Pairs, then fours of neighbours within 128 bits; then the 128-bit quarters among each other.
  __m512 two[kLanes], four[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    two[i] = _mm512_unpacklo_ps(rows[i].r[0], rows[i + 1].r[0]);
    two[i + 1] = _mm512_unpackhi_ps(rows[i].r[0], rows[i + 1].r[0]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(two[i + j]), b = _mm512_castps_pd(two[i + j + 2]);
      four[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      four[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low01 = _mm512_shuffle_f32x4(four[i], four[i + 4], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(four[i], four[i + 4], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(four[i + 8], four[i + 12], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(four[i + 8], four[i + 12], 0xdd);
    rows[i].r[0] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[i + 4].r[0] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[i + 8].r[0] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    rows[i + 12].r[0] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#else
  float values[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    float row[kLanes];
    std::memcpy(row, &rows[i], sizeof(row));
    for (int j = 0; j < kLanes; ++j) values[j][i] = row[j];
  }
  std::memcpy(rows, values, sizeof(values));
#endif
}

// Fixed-order sum of the 16 values, in double.
template <class acc>
inline double horizontal_sum(Pack<acc> v) {
  acc values[kLanes];
  std::memcpy(values, &v, sizeof(v));
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, and a degree-7 Taylor polynomial of e^r, whose
// truncation is below 6e-9; 0 below -87 and infinite above 88. NaN stays NaN.
inline Pack<float> exp(Pack<float> x) {
  const Mask<float> overflow = greater(x, 88.0f);
  const Mask<float> underflow = greater(broadcast(0.0f) - x, 87.0f);
  const Pack<float> magic = broadcast(0x1.8p23f);  // adding it rounds to an integer
  const Pack<float> shifted = fma(x, broadcast(1.44269504f), magic);
  const Pack<float> n = shifted - magic;
  Pack<float> r = fma(n, broadcast(-0.693145752f), x);  // ln 2 in two parts, the first short
  r = fma(n, broadcast(-1.42860677e-6f), r);
  Pack<float> p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  // 2^n: n stands in the low bits of `shifted`.
  typedef int32_t IntRegister __attribute__((vector_size(kRegisterBytes)));
  Pack<float> power;
  for (int i = 0; i < Pack<float>::kRegisters; ++i) {
    IntRegister bits;
    std::memcpy(&bits, &shifted.r[i], sizeof(bits));
    bits = (bits + 127) << 23;
    std::memcpy(&power.r[i], &bits, sizeof(bits));
  }
  const Pack<float> finite = select(underflow, broadcast(0.0f), p * power);
  return select(overflow, broadcast(INFINITY), finite);
}

// Phi(z), the normal distribution function: Abramowitz and Stegun 7.1.26 for erfc(|z| / sqrt 2),
// absolute error below 1e-7, which is a unit in the last place of gelu(z) / z.
inline Pack<float> normal_cdf(Pack<float> z, Pack<float> exp_half_square) {
  const Pack<float> zero = broadcast(0.0f);
  const Mask<float> positive = greater(z, 0.0f);
  const Pack<float> magnitude = select(positive, z, zero - z);
  const Pack<float> t =
      broadcast(1.0f) / fma(magnitude, broadcast(0.3275911f * 0.707106781f), broadcast(1.0f));
  Pack<float> p = broadcast(1.061405429f);
  p = fma(p, t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const Pack<float> tail = broadcast(0.5f) * p * t * exp_half_square;
  return select(positive, broadcast(1.0f) - tail, tail);
}

inline Pack<float> sigmoid(Pack<float> z) {
  return broadcast(1.0f) / (broadcast(1.0f) + exp(broadcast(0.0f) - z));
}

// float64 is there for derivative checks: the C library, lane by lane.
template <class F>
inline Pack<double> map_lanes(Pack<double> v, F f) {
  double values[kLanes];
  std::memcpy(values, &v, sizeof(v));
  for (double& value : values) value = f(value);
  std::memcpy(&v, values, sizeof(v));
  return v;
}

// act(z) and d act / dz, over a Pack. NaN stays NaN.
inline Pack<float> silu(Pack<float> z) { return z * sigmoid(z); }
inline Pack<double> silu(Pack<double> z) {
  return map_lanes(z, [](double v) { return v / (1 + std::exp(-v)); });
}
inline Pack<float> silu_derivative(Pack<float> z) {
  const Pack<float> s = sigmoid(z);
  return s * fma(z, broadcast(1.0f) - s, broadcast(1.0f));
}
inline Pack<double> silu_derivative(Pack<double> z) {
  return map_lanes(z, [](double v) {
    const double s = 1 / (1 + std::exp(-v));
    return s * (1 + v * (1 - s));
  });
}
inline Pack<float> gelu(Pack<float> z) { return z * normal_cdf(z, exp(z * z * broadcast(-0.5f))); }
inline Pack<double> gelu(Pack<double> z) {
  return map_lanes(z, [](double v) { return 0.5 * v * (1 + std::erf(v * M_SQRT1_2)); });
}
inline Pack<float> gelu_derivative(Pack<float> z) {
  const Pack<float> e = exp(z * z * broadcast(-0.5f));
  return fma(z * broadcast(0.398942280f), e, normal_cdf(z, e));
}
inline Pack<double> gelu_derivative(Pack<double> z) {
  return map_lanes(z, [](double v) {
    const double pdf = std::exp(-0.5 * v * v) * 0.3989422804014326779;
    return 0.5 * (1 + std::erf(v * M_SQRT1_2)) + v * pdf;
  });
}

#undef RESOPS_EACH_REGISTER

}  // namespace resops::RESOPS_ISA
