#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace m2mkd::emulator {

namespace {

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

#if defined(__x86_64__)

// Saves what a call must preserve on the present stack and its pointer in *save, then goes on where
// `next` was saved. ucontext would make two system calls for signal masks here.
asm(R"(
.text
.type m2mkd_emulator_switch, @function
m2mkd_emulator_switch:
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
.size m2mkd_emulator_switch, .-m2mkd_emulator_switch
)");
extern "C" void m2mkd_emulator_switch(void** save, void* next) asm("m2mkd_emulator_switch");

#endif

Fiber::Fiber(int number) : stagger_(static_cast<size_t>(number) * 192 % 3072) {
  // The lowest page stays closed, so that a stack too small is a fault and not a surprise.
  void* memory = mmap(nullptr, page() + kStackBytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  stack_ = reinterpret_cast<uintptr_t>(memory) + page();
  mprotect(reinterpret_cast<void*>(stack_), kStackBytes, PROT_READ | PROT_WRITE);
}

Fiber::~Fiber() { munmap(reinterpret_cast<void*>(stack_ - page()), page() + kStackBytes); }

void Fiber::start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(reinterpret_cast<void*>(stack_), kStackBytes);
  fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<void**>(stack_ + kStackBytes - stagger_ - 64);
  // Six registers, then the address to return to; the callee finds its stack 8 past a multiple of
  // 16, as after a call.
  top -= 8;
  for (int i = 0; i < 8; ++i) {
    top[i] = nullptr;
  }
  top[6] = reinterpret_cast<void*>(entry);
  own_ = top;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = reinterpret_cast<void*>(stack_);
  own_.uc_stack.ss_size = kStackBytes - stagger_;
  own_.uc_link = nullptr;
  makecontext(&own_, entry, 0);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, reinterpret_cast<void*>(stack_),
                                 kStackBytes);
#endif
#if defined(__x86_64__)
  m2mkd_emulator_switch(&scheduler_, own_);
#else
  swapcontext(&scheduler_, &own_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#endif
#if defined(__x86_64__)
  m2mkd_emulator_switch(&own_, scheduler_);
#else
  swapcontext(&own_, &scheduler_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

}  // namespace m2mkd::emulator
