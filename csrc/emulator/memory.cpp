#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address))
#endif

namespace m2mkd::emulator {

namespace {

// NaN as a floating-point number of any size, -1 as an integer.
constexpr int kPoison = 0xff;
constexpr size_t kGuard = 4096;

std::string count_bytes(size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

std::string verb(Kind kind) {
  return kind == Kind::read ? "reads" : kind == Kind::write ? "writes" : "atomically updates";
}

// "thread (3,0,0) writes 4 bytes".
std::string doing(Kind kind, size_t size) {
  const Machine& m = machine();
  return (m.current != nullptr ? m.name(*m.current) : "host code") + " " + verb(kind) + " " +
         count_bytes(size);
}

std::string place(const Region& region, uintptr_t address) {
  return " at byte " + std::to_string(address - region.begin) + " of " + region.name + ", " +
         count_bytes(region.bytes()) + " in all";
}

bool all_written(const Region& region, uintptr_t address, size_t size) {
  if (region.written.empty()) {
    return true;
  }
  const uint8_t* flags = region.written.data() + (address - region.begin);
  return std::memchr(flags, 0, size) == nullptr;
}

}  // namespace

Memory::Memory() : slots_(kSlots, nullptr) {
  void* arena = mmap(nullptr, kArenaBytes + kSlotBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) {
    throw std::bad_alloc();
  }
  base_ = (reinterpret_cast<uintptr_t>(arena) + kSlotBytes - 1) & ~(kSlotBytes - 1);
}

Memory::~Memory() { munmap(reinterpret_cast<void*>(base_), kArenaBytes); }

// The next free slots, with the region at `remainder` modulo `modulus` and guards on both sides.
Region& Memory::allocate(std::string name, size_t bytes, size_t modulus, size_t remainder) {
  const size_t slots = (bytes + 4 * kGuard) / kSlotBytes + 1;
  next_slot_ = (next_slot_ - 1 + spacing_ - 1) / spacing_ * spacing_ + 1;
  if (next_slot_ + slots > kSlots) {
    throw std::bad_alloc();
  }
  const uintptr_t slot = base_ + next_slot_ * kSlotBytes;
  auto region = std::make_unique<Region>();
  region->name = std::move(name);
  // Regions at the same place in every slot would share the same few cache sets.
  region->begin = slot + kGuard + next_slot_ % 16 * 256 + remainder % modulus;
  region->end = region->begin + bytes;
  std::fill_n(slots_.begin() + static_cast<ptrdiff_t>(next_slot_), slots, region.get());
  next_slot_ += slots;
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(slot), slots * kSlotBytes);
  ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(region->begin), bytes);
  std::memset(reinterpret_cast<void*>(region->begin), kPoison, bytes);
  regions_.push_back(std::move(region));
  return *regions_.back();
}

void* Memory::device_buffer(const void* host, size_t bytes, Access access) {
  if (host == nullptr) {
    return nullptr;
  }
  const auto address = reinterpret_cast<uintptr_t>(host);
  for (const auto& region : regions_) {
    if (region->host == host && region->bytes() == bytes && bytes > 0) {
      if (region->access != access) {
        // In place: what was there may be read, and is overwritten.
        std::memcpy(reinterpret_cast<void*>(region->begin), host, bytes);
        region->written.clear();
        region->access = Access::update;
      }
      return reinterpret_cast<void*>(region->begin);
    }
  }
  const size_t number = static_cast<size_t>(
      std::count_if(regions_.begin(), regions_.end(), [](const auto& r) { return !r->shared; }));
  Region& region = allocate("buffer " + std::to_string(number), bytes, 256, address);
  region.access = access;
  region.host = host;
  if (access == Access::write) {
    region.written.resize(bytes);
  } else {
    std::memcpy(reinterpret_cast<void*>(region.begin), host, bytes);
  }
  return reinterpret_cast<void*>(region.begin);
}

void Memory::copy_back() const {
  for (const auto& region : regions_) {
    if (region->host != nullptr && region->access != Access::read && region->bytes() > 0) {
      std::memcpy(const_cast<void*>(region->host), reinterpret_cast<void*>(region->begin),
                  region->bytes());
    }
  }
}

