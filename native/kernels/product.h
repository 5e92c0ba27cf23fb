// The inner product of a block of activation rows with weight panels, in the vector vocabulary.
#pragma once
#include "codecs.h"

namespace MONDE_ISA {

// The tiles of K that a product covers. Activations of a block lie `block_tiles` tiles of K deep.
struct Depth {
  int begin, end, block_tiles;
};

// Which of `count` consecutive readings of the same panels this is: one for every chunk of rows.
struct Pass {
  int index, count;
};

// Weights come from memory once and in order; what has to be fetched ahead depends on how often they are read then.
//
// Read once (few rows): memory is the limit. On Intel's cores, whose prefetchers stop at a panel's end and at every
// 4 KiB page, software goes on to the next panel: into L2 far ahead (MONDE_FAR_TILES) and into L1 just ahead. Zen 5
// follows by itself: two cores lost 15% by both and 4% by the nearer one alone.
// Read several times (many rows): the panel lies in L2 after its first reading and arithmetic is the limit, so all
// readings share the fetching of the next panel into L2, evenly: memory and arithmetic then overlap.
// A tile is 1 KiB of a panel.
inline constexpr int kNearTiles = 2;
inline constexpr int kFarTiles = MONDE_FAR_TILES;

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

// One panel's share of the fetching, advanced tile by tile.
template <int kPanelTileBytes>
class Prefetcher {
 public:
  Prefetcher() = default;
  Prefetcher(const unsigned char* panel, const unsigned char* next, int num_tiles, Pass pass)
      : once_(pass.count == 1), near_(panel, next, num_tiles), far_(panel, next, num_tiles) {
    constexpr int kLines = kPanelTileBytes / 64;
    const int lines = (kLines + pass.count - 1) / pass.count;
    lines_ = pass.index * lines < kLines ? lines : 0;
    shared_ = next + ptrdiff_t(pass.index) * lines * num_tiles * 64;
  }
  void step() {
    if (once_) {
      if constexpr (kFarTiles > 0) {
        far_.step([](const unsigned char* line) { prefetch_l2(line); });
        near_.step([](const unsigned char* line) { prefetch_l1(line); });
      }
    } else {
      for (int i = 0; i < lines_; ++i) prefetch_l2(shared_ + 64 * i);
      shared_ += 64 * lines_;
    }
  }

 private:
  bool once_;
  int lines_;  // per tile, of the next panel
  const unsigned char* shared_;
  Ahead<kNearTiles, kPanelTileBytes> near_;
  Ahead<kFarTiles, kPanelTileBytes> far_;
};

// sums[p][r] = panel p (16 outputs) . row r over num_tiles tiles, for kPanels panels and kRows rows of one block.
//   a:      block [num_tiles][block_rows][tile_k]
//   next:   panel to fetch ahead: with one pass the one read after panels[p], with several any that is needed soon
//   sums:   rows of 16 floats
template <class Codec, int kRows, int kPanels>
inline void multiply_rows(const typename Codec::A* a, int block_rows, int num_tiles, const unsigned char* const* panels,
                          const unsigned char* const* next, Pass pass, float* const* sums) {
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
    prefetcher[p] = PanelPrefetcher(panels[p], next[p], num_tiles, pass);
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
                           const unsigned char* const* panels, const unsigned char* const* next, Pass pass,
                           float* const* sums) {
  if (rows == kRows)
    multiply_rows<Codec, kRows, kPanels>(a, block_rows, num_tiles, panels, next, pass, sums);
  else if constexpr (kRows > 1)
    multiply_up_to<Codec, kPanels, kRows - 1>(rows, a, block_rows, num_tiles, panels, next, pass, sums);
}

// One block of at most 16 rows: sums[p] is [16][16] floats.
template <class Codec, int kPanels>
inline void multiply_block(int block_rows, const typename Codec::A* a, Depth depth, const unsigned char* const* panels,
                           const unsigned char* const* next, Pass pass, float* const* sums) {
  constexpr int kTileK = monde::kTileBytes / int(sizeof(typename Codec::A));
  constexpr int kPanelTileBytes = kTileK / Codec::kGroup * Codec::kGroupBytes;
  const int num_parts = (block_rows + kMaxRowsPerProduct - 1) / kMaxRowsPerProduct;
  const unsigned char *from[kPanels], *after[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    from[p] = panels[p] + ptrdiff_t(depth.begin) * kPanelTileBytes;
    after[p] = next[p] + ptrdiff_t(depth.begin) * kPanelTileBytes;
  }
  a += ptrdiff_t(depth.begin) * block_rows * kTileK;
  for (int part = 0; part < num_parts; ++part) {
    const int row = part * kMaxRowsPerProduct;
    const int rows = block_rows - row < kMaxRowsPerProduct ? block_rows - row : kMaxRowsPerProduct;
    float* shifted[kPanels];
    for (int p = 0; p < kPanels; ++p) shifted[p] = sums[p] + row * 16;
    multiply_up_to<Codec, kPanels>(rows, a + row * kTileK, block_rows, depth.end - depth.begin, from, after,
                                   {pass.index * num_parts + part, pass.count * num_parts}, shifted);
  }
}

// The product of every ISA without matrix tiles. `Multiply` types say how many rows they take at once.
template <class Codec>
struct VectorMultiply {
  using A = typename Codec::A;
  static constexpr int kChunkRows = monde::kBlockRows;
  static constexpr int kStretchBytes = 1 << 19;
  template <int kPanels>
  static void run(int rows, const A* a, Depth depth, const unsigned char* const* panels,
                  const unsigned char* const* next, Pass pass, float* const* sums) {
    multiply_block<Codec, kPanels>(rows, a, depth, panels, next, pass, sums);
  }
  static void finish() {}
};

}  // namespace MONDE_ISA
