// Memory that a kernel needs for the time of a call.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace resops {

// Uninitialised floats on a stack that the thread keeps for its next call: the last one made is the
// first one gone. A thread's stack has kScratchBytes; what does not fit is allocated.
//
// It lies in large pages where the system has them. Winograd's transforms write each vector to 36
// places far apart; in pages of 4 KB that is more pages than a processor keeps the addresses of.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

 private:
  size_t before_;  // bytes of the stack in use
  std::unique_ptr<float[]> own_;
  float* data_;
};

constexpr size_t kScratchBytes = size_t{64} << 20;

// Bytes that a thread has had in use at a time at most, since the last call: of the thread that had
// most.
int64_t scratch_peak();

}  // namespace resops
