// The emulated device: memory with its shadow, the threads of the block that runs, faults.

#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "report.h"
#include "runtime.h"

namespace m2mkd::emulator {

constexpr int kWarp = 32;
constexpr uint64_t kMaxSteps = 4'000'000;

enum class Wait { none, turn, barrier, warp, ended };

// An operation that lanes of a warp do together: what a lane brings, and takes away in `bits`.
struct WarpCall {
  enum Kind { sync, shuffle, vote } kind;
  const char* name;
  unsigned mask;
  uint64_t bits = 0;
  int source = 0;  // lane whose bits it wants
};

struct Thread {
  explicit Thread(int number) : fiber(number), number(number) {}

  Fiber fiber;
  const int number;  // within the block
  Self self;
  Wait wait = Wait::none;
  Site site;           // of the barrier or warp operation it waits in
  uint32_t calls = 0;  // chain of calls it is in
  uint64_t steps = 0;

  WarpCall call;

  // Logical time: barriers passed, and how far it has seen each lane of its warp come.
  uint32_t barriers = 0;
  std::array<uint32_t, kWarp> clock;
  uint32_t segment = 0;

  int lane() const { return number % kWarp; }
  int warp() const { return number / kWarp; }
};

// A stretch of one thread's run between two synchronisations.
struct Segment {
  uint32_t block;
  int thread;
  uint32_t barriers;
  uint32_t clock;
};

class Machine {
 public:
  Machine();

  void run(const Launch& launch);
  std::string finish();

  // ---- called on the running thread's stack ----
  void syncthreads(Site site);
  uint64_t warp_call(const WarpCall& call, Site site);
  // Lets others run before an operation whose order matters.
  void give_way();
  // Whether what happened in `segment` is over for the running thread.
  bool is_past(uint32_t segment) const;
  // Counts accesses and waits, so that endless loops end.
  void step(Site site) {
    if (++current->steps > kMaxSteps) {
      fail("endless loop: a thread made " + std::to_string(kMaxSteps) + " accesses and waits",
           {{name(*current), site}});
    }
  }

  // Keeps the first fault and ends the launch; on a thread's stack it does not return.
  void fail(std::string what, std::vector<std::pair<std::string, Site>> parts);

  Site site(const void* return_address) const;
  // Such as "thread (33,0,0)".
  std::string name(const Thread& thread) const;
  std::string name(const Segment& segment) const;
  const Segment& segment(uint32_t number) const { return segments_[number]; }
  // Whether kernels may look at `address`, which is not device memory: stacks, parameters,
  // constants.
  bool is_private(uintptr_t address, bool is_write) const;

  Thread* current = nullptr;
  const Launch* launching = nullptr;
  std::optional<Fault> fault;
  CallTree calls;
  Memory memory;
  uint64_t seed;
  uint64_t most_blocks = UINT64_MAX;  // of a launch that run, its last ones
  bool instrumented = false;
  // Whether the emulator's own code runs. Templates of the standard library that both it and
  // kernels use exist once in a program, perhaps as compiled for kernels, with hooks.
  bool busy = false;
  std::map<const void*, size_t> allowed_shared;

 private:
  bool is_launchable(const Launch& launch);
  void run_block(uint32_t block);
  void begin_block(uint32_t block);
  void after_turn(Thread& thread);
  void complete_barrier();
  void complete_warp(Thread& arrived);
  bool is_one_call(const Thread& arrived);
  void answer_warp(int warp, unsigned mask);
  void suspend(Wait wait, Site site);
  void explain_deadlock();
  void explain_missing_lane(const Thread& waiting);
  void new_segment(Thread& thread);
  void make_runnable(Thread& thread);
  uint64_t random(uint64_t below);
  std::string report() const;

  std::vector<std::unique_ptr<Thread>> threads_;
  int count_ = 0;  // threads in the block; 0 while there is none
  int at_barrier_ = 0;
  int ended_ = 0;
  std::vector<int> runnable_;
  std::array<unsigned, 1024 / kWarp> in_warp_call_ = {};  // lanes of each warp
  std::vector<Segment> segments_;
  uint32_t block_ = 0;
  uint64_t random_state_ = 0;
  uint64_t launches_ = 0;
};

// Of this host thread. Every access of a kernel asks for it, so it is cheap after the first time.
Machine& make_machine();
inline thread_local Machine* own_machine __attribute__((tls_model("initial-exec"))) = nullptr;
inline Machine& machine() { return own_machine != nullptr ? *own_machine : make_machine(); }

// Marks a call from kernels or hosts into the emulator.
class Call {
 public:
  Call() { machine().busy = true; }
  ~Call() { machine().busy = false; }
};

}  // namespace m2mkd::emulator
