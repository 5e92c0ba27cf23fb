// The one kernel body: gather, gate-up-activation, down-accumulate, over any vocabulary, codec and multiply.
//
// Letters: T tokens, D model dim, F expert hidden dim, R rows routed to one expert.
#pragma once
#include "activation.h"
#include "product.h"

namespace MONDE_ISA {

using monde::Batch;
using monde::DType;
using monde::ExpertGroup;
using monde::ExpertLayout;
using monde::kBlockRows;
using monde::kLanes;
using monde::kTileBytes;

inline int min_int(int a, int b) { return a < b ? a : b; }

// ---- elements: sixteen (or, at a ragged end, fewer) values in any stored type ----

inline Vec load_elements(const unsigned char* base, ptrdiff_t index, DType dtype) {
  if (dtype == DType::kF32) return load(reinterpret_cast<const float*>(base) + index);
  const uint16_t* p = reinterpret_cast<const uint16_t*>(base) + index;
  return dtype == DType::kBF16 ? load_bf16(p) : load_f16(p);
}
inline void store_elements(unsigned char* base, ptrdiff_t index, DType dtype, Vec v) {
  if (dtype == DType::kF32) return store(reinterpret_cast<float*>(base) + index, v);
  uint16_t* p = reinterpret_cast<uint16_t*>(base) + index;
  dtype == DType::kBF16 ? store_bf16(p, v) : store_f16(p, v);
}
inline Vec load_first(const unsigned char* base, ptrdiff_t index, DType dtype, int count) {
  if (count >= 16) return load_elements(base, index, dtype);
  const int item_bytes = dtype == DType::kF32 ? 4 : 2;
  alignas(64) unsigned char padded[64] = {};
  __builtin_memcpy(padded, base + index * item_bytes, count * item_bytes);
  return load_elements(padded, 0, dtype);
}
inline void store_first(unsigned char* base, ptrdiff_t index, DType dtype, Vec v, int count) {
  if (count >= 16) return store_elements(base, index, dtype, v);
  const int item_bytes = dtype == DType::kF32 ? 4 : 2;
  alignas(64) unsigned char padded[64];
  store_elements(padded, 0, dtype, v);
  __builtin_memcpy(base + index * item_bytes, padded, count * item_bytes);
}
inline void store_activation(float* p, Vec v) { store(p, v); }
inline void store_activation(uint16_t* p, Vec v) { store_bf16(p, v); }

// Where the block that begins at `row` lies. A group's blocks before its last are full, so rows simply add up.
template <class A>
inline A* block_at(unsigned char* blocks, int row, int k_pad) {
  return reinterpret_cast<A*>(blocks) + ptrdiff_t(row) * k_pad;
}
template <class A>
inline const A* block_at(const unsigned char* blocks, int row, int k_pad) {
  return reinterpret_cast<const A*>(blocks) + ptrdiff_t(row) * k_pad;
}

// ---- the three tasks ----

template <class A>
void gather(const ExpertLayout& layout, const Batch& batch, const ExpertGroup& group, int row_begin, int row_end,
            unsigned char* x_blocks) {
  constexpr int kTileK = kTileBytes / int(sizeof(A));
  const int D = layout.d_model;
  const bool is_own = batch.x_dtype == (sizeof(A) == 2 ? DType::kBF16 : DType::kF32);
  const int copied = is_own ? D / kTileK * kTileK : 0;  // whole tile rows, as they are
  for (int row = row_begin; row < row_end; row += kBlockRows) {
    const int rows = min_int(kBlockRows, row_end - row);
    A* block = block_at<A>(x_blocks, row - row_begin, layout.d_pad_k);
    for (int r = 0; r < rows; ++r) {
      const ptrdiff_t x_row = batch.row_token[group.first_row + row + r] * batch.x_row_stride;
      const A* from = reinterpret_cast<const A*>(batch.x) + x_row;
      for (int k = 0; k < copied; k += kTileK)
        __builtin_memcpy(block + (ptrdiff_t(k / kTileK) * rows + r) * kTileK, from + k, kTileBytes);
      for (int k = copied; k < layout.d_pad_k; k += 16) {
        A* to = block + (ptrdiff_t(k / kTileK) * rows + r) * kTileK + k % kTileK;
        store_activation(to, k < D ? load_first(batch.x, x_row + k, batch.x_dtype, D - k) : splat(0.f));
      }
    }
  }
}

// Where hidden values of row `row` (counted in the group) begin for columns 16 * panel.
template <class A>
inline A* hidden_at(const ExpertLayout& layout, const Batch& batch, const ExpertGroup& group, int row, int panel) {
  constexpr int kTileK = kTileBytes / int(sizeof(A));
  const int block_row = row / kBlockRows * kBlockRows;
  const int block_rows = min_int(kBlockRows, group.num_rows - block_row);
  const int k = panel * kLanes;
  return block_at<A>(batch.h_blocks, group.first_row + block_row, layout.f_pad_k) +
         (ptrdiff_t(k / kTileK) * block_rows + row - block_row) * kTileK + k % kTileK;
}

template <class Multiply>
void gate_up(const ExpertLayout& layout, const monde::Activation& activation, const Batch& batch,
             const ExpertGroup& group, const unsigned char* x_blocks, int row_begin, int row_end, int panel_begin,
             int panel_end) {
  using A = typename Multiply::A;
  constexpr int kChunk = Multiply::kChunkRows;
  const int num_tiles = layout.d_pad_k * int(sizeof(A)) / kTileBytes;
  const Depth depth = {0, num_tiles, num_tiles};
  const int num_passes = (row_end - row_begin + kChunk - 1) / kChunk;
  alignas(64) float sums[2][kChunk * kLanes];
  float* const sum_of[2] = {sums[0], sums[1]};
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const unsigned char* gate = group.in_panels + layout.in_unit_bytes * panel;
    const unsigned char* const pair[2] = {gate, gate + layout.in_panel_bytes};
    // The adjacent panel comes next, in this unit or (likely) this thread's next; after the expert's last panel the
    // next expert's first one.
    const unsigned char* const after = panel + 1 < layout.num_f_panels                ? gate + layout.in_unit_bytes
                                       : &group + 1 < batch.groups + batch.num_groups ? (&group)[1].in_panels
                                                                                      : gate;
    const unsigned char* const next[2] = {after, after + layout.in_panel_bytes};
    const Vec up_bias = group.up_bias ? load(group.up_bias + panel * kLanes) : splat(0.f);
    const Vec gate_bias = group.gate_bias ? load(group.gate_bias + panel * kLanes) : splat(0.f);
    for (int row = row_begin; row < row_end; row += kChunk) {
      const int rows = min_int(kChunk, row_end - row);
      const A* x = block_at<A>(x_blocks, row - row_begin, layout.d_pad_k);
      const Pass pass = {(row - row_begin) / kChunk, num_passes};
      if (layout.gated)
        Multiply::template run<2>(rows, x, depth, pair, next, pass, sum_of);
      else
        Multiply::template run<1>(rows, x, depth, pair, next, pass, sum_of);
      for (int r = 0; r < rows; ++r) {
        const Vec first = load(sums[0] + r * kLanes);
        const Vec h = layout.gated
                          ? activate(activation, true, add(first, gate_bias), add(load(sums[1] + r * kLanes), up_bias))
                          : activate(activation, false, add(first, up_bias), splat(0.f));
        store_activation(hidden_at<A>(layout, batch, group, row + r, panel), h);
      }
    }
  }
  // F padded to 32 may exceed the 16-row panels: the last half tile has no panel and must read as zero.
  if (panel_end == layout.num_f_panels && layout.num_f_panels * kLanes < layout.f_pad_k)
    for (int row = row_begin; row < row_end; ++row)
      store_activation(hidden_at<A>(layout, batch, group, row, layout.num_f_panels), splat(0.f));
  Multiply::finish();
}

