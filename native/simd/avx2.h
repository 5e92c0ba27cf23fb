// Vector vocabulary: AVX2 + FMA + F16C. Sixteen floats are two registers.
#pragma once
#include <immintrin.h>

#include "../layout.h"
#include "bits.h"

namespace MONDE_ISA {

struct Vec {
  __m256 lo, hi;
};

inline constexpr int kMaxRowsPerProduct = 3;  // 2 panels x 3 rows x 2 registers leave 4 of 16 for operands

inline Vec splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec reciprocal(Vec a) { return div({_mm256_set1_ps(1.f), _mm256_set1_ps(1.f)}, a); }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
// MINPS and MAXPS return the second operand when either is NaN, so a NaN in `a` is kept.
inline Vec min_keep_nan(Vec a, Vec b) { return {_mm256_min_ps(b.lo, a.lo), _mm256_min_ps(b.hi, a.hi)}; }
inline Vec max_keep_nan(Vec a, Vec b) { return {_mm256_max_ps(b.lo, a.lo), _mm256_max_ps(b.hi, a.hi)}; }
inline Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Vec copy_sign(Vec magnitude, Vec from) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, magnitude.lo), _mm256_and_ps(sign, from.lo)),
          _mm256_or_ps(_mm256_andnot_ps(sign, magnitude.hi), _mm256_and_ps(sign, from.hi))};
}
inline Vec round_nearest(Vec n) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(n.lo, mode), _mm256_round_ps(n.hi, mode)};
}
inline __m256 pow2_half(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline Vec pow2(Vec n) { return {pow2_half(n.lo), pow2_half(n.hi)}; }

inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline Vec load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_bf16(uint16_t* p, Vec v) {
  float lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(lanes[i]);
}
inline void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline void load_bf16_pairs(const uint16_t* p, Vec& even, Vec& odd) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
  const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
inline void prefetch_l1(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
inline float read_all(const void* data, size_t num_bytes) {
  const float* p = static_cast<const float*>(data);
  __m256 seen[8];
  for (auto& s : seen) s = _mm256_setzero_ps();
  for (size_t i = 0; i + 64 <= num_bytes / 4; i += 64)
    for (int j = 0; j < 8; ++j) seen[j] = _mm256_or_ps(seen[j], _mm256_loadu_ps(p + i + 8 * j));
  for (int j = 1; j < 8; ++j) seen[0] = _mm256_or_ps(seen[0], seen[j]);
  return _mm256_cvtss_f32(seen[0]);
}

}  // namespace MONDE_ISA