std::string Memory::unwritten() const {
  for (const auto& region : regions_) {
    const auto missing = std::find(region->written.begin(), region->written.end(), 0);
    if (!region->shared && missing != region->written.end()) {
      const auto holes = std::count(region->written.begin(), region->written.end(), 0);
      return region->name + " of " + count_bytes(region->bytes()) +
             " was not written whole: " + count_bytes(static_cast<size_t>(holes)) +
             " missing, the first at byte " + std::to_string(missing - region->written.begin());
    }
  }
  return "";
}

void Memory::free_all() {
  std::fill(slots_.begin(), slots_.end(), nullptr);
  regions_.clear();
  next_slot_ = spacing_ = 1;
}

void Memory::begin_launch() {
  std::erase_if(regions_, [this](const auto& region) {
    if (region->shared) {
      std::replace(slots_.begin(), slots_.end(), region.get(), static_cast<Region*>(nullptr));
    }
    return region->shared;
  });
  for (const auto& region : regions_) {
    ++region->generation;
  }
}

void Memory::begin_block() {
  for (const auto& region : regions_) {
    if (region->shared) {
      ++region->generation;
      std::fill(region->written.begin(), region->written.end(), 0);
      std::memset(reinterpret_cast<void*>(region->begin), kPoison, region->bytes());
    }
  }
}

void* Memory::shared_array(const void* declaration, const char* name, size_t bytes,
                           size_t alignment) {
  for (const auto& region : regions_) {
    if (region->shared && region->declaration == declaration) {
      return reinterpret_cast<void*>(region->begin);
    }
  }
  // No better aligned than its type asks for, as CUDA promises no more.
  Region& region = allocate(std::string("shared array ") + name, bytes, 2 * alignment, alignment);
  region.shared = true;
  region.declaration = declaration;
  region.written.resize(bytes);
  return reinterpret_cast<void*>(region.begin);
}

void* Memory::dynamic_shared() const {
  for (const auto& region : regions_) {
    if (region->shared && region->declaration == nullptr) {
      return reinterpret_cast<void*>(region->begin);
    }
  }
  // Nothing was asked for: any access is out of bounds.
  return reinterpret_cast<void*>(base_ + kGuard);
}

size_t Memory::static_shared_bytes() const {
  size_t bytes = 0;
  for (const auto& region : regions_) {
    bytes += region->shared && region->declaration != nullptr ? region->bytes() : 0;
  }
  return bytes;
}

Region* Memory::region_at(uintptr_t address) const {
  return slots_[(address - base_) / kSlotBytes];
}

void Memory::fail_outside(uintptr_t address, size_t size, Kind kind, Site site) const {
  std::string what = "out of bounds: a kernel touches memory that no array holds";
  std::string part = doing(kind, size);
  if (!is_device(address)) {
    what = "host memory: a kernel touches memory that is not the device's";
  } else if (const Region* region = region_at(address)) {
    const bool before = address < region->begin;
    part +=
        before ? ", " + count_bytes(region->begin - address) + " before the start of "
               : ", " + count_bytes(address - std::min(address, region->end)) + " past the end of ";
    part += region->name + ", " + count_bytes(region->bytes()) + " in all";
  }
  machine().fail(what, {{part, site}});
}

void Memory::fail_misaligned(uintptr_t address, Site site) const {
  Machine& m = machine();
  const Region* region = region_at(address);
  std::string part = m.name(*m.current) + " uses an address";
  if (region != nullptr && region->holds(address, 0)) {
    part += place(*region, address);
  }
  m.fail("misaligned: an access must lie at a multiple of its size", {{part, site}});
}

