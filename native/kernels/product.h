// The inner product of a block of activation rows with weight panels, in the vector vocabulary.
#pragma once
#include "codecs.h"

namespace MONDE_ISA {

// Weights come from memory once and in order. Hardware prefetchers follow them only inside a 4 KiB page and stop at a
// panel's end, so software does it: into L2 far ahead (a memory latency at a core's share of bandwidth, several times
// over, so that arithmetic and reading overlap) and into L1 just ahead. A tile is 1 KiB of a panel. Both distances
// were chosen on a 16-core Emerald Rapids: neither alone reached 90% of the plain read test at 1 to 8 rows.
inline constexpr int kFarTiles = 16;
inline constexpr int kNearTiles = 2;

// Runs a fixed distance ahead of a panel and goes over to the panel that will be read next.
template <int kDistanceTiles, int kPanelTileBytes>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const unsigned char* panel, const unsigned char* next, int num_tiles) : next_(next) {
    const int distance = num_tiles < kDistanceTiles ? num_tiles : kDistanceTiles;
    at_ = panel + distance * kPanelTileBytes;
    tiles_left_ = num_tiles - distance;
  }
  template <class Fetch>
  void step(Fetch fetch) {
    if (tiles_left_-- == 0) at_ = next_;
    for (int line = 0; line < kPanelTileBytes; line += 64) fetch(at_ + line);
    at_ += kPanelTileBytes;
  }

 private:
  const unsigned char* at_;
  const unsigned char* next_;
  int tiles_left_;  // until at_ leaves this panel
};

template <int kPanelTileBytes>
class Prefetcher {
 public:
  Prefetcher() = default;
  Prefetcher(const unsigned char* panel, const unsigned char* next, int num_tiles)
      : far_(panel, next, num_tiles), near_(panel, next, num_tiles) {}
  void step() {
    far_.step([](const unsigned char* line) { prefetch_l2(line); });
    near_.step([](const unsigned char* line) { prefetch_l1(line); });
  }

 private:
  Ahead<kFarTiles, kPanelTileBytes> far_;
  Ahead<kNearTiles, kPanelTileBytes> near_;
};

// sums[p][r] = panel p (16 outputs) . row r, for kPanels panels and kRows rows of one block.
//   a:      block [num_tiles][block_rows][tile_k]
//   next:   panel read after panels[p]
//   sums:   rows of 16 floats
template <class Codec, int kRows, int kPanels>
inline void multiply_rows(const typename Codec::A* a, int block_rows, int num_tiles, const unsigned char* const* panels,
                          const unsigned char* const* next, float* const* sums) {
  constexpr int kTileK = monde::kTileBytes / int(sizeof(typename Codec::A));
  constexpr int kGroups = kTileK / Codec::kGroup;
  Vec acc[kPanels][kRows];
  for (int p = 0; p < kPanels; ++p)
    for (int r = 0; r < kRows; ++r) acc[p][r] = splat(0.f);
  const unsigned char* w[kPanels];
  using PanelPrefetcher = Prefetcher<kGroups * Codec::kGroupBytes>;
  PanelPrefetcher prefetcher[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    w[p] = panels[p];
    prefetcher[p] = PanelPrefetcher(panels[p], next[p], num_tiles);
  }
  for (int tile = 0; tile < num_tiles; ++tile, a += block_rows * kTileK) {
    for (int p = 0; p < kPanels; ++p) prefetcher[p].step();
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const auto weights = Codec::load(w[p]);
        w[p] += Codec::kGroupBytes;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[p][r] = Codec::fma(acc[p][r], weights, a + r * kTileK + g * Codec::kGroup);
      }
    }
  }
  for (int p = 0; p < kPanels; ++p)
    for (int r = 0; r < kRows; ++r) store(sums[p] + r * 16, acc[p][r]);
}

template <class Codec, int kPanels, int kRows = kMaxRowsPerProduct>
inline void multiply_up_to(int rows, const typename Codec::A* a, int block_rows, int num_tiles,
                           const unsigned char* const* panels, const unsigned char* const* next, float* const* sums) {
  if (rows == kRows)
    multiply_rows<Codec, kRows, kPanels>(a, block_rows, num_tiles, panels, next, sums);
  else if constexpr (kRows > 1)
    multiply_up_to<Codec, kPanels, kRows - 1>(rows, a, block_rows, num_tiles, panels, next, sums);
}

// One block of at most 16 rows: sums[p] is [16][16] floats.
template <class Codec, int kPanels>
inline void multiply_block(int block_rows, const typename Codec::A* a, int num_tiles,
                           const unsigned char* const* panels, const unsigned char* const* next, float* const* sums) {
  constexpr int kTileK = monde::kTileBytes / int(sizeof(typename Codec::A));
  for (int row = 0; row < block_rows; row += kMaxRowsPerProduct) {
    const bool last = block_rows - row <= kMaxRowsPerProduct;
    float* shifted[kPanels];
    for (int p = 0; p < kPanels; ++p) shifted[p] = sums[p] + row * 16;
    multiply_up_to<Codec, kPanels>(last ? block_rows - row : kMaxRowsPerProduct, a + row * kTileK, block_rows,
                                   num_tiles, panels, last ? next : panels, shifted);
  }
}

// The product of every ISA without matrix tiles. `Multiply` types say how many rows they take at once.
template <class Codec>
struct VectorMultiply {
  using A = typename Codec::A;
  static constexpr int kChunkRows = monde::kBlockRows;
  template <int kPanels>
  static void run(int rows, const A* a, int num_tiles, const unsigned char* const* panels,
                  const unsigned char* const* next, float* const* sums) {
    multiply_block<Codec, kPanels>(rows, a, num_tiles, panels, next, sums);
  }
  static void finish() {}
};

}  // namespace MONDE_ISA
