// The emulator's interface, and the functions that instrumented kernels call at every access.
//
// g++ -fsanitize=thread puts a call before each load and store and around each function. Those
// calls are ThreadSanitizer's; its library is not linked, and they are defined here instead. The
// same goes for -fsanitize=alignment.

#include "runtime.h"

#include <cstring>

#include "machine.h"

#define HIDDEN extern "C" __attribute__((visibility("hidden")))
#define HERE machine().site(__builtin_return_address(0))

namespace m2mkd::emulator {

const Self& self() { return machine().current->self; }

void* device_buffer(const void* host, size_t bytes, Access access) {
  const Call call;
  return machine().memory.device_buffer(host, bytes, access);
}

std::string finish() {
  const Call call;
  return machine().finish();
}

void run_last_blocks(uint64_t count) { machine().most_blocks = count; }

void space_buffers(uint64_t bytes) { machine().memory.space_buffers(bytes); }

uint64_t seed() { return machine().seed; }

void set_seed(uint64_t value) { machine().seed = value; }

// For tests in Python.
extern "C" __attribute__((visibility("default"))) void m2mkd_emulator_set_seed(uint64_t value) {
  set_seed(value);
}

bool has_hooks() { return machine().instrumented; }

void run(const Launch& launch) {
  const Call call;
  machine().run(launch);
}

int last_error() {
  constexpr int kLaunchFailure = 719;
  return machine().fault ? kLaunchFailure : 0;
}

int copy_to_host(void* to, const void* from, size_t bytes) {
  const Call call;
  Machine& m = machine();
  if (m.fault) {
    return last_error();
  }
  m.memory.check_host_read(reinterpret_cast<uintptr_t>(from), bytes, HERE);
  if (!m.fault) {
    std::memcpy(to, from, bytes);
  }
  return last_error();
}

int allow_shared(const void* kernel, size_t bytes) {
  const Call call;
  constexpr int kInvalidValue = 1;
  if (bytes > kMaxShared) {
    return kInvalidValue;
  }
  machine().allowed_shared[kernel] = bytes;
  return 0;
}

void syncthreads() {
  const Call call;
  machine().syncthreads(HERE);
}

void syncwarp(unsigned mask) {
  const Call call;
  machine().warp_call({WarpCall::sync, "__syncwarp", mask}, HERE);
}

uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source) {
  const Call call;
  return machine().warp_call({WarpCall::shuffle, name, mask, bits, source}, HERE);
}

unsigned ballot(const char* name, unsigned mask, bool predicate) {
  const Call call;
  return static_cast<unsigned>(
      machine().warp_call({WarpCall::vote, name, mask, uint64_t(predicate)}, HERE));
}

void* shared_array(const void* declaration, const char* name, size_t bytes, size_t alignment) {
  const Call call;
  return machine().memory.shared_array(declaration, name, bytes, alignment);
}

void* dynamic_shared() {
  const Call call;
  return machine().memory.dynamic_shared();
}

AtomicAccess::AtomicAccess(void* address, size_t bytes, bool is_float) {
  Machine& m = machine();
  m.busy = true;
  const Site here = HERE;
  if (is_float) {
    m.fail("float atomic: the order of a floating-point sum changes from run to run",
           {{m.name(*m.current), here}});
  }
  m.give_way();
  m.memory.access(reinterpret_cast<uintptr_t>(address), bytes, Kind::atomic, true, here);
}

AtomicAccess::~AtomicAccess() { machine().busy = false; }

namespace {

void check(const void* pointer, size_t size, Kind kind, bool aligned, const void* return_address) {
  Machine& m = machine();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (m.busy) {
    return;
  }
  if (m.current == nullptr ? !m.memory.is_device(address)
                           : m.is_private(address, kind != Kind::read)) {
    return;
  }
  const Call call;
  const Site site = m.site(return_address);
  if (m.current != nullptr) {
    m.step(site);
  }
  m.memory.access(address, size, kind, aligned, site);
}

}  // namespace

}  // namespace m2mkd::emulator

using m2mkd::emulator::check;
using m2mkd::emulator::Kind;
using m2mkd::emulator::machine;

#define M2MKD_HOOKS(size)                                            \
  HIDDEN void __tsan_read##size(void* p) {                           \
    check(p, size, Kind::read, true, __builtin_return_address(0));   \
  }                                                                  \
  HIDDEN void __tsan_write##size(void* p) {                          \
    check(p, size, Kind::write, true, __builtin_return_address(0));  \
  }                                                                  \
  HIDDEN void __tsan_unaligned_read##size(void* p) {                 \
    check(p, size, Kind::read, false, __builtin_return_address(0));  \
  }                                                                  \
  HIDDEN void __tsan_unaligned_write##size(void* p) {                \
    check(p, size, Kind::write, false, __builtin_return_address(0)); \
  }

M2MKD_HOOKS(1)
M2MKD_HOOKS(2)
M2MKD_HOOKS(4)
M2MKD_HOOKS(8)
M2MKD_HOOKS(16)

HIDDEN void __tsan_read_range(void* p, size_t size) {
  check(p, size, Kind::read, false, __builtin_return_address(0));
}

HIDDEN void __tsan_write_range(void* p, size_t size) {
  check(p, size, Kind::write, false, __builtin_return_address(0));
}

// g++ -fsanitize=alignment calls this where an address is no multiple of what its type asks for,
// also where the access that follows is split into narrower ones.
HIDDEN void __ubsan_handle_type_mismatch_v1(void* /*where*/, void* pointer) {
  auto& m = machine();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (m.current != nullptr && !m.busy && m.memory.is_device(address)) {
    const m2mkd::emulator::Call call;
    m.memory.fail_misaligned(address, HERE);
  }
}

HIDDEN void __tsan_init() { machine().instrumented = true; }

// Objects with virtual functions, which only host code has.
HIDDEN void __tsan_vptr_update(void**, void*) {}
HIDDEN void __tsan_vptr_read(void**) {}

HIDDEN void __tsan_func_entry(void* caller) {
  auto& m = machine();
  if (m.current != nullptr && !m.busy) {
    m.current->calls = m.calls.enter(m.current->calls, m2mkd::emulator::offset_of(caller));
  }
}

HIDDEN void __tsan_func_exit() {
  auto& m = machine();
  if (m.current != nullptr && !m.busy) {
    m.current->calls = m.calls.leave(m.current->calls);
  }
}
