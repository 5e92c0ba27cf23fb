// A dense layer for a few tokens: rows of a row-major bf16 matrix, read in place, once.
//
// Letters: T tokens, N output rows, K inputs.
#pragma once
#include MONDE_SIMD
#include "tasks.h"

namespace MONDE_ISA {

// 32 consecutive bf16 values and how two such chunks multiply.
#ifdef __AVX512BF16__
struct Chunk {
  __m512i pairs;
};
inline Chunk load_chunk(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Vec fma_chunk(Vec acc, Chunk a, Chunk b) { return _mm512_dpbf16_ps(acc, (__m512bh)a.pairs, (__m512bh)b.pairs); }
#else
struct Chunk {
  Vec even, odd;
};
inline Chunk load_chunk(const uint16_t* p) {
  Chunk c;
  load_bf16_pairs(p, c.even, c.odd);
  return c;
}
inline Vec fma_chunk(Vec acc, const Chunk& a, const Chunk& b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
#endif

inline constexpr int kChunk = 32;
inline constexpr int kSums = 4;  // sums of one row, so that additions need not wait for each other

// The values from k on, zeros after the end.
inline Chunk load_tail(const uint16_t* p, int count) {
  alignas(64) uint16_t padded[kChunk] = {};
  __builtin_memcpy(padded, p, count * sizeof(uint16_t));
  return load_chunk(padded);
}

inline float sum_lanes(Vec v) {
  alignas(64) float lanes[16];
  store(lanes, v);
  float sum = 0.f;
  for (float lane : lanes) sum += lane;
  return sum;
}

// Row by row, because memory is the limit: one stream in order is what hardware prefetchers follow best (a Zen 5 core
// read four rows side by side at 29 GB/s and in order at 40, of 42 in a plain read test).
template <int kTokens>
void dense_range(const monde::DenseArgs& args, int row_begin, int row_end) {
  const int K = args.num_inputs, whole = K / kChunk * kChunk;
  const uint16_t* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = args.x + t * args.x_row_stride;
  for (int row = row_begin; row < row_end; ++row) {
    const uint16_t* w = args.weights + row * args.weights_row_stride;
    Vec acc[kSums][kTokens];
    for (int s = 0; s < kSums; ++s)
      for (int t = 0; t < kTokens; ++t) acc[s][t] = splat(0.f);
    int k = 0;
    for (; k + kSums * kChunk <= K; k += kSums * kChunk)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) {
        const Chunk from_w = load_chunk(w + k + s * kChunk);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) acc[s][t] = fma_chunk(acc[s][t], from_w, load_chunk(x[t] + k + s * kChunk));
      }
    for (; k < whole; k += kChunk)
      for (int t = 0; t < kTokens; ++t) acc[0][t] = fma_chunk(acc[0][t], load_chunk(w + k), load_chunk(x[t] + k));
    if (k < K)
      for (int t = 0; t < kTokens; ++t)
        acc[0][t] = fma_chunk(acc[0][t], load_tail(w + k, K - k), load_tail(x[t] + k, K - k));
    const float bias = args.bias ? bf16_to_float(args.bias[row]) : 0.f;
    for (int t = 0; t < kTokens; ++t) {
      const float sum = sum_lanes(add(add(acc[0][t], acc[1][t]), add(acc[2][t], acc[3][t])));
      args.out[t * args.out_row_stride + row] = float_to_bf16(sum + bias);
    }
  }
}

// Rows [row_begin, row_end) of out for every token; args.num_tokens is at most kMaxDenseTokens.
inline void dense(const monde::DenseArgs& args, int row_begin, int row_end) {
  switch (args.num_tokens) {
    case 1:
      return dense_range<1>(args, row_begin, row_end);
    case 2:
      return dense_range<2>(args, row_begin, row_end);
    case 3:
      return dense_range<3>(args, row_begin, row_end);
    case 4:
      return dense_range<4>(args, row_begin, row_end);
  }
}

}  // namespace MONDE_ISA
