// A CUDA thread as a fiber: a stack of its own and a switch between stacks, announced to whichever
// sanitizer watches (-DSIMT_ASAN, -DSIMT_TSAN).
//
// ThreadSanitizer sees every fiber as a thread, and a switch orders nothing. Happens-before comes
// only from `acquire` and `release`, which simt.cpp calls where CUDA promises an order. This file
// and simt.cpp are themselves compiled without its flag: what they do is none of its business.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <string>
#include <vector>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT  // eight times slower: two system calls a switch
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxFibers = 8192;  // at the same time

// ---- ThreadSanitizer ---------------------------------------------------------------------------

#ifdef SIMT_TSAN
constexpr bool kTsan = true;
inline void acquire(void* tag) { __tsan_acquire(tag); }
inline void release(void* tag) { __tsan_release(tag); }
// Memory that is allocated or freed in its scope counts as new, not as accessed by anyone.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// What TSan believes to be threads. One costs half a millisecond, so a launch makes no more than
// kPool (or what is alive at once) and then takes the one that has been idle longest: a race
// between blocks that many threads apart is not seen.
class TsanFibers {
 public:
  void start_launch() {
    main_ = __tsan_get_current_fiber();
    next_ = 0;
  }
  void* take(size_t alive) {
    if (next_ == fibers_.size()) {
      if (fibers_.size() < std::max(kPool, alive))
        fibers_.push_back(__tsan_create_fiber(0));
      else
        next_ = 0;
    }
    return fibers_[next_++];
  }
  // After an error the fibers are in the middle of a kernel: release for them, and forget them.
  void abandon(void* tag) {
    for (void* fiber : fibers_) {
      __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
      __tsan_release(tag);
      __tsan_switch_to_fiber(main_, __tsan_switch_to_fiber_no_sync);
      __tsan_destroy_fiber(fiber);
    }
    fibers_.clear();
  }
  void* main() const { return main_; }

 private:
  static constexpr size_t kPool = 512;
  std::vector<void*> fibers_;
  size_t next_ = 0;
  void* main_ = nullptr;
};
#else
constexpr bool kTsan = false;
inline void acquire(void*) {}
inline void release(void*) {}
struct Quiet {
  Quiet() {}
};
#endif

// ---- stacks ------------------------------------------------------------------------------------

// Reserved at once, used page by page, below each an unreadable page.
class Stacks {
 public:
  void prepare(size_t count) {
    constexpr int kProtection = PROT_READ | PROT_WRITE;
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (memory_ == nullptr) {
      void* memory = mmap(nullptr, kMaxFibers * kStackBytes, kProtection, kFlags, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
    }
    if constexpr (kTsan) {  // mapped anew, it is nobody's memory
      mmap(memory_, count * kStackBytes, kProtection, kFlags | MAP_FIXED, -1, 0);
    } else {
      for (; guarded_ < count; ++guarded_)
        mprotect(memory_ + guarded_ * kStackBytes, kPageBytes, PROT_NONE);
    }
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(memory_, count * kStackBytes);
#endif
  }
  char* operator[](size_t i) const { return memory_ + i * kStackBytes; }

 private:
  static constexpr size_t kPageBytes = 4096;
  char* memory_ = nullptr;
  size_t guarded_ = 0;
};

// ---- the switch --------------------------------------------------------------------------------

struct Fiber {
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif

  void start(char* its_stack, void (*entry)());
};

#ifdef SIMT_UCONTEXT
inline void Fiber::start(char* its_stack, void (*entry)()) {
  stack = its_stack;
  stack_bytes = kStackBytes;
  getcontext(&context);
  context.uc_stack.ss_sp = its_stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#else
// Saves the callee-saved registers on the old stack, and takes them from the new one.
asm(R"(
.text
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, . - simt_switch_stack
)");
extern "C" void simt_switch_stack(void** from, void* to);

inline void Fiber::start(char* its_stack, void (*entry)()) {
  stack = its_stack;
  stack_bytes = kStackBytes;
  void** top = reinterpret_cast<void**>(its_stack + kStackBytes);
  *--top = nullptr;  // entry has no caller
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that the switch takes
  stack_pointer = top;
}
#endif

// `last`: nobody will switch back.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// The first thing that a fiber does.
inline void fiber_begins([[maybe_unused]] Fiber& came_from) {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &came_from.stack, &came_from.stack_bytes);
#endif
}

}  // namespace simt
