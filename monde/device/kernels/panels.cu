// Many tokens by many experts straight from their panels, bf16 by bf16: two launches for any number of experts.
//
//   panels_in     h = act(gate x, up x)       one warp: 16 rows of F, gate and up (without a gate, 32 rows)
//   panels_down   v = down h                  one warp: 32 rows of D
//
// A block takes up to kTileRows activation rows of one expert; its warps share those and read weights of their own.
// Inputs go in tiles of 32 through kStages stages in shared memory. As at `multiply` (product.cuh) the order of inputs is
// free and a piece of a line feeds four products; here lane (g, q) has inputs 8q..8q+7 of row g, 16 bytes, and lines
// 4q..4q+3, which hold those inputs: shared memory is read without conflicts, lines by the lane that copied them.
//
// Letters: N routed pairs in the order of their experts, T tokens, D model dim, F rows of a piece of an expert.

#if X == 1 && W == 1

constexpr int kTileRows = 128, kPanelWarps = 4, kPanelThreads = 32 * kPanelWarps, kStages = 6;

struct Stage {
  uint4 rows[kTileRows][4];            // 32 inputs of a row
  uint4 lines[kPanelWarps][4][32];     // of a lane: four pieces of lines
};

// Of one expert's rows, none where num_rows is 0; offset: its bytes from the beginning of the blobs; expert: its row of the biases.
struct Tile {
  i64 offset, first_row, num_rows, expert;
};

typedef float Accumulators[kTileRows / 16][4][4];

__device__ void copy_piece(uint4* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(u32(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
__device__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" : : "n"(kStages - 2) : "memory"); }

// rows[i]: this thread's 16 bytes of inputs 0..31 of row threadIdx.x / 4 + i * 32, or null beyond the tile's rows;
// inputs from K on are zero. panels: this lane's first piece of a line, null for a warp without panels.
__device__ void multiply_tiles(const u16* const (&rows)[kTileRows / 32], int K, const u8* panels, int num_tiles,
                               int num_rows, Stage* stages, Accumulators& acc) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int piece = threadIdx.x % 4, row0 = threadIdx.x / 4;
  auto load = [&](int tile) {
    if (tile < num_tiles) {
      Stage& stage = stages[tile % kStages];
#pragma unroll
      for (int i = 0; i < kTileRows / 32; ++i)
        if (rows[i]) {
          const bool there = tile * kTile + piece * 8 < K;
          copy_piece(&stage.rows[row0 + 32 * i][piece], there ? rows[i] + tile * kTile : rows[i] - piece * 8, there);
        }
      if (panels)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          copy_piece(&stage.lines[warp][j][lane], panels + i64(tile) * (kTile / 2 * kLine) + j * kLine, true);
    }
    copies_end();  // a group for every tile, of nothing behind the last
  };
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait_for_oldest();
    __syncthreads();  // everybody's rows are there, and the stage before this one has been read
    load(tile + kStages - 1);
    if (!panels) continue;
    const Stage& stage = stages[tile % kStages];
    uint4 line[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) line[j] = stage.lines[warp][j][lane];
#pragma unroll
    for (int m = 0; m < kTileRows / 16; ++m) {
      if (m * 16 >= num_rows) continue;
      const uint4 x = stage.rows[m * 16 + g][q], z = stage.rows[m * 16 + g + 8][q];
      mma<1>(acc[m][0], x.x, z.x, x.y, z.y, line[0].x, line[1].x);
      mma<1>(acc[m][1], x.x, z.x, x.y, z.y, line[0].y, line[1].y);
      mma<1>(acc[m][2], x.x, z.x, x.y, z.y, line[0].z, line[1].z);
      mma<1>(acc[m][3], x.x, z.x, x.y, z.y, line[0].w, line[1].w);
      mma<1>(acc[m][0], x.z, z.z, x.w, z.w, line[2].x, line[3].x);
      mma<1>(acc[m][1], x.z, z.z, x.w, z.w, line[2].y, line[3].y);
      mma<1>(acc[m][2], x.z, z.z, x.w, z.w, line[2].z, line[3].z);
      mma<1>(acc[m][3], x.z, z.z, x.w, z.w, line[2].w, line[3].w);
    }
  }
}

// This lane's first piece of a line: lines 4q.. of a tile, output rows 4a.. of the first or second panel.
__device__ const u8* piece_of(const u8* panel0, const u8* panel1) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  return (g / 4 ? panel1 : panel0) + q * 4 * kLine + g % 4 * 16;
}

struct alignas(16) EightHalves {
  u16 v[8];
};

