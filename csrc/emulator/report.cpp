#include "report.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>

#include "machine.h"

// Where this library or program begins in memory; the linker defines it.
extern "C" __attribute__((visibility("hidden"))) const ElfW(Ehdr) __ehdr_start;

namespace m2mkd::emulator {

namespace {

uintptr_t image() { return reinterpret_cast<uintptr_t>(&__ehdr_start); }

std::string image_path() {
  Dl_info info;
  return dladdr(&__ehdr_start, &info) != 0 ? info.dli_fname : "/proc/self/exe";
}

// "void m2mkd::cuda::(anonymous namespace)::f<int>(int*)" becomes "f<int>".
std::string short_name(std::string name) {
  for (const std::string space : {"(anonymous namespace)::", "m2mkd::cuda::", "operator()"}) {
    for (size_t at; (at = name.find(space)) != std::string::npos;) {
      name.replace(at, space.size(), space == "operator()" ? "lambda" : "");
    }
  }
  name = name.substr(0, name.find('('));
  // What stands before the last blank outside template arguments is the type it returns.
  int depth = 0;
  for (size_t i = name.size(); i-- > 0;) {
    depth += (name[i] == '>') - (name[i] == '<');
    if (name[i] == ' ' && depth == 0) {
      return name.substr(i + 1);
    }
  }
  return name;
}

std::vector<Frame> parse(std::istream& lines) {
  std::vector<Frame> found;
  for (std::string function, place; std::getline(lines, function) && std::getline(lines, place);) {
    const size_t colon = place.rfind(':');
    const int line = std::atoi(place.c_str() + colon + 1);
    found.push_back({short_name(function), place.substr(0, colon), line});
  }
  return found;
}

// Frames of inlined functions at an address of this library, innermost first, by addr2line.
const std::vector<Frame>& inlined_frames(uint32_t offset) {
  static thread_local std::unordered_map<uint32_t, std::vector<Frame>> known;
  const auto found = known.find(offset);
  if (found != known.end()) {
    return found->second;
  }
  const uintptr_t base = __ehdr_start.e_type == ET_EXEC ? image() : 0;
  std::ostringstream command;
  command << "addr2line -i -f -C -e '" << image_path() << "' 0x" << std::hex << base + offset;
  std::string text;
  const auto close = [](FILE* pipe) { pclose(pipe); };
  const std::unique_ptr<FILE, decltype(close)> pipe(popen(command.str().c_str(), "r"), close);
  std::array<char, 4096> part;
  while (pipe != nullptr && std::fgets(part.data(), part.size(), pipe.get()) != nullptr) {
    text += part.data();
  }
  std::istringstream lines(text);
  return known[offset] = parse(lines);
}

bool is_emulator(const Frame& frame) {
  return frame.line == 0 || frame.file.find("/emulator/") != std::string::npos ||
         frame.file.find("/include/c++/") != std::string::npos;
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

}  // namespace

uint32_t offset_of(const void* address) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) - image());
}

uint32_t CallTree::enter(uint32_t chain, uint32_t caller) {
  const uint64_t key = uint64_t(chain) << 32 | caller;
  const auto [entry, is_new] = numbers_.try_emplace(key, static_cast<uint32_t>(parents_.size()));
  if (is_new) {
    parents_.push_back({caller, chain});
  }
  return entry->second;
}

std::vector<Frame> frames(Site site) {
  std::vector<Frame> result;
  while (site.pc != 0) {
    // Sites are return addresses, so the call lies just before.
    for (const Frame& frame : inlined_frames(site.pc - 1)) {
      if (!is_emulator(frame)) {
        result.push_back(frame);
      }
    }
    site = machine().calls.caller(site.calls);
  }
  return result;
}

std::string describe(Site site) {
  std::string text;
  for (const Frame& frame : frames(site)) {
    text += text.empty() ? "" : ", from ";
    text += base_name(frame.file) + ":" + std::to_string(frame.line) + " in " +
            frame.function.substr(0, frame.function.find('<'));
  }
  return text.empty() ? "an unknown place (built without -g, or addr2line is missing)" : text;
}

std::string function_name(const void* function) {
  const std::vector<Frame>& found = inlined_frames(offset_of(function));
  return found.empty() ? "unknown" : found.back().function;
}

}  // namespace m2mkd::emulator
