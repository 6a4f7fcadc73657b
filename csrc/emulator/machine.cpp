#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

// Where this library or program ends in memory; the linker defines both.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

namespace m2mkd::emulator {

namespace {

constexpr int kMaxThreads = 1024;

uint64_t first_seed() {
  const char* chosen = std::getenv("M2MKD_EMULATOR_SEED");
  return chosen != nullptr ? std::strtoull(chosen, nullptr, 10) : std::random_device()();
}

std::string braced(const Index& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

uint64_t total(const Size& size) { return uint64_t(size.x) * size.y * size.z; }

Index index_in(const Size& size, uint32_t number) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

std::string waits(const Thread& thread) {
  if (thread.wait == Wait::barrier) {
    return " waits in __syncthreads";
  }
  char mask[16];
  std::snprintf(mask, sizeof(mask), "0x%08x", thread.call.mask);
  return std::string(" waits in ") + thread.call.name + " with mask " + mask;
}

void thread_main() {
  Machine& m = machine();
  m.current->fiber.entered();
  m.busy = false;
  m.launching->invoke(m.launching->parameters);
  m.busy = true;
  m.current->wait = Wait::ended;
  m.current->fiber.suspend();
}

}  // namespace

Machine& make_machine() {
  static thread_local Machine instance;
  own_machine = &instance;
  return instance;
}

Machine::Machine() : seed(first_seed()) {}

// splitmix64
uint64_t Machine::random(uint64_t below) {
  random_state_ += 0x9e3779b97f4a7c15;
  uint64_t x = random_state_;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (x ^ (x >> 31)) % below;
}

bool Machine::is_launchable(const Launch& launch) {
  const auto allowed = allowed_shared.find(launch.kernel);
  const size_t most = allowed == allowed_shared.end() ? kUsualShared : allowed->second;
  std::string what;
  if (total(launch.block) < 1 || total(launch.block) > kMaxThreads || launch.block.z > 64) {
    what = std::to_string(total(launch.block)) + " threads per block";
  } else if (total(launch.grid) < 1 || launch.grid.x > INT32_MAX || launch.grid.y > 65535 ||
             launch.grid.z > 65535) {
    what = std::to_string(launch.grid.x) + " x " + std::to_string(launch.grid.y) + " x " +
           std::to_string(launch.grid.z) + " blocks";
  } else if (launch.dynamic_shared > most) {
    what = std::to_string(launch.dynamic_shared) + " bytes of dynamic shared memory, allowed " +
           std::to_string(most);
  }
  if (!what.empty()) {
    fail("launch: a device refuses " + what, {});
  }
  return what.empty();
}

void Machine::run(const Launch& launch) {
  launching = &launch;
  count_ = 0;
  if (!fault && is_launchable(launch)) {
    random_state_ = seed + 0x632be59bd9b4e019 * ++launches_;
    count_ = static_cast<int>(total(launch.block));
    while (static_cast<int>(threads_.size()) < count_) {
      threads_.push_back(std::make_unique<Thread>(static_cast<int>(threads_.size())));
    }
    segments_.assign(1, Segment{});
    memory.begin_launch();
    if (launch.dynamic_shared > 0) {
      memory.shared_array(nullptr, "(dynamic)", launch.dynamic_shared, 16);
    }
    const uint64_t blocks = total(launch.grid), some = std::min(blocks, most_blocks);
    std::vector<uint32_t> order(some);
    std::iota(order.begin(), order.end(), static_cast<uint32_t>(blocks - some));
    for (size_t i = 0; i < order.size() && !fault; ++i) {
      std::swap(order[i], order[i + random(order.size() - i)]);
      run_block(order[i]);
    }
  }
  launching = nullptr;
}

void Machine::begin_block(uint32_t block) {
  block_ = block;
  memory.begin_block();
  at_barrier_ = ended_ = 0;
  in_warp_call_.fill(0);
  runnable_.clear();
  for (int i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    thread.self = {index_in(launching->block, static_cast<uint32_t>(i)),
                   index_in(launching->grid, block), launching->block, launching->grid};
    thread.calls = thread.barriers = 0;
    thread.steps = 0;
    thread.clock.fill(0);
    thread.clock[thread.lane()] = 1;
    new_segment(thread);
    thread.fiber.start(thread_main);
    make_runnable(thread);
  }
}

void Machine::run_block(uint32_t block) {
  begin_block(block);
  while (ended_ < count_ && !fault) {
    if (runnable_.empty()) {
      explain_deadlock();
      return;
    }
    const size_t choice = random(runnable_.size());
    Thread& thread = *threads_[runnable_[choice]];
    runnable_[choice] = runnable_.back();
    runnable_.pop_back();
    current = &thread;
    thread.fiber.resume();
    current = nullptr;
    if (!fault) {
      after_turn(thread);
    }
  }
  const size_t shared = memory.static_shared_bytes();
  if (!fault && shared > kUsualShared) {
    fail("launch: " + std::to_string(shared) + " bytes of shared arrays, at most " +
             std::to_string(kUsualShared),
         {});
  }
}

void Machine::after_turn(Thread& thread) {
  switch (thread.wait) {
    case Wait::turn:
      make_runnable(thread);
      break;
    case Wait::barrier:
      if (++at_barrier_ == count_) {
        complete_barrier();
      }
      break;
    case Wait::warp:
      complete_warp(thread);
      break;
    default:
      ++ended_;
  }
}

void Machine::make_runnable(Thread& thread) {
  thread.wait = Wait::none;
  runnable_.push_back(thread.number);
}

void Machine::new_segment(Thread& thread) {
  thread.segment = static_cast<uint32_t>(segments_.size());
  segments_.push_back({block_, thread.number, thread.barriers, thread.clock[thread.lane()]});
}

void Machine::complete_barrier() {
  const Thread& first = *threads_[0];
  for (int i = 1; i < count_; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.site != first.site && frames(thread.site) != frames(first.site)) {
      fail("divergent barrier: threads of a block wait at different barriers",
           {{name(first) + " waits in __syncthreads", first.site},
            {name(thread) + " waits in __syncthreads", thread.site}});
      return;
    }
  }
  at_barrier_ = 0;
  for (int i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    ++thread.barriers;
    new_segment(thread);
    make_runnable(thread);
  }
}

// Lets the lanes of a warp operation go on when all that its mask names have arrived.
void Machine::complete_warp(Thread& arrived) {
  unsigned& waiting = in_warp_call_[arrived.warp()];
  waiting |= 1u << arrived.lane();
  const unsigned mask = arrived.call.mask;
  if ((waiting & mask) == mask && is_one_call(arrived)) {
    waiting &= ~mask;
    answer_warp(arrived.warp(), mask);
  }
}

// Whether all lanes of a mask, which have arrived, are in the same operation at the same place.
bool Machine::is_one_call(const Thread& arrived) {
  const WarpCall& call = arrived.call;
  for (unsigned left = call.mask; left != 0; left &= left - 1) {
    const Thread& other = *threads_[arrived.warp() * kWarp + std::countr_zero(left)];
    const bool same = other.call.mask == call.mask && !std::strcmp(other.call.name, call.name);
    if (!same || (other.site != arrived.site && frames(other.site) != frames(arrived.site))) {
      fail("divergent warp operation: lanes wait for each other in different ones",
           {{name(arrived) + waits(arrived), arrived.site},
            {name(other) + waits(other), other.site}});
      return false;
    }
  }
  return true;
}

void Machine::answer_warp(int warp, unsigned mask) {
  std::array<uint64_t, kWarp> bits;
  std::array<uint32_t, kWarp> clock = {};
  unsigned votes = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const Thread& thread = *threads_[warp * kWarp + std::countr_zero(left)];
    bits[thread.lane()] = thread.call.bits;
    votes |= static_cast<unsigned>(thread.call.bits & 1) << thread.lane();
    if (thread.call.kind == WarpCall::sync) {
      for (int i = 0; i < kWarp; ++i) {
        clock[i] = std::max(clock[i], thread.clock[i]);
      }
    }
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    Thread& thread = *threads_[warp * kWarp + std::countr_zero(left)];
    WarpCall& call = thread.call;
    if (call.kind == WarpCall::shuffle) {
      if ((mask >> call.source & 1) == 0) {
        fail("missing lane: a lane reads from one that its mask does not name",
             {{name(thread) + waits(thread) + " for lane " + std::to_string(call.source),
               thread.site}});
        return;
      }
      call.bits = bits[call.source];
    } else if (call.kind == WarpCall::vote) {
      call.bits = votes;
    } else {
      // Of the warp operations only __syncwarp orders memory.
      thread.clock = clock;
      ++thread.clock[thread.lane()];
      new_segment(thread);
    }
    make_runnable(thread);
  }
}

