// Device memory, and a shadow of it that knows who wrote and read what when.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "report.h"
#include "runtime.h"

namespace m2mkd::emulator {

enum class Kind { read, write, atomic };

// One access to a cell: by whom and when (a segment, 0 for none), and where in the code.
struct Event {
  uint32_t segment = 0;
  Site site;
};

// Last events on some bytes that are always accessed together. Two concurrent readers are enough to
// find a write that races with any.
struct Cell {
  uint32_t generation = 0;
  bool atomic = false;  // the write was atomic
  Event write;
  Event reads[2];
};

// A global buffer or a shared array.
struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  Access access = Access::update;
  bool shared = false;
  const void* host = nullptr;         // what a buffer was copied from
  const void* declaration = nullptr;  // of a shared array
  uint32_t generation = 1;            // cells of earlier ones are empty
  std::vector<uint8_t> written;       // by byte; empty where the host has written all
  std::vector<Cell> cells;            // made at the first access that needs them
  int shift = 4;                      // log2 of bytes per cell

  size_t bytes() const { return end - begin; }
  bool holds(uintptr_t address, size_t size) const {
    return address >= begin && address + size <= end;
  }
};

class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* device_buffer(const void* host, size_t bytes, Access access);
  void space_buffers(size_t bytes) { spacing_ = bytes / kSlotBytes; }
  void copy_back() const;
  // The first output that the launches have not written whole, or an empty string.
  std::string unwritten() const;
  void free_all();

  // A kernel starts: accesses of earlier ones are over.
  void begin_launch();
  // A block starts: shared memory holds nothing.
  void begin_block();
  void* shared_array(const void* declaration, const char* name, size_t bytes, size_t alignment);
  void* dynamic_shared() const;
  size_t static_shared_bytes() const;

  bool is_device(uintptr_t address) const { return address - base_ < kArenaBytes; }
  // Checks an access by the running thread and remembers it; `aligned` where its address must be
  // a multiple of its size.
  void access(uintptr_t address, size_t size, Kind kind, bool aligned, Site site);
  // Reports an access whose address is no multiple of its type's alignment.
  void fail_misaligned(uintptr_t address, Site site) const;
  // Checks a copy to the host.
  void check_host_read(uintptr_t address, size_t size, Site site) const;

 private:
  static constexpr size_t kSlotBytes = size_t(1) << 20;
  static constexpr size_t kSlots = 1 << 14;
  static constexpr size_t kArenaBytes = kSlotBytes * kSlots;

  Region& allocate(std::string name, size_t bytes, size_t modulus, size_t remainder);
  Region* region_at(uintptr_t address) const;
  void fail_outside(uintptr_t address, size_t size, Kind kind, Site site) const;
  void check_cells(Region& region, uintptr_t address, size_t size, Kind kind, Site site);
  void check_cell(const Region& region, Cell& cell, uintptr_t address, size_t size, Kind kind,
                  Site site);
  void fail_race(const Region& region, const Event& before, const char* did, uintptr_t address,
                 size_t size, Kind kind, Site site) const;

  uintptr_t base_ = 0;
  size_t next_slot_ = 1;
  size_t spacing_ = 1;  // slots between the first ones of regions, or a multiple
  std::vector<std::unique_ptr<Region>> regions_;
  std::vector<Region*> slots_;
};

}  // namespace m2mkd::emulator
