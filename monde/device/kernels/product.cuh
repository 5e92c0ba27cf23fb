// Up to 16 activation rows by two weight panels, K shared out over the block's warps.

constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;      // activation rows of one product
constexpr int kTile = 32;      // inputs of a weight tile
constexpr int kLine = 16 * 4;  // bytes of a bf16 line: two inputs of sixteen rows

// sums[warp][row][panel][16]: partial sums of each warp.
typedef float Sums[kWarps][kRows][2][16];

// A dot product may take its inputs in any order, if both operands agree. Lane (g = lane / 4, q = lane % 4) loads lines
// q, q + 4, q + 8 and q + 12 of a tile's weights, so that a load of the warp covers 256 bytes in a row of each panel,
// which reads across the bus need; and of activation row g the pairs of inputs that those lines hold. A 16-byte piece of
// a line is four output rows 4a..4a+3 of panel p, with g = 4p + a: four products, one for each of them.
__device__ void multiply(const u8* panel0, const u8* panel1, int num_tiles, const u16* const* rows, int num_rows,
                         Sums& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4, a = g % 4, p = g / 4;
  const u8* weights = (p ? panel1 : panel0) + q * kLine + a * 16;
  const u32* low = g < num_rows ? reinterpret_cast<const u32*>(rows[g]) + q : nullptr;
  const u32* high = g + 8 < num_rows ? reinterpret_cast<const u32*>(rows[g + 8]) + q : nullptr;
  float acc[4][4] = {};
#pragma unroll 2
  for (int tile = warp; tile < num_tiles; tile += kWarps) {
    const u8* at = weights + i64(tile) * kTile / 2 * kLine;
    uint4 line[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) line[j] = load_once(at + j * 4 * kLine);
    u32 x[4], z[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[j] = low ? low[tile * kTile / 2 + j * 4] : 0;
      z[j] = high ? high[tile * kTile / 2 + j * 4] : 0;
    }
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      mma<1>(acc[0], x[j], z[j], x[j + 1], z[j + 1], line[j].x, line[j + 1].x);
      mma<1>(acc[1], x[j], z[j], x[j + 1], z[j + 1], line[j].y, line[j + 1].y);
      mma<1>(acc[2], x[j], z[j], x[j + 1], z[j + 1], line[j].z, line[j + 1].z);
      mma<1>(acc[3], x[j], z[j], x[j + 1], z[j + 1], line[j].w, line[j + 1].w);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, n = 2 * q + i % 2;
      sums[warp][row][n / 4][4 * (n % 4) + c] = acc[c][i];
    }
}

// Every other pair of types: one lane per output row of each panel.
template <int kType>
__device__ void multiply_wide(const u8* panel0, const u8* panel1, int num_tiles,
                              const typename Element<kType>::type* const* rows, int num_rows, Sums& sums) {
  constexpr int kGroup = W == 1 ? 2 : 1;  // consecutive inputs of one row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane % 16;
  const WElement* weights = reinterpret_cast<const WElement*>(lane / 16 ? panel1 : panel0);
  float acc[kRows] = {};
  for (int tile = warp; tile < num_tiles; tile += kWarps)
    for (int k = tile * kTile; k < (tile + 1) * kTile; ++k) {
      const float w = widen<W>(weights[(i64(k / kGroup) * 16 + row) * kGroup + k % kGroup]);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (i < num_rows) acc[i] += w * widen<kType>(rows[i][k]);
    }
#pragma unroll
  for (int i = 0; i < kRows; ++i) sums[warp][i][lane / 16][row] = acc[i];
}

template <int kType>
__device__ void product(const u8* panel0, const u8* panel1, int num_tiles,
                        const typename Element<kType>::type* const* rows, int num_rows, Sums& sums) {
  if constexpr (kTensorCores)
    multiply(panel0, panel1, num_tiles, rows, num_rows, sums);
  else
    multiply_wide<kType>(panel0, panel1, num_tiles, rows, num_rows, sums);
}

__device__ float sum_of_warps(const Sums& sums, int row, int panel, int lane) {
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][row][panel][lane];
  return sum;
}
