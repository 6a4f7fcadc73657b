// Faults that the emulator finds in kernels, and the source lines they happened at.

#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace m2mkd::emulator {

// A place in kernel code: an instruction, as an offset into this library, and the calls that led
// there, as a number of CallTree. Zero is nowhere.
struct Site {
  uint32_t pc = 0;
  uint32_t calls = 0;
  bool operator==(const Site&) const = default;
};

uint32_t offset_of(const void* address);

// Numbers for chains of calls. Chain 0 is the kernel's launch.
class CallTree {
 public:
  uint32_t enter(uint32_t chain, uint32_t caller);
  uint32_t leave(uint32_t chain) const { return parents_[chain].calls; }
  // The call that made `chain` out of its parent.
  Site caller(uint32_t chain) const { return parents_[chain]; }

 private:
  std::vector<Site> parents_ = {Site{}};
  std::unordered_map<uint64_t, uint32_t> numbers_;
};

struct Frame {
  std::string function;
  std::string file;
  int line;
  bool operator==(const Frame&) const = default;
};

// Source lines of a site, innermost first, without those of the emulator itself.
std::vector<Frame> frames(Site site);
// Such as "moe_plan.cu:60 in rank_in_block, from moe_plan.cu:71 in count_kernel".
std::string describe(Site site);
// The kernel's name without namespace and parameters.
std::string function_name(const void* function);

// What is wrong, and a line for each thread that has a part in it.
struct Fault {
  std::string what;
  std::vector<std::pair<std::string, Site>> parts;
  const void* kernel;
  std::string block;
};

}  // namespace m2mkd::emulator