void Machine::explain_deadlock() {
  const Thread* at_barrier = nullptr;
  const Thread* gone = nullptr;
  for (int i = 0; i < count_; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.wait == Wait::warp) {
      explain_missing_lane(thread);
      return;
    }
    (thread.wait == Wait::barrier ? at_barrier : gone) = &thread;
  }
  fail("barrier not reached: " + std::to_string(at_barrier_) + " of " + std::to_string(count_) +
           " threads wait in __syncthreads and the others have ended",
       {{name(*at_barrier) + " waits", at_barrier->site}, {name(*gone) + " has ended", Site{}}});
}

void Machine::explain_missing_lane(const Thread& waiting) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const int number = waiting.warp() * kWarp + lane;
    if ((waiting.call.mask >> lane & 1) == 0) {
      continue;
    }
    const std::string what = "missing lane: a warp operation waits for lane " +
                             std::to_string(lane) + ", which does not arrive";
    const std::pair<std::string, Site> first{name(waiting) + waits(waiting), waiting.site};
    if (number >= count_) {
      fail(what, {first, {"the block has no such thread", Site{}}});
      return;
    }
    const Thread& other = *threads_[number];
    if (other.wait == Wait::ended) {
      fail(what, {first, {name(other) + " has ended", Site{}}});
      return;
    }
    if (other.wait == Wait::barrier || other.call.mask != waiting.call.mask) {
      fail(what, {first, {name(other) + waits(other), other.site}});
      return;
    }
  }
}

