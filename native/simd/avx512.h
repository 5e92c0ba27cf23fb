// Vector vocabulary: AVX-512 (F, BW, DQ, VL). Sixteen floats are one register.
#pragma once
#include <immintrin.h>

#include "../layout.h"
#include "bits.h"

namespace MONDE_ISA {

using Vec = __m512;

inline constexpr int kMaxRowsPerProduct = 8;  // 2 panels x 8 rows = 16 of 32 registers accumulate

inline Vec splat(float v) { return _mm512_set1_ps(v); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// Within 1 ulp where neither is beyond 2^126: an estimate of 14 bits and a step of Newton's, in half the time of div.
inline Vec reciprocal(Vec a) {
  const Vec r = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.f)), r, r);
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// MINPS and MAXPS return the second operand when either is NaN, so a NaN in `a` is kept.
inline Vec min_keep_nan(Vec a, Vec b) { return _mm512_min_ps(b, a); }
inline Vec max_keep_nan(Vec a, Vec b) { return _mm512_max_ps(b, a); }
inline Vec abs(Vec a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.f), a); }
inline Vec copy_sign(Vec magnitude, Vec from) {
  return _mm512_or_ps(abs(magnitude), _mm512_and_ps(_mm512_set1_ps(-0.f), from));
}
inline Vec round_nearest(Vec n) { return _mm512_roundscale_ps(n, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec pow2(Vec n) { return _mm512_scalef_ps(_mm512_set1_ps(1.f), n); }

inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_bf16(uint16_t* p, Vec v) {
#ifdef __AVX512BF16__
  const __m256bh narrow = _mm512_cvtneps_pbh(v);  // denormals, below 2^-126, become zero
  __builtin_memcpy(p, &narrow, sizeof narrow);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
#endif
}
inline void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void load_bf16_pairs(const uint16_t* p, Vec& even, Vec& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
inline void prefetch_l1(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
inline float read_all(const void* data, size_t num_bytes) {
  const float* p = static_cast<const float*>(data);
  __m512 seen[8];
  for (auto& s : seen) s = _mm512_setzero_ps();
  for (size_t i = 0; i + 128 <= num_bytes / 4; i += 128)
    for (int j = 0; j < 8; ++j) seen[j] = _mm512_or_ps(seen[j], _mm512_loadu_ps(p + i + 16 * j));
  for (int j = 1; j < 8; ++j) seen[0] = _mm512_or_ps(seen[0], seen[j]);
  return _mm512_cvtss_f32(seen[0]);
}

}  // namespace MONDE_ISA
