// The emulator as kernels, launchers and op wrappers see it. Everything is per host thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

namespace m2mkd::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Size {
  unsigned x, y, z;
  Size(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What the CUDA thread that is running finds in its built-in variables.
struct Self {
  Index thread, block;
  Size block_size, grid_size;
};
const Self& self();

// ---- for host code
// -------------------------------------------------------------------------------

// What kernels may do with a buffer: read what the host wrote; write every element, which hold
// nothing before; or read and write.
enum class Access { read, write, update };

// Copies host memory to a new buffer of device memory, at the same address modulo 256 and with
// guards around it. Memory the device has already, because a call before this named it too, is
// shared. Null stays null.
void* device_buffer(const void* host, size_t bytes, Access access);

// Ends what belongs together: copies written buffers back to the host, frees all, and returns a
// report of the first fault found since the last call, or an empty string.
std::string finish();

// Until `finish`, launches run only this many blocks, their last ones: enough to see where those of
// a very large launch look.
void run_last_blocks(uint64_t count);

// Until `finish`, new buffers of memory at the same address modulo 256 begin a multiple of this
// apart: a power of two from 16 MiB to 4 GiB, of which there is room for three.
void space_buffers(uint64_t bytes);

// Schedules follow from this number: M2MKD_EMULATOR_SEED, else a random one.
uint64_t seed();
void set_seed(uint64_t value);

// Whether kernels were compiled with -fsanitize=thread, so that their accesses are seen.
bool has_hooks();

struct Launch {
  const void* kernel;
  Size grid, block;
  size_t dynamic_shared;
  void (*invoke)(const void* parameters);
  const void* parameters;
  size_t parameters_bytes;
};
void run(const Launch& launch);

template <typename... P, typename... A>
void launch(void (*kernel)(P...), Size grid, Size block, size_t dynamic_shared, void* /*stream*/,
            const A&... arguments) {
  struct Parameters {
    void (*kernel)(P...);
    std::tuple<P...> values;
  };
  const Parameters parameters{kernel, std::tuple<P...>(arguments...)};
  const auto invoke = [](const void* at) {
    const auto& call = *static_cast<const Parameters*>(at);
    std::apply(call.kernel, call.values);
  };
  run({reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, invoke, &parameters,
       sizeof(Parameters)});
}

// Bytes of dynamic shared memory that a kernel may be allowed, as on an H100; and without asking.
constexpr int kMaxShared = 227 << 10;
constexpr int kUsualShared = 48 << 10;

// cudaError_t of the fault found, if any; and three calls of the CUDA runtime.
int last_error();
int copy_to_host(void* to, const void* from, size_t bytes);
int allow_shared(const void* kernel, size_t bytes);

// ---- for device code
// -----------------------------------------------------------------------------

void syncthreads();
void syncwarp(unsigned mask);
// The bits that lane `source` gave, when all lanes of the mask have arrived.
uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source);
// The lanes of the mask that gave true.
unsigned ballot(const char* name, unsigned mask, bool predicate);

void* shared_array(const void* declaration, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared();

// Lives during an atomic operation, whose own load and store do not count. Atomic operations do not
// race with each other; floating-point ones are a fault, as their order changes sums.
class AtomicAccess {
 public:
  AtomicAccess(void* address, size_t bytes, bool is_float);
  ~AtomicAccess();
  AtomicAccess(const AtomicAccess&) = delete;
  AtomicAccess& operator=(const AtomicAccess&) = delete;
};

}  // namespace m2mkd::emulator
