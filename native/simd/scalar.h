// Vector vocabulary, portable: sixteen floats as an array. The compiler may vectorise the loops for the baseline.
#pragma once
#include "../layout.h"
#include "bits.h"

namespace MONDE_ISA {

struct Vec {
  float lane[16];
};

inline constexpr int kMaxRowsPerProduct = 4;

#define MONDE_LANES for (int i = 0; i < 16; ++i)

inline Vec splat(float v) {
  Vec r;
  MONDE_LANES r.lane[i] = v;
  return r;
}
inline Vec load(const float* p) {
  Vec r;
  MONDE_LANES r.lane[i] = p[i];
  return r;
}
inline void store(float* p, Vec v) { MONDE_LANES p[i] = v.lane[i]; }
inline Vec add(Vec a, Vec b) {
  MONDE_LANES a.lane[i] += b.lane[i];
  return a;
}
inline Vec mul(Vec a, Vec b) {
  MONDE_LANES a.lane[i] *= b.lane[i];
  return a;
}
inline Vec div(Vec a, Vec b) {
  MONDE_LANES a.lane[i] /= b.lane[i];
  return a;
}
inline Vec reciprocal(Vec a) {
  MONDE_LANES a.lane[i] = 1.f / a.lane[i];
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  MONDE_LANES c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
// A NaN in `a` is kept: clamps and ReLU must not hide it.
inline Vec min_keep_nan(Vec a, Vec b) {
  MONDE_LANES a.lane[i] = b.lane[i] < a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}
inline Vec max_keep_nan(Vec a, Vec b) {
  MONDE_LANES a.lane[i] = b.lane[i] > a.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}
inline Vec abs(Vec a) {
  MONDE_LANES a.lane[i] = bits_float(float_bits(a.lane[i]) & 0x7fffffffu);
  return a;
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  MONDE_LANES magnitude.lane[i] =
      bits_float((float_bits(magnitude.lane[i]) & 0x7fffffffu) | (float_bits(sign.lane[i]) & 0x80000000u));
  return magnitude;
}
// n rounded to an integer (|n| < 2^22), and 2^n for integers -126..127: the two halves of an exponential.
inline Vec round_nearest(Vec n) {
  MONDE_LANES n.lane[i] = (n.lane[i] + 12582912.f) - 12582912.f;
  return n;
}
// Adding 1.5 * 2^23 leaves n in the low mantissa bits: unlike a conversion to int, that is defined for NaN.
inline Vec pow2(Vec n) {
  MONDE_LANES n.lane[i] = bits_float((float_bits(n.lane[i] + 12582912.f) + 127) << 23);
  return n;
}

inline Vec load_bf16(const uint16_t* p) {
  Vec r;
  MONDE_LANES r.lane[i] = bits_float(uint32_t(p[i]) << 16);
  return r;
}
inline Vec load_f16(const uint16_t* p) {
  Vec r;
  MONDE_LANES r.lane[i] = f16_to_float(p[i]);
  return r;
}
inline void store_bf16(uint16_t* p, Vec v) { MONDE_LANES p[i] = float_to_bf16(v.lane[i]); }
inline void store_f16(uint16_t* p, Vec v) { MONDE_LANES p[i] = float_to_f16(v.lane[i]); }
// Sixteen pairs (even element, odd element) of bf16, widened.
inline void load_bf16_pairs(const uint16_t* p, Vec& even, Vec& odd) {
  MONDE_LANES even.lane[i] = bits_float(uint32_t(p[2 * i]) << 16);
  MONDE_LANES odd.lane[i] = bits_float(uint32_t(p[2 * i + 1]) << 16);
}
inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
inline float read_all(const void* data, size_t num_bytes) {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64_t seen[8] = {};
  for (size_t i = 0; i + 8 <= num_bytes / 8; i += 8)
    for (int j = 0; j < 8; ++j) seen[j] |= p[i + j];
  uint64_t all = 0;
  for (uint64_t s : seen) all |= s;
  return float(all);
}

#undef MONDE_LANES

}  // namespace MONDE_ISA
