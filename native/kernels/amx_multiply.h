// The product on AMX tiles: up to 128 activation rows by two weight panels, 32 rows at a time. Single rows too: memory
// bounds those, and tile loads ask for it 6% faster than the vector unit does.
//
// A panel's 16 consecutive groups are one B tile as they lie; a block's tile is one A tile as it lies.
#pragma once
#include "product.h"

namespace MONDE_ISA {

struct AmxMultiply {
  using A = uint16_t;
  static constexpr int kChunkRows = 8 * monde::kBlockRows;
  static constexpr int kStretchBytes = 1 << 20;  // every core with AMX has 2 MiB of L2
  static constexpr int kTileElements = 32;       // bf16 values in a tile row
  static constexpr int kPanelTileBytes = 1024;   // 16 groups of 64 bytes
  // Four products take 64 cycles, and their four operands would take as long from L2. So K is cut, and the weights of
  // a cut (24 KiB of two panels) stay in L1 while all rows pass over them; sums wait in memory between cuts. Shorter
  // cuts let two hyperthreads share L1, but storing and loading sums takes 180 cycles each time.
  static constexpr int kCutTiles = MONDE_AMX_CUT;

  // Tile registers: 0 to 3 accumulate (block, panel), 4 and 5 hold activations, 6 and 7 weights.
  struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  // Loading a configuration clears all tiles and costs tens of cycles: kept until the number of rows changes.
  static void configure(int rows) {
    if (configured_rows() == rows) return;
    configured_rows() = rows;
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = uint8_t(i < 6 ? rows : 16);
      config.row_bytes[i] = 64;
    }
    // GCC 12's _tile_loadconfig says that it reads eight bytes: the stores of the others were left out.
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }

  template <int kPanels>
  static void run(int rows, const A* a, Depth depth, const unsigned char* const* panels,
                  const unsigned char* const* next, Pass pass, float* const* sums) {
    constexpr int kPairRows = 2 * monde::kBlockRows;
    const int num_pairs = (rows + kPairRows - 1) / kPairRows, num_tiles = depth.end - depth.begin;
    const bool one_block = rows <= monde::kBlockRows, is_cut = num_pairs > 1;
    // Of several blocks the last may have fewer rows; its tile then reads on into memory behind it, which is scratch
    // too, and those rows of the sums are nobody's.
    configure(one_block ? rows : monde::kBlockRows);
    PanelPrefetcher prefetchers[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      const ptrdiff_t at = ptrdiff_t(depth.begin) * kPanelTileBytes;
      prefetchers[p] =
          PanelPrefetcher(panels[p] + at, next[p] + at, num_tiles, {pass.index * num_pairs, pass.count * num_pairs});
    }
    const int cut_tiles = is_cut ? kCutTiles : num_tiles;
    for (int begin = depth.begin; begin < depth.end; begin += cut_tiles) {
      const int end = begin + cut_tiles < depth.end ? begin + cut_tiles : depth.end;
      for (int row = 0; row < rows; row += kPairRows) {
        const int rows_low = rows - row < monde::kBlockRows ? rows - row : monde::kBlockRows;
        const int rows_high = rows - row - rows_low < monde::kBlockRows ? rows - row - rows_low : monde::kBlockRows;
        const A* low = a + ptrdiff_t(row) * depth.block_tiles * kTileElements;
        float* pair_sums[kPanels];
        for (int p = 0; p < kPanels; ++p) pair_sums[p] = sums[p] + row * 16;
        const Cut cut = {begin, end, depth.block_tiles, rows_low, rows_high, begin > depth.begin};
        rows_high == 0 ? tiles<kPanels, false, false>(cut, low, panels, prefetchers, pair_sums)
        : is_cut       ? tiles<kPanels, true, true>(cut, low, panels, prefetchers, pair_sums)
                       : tiles<kPanels, true, false>(cut, low, panels, prefetchers, pair_sums);
      }
    }
  }

  using PanelPrefetcher = Prefetcher<kPanelTileBytes>;

  // Tiles [begin, end) of K for one or two blocks; `resumes`: sums hold those of earlier tiles.
  struct Cut {
    int begin, end, block_tiles, rows_low, rows_high;
    bool resumes;
  };

  // kStreams: where K is cut, activations pass by the weights in L1 and must not push them out.
  template <int kPanels, bool kTwoBlocks, bool kStreams>
  static void tiles(const Cut& cut, const A* low, const unsigned char* const* panels, PanelPrefetcher* prefetchers,
                    float* const* sums) {
    const A* high = low + ptrdiff_t(cut.rows_low) * cut.block_tiles * kTileElements;
    if (cut.resumes) {
      _tile_loadd(0, sums[0], 64);
      if constexpr (kPanels == 2) _tile_loadd(1, sums[1], 64);
      if constexpr (kTwoBlocks) _tile_loadd(2, sums[0] + 256, 64);
      if constexpr (kTwoBlocks && kPanels == 2) _tile_loadd(3, sums[1] + 256, 64);
    } else {
      _tile_zero(0);
      if constexpr (kPanels == 2) _tile_zero(1);
      if constexpr (kTwoBlocks) _tile_zero(2);
      if constexpr (kTwoBlocks && kPanels == 2) _tile_zero(3);
    }
    for (int t = cut.begin; t < cut.end; ++t) {
      const ptrdiff_t at = ptrdiff_t(t) * kPanelTileBytes;
      for (int p = 0; p < kPanels; ++p) prefetchers[p].step();
      _tile_loadd(6, panels[0] + at, 64);
      if constexpr (kPanels == 2) _tile_loadd(7, panels[1] + at, 64);
      const A* const low_tile = low + ptrdiff_t(t) * cut.rows_low * kTileElements;
      if constexpr (kStreams)
        _tile_stream_loadd(4, low_tile, 64);
      else
        _tile_loadd(4, low_tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kPanels == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoBlocks) {
        const A* const high_tile = high + ptrdiff_t(t) * cut.rows_high * kTileElements;
        if constexpr (kStreams)
          _tile_stream_loadd(5, high_tile, 64);
        else
          _tile_loadd(5, high_tile, 64);
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
  AmxMultiply::configure(16);
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