// y[:, column panels] += weight * (h . panels + bias) for rows [row, row + rows) of a group, over a depth of F; the
// bias comes with its first tile. y rows are `y_columns` wide.
template <class Multiply, int kPanels>
void down_rows(const ExpertLayout& layout, const Batch& batch, const ExpertGroup& group, int row, int rows, Depth depth,
               int panel, const unsigned char* const* next, Pass pass, float* y, int y_columns) {
  using A = typename Multiply::A;
  alignas(64) float sums[kPanels][Multiply::kChunkRows * kLanes];
  float* sum_of[kPanels];
  const unsigned char* panels[kPanels];
  Vec bias[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    sum_of[p] = sums[p];
    panels[p] = group.down_panels + layout.down_panel_bytes * (panel + p);
    bias[p] = group.down_bias && depth.begin == 0 ? load(group.down_bias + (panel + p) * kLanes) : splat(0.f);
  }
  const A* h = block_at<A>(batch.h_blocks, group.first_row + row, layout.f_pad_k);
  Multiply::template run<kPanels>(rows, h, depth, panels, next, pass, sum_of);
  for (int r = 0; r < rows; ++r) {
    const int routed = group.first_row + row + r;
    float* to = y + ptrdiff_t(batch.row_token[routed]) * y_columns;
    const Vec weight = splat(batch.row_weight[routed]);
    for (int p = 0; p < kPanels; ++p)
      store(to + p * kLanes, fma(add(load(sums[p] + r * kLanes), bias[p]), weight, load(to + p * kLanes)));
  }
}