// ---- on the running thread's stack
// ---------------------------------------------------------------

void Machine::suspend(Wait wait, Site site) {
  step(site);
  current->wait = wait;
  current->site = site;
  current->fiber.suspend();
}

void Machine::syncthreads(Site site) { suspend(Wait::barrier, site); }

uint64_t Machine::warp_call(const WarpCall& call, Site site) {
  Thread& thread = *current;
  thread.call = call;
  if ((call.mask >> thread.lane() & 1) == 0) {
    fail("missing lane: a lane is not in its own mask", {{name(thread) + waits(thread), site}});
  }
  suspend(Wait::warp, site);
  return thread.call.bits;
}

void Machine::give_way() { suspend(Wait::turn, Site{}); }

bool Machine::is_past(uint32_t segment) const {
  const Segment& then = segments_[segment];
  const Thread& now = *current;
  if (then.block != block_) {
    return false;
  }
  return then.thread == now.number || then.barriers < now.barriers ||
         (then.thread / kWarp == now.warp() && then.clock <= now.clock[then.thread % kWarp]);
}

bool Machine::is_private(uintptr_t address, bool is_write) const {
  const auto within = [address](const void* begin, const void* end) {
    return address >= reinterpret_cast<uintptr_t>(begin) &&
           address < reinterpret_cast<uintptr_t>(end);
  };
  if (current->fiber.on_stack(address)) {
    return true;
  }
  const auto* parameters = static_cast<const char*>(launching->parameters);
  return !is_write && (within(&current->self, &current->self + 1) ||
                       within(parameters, parameters + launching->parameters_bytes) ||
                       within(&__ehdr_start, &_end));
}

// ---- faults
// --------------------------------------------------------------------------------------

void Machine::fail(std::string what, std::vector<std::pair<std::string, Site>> parts) {
  if (!fault) {
    // This may be a small stack: source lines are looked up later.
    fault = Fault{std::move(what), std::move(parts), nullptr, ""};
    if (launching != nullptr) {
      fault->kernel = launching->kernel;
      if (count_ > 0) {
        fault->block = ", block " + braced(index_in(launching->grid, block_));
      }
    }
  }
  if (current != nullptr) {
    current->fiber.suspend();
  }
}

Site Machine::site(const void* return_address) const {
  return {offset_of(return_address), current != nullptr ? current->calls : 0};
}

std::string Machine::name(const Thread& thread) const {
  return "thread " + braced(thread.self.thread);
}

std::string Machine::name(const Segment& segment) const {
  std::string text =
      "thread " + braced(index_in(launching->block, static_cast<uint32_t>(segment.thread)));
  if (segment.block != block_) {
    text += " of block " + braced(index_in(launching->grid, segment.block));
  }
  return text;
}

std::string Machine::report() const {
  std::string text = "emulator: " + fault->what + "\n";
  if (fault->kernel != nullptr) {
    text += "  kernel " + function_name(fault->kernel) + fault->block + "\n";
  }
  for (const auto& [part, site] : fault->parts) {
    text += "  " + part + "\n";
    if (site.pc != 0) {
      text += "    at " + describe(site) + "\n";
    }
  }
  return text + "  repeat with M2MKD_EMULATOR_SEED=" + std::to_string(seed);
}

std::string Machine::finish() {
  const std::string unwritten = memory.unwritten();
  if (!fault && instrumented && !unwritten.empty()) {
    fail("output not written: " + unwritten, {});
  }
  memory.copy_back();
  memory.free_all();
  const std::string text = fault ? report() : "";
  fault.reset();
  launches_ = 0;
  most_blocks = UINT64_MAX;
  return text;
}

}  // namespace m2mkd::emulator
