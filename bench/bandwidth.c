// Memory bandwidth of this machine: what a fused kernel can reach at best.
//
// Three passes over n bytes (a multiple of 512, pointers aligned to 64). Stores bypass the caches,
// since a normal store first reads the line that it overwrites. `ahead` bytes in front of the
// reads are prefetched into L2; 0 leaves that to the hardware. bench/roofline.py compiles this
// file and takes the best of several distances.
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
typedef __m512i vector;
#define LOAD(p) _mm512_load_si512((const void*)(p))
#define STREAM(p, v) _mm512_stream_si512((void*)(p), v)
#define ADD(a, b) _mm512_add_epi32(a, b)
#elif defined(__AVX2__)
typedef __m256i vector;
#define LOAD(p) _mm256_load_si256((const __m256i*)(p))
#define STREAM(p, v) _mm256_stream_si256((__m256i*)(p), v)
#define ADD(a, b) _mm256_add_epi32(a, b)
#elif defined(__x86_64__)
typedef __m128i vector;
#define LOAD(p) _mm_load_si128((const __m128i*)(p))
#define STREAM(p, v) _mm_stream_si128((__m128i*)(p), v)
#define ADD(a, b) _mm_add_epi32(a, b)
#else
typedef uint64_t vector;
#define LOAD(p) (*(const vector*)(p))
#define STREAM(p, v) (*(vector*)(p) = (v))
#define ADD(a, b) ((a) + (b))
#endif

enum { kLine = 64, kBlock = 512, kVector = sizeof(vector), kVectors = kBlock / kVector };

static void fence(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

static void prefetch(const char* p, size_t i, size_t n, size_t ahead) {
  if (ahead == 0 || i + ahead + kBlock > n) return;
  for (int line = 0; line < kBlock; line += kLine) __builtin_prefetch(p + i + ahead + line, 0, 2);
}

// Reads n bytes; the result only keeps the compiler from dropping the loads.
uint64_t pass_read(const char* x, size_t n, size_t ahead) {
  vector sum[4] = {LOAD(x), LOAD(x), LOAD(x), LOAD(x)};
  for (size_t i = 0; i < n; i += kBlock) {
    prefetch(x, i, n, ahead);
    for (int v = 0; v < kVectors; v += 4)
      for (int k = 0; k < 4; k++) sum[k] = ADD(sum[k], LOAD(x + i + (v + k) * kVector));
  }
  vector total = ADD(ADD(sum[0], sum[1]), ADD(sum[2], sum[3]));
  uint64_t result;
  __builtin_memcpy(&result, &total, sizeof(result));
  return result;
}

// Reads n bytes and writes n.
void pass_copy(char* y, const char* x, size_t n, size_t ahead) {
  for (size_t i = 0; i < n; i += kBlock) {
    prefetch(x, i, n, ahead);
    for (int v = 0; v < kVectors; v++) STREAM(y + i + v * kVector, LOAD(x + i + v * kVector));
  }
  fence();
}

// Reads 2 n bytes and writes n.
void pass_triad(char* y, const char* x, const char* z, size_t n, size_t ahead) {
  for (size_t i = 0; i < n; i += kBlock) {
    prefetch(x, i, n, ahead);
    prefetch(z, i, n, ahead);
    for (int v = 0; v < kVectors; v++)
      STREAM(y + i + v * kVector, ADD(LOAD(x + i + v * kVector), LOAD(z + i + v * kVector)));
  }
  fence();
}
