// Random typed arrays of exactly their size, so that AddressSanitizer sees the first byte read past the end.
#pragma once
#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "../runtime/pack.h"
#include "../simd/bits.h"

namespace monde::test {

inline constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

inline const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kBF16 ? "bf16" : "f16";
}

struct Array {
  DType dtype;
  std::vector<unsigned char> bytes;

  Array(DType type, int64_t count) : dtype(type), bytes(size_t(count) * itemsize_bytes(type)) {}
  unsigned char* data() { return bytes.data(); }
  const unsigned char* data() const { return bytes.data(); }
  double operator[](int64_t index) const { return load_element(bytes.data(), index, dtype); }
  void set(int64_t index, float value) {
    const uint16_t half = dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
    if (dtype == DType::kF32)
      std::memcpy(data() + index * 4, &value, 4);
    else
      std::memcpy(data() + index * 2, &half, 2);
  }
};

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  int below(int limit) { return int(generator_() % unsigned(limit)); }
  float uniform(float largest) { return (float(generator_() >> 8) * 0x1p-23f - 1.f) * largest; }
  void fill(Array& array, float largest) {
    const int64_t count = int64_t(array.bytes.size()) / itemsize_bytes(array.dtype);
    for (int64_t i = 0; i < count; ++i) array.set(i, uniform(largest));
  }

 private:
  std::mt19937 generator_;
};

}  // namespace monde::test
