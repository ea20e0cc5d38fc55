// What the sanitizer lanes must report: a check of the lanes themselves. Compiled by sanitize.py.

#include <climits>
#include <cstdint>

// Sum of values[0, count): past the end of the memory for a count that is too large.
extern "C" float sum_of(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// Writes values[index].
extern "C" void write_at(float* values, int64_t index) { values[index] = 1; }

// Signed overflow for INT_MAX.
extern "C" int next_of(int value) { return value + 1; }