// h_NF [N, f_pad_k] of a wave's tiles. Biases [experts, piece.up_bias_stride] or null.
// Grid: (tiles; units, or pairs of panels, over kPanelWarps).
extern "C" __global__ void __launch_bounds__(kPanelThreads, 2)
    panels_in(const PieceLayout piece, const u8* blobs, const Tile* tiles, const u16* x_TD, const i64* tokens_N,
              u16* h_NF, const float* gate_bias, const float* up_bias) {
  const i64 panel_bytes = piece.in_panel_bytes;
  const int num_panels = piece.num_f_panels, D = piece.d_model, d_pad_k = piece.d_pad_k, f_pad_k = piece.f_pad_k;
  const bool gated = piece.gated;
  extern __shared__ uint4 shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  const Tile tile = tiles[blockIdx.x];
  if (tile.num_rows <= 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int unit = blockIdx.y * kPanelWarps + warp, num_units = gated ? num_panels : (num_panels + 1) / 2;
  const u16* rows[kTileRows / 32];
#pragma unroll
  for (int i = 0; i < kTileRows / 32; ++i) {
    const int row = threadIdx.x / 4 + 32 * i;
    rows[i] = row < tile.num_rows ? x_TD + tokens_N[tile.first_row + row] * D + threadIdx.x % 4 * 8 : nullptr;
  }
  const u8* panels = nullptr;
  if (unit < num_units) {
    const u8* first = blobs + tile.offset + piece.in_offset_bytes + i64(unit) * 2 * panel_bytes;
    panels = piece_of(first, gated || 2 * unit + 1 < num_panels ? first + panel_bytes : first);
  }
  Accumulators acc = {};
  multiply_tiles(rows, D, panels, d_pad_k / kTile, int(tile.num_rows), stages, acc);
  if (!panels) return;

  Layer layer;
  layer.activation = piece.activation, layer.gated = gated, layer.limit = piece.limit, layer.alpha = piece.alpha;
  const int panel = gated ? unit : 2 * unit + q / 2, column = panel * 16 + q % 2 * 8;  // of this lane's eight rows of F
  const i64 bias_at = tile.expert * piece.up_bias_stride + piece.first_row + column;
  const bool is_last = unit == num_units - 1 && num_panels * 16 < f_pad_k;  // half a tile that must read as zero
#pragma unroll
  for (int m = 0; m < kTileRows / 16; ++m) {
    if (m * 16 >= tile.num_rows) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Gates are with lanes q < 2, ups with the others: each pair of lanes shares out its two rows.
      if (gated && half) continue;
      const int row = m * 16 + g + (gated ? q / 2 : half) * 8;
      EightHalves result;
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int k = 4 * b + c;
          float gate, up = 0.f;
          if (gated) {
            const float low = acc[m][c][b], high = acc[m][c][2 + b];
            const float other = __shfl_xor_sync(0xffffffffu, q < 2 ? high : low, 2);
            gate = q < 2 ? low : other, up = q < 2 ? other : high;
            if (gate_bias) gate += gate_bias[bias_at + k];
            if (up_bias) up += up_bias[bias_at + k];
          } else {
            gate = acc[m][c][2 * half + b];
            if (up_bias && panel < num_panels) gate += up_bias[bias_at + k];
          }
          result.v[k] = narrow<1>(activate(&layer, gate, up));
        }
      if (row >= tile.num_rows) continue;
      u16* h = h_NF + (tile.first_row + row) * f_pad_k;
      if (panel < num_panels) *reinterpret_cast<EightHalves*>(h + column) = result;
      if (is_last && (gated || q < 2)) *reinterpret_cast<EightHalves*>(h + num_panels * 16 + q % 2 * 8) = EightHalves{};
    }
  }
}

// v_ND [N, D] of a wave's tiles, bf16, or fp32 where v_is_wide, then added to v_ND unless the pieces begin their
// experts. bias may be null. Grid: (tiles; pairs of panels over kPanelWarps).
extern "C" __global__ void __launch_bounds__(kPanelThreads, 2)
    panels_down(const PieceLayout piece, const u8* blobs, const Tile* tiles, const u16* h_NF, void* v_ND,
                const float* bias, int v_is_wide) {
  const i64 panel_bytes = piece.down_panel_bytes;
  const int num_panels = piece.num_d_panels, D = piece.d_model, f_pad_k = piece.f_pad_k;
  const bool adds = piece.first_row > 0;
  extern __shared__ uint4 shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  const Tile tile = tiles[blockIdx.x];
  if (tile.num_rows <= 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int unit = blockIdx.y * kPanelWarps + warp;
  const u16* rows[kTileRows / 32];
#pragma unroll
  for (int i = 0; i < kTileRows / 32; ++i) {
    const int row = threadIdx.x / 4 + 32 * i;
    rows[i] = row < tile.num_rows ? h_NF + (tile.first_row + row) * f_pad_k + threadIdx.x % 4 * 8 : nullptr;
  }
  const u8* panels = nullptr;
  if (2 * unit < num_panels) {
    const u8* first = blobs + tile.offset + piece.down_offset_bytes + i64(unit) * 2 * panel_bytes;
    panels = piece_of(first, 2 * unit + 1 < num_panels ? first + panel_bytes : first);
  }
  Accumulators acc = {};
  multiply_tiles(rows, f_pad_k, panels, f_pad_k / kTile, int(tile.num_rows), stages, acc);

  const int column = (2 * unit + q / 2) * 16 + q % 2 * 8;
  if (!panels || column >= D) return;  // D is a multiple of 8
  if (bias) bias += tile.expert * piece.down_bias_stride + column;
#pragma unroll
  for (int m = 0; m < kTileRows / 16; ++m) {
    if (m * 16 >= tile.num_rows) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + g + half * 8;
      if (row >= tile.num_rows) continue;
      const i64 at = (tile.first_row + row) * D + column;
      float sums[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) sums[k] = acc[m][k % 4][2 * half + k / 4] + (bias ? bias[k] : 0.f);
      if (v_is_wide) {
        float* v = static_cast<float*>(v_ND) + at;
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = adds ? v[k] + sums[k] : sums[k];
      } else {
        EightHalves result;
#pragma unroll
        for (int k = 0; k < 8; ++k) result.v[k] = narrow<1>(sums[k]);
        *reinterpret_cast<EightHalves*>(static_cast<u16*>(v_ND) + at) = result;
      }
    }
  }
}

#endif
