// What the kernels for whole tensors share: several elements by one access, the bits of a mask, and
// the loop over a thread's share. Elements are computed with in float, whatever their type in
// memory.
//
// A thread handles kVec neighbouring elements: 16 bytes (8 of 16 bits, 4 of float), or 1 where the
// rows of a tensor do not start on 16 bytes; or 8 bytes (4 of 16 bits) beside 4 of float. A mask
// has one bit per element, lowest bit first, so that 8 / kVec neighbouring lanes share a byte.

#pragma once

#include <cstring>

#include "portable.cuh"

namespace resops::cuda {

constexpr int kThreads = 256;  // of a block

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
constexpr int kVectorSize = 16 / sizeof(T);

// kVec elements as they are in memory.
template <class T, int kVec>
struct RawType {
  static_assert(kVec == kVectorSize<T> || kVec * sizeof(T) == 8);
  using type = std::conditional_t<kVec == kVectorSize<T>, uint4, uint2>;
};
template <class T>
struct RawType<T, 1> {
  using type = T;
};
template <class T, int kVec>
using Raw = typename RawType<T, kVec>::type;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(unsigned pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(bits_as<__half2>(pair));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

template <class T>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return bits_as<unsigned>(__floats2half2_rn(low, high));
  } else {
    return bits_as<unsigned>(__floats2bfloat162_rn(low, high));
  }
}

template <class T, int kVec>
__device__ __forceinline__ void unpack(const Raw<T, kVec>& raw, float (&v)[kVec]) {
  if constexpr (kVec == 1) {
    v[0] = to_float(raw);
  } else if constexpr (sizeof(raw) == 8) {
    const float2 low = unpack_pair<T>(raw.x), high = unpack_pair<T>(raw.y);
    v[0] = low.x;
    v[1] = low.y;
    v[2] = high.x;
    v[3] = high.y;
  } else {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kVec == 4) {
        v[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = unpack_pair<T>(words[i]);
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
      }
    }
  }
}

template <class T, int kVec>
__device__ __forceinline__ Raw<T, kVec> pack(const float (&v)[kVec]) {
  if constexpr (kVec == 1) {
    return from_float<T>(v[0]);
  } else if constexpr (sizeof(Raw<T, kVec>) == 8) {
    return make_uint2(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]));
  } else if constexpr (kVec == 4) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
  } else {
    return make_uint4(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]),
                      pack_pair<T>(v[6], v[7]));
  }
}

// The elements of a vector that is cut short by the end of the tensor; the others are left alone.
template <class T, int kVec>
__device__ __forceinline__ void load_some(const T* p, int count, float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i < count) v[i] = to_float(load_nc<T>(p + i));
  }
}

template <class T, int kVec>
__device__ __forceinline__ void store_some(T* p, int count, const float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i < count) store<T>(p + i, from_float<T>(v[i]));
  }
}

// ---- masks -------------------------------------------------------------------------------------

// Writes the bits of kVec elements, whose byte is `byte`. All lanes of a warp take part; those with
// nothing to write bring no bits and `write` = false. Lanes that share a byte are aligned.
template <int kVec>
__device__ __forceinline__ void store_bits(uint8_t* byte, unsigned bits, bool write) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if constexpr (kVec == 4) {
    bits |= shuffle_xor(bits, 1) << 4;
    write = write && lane % 2 == 0;
  } else if constexpr (kVec == 1) {
    bits = warp_ballot(bits != 0) >> (lane & 24);
    write = write && lane % 8 == 0;
  }
  if (write) store<uint8_t>(byte, static_cast<uint8_t>(bits));
}

// Zeros in [begin, end), by all threads of the grid.
__device__ __forceinline__ void clear_bytes(uint8_t* mask, int64_t begin, int64_t end) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * kThreads;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  for (int64_t i = begin + block * kThreads + threadIdx.x; i < end; i += threads) {
    store<uint8_t>(mask + i, 0);
  }
}

// The bits of this thread's kVec elements, lowest first, out of their byte.
template <int kVec>
__device__ __forceinline__ unsigned own_bits(unsigned byte) {
  if constexpr (kVec == 8) return byte;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return kVec == 4 ? byte >> (4 * (lane % 2)) : byte >> (lane % 8);
}

// ---- the loop ----------------------------------------------------------------------------------

// Where kVec elements are. `whole`: they are this thread's, and so is every element that shares a
// byte of the mask with them.
struct Place {
  int64_t offset;
  int64_t byte;  // of the mask
  bool whole;
};

// Accesses of each tensor that a thread has on their way at a time. At 128 bytes a thread two
// blocks have 64 KB; memory of 4 to 5 TB/s with a latency near a microsecond takes 40 per
// multiprocessor.
template <int kVec, int kTensors>
constexpr int kUnroll = kTensors < 5 ? 8 / kTensors : 1;

// Calls f(place, count, v, bits, is_short) for every vector of this thread, where v[t] holds
// elements of tensor t (zeros if it is null) and `bits` those of the mask. All threads of a warp
// make the same calls. `count` is kVec or 0, and in the call with is_short, which ends a tensor
// that is no whole number of bytes of mask, anything from 0 to kVec.
//
// The cursor says which vectors: `steps` times next(). A place that is not whole is none at all or,
// where kShortEnd and has_short_end() allow it and 0 <= offset < `end`, the thread's short one.
template <class T, int kVec, int kTensors, bool kMask, int kSteps = kUnroll<kVec, kTensors>,
          class Cursor, class F>
__device__ __forceinline__ void for_vectors(Cursor& cursor, const T* const (&tensors)[kTensors],
                                            const uint8_t* mask, F f) {
  Place last{cursor.end, 0, false};
  for (int64_t step = 0; step < cursor.steps; step += kSteps) {
    Place place[kSteps];
    Raw<T, kVec> raw[kSteps][kTensors] = {};
    unsigned byte[kSteps] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      place[u] = cursor.next();
      if (place[u].whole) {
#pragma unroll
        for (int t = 0; t < kTensors; ++t) {
          if (tensors[t]) raw[u][t] = load_nc<Raw<T, kVec>>(tensors[t] + place[u].offset);
        }
        if constexpr (kMask) byte[u] = load_nc<uint8_t>(mask + place[u].byte);
      } else if (Cursor::kShortEnd && place[u].offset >= 0 && place[u].offset < cursor.end) {
        last = place[u];
      }
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float v[kTensors][kVec];
#pragma unroll
      for (int t = 0; t < kTensors; ++t) unpack<T, kVec>(raw[u][t], v[t]);
      f(place[u], place[u].whole ? kVec : 0, v, own_bits<kVec>(byte[u]), std::false_type{});
    }
  }
  if (Cursor::kShortEnd && cursor.has_short_end()) {
    const int64_t left = cursor.end - last.offset;
    const int count = left < kVec ? static_cast<int>(left) : kVec;
    float v[kTensors][kVec] = {};
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      if (tensors[t]) load_some<T>(tensors[t] + last.offset, count, v[t]);
    }
    unsigned byte = 0;
    if (kMask && count > 0) byte = load_nc<uint8_t>(mask + last.byte);
    f(last, count, v, own_bits<kVec>(byte), std::true_type{});
  }
}

// Writes what f of for_vectors has made of its elements.
template <class T, int kVec, bool kShort>
__device__ __forceinline__ void put(T* p, int count, const float (&v)[kVec],
                                    std::bool_constant<kShort>) {
  if constexpr (kShort) {
    store_some<T>(p, count, v);
  } else if (count == kVec) {
    store<Raw<T, kVec>>(p, pack<T, kVec>(v));
  }
}

}  // namespace resops::cuda