// Column panels [panel_begin, panel_end) of y, summed over experts [group_begin, group_end) in order: no two tasks
// touch the same sums, so the result does not depend on the number of threads.
template <class Multiply>
void down(const ExpertLayout& layout, const Batch& batch, int group_begin, int group_end, int panel_begin,
          int panel_end, float* y) {
  using A = typename Multiply::A;
  constexpr int kChunk = Multiply::kChunkRows;
  const int y_columns = (panel_end - panel_begin) * kLanes;
  const int num_tiles = layout.f_pad_k * int(sizeof(A)) / kTileBytes;
  for (ptrdiff_t i = 0; i < ptrdiff_t(batch.num_tokens) * y_columns; i += kLanes) store(y + i, splat(0.f));
  for (int g = group_begin; g < group_end; ++g) {
    const ExpertGroup& group = batch.groups[g];
    // After the last expert (likely) this thread's next task begins with the first one's next panels.
    const bool is_last = g + 1 == batch.num_groups;
    const ExpertGroup& following = batch.groups[is_last ? 0 : g + 1];
    const int following_panel = is_last && panel_end < layout.num_d_panels ? panel_end : panel_begin;
    const int num_passes = (group.num_rows + kChunk - 1) / kChunk;
    for (int row = 0; row < group.num_rows; row += kChunk) {
      const int rows = min_int(kChunk, group.num_rows - row);
      // A chunk's hidden rows stay in L2 while the panels pass: F is cut where they would not. Few rows fit whole.
      const int fitting_tiles = Multiply::kStretchBytes / (rows * kTileBytes);
      const int cut_tiles = num_tiles <= fitting_tiles ? num_tiles : fitting_tiles;
      for (int tile = group.first_panel * kLanes * int(sizeof(A)) / kTileBytes; tile < num_tiles; tile += cut_tiles) {
        const Depth depth = {tile, min_int(tile + cut_tiles, num_tiles), num_tiles};
        for (int panel = panel_begin; panel < panel_end; panel += 2) {
          const bool two = panel + 1 < panel_end;
          // Read once: the task's next panels, and after its last ones the next expert's first. Read several times:
          // the same panels of the next expert.
          const bool in_order = num_passes == 1 && panel + 2 < panel_end;
          const int next_panel = in_order ? panel + 2 : num_passes == 1 ? following_panel : panel;
          const unsigned char* const after =
              (in_order ? group : following).down_panels + layout.down_panel_bytes * next_panel;
          const unsigned char* const next[2] = {after, after + layout.down_panel_bytes};
          const Pass pass = {row / kChunk, num_passes};
          float* const to = y + (panel - panel_begin) * kLanes;
          two ? down_rows<Multiply, 2>(layout, batch, group, row, rows, depth, panel, next, pass, to, y_columns)
              : down_rows<Multiply, 1>(layout, batch, group, row, rows, depth, panel, next, pass, to, y_columns);
        }
      }
    }
  }
  Multiply::finish();
}

inline void write(const ExpertLayout& layout, const Batch& batch, int panel_begin, int panel_end, const float* y,
                  int num_sums, ptrdiff_t sum_stride) {
  const ptrdiff_t y_columns = (panel_end - panel_begin) * kLanes;
  for (int t = 0; t < batch.num_tokens; ++t)
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      const int column = panel * kLanes;
      const float* from = y + t * y_columns + column - panel_begin * kLanes;
      Vec sum = load(from);
      for (int i = 1; i < num_sums; ++i) sum = add(sum, load(from + i * sum_stride));
      const ptrdiff_t at = t * batch.out_row_stride + column;
      if (batch.adds) sum = add(sum, load_first(batch.out, at, batch.out_dtype, layout.d_model - column));
      store_first(batch.out, at, batch.out_dtype, sum, layout.d_model - column);
    }
}

template <class Multiply>
constexpr monde::Kernels kernels_of() {
  using A = typename Multiply::A;
  return {int(sizeof(A)), Multiply::kStretchBytes, &gather<A>, &gate_up<Multiply>, &down<Multiply>, &write};
}

inline float read_bytes(const void* data, size_t num_bytes) { return read_all(data, num_bytes); }

// Sixteen independent chains of multiply-adds in registers: what the vector unit can do at most.
template <class Codec>
double vector_peak(int num_iterations) {
  alignas(64) unsigned char weights[Codec::kGroupBytes];
  alignas(64) typename Codec::A row[Codec::kGroup];
  __builtin_memset(weights, 0x3c, sizeof weights);  // about 0.01 in every element type
  __builtin_memset(row, 0x3c, sizeof row);
  asm volatile("" : : "r"(weights), "r"(row) : "memory");  // their values are unknown from here on
  constexpr int kChains = 2 * kMaxRowsPerProduct;
  Vec acc[kChains];
  for (Vec& a : acc) a = splat(0.f);
  const auto w = Codec::load(weights);
  for (int i = 0; i < num_iterations; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = Codec::fma(acc[c], w, row);
  }
  Vec sum = acc[0];
  for (int c = 1; c < kChains; ++c) sum = add(sum, acc[c]);
  alignas(64) float sink[16];
  store(sink, sum);
  asm volatile("" : : "r"(sink) : "memory");
  return 2.0 * kLanes * Codec::kGroup * kChains * num_iterations;
}

}  // namespace MONDE_ISA
