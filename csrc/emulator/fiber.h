// A stack of its own for each CUDA thread, and switching between it and the scheduler.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace m2mkd::emulator {

class Fiber {
 public:
  // `number` staggers stacks, which would otherwise share the same few cache sets.
  explicit Fiber(int number);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry(), which must begin with entered(), end with suspend() and
  // never return. Whatever ran here before is abandoned.
  void start(void (*entry)());
  void entered();
  // From the scheduler: runs the fiber until it suspends.
  void resume();
  // From inside the fiber: goes back to the scheduler.
  void suspend();

  bool on_stack(uintptr_t address) const { return address - stack_ < kStackBytes; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStackBytes = 256 << 10;
#else
  static constexpr size_t kStackBytes = 64 << 10;
#endif

  uintptr_t stack_ = 0;
  size_t stagger_ = 0;
#if defined(__x86_64__)
  void* own_ = nullptr;
  void* scheduler_ = nullptr;
#else
  ucontext_t own_;
  ucontext_t scheduler_;
#endif
  // What AddressSanitizer asks to be told about stacks.
  void* fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

}  // namespace m2mkd::emulator
