#include "scratch.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <atomic>

namespace resops {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kLargePage = size_t{2} << 20;

std::atomic<size_t> peak{0};

// Address space; memory comes with the first use of a page, and goes with the thread.
class Stack {
 public:
  Stack() {
    space_ = mmap(nullptr, kSize, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(space_ != MAP_FAILED, "no address space for ", kScratchBytes, " bytes");
    const auto address = reinterpret_cast<uintptr_t>(space_);
    begin_ = reinterpret_cast<char*>((address + kLargePage - 1) / kLargePage * kLargePage);
#ifdef MADV_HUGEPAGE
    madvise(begin_, kScratchBytes, MADV_HUGEPAGE);  // refused by some kernels: then small pages
#endif
  }
  ~Stack() { munmap(space_, kSize); }

  char* begin() const { return begin_; }
  size_t used = 0;

 private:
  static constexpr size_t kSize = kScratchBytes + kLargePage;
  void* space_;
  char* begin_;
};

Stack& stack() {
  thread_local Stack of_thread;
  return of_thread;
}

}  // namespace

Scratch::Scratch(int64_t floats) : before_(stack().used) {
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  const size_t after = before_ + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (after <= kScratchBytes) {
    data_ = reinterpret_cast<float*>(stack().begin() + before_);
    stack().used = after;
  } else {
    own_.reset(new float[static_cast<size_t>(floats)]);
    data_ = own_.get();
  }
  size_t most = peak;
  while (after > most && !peak.compare_exchange_weak(most, after)) {
  }
}

Scratch::~Scratch() { stack().used = before_; }

int64_t scratch_peak() { return static_cast<int64_t>(peak.exchange(0)); }

}  // namespace resops
