// Element conversions by bit pattern. Internal linkage: every ISA file gets its own copy, compiled for that ISA.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline uint32_t float_bits(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float bits_float(uint32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }
// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float v) {
  const uint32_t b = float_bits(v);
  if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t((b >> 16) | 0x40);
  return uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 turns the f16 exponent bias into f32's and normalises subnormals exactly.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}
inline uint16_t float_to_f16(float v) {
  const uint32_t b = float_bits(v);
  const uint16_t sign = uint16_t((b >> 16) & 0x8000);
  const uint32_t magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal in f16: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
    return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13));
}

}  // namespace
