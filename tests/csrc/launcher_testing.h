// What tests of launchers share: arrays of any dtype on host and device, and comparisons.

#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "launchers.h"
#include "platform.h"

namespace {

using namespace m2mkd::cuda;
using m2mkd::emulator::Access;
using m2mkd::emulator::device_buffer;

int failures = 0;

// Numbers of a dtype on the host, seen as doubles, and their place on the device.
class Floats {
 public:
  Floats(DType dtype, int count) : dtype_(dtype), count_(count), words_(count + 1) {}

  // Reproducible values between -1 and 1.
  static Floats random(DType dtype, int count, unsigned seed) {
    Floats result(dtype, count);
    for (int i = 0; i < count; ++i) {
      seed = seed * 1664525 + 1013904223;
      result.set(i, double(seed >> 8) / (1 << 23) - 1);
    }
    return result;
  }

  double operator[](int64_t i) const {
    double value = 0;
    M2MKD_FOR_DTYPE(dtype_, value = widen(reinterpret_cast<const T*>(words_.data())[i]));
    return value;
  }
  void set(int64_t i, double value) {
    M2MKD_FOR_DTYPE(dtype_,
                    reinterpret_cast<T*>(words_.data())[i] = narrow<T>(compute_t<T>(value)));
  }
  int count() const { return count_; }

  const void* read() const { return at(Access::read); }
  void* write() const { return at(Access::write); }
  void* update() const { return at(Access::update); }

 private:
  void* at(Access access) const {
    size_t bytes = 0;
    M2MKD_FOR_DTYPE(dtype_, bytes = sizeof(T) * count_);
    return device_buffer(words_.data(), bytes, access);
  }

  DType dtype_;
  int count_;
  std::vector<uint64_t> words_;
};

using Ints = std::vector<int32_t>;
const int32_t* read(const Ints& ints) {
  return static_cast<int32_t*>(device_buffer(ints.data(), 4 * ints.size(), Access::read));
}
int32_t* write(const Ints& ints) {
  return static_cast<int32_t*>(device_buffer(ints.data(), 4 * ints.size(), Access::write));
}
int32_t* update(const Ints& ints) {
  return static_cast<int32_t*>(device_buffer(ints.data(), 4 * ints.size(), Access::update));
}

DType compute(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void finish(const std::string& what) {
  const std::string report = m2mkd::emulator::finish();
  if (!report.empty()) {
    ++failures;
    std::printf("FAILED %s: %s\n", what.c_str(), report.c_str());
  }
}

void expect(const std::string& what, const Floats& found, DType dtype,
            const std::function<double(int)>& expected) {
  const double tolerance = dtype == DType::f64   ? 1e-12
                           : dtype == DType::f32 ? 2e-5
                           : dtype == DType::f16 ? 1e-2
                                                 : 8e-2;
  for (int i = 0; i < found.count(); ++i) {
    const double wanted = expected(i);
    if (!(std::abs(found[i] - wanted) <= tolerance * (1 + std::abs(wanted)))) {
      ++failures;
      std::printf("FAILED %s: element %d is %g, expected %g\n", what.c_str(), i, found[i], wanted);
      return;
    }
  }
}

void expect(const std::string& what, const Ints& found, const Ints& expected) {
  if (found != expected) {
    ++failures;
    std::printf("FAILED %s: other integers than the loop's\n", what.c_str());
  }
}

}  // namespace