void Memory::access(uintptr_t address, size_t size, Kind kind, bool aligned, Site site) {
  Machine& m = machine();
  if (size == 0) {
    return;
  }
  if (m.current == nullptr) {
    m.fail("host code touches device memory", {{doing(kind, size), site}});
    return;
  }
  Region* region = is_device(address) ? region_at(address) : nullptr;
  if (region == nullptr || !region->holds(address, size)) {
    fail_outside(address, size, kind, site);
    return;
  }
  if (aligned && address % size != 0) {
    m.fail("misaligned: an access must lie at a multiple of its size",
           {{doing(kind, size) + place(*region, address), site}});
  }
  if (kind == Kind::read && !all_written(*region, address, size)) {
    m.fail(region->shared
               ? "uninitialised: nothing has written this shared memory since the block began"
               : "uninitialised: nothing has written this output",
           {{doing(kind, size) + place(*region, address), site}});
  }
  if (region->access == Access::read) {
    if (kind != Kind::read) {
      m.fail("read-only: a kernel writes to an input",
             {{doing(kind, size) + place(*region, address), site}});
    }
    return;
  }
  if (kind != Kind::read && !region->written.empty()) {
    std::memset(region->written.data() + (address - region->begin), 1, size);
  }
  check_cells(*region, address, size, kind, site);
}

void Memory::check_host_read(uintptr_t address, size_t size, Site site) const {
  const Region* region = is_device(address) ? region_at(address) : nullptr;
  if (region == nullptr || !region->holds(address, size)) {
    fail_outside(address, size, Kind::read, site);
  } else if (!all_written(*region, address, size)) {
    machine().fail("uninitialised: nothing has written this output",
                   {{doing(Kind::read, size) + place(*region, address), site}});
  }
}

void Memory::check_cells(Region& region, uintptr_t address, size_t size, Kind kind, Site site) {
  const int fit = std::min(4, std::countr_zero(address | size));
  const uintptr_t origin = region.begin & ~uintptr_t(15);
  if (region.cells.empty()) {
    region.shift = fit;
    region.cells.resize(((region.end - 1 - origin) >> fit) + 1);
  } else if (fit < region.shift) {
    // A narrower access than all before: split the cells.
    std::vector<Cell> finer(((region.end - 1 - origin) >> fit) + 1);
    for (size_t i = 0; i < finer.size(); ++i) {
      finer[i] = region.cells[i >> (region.shift - fit)];
    }
    region.cells = std::move(finer);
    region.shift = fit;
  }
  const size_t first = (address - origin) >> region.shift;
  const size_t last = (address + size - 1 - origin) >> region.shift;
  for (size_t i = first; i <= last; ++i) {
    check_cell(region, region.cells[i], address, size, kind, site);
  }
}

void Memory::check_cell(const Region& region, Cell& cell, uintptr_t address, size_t size, Kind kind,
                        Site site) {
  const Machine& m = machine();
  if (cell.generation != region.generation) {
    cell = {};
    cell.generation = region.generation;
  }
  const auto races = [&](const Event& event) {
    return event.segment != 0 && !m.is_past(event.segment);
  };
  const bool both_atomic = kind == Kind::atomic && cell.atomic;
  if (races(cell.write) && !both_atomic) {
    fail_race(region, cell.write, cell.atomic ? "atomically updated" : "wrote", address, size, kind,
              site);
  }
  const Event now{m.current->segment, site};
  if (kind != Kind::read) {
    for (Event& read : cell.reads) {
      if (races(read)) {
        fail_race(region, read, "read", address, size, kind, site);
      }
      read = {};
    }
    cell.write = now;
    cell.atomic = kind == Kind::atomic;
    return;
  }
  for (Event& read : cell.reads) {
    if (!races(read)) {
      read = now;
      return;
    }
  }
  // Of three concurrent readers keep two that no single barrier orders, where there are such.
  const Segment& kept = m.segment(cell.reads[0].segment);
  const Segment& other = m.segment(cell.reads[1].segment);
  const Segment& new_one = m.segment(now.segment);
  const auto alike = [](const Segment& a, const Segment& b) {
    return a.block == b.block && a.thread / kWarp == b.thread / kWarp;
  };
  if ((kept.block == other.block && kept.block != new_one.block) ||
      (alike(kept, other) && !alike(kept, new_one))) {
    cell.reads[1] = now;
  }
}

void Memory::fail_race(const Region& region, const Event& before, const char* did,
                       uintptr_t address, size_t size, Kind kind, Site site) const {
  Machine& m = machine();
  const std::string where = region.shared ? "shared" : "global";
  m.fail("race: two threads use the same " + where + " memory with nothing to order them",
         {{doing(kind, size) + place(region, address), site},
          {m.name(m.segment(before.segment)) + " " + did + " it before", before.site}});
}

}  // namespace m2mkd::emulator
