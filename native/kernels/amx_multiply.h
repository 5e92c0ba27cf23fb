// The product on AMX tiles: up to 32 activation rows by two weight panels.
//
// A panel's 16 consecutive groups are one B tile as they lie; a block's tile is one A tile as it lies.
#pragma once
#include "product.h"

namespace MONDE_ISA {

struct AmxMultiply {
  using A = uint16_t;
  static constexpr int kChunkRows = 2 * monde::kBlockRows;
  // Below this many rows the vector unit keeps up with memory and the tile's fixed cost does not pay.
  static constexpr int kFewRows = 4;
  static constexpr int kTileElements = 32;      // bf16 values in a tile row
  static constexpr int kPanelTileBytes = 1024;  // 16 groups of 64 bytes

  // Tile registers: 0 to 3 accumulate (block, panel), 4 and 5 hold activations, 6 and 7 weights.
  struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  // Loading a configuration clears all tiles and costs tens of cycles: kept until the row counts change.
  static void configure(int rows_low, int rows_high) {
    const int wanted = rows_low * 32 + rows_high;
    if (configured_rows() == wanted) return;
    configured_rows() = wanted;
    TileConfig config = {};
    config.palette = 1;
    const int rows[8] = {rows_low, rows_low, rows_high, rows_high, rows_low, rows_high, 16, 16};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = uint8_t(rows[i] ? rows[i] : 1);
      config.row_bytes[i] = 64;
    }
    _tile_loadconfig(&config);
  }

  template <int kPanels>
  static void run(int rows, const A* a, int num_tiles, const unsigned char* const* panels,
                  const unsigned char* const* next, Pass pass, float* const* sums) {
    if (rows <= kFewRows) return multiply_block<BF16ByBF16, kPanels>(rows, a, num_tiles, panels, next, pass, sums);
    const int rows_low = rows < monde::kBlockRows ? rows : monde::kBlockRows;
    const int rows_high = rows - rows_low;
    configure(rows_low, rows_high);
    rows_high ? tiles<kPanels, true>(rows_low, rows_high, a, num_tiles, panels, next, pass, sums)
              : tiles<kPanels, false>(rows_low, rows_high, a, num_tiles, panels, next, pass, sums);
  }

  template <int kPanels, bool kTwoBlocks>
  static void tiles(int rows_low, int rows_high, const A* low, int num_tiles, const unsigned char* const* panels,
                    const unsigned char* const* next, Pass pass, float* const* sums) {
    const A* high = low + ptrdiff_t(rows_low) * num_tiles * kTileElements;
    using PanelPrefetcher = Prefetcher<kPanelTileBytes>;
    PanelPrefetcher prefetcher[kPanels];
    for (int p = 0; p < kPanels; ++p) prefetcher[p] = PanelPrefetcher(panels[p], next[p], num_tiles, pass);
    _tile_zero(0);
    if constexpr (kPanels == 2) _tile_zero(1);
    if constexpr (kTwoBlocks) _tile_zero(2);
    if constexpr (kTwoBlocks && kPanels == 2) _tile_zero(3);
    for (int t = 0; t < num_tiles; ++t) {
      const ptrdiff_t at = ptrdiff_t(t) * kPanelTileBytes;
      for (int p = 0; p < kPanels; ++p) prefetcher[p].step();
      _tile_loadd(6, panels[0] + at, 64);
      if constexpr (kPanels == 2) _tile_loadd(7, panels[1] + at, 64);
      _tile_loadd(4, low + ptrdiff_t(t) * rows_low * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kPanels == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoBlocks) {
        _tile_loadd(5, high + ptrdiff_t(t) * rows_high * kTileElements, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kPanels == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (kPanels == 2) _tile_stored(1, sums[1], 64);
    if constexpr (kTwoBlocks) _tile_stored(2, sums[0] + 256, 64);
    if constexpr (kTwoBlocks && kPanels == 2) _tile_stored(3, sums[1] + 256, 64);
  }

  // Gives the tile state back, so that a context switch does not have to save 8 KiB.
  static void finish() {
    _tile_release();
    configured_rows() = 0;
  }

  static int& configured_rows() {
    static thread_local int rows = 0;
    return rows;
  }
};

// Two by two tiles with all operands in L1: what the matrix unit can do at most when it has to load its operands.
inline double amx_peak(int num_iterations) {
  alignas(64) static thread_local unsigned char operands[4][AmxMultiply::kPanelTileBytes];
  __builtin_memset(operands, 0x3c, sizeof operands);  // about 0.01 in every element
  AmxMultiply::configure(16, 16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < num_iterations; ++i) {
    _tile_loadd(4, operands[0], 64);
    _tile_loadd(6, operands[2], 64);
    _tile_loadd(7, operands[3], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, operands[1], 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  AmxMultiply::finish();
  return 2.0 * 16 * 16 * 32 * 4 * num_iterations;
}

}  // namespace MONDE_ISA
