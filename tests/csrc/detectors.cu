// Proves the emulator's detectors: each kernel of broken_kernels.h must be reported with detector
// and line, and its mended twin must run clean, under several schedules.
//
//   detectors            runs all; prints every report; the exit status tells whether all is well
//   detectors NAME...    runs these
//   detectors --list     prints the names
//   detectors --broken NAME   runs that broken kernel once and prints the report: for sanitizers

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "broken_kernels.h"

namespace {

using m2mkd::emulator::Access;
using m2mkd::emulator::finish;

constexpr int kSeeds = 10;

// Host memory with its place on the device.
template <typename T>
class Buffer {
 public:
  explicit Buffer(Access access, int count = 64, T value = {}) : host_(count, value) {
    device_ = static_cast<T*>(
        m2mkd::emulator::device_buffer(host_.data(), host_.size() * sizeof(T), access));
  }
  operator T*() const { return device_; }
  T* host() { return host_.data(); }

 private:
  std::vector<T> host_;
  T* device_;
};

#define RUN(kernel, blocks, threads, shared, ...) \
  M2MKD_LAUNCH(kernel, blocks, threads, shared, nullptr, __VA_ARGS__)

// Runs a kernel and returns the emulator's report.
using Run = std::function<std::string(bool mended)>;

struct Case {
  const char* name;
  const char* detector;            // how the report begins; empty for kernels without a bug
  std::vector<const char*> marks;  // lines it names
  Run run;
};

// Reports that need no word from the compiler about each access.
constexpr const char* kWithoutHooks[] = {"barrier not reached", "divergent barrier",
                                         "missing lane",        "divergent warp operation",
                                         "float atomic",        "launch"};

// One block with one array of ints.
Run simple(void (*kernel)(int*, bool), int threads, Access access = Access::write) {
  return [=](bool mended) {
    const Buffer<int> out(access, threads);
    RUN(kernel, 1, threads, 0, out, mended);
    return finish();
  };
}

std::string run_early_return(bool mended) {
  const Buffer<int> out(Access::write, 50);
  RUN(early_return, 1, 64, 0, out, 50, mended);
  return finish();
}

std::string run_part_of_a_warp(bool mended) {
  const int threads = mended ? 64 : 48;
  const Buffer<int> out(Access::write, threads);
  RUN(part_of_a_warp, 1, threads, 0, out);
  return finish();
}

std::vector<Case> waiting_cases() {
  return {
      {"barrier_in_branch",
       "barrier not reached",
       {"barrier_in_branch"},
       simple(barrier_in_branch, 64)},
      {"two_barriers",
       "divergent barrier",
       {"even_barrier", "odd_barrier"},
       simple(two_barriers, 64)},
      {"early_return", "barrier not reached", {"early_return"}, run_early_return},
      {"uneven_loop", "barrier not reached", {"uneven_loop"}, simple(uneven_loop, 64)},
      {"half_warp_shuffle", "missing lane", {"half_warp_shuffle"}, simple(half_warp_shuffle, 32)},
      {"lane_outside_mask", "missing lane", {"lane_outside_mask"}, simple(lane_outside_mask, 32)},
      {"lane_has_ended",
       "missing lane",
       {"lane_has_ended"},
       simple(lane_has_ended, 32, Access::write)},
      {"unnamed_source", "missing lane", {"unnamed_source"}, simple(unnamed_source, 32)},
      {"part_of_a_warp", "missing lane", {"part_of_a_warp"}, run_part_of_a_warp},
      {"two_shuffles",
       "divergent warp operation",
       {"lower_shuffle", "upper_shuffle"},
       simple(two_shuffles, 32)},
  };
}

std::string run_dynamic_overrun(bool mended) {
  const Buffer<int> out(Access::write, 33);
  RUN(dynamic_overrun, 1, 64, (mended ? 33 : 32) * sizeof(int), out, 33);
  return finish();
}

std::string run_global_overrun(bool mended) {
  const Buffer<float> in(Access::read, 37), out(Access::write, 37);
  RUN(global_overrun, 1, 64, 0, in, 37, out, mended);
  return finish();
}

std::string run_pack_overrun(bool mended) {
  const Buffer<Four> out(Access::write, 16);
  const Buffer<float> in(Access::read, mended ? 64 : 63);
  float* floats = in;
  RUN(pack_overrun, 1, 32, 0, reinterpret_cast<Four*>(floats), 16, out);
  return finish();
}

std::string run_before_the_start(bool mended) {
  const Buffer<float> in(Access::read), out(Access::write);
  RUN(before_the_start, 1, 64, 0, in, out, mended);
  return finish();
}

std::string run_write_to_input(bool mended) {
  const Buffer<float> in(Access::read), out(Access::update);
  RUN(write_to_input, 1, 64, 0, in, out, mended);
  return finish();
}

std::string run_host_pointer(bool mended) {
  Buffer<float> in(Access::read), out(Access::write);
  RUN(host_pointer, 1, 64, 0, mended ? in : in.host(), out);
  return finish();
}

std::string run_misaligned(bool mended) {
  const Buffer<float> in(Access::read, 133);
  const Buffer<Four> out(Access::write, 32);
  RUN(misaligned, 1, 32, 0, in, out, mended);
  return finish();
}

std::string run_misaligned_shared(bool mended) {
  const Buffer<float> out(Access::write, 1);
  RUN(misaligned_shared, 1, 1, 0, out, mended);
  return finish();
}

std::vector<Case> bounds_cases() {
  return {
      {"shared_overrun", "out of bounds", {"shared_overrun"}, simple(shared_overrun, 32)},
      {"dynamic_overrun", "out of bounds", {"dynamic_overrun"}, run_dynamic_overrun},
      {"global_overrun", "out of bounds", {"global_overrun"}, run_global_overrun},
      {"pack_overrun", "out of bounds", {"pack_overrun"}, run_pack_overrun},
      {"before_the_start", "out of bounds", {"before_the_start"}, run_before_the_start},
      {"write_to_input", "read-only", {"write_to_input"}, run_write_to_input},
      {"host_pointer", "host memory", {"host_pointer"}, run_host_pointer},
      {"misaligned", "misaligned", {"misaligned"}, run_misaligned},
      {"misaligned_shared", "misaligned", {"misaligned_shared"}, run_misaligned_shared},
  };
}

std::string run_left_by_another_block(bool mended) {
  const Buffer<int> out(Access::write);
  RUN(left_by_another_block, 2, 32, 0, out, mended);
  return finish();
}

std::string run_holes_in_output(bool mended) {
  const Buffer<int> out(Access::write, 40);
  RUN(holes_in_output, 1, 64, 0, out, 40, mended);
  return finish();
}

std::vector<Case> content_cases() {
  return {
      {"unwritten_shared", "uninitialised", {"unwritten_shared"}, simple(unwritten_shared, 32)},
      {"left_by_another_block",
       "uninitialised",
       {"left_by_another_block"},
       run_left_by_another_block},
      {"unwritten_output", "uninitialised", {"unwritten_output"}, simple(unwritten_output, 64)},
      {"holes_in_output", "output not written", {}, run_holes_in_output},
  };
}

std::string run_add_across_blocks(bool mended) {
  const Buffer<int> out(Access::update, 1);
  RUN(add_across_blocks, 3, 32, 0, out, mended);
  return finish();
}

std::string run_pack_race(bool mended) {
  const Buffer<float> out(Access::write, 32);
  RUN(pack_race, 1, 32, 0, out, mended);
  return finish();
}

std::string run_atomic_and_plain(bool mended) {
  const Buffer<int> count(Access::update, 1), out(Access::write);
  RUN(atomic_and_plain, 1, 64, 0, count, out, mended);
  return finish();
}

std::vector<Case> race_cases() {
  return {
      {"missing_barrier",
       "race",
       {"missing_barrier_write", "missing_barrier_read"},
       simple(missing_barrier, 64)},
      {"missing_second_barrier",
       "race",
       {"second_barrier_write", "second_barrier_read"},
       simple(missing_second_barrier, 64)},
      {"missing_syncwarp",
       "race",
       {"missing_syncwarp_write", "missing_syncwarp_read"},
       simple(missing_syncwarp, 32)},
      {"syncwarp_between_warps",
       "race",
       {"between_warps_write", "between_warps_read"},
       simple(syncwarp_between_warps, 64)},
      {"add_across_blocks", "race", {"add_across_blocks"}, run_add_across_blocks},
      {"one_word_two_writers",
       "race",
       {"one_word_two_writers"},
       simple(one_word_two_writers, 64, Access::update)},
      {"pack_race", "race", {"pack_race_write", "pack_race_read"}, run_pack_race},
      {"atomic_and_plain", "race", {"atomic_update", "plain_read"}, run_atomic_and_plain},
  };
}

std::string run_float_atomic(bool mended) {
  const Buffer<float> out(Access::update, 1);
  RUN(float_atomic, 4, 1, 0, out, mended);
  return finish();
}

std::string run_endless(bool mended) {
  const Buffer<int> in(Access::read, 2, mended), out(Access::write, 1);
  RUN(endless, 1, 1, 0, in, out);
  return finish();
}

std::string run_too_much_shared(bool mended) {
  const Buffer<int> out(Access::write);
  const int bytes = 100 << 10;
  cudaFuncSetAttribute(big_shared, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       mended ? bytes : 48 << 10);
  RUN(big_shared, 1, 64, bytes, out, bytes / int(sizeof(int)));
  return finish();
}

std::string run_too_many_threads(bool mended) {
  const int threads = mended ? 1024 : 1056;
  const Buffer<int> out(Access::write, threads);
  RUN(part_of_a_warp, 1, threads, 0, out);
  return finish();
}

std::string run_no_blocks(bool mended) {
  const Buffer<int> out(Access::write, 32);
  RUN(part_of_a_warp, mended ? 1 : 0, 32, 0, out);
  return finish();
}

std::vector<Case> other_cases() {
  return {
      {"float_atomic", "float atomic", {"float_atomic"}, run_float_atomic},
      {"endless", "endless loop", {"endless"}, run_endless},
      {"too_much_shared", "launch", {}, run_too_much_shared},
      {"too_many_threads", "launch", {}, run_too_many_threads},
      {"no_blocks", "launch", {}, run_no_blocks},
  };
}

// A kernel without a bug on an output of `count` elements.
template <typename T>
Run clean(void (*kernel)(T*), int blocks, int threads, int count) {
  return [=](bool) {
    const Buffer<T> out(Access::write, count);
    RUN(kernel, blocks, threads, 0, out);
    return finish();
  };
}

std::vector<Case> clean_cases() {
  return {
      {"neighbours_in_a_word", "", {}, clean(neighbours_in_a_word, 1, 64, 64)},
      {"reuse_after_barrier", "", {}, clean(reuse_after_barrier, 3, 64, 192)},
      {"warp_by_warp", "", {}, clean(warp_by_warp, 1, 64, 64)},
      {"warps_leave", "", {}, clean(warps_leave, 1, 128, 40)},
      {"masks_of_branches", "", {}, clean(masks_of_branches, 1, 32, 32)},
      {"broadcast", "", {}, clean(broadcast, 4, 32, 128)},
      {"one_lane_reads_what_warps_wrote", "", {}, clean(one_lane_reads, 1, 96, 1)},
  };
}

// "broken_kernels.h:N in " for the line with a mark.
std::string line_of(const std::string& mark) {
  const std::string here = __FILE__, file = "broken_kernels.h";
  std::ifstream source(here.substr(0, here.rfind('/') + 1) + file);
  int number = 1;
  for (std::string line; std::getline(source, line); ++number) {
    const size_t found = line.find("// mark ");
    if (found != std::string::npos && line.substr(found + 8) == mark) {
      return file + ":" + std::to_string(number) + " in ";
    }
  }
  return "no line is marked " + mark;
}

bool complain(const Case& c, const std::string& what, const std::string& report) {
  std::printf("FAILED %s: %s\n%s\n\n", c.name, what.c_str(), report.c_str());
  return false;
}

bool passes(const Case& c, uint64_t seed) {
  m2mkd::emulator::set_seed(seed);
  std::string report = c.run(true);
  if (!report.empty()) {
    return complain(c, "the kernel without a bug is reported", report);
  }
  const std::string detector = c.detector;
  const bool needs_hooks = std::find(std::begin(kWithoutHooks), std::end(kWithoutHooks),
                                     detector) == std::end(kWithoutHooks);
  if (detector.empty() || (needs_hooks && !m2mkd::emulator::has_hooks())) {
    return true;
  }
  report = c.run(false);
  if (!report.starts_with("emulator: " + detector)) {
    return complain(c, "expected " + detector + ", but the report is", report);
  }
  for (const char* mark : c.marks) {
    // Without hooks calls are not followed, so a line in a helper may be all that is known.
    if (m2mkd::emulator::has_hooks() && report.find(line_of(mark)) == std::string::npos) {
      return complain(c, "the report lacks " + line_of(mark), report);
    }
  }
  if (seed == 1) {
    std::printf("%s: %s\n\n", c.name, report.c_str());
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> wanted(arguments + 1, arguments + count);
  const bool list = wanted == std::vector<std::string>{"--list"};
  const bool broken = wanted.size() == 2 && wanted[0] == "--broken";
  bool all_well = true;
  size_t ran = 0;
  for (const auto& cases : {waiting_cases(), bounds_cases(), content_cases(), race_cases(),
                            other_cases(), clean_cases()}) {
    for (const Case& c : cases) {
      if (list) {
        std::printf("%s\n", c.name);
      } else if (broken && wanted[1] == c.name) {
        std::printf("%s\n", c.run(false).c_str());
      } else if (wanted.empty() || std::count(wanted.begin(), wanted.end(), c.name) != 0) {
        ++ran;
        bool passed = true;
        for (uint64_t seed = 1; seed <= kSeeds && passed; ++seed) {
          passed = passes(c, seed);
        }
        all_well = all_well && passed;
      }
    }
  }
  return all_well && (list || broken || ran >= std::max<size_t>(1, wanted.size())) ? 0 : 1;
}
