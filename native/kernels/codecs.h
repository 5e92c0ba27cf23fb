// How a group of weights meets activations: one codec per (activation element, weight element) pair.
//
// A codec names the activation element `A`, the inputs per group `kGroup`, the bytes of one group of 16 rows, how a
// group becomes registers (`load`) and how it is multiplied by one row's kGroup activations and accumulated (`fma`).
#pragma once
#include MONDE_SIMD
#include "tasks.h"

namespace MONDE_ISA {

struct F32ByF32 {
  using A = float;
  using Weights = Vec;
  static constexpr int kGroup = 1, kGroupBytes = 64;
  static Weights load(const unsigned char* p) { return MONDE_ISA::load(reinterpret_cast<const float*>(p)); }
  static Vec fma(Vec acc, Weights w, const A* a) { return MONDE_ISA::fma(w, splat(*a), acc); }
};

struct F32ByF16 {
  using A = float;
  using Weights = Vec;
  static constexpr int kGroup = 1, kGroupBytes = 32;
  static Weights load(const unsigned char* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
  static Vec fma(Vec acc, Weights w, const A* a) { return MONDE_ISA::fma(w, splat(*a), acc); }
};

struct F32ByBF16 {
  using A = float;
  struct Weights {
    Vec even, odd;
  };
  static constexpr int kGroup = 2, kGroupBytes = 64;
  static Weights load(const unsigned char* p) {
    Weights w;
    load_bf16_pairs(reinterpret_cast<const uint16_t*>(p), w.even, w.odd);
    return w;
  }
  static Vec fma(Vec acc, const Weights& w, const A* a) {
    return MONDE_ISA::fma(w.odd, splat(a[1]), MONDE_ISA::fma(w.even, splat(a[0]), acc));
  }
};

#ifdef __AVX512BF16__
struct BF16ByBF16 {
  using A = uint16_t;
  using Weights = __m512i;
  static constexpr int kGroup = 2, kGroupBytes = 64;
  static Weights load(const unsigned char* p) { return _mm512_loadu_si512(p); }
  static Vec fma(Vec acc, Weights w, const A* a) {
    int pair;
    __builtin_memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#endif

}  // namespace MONDE_ISA
