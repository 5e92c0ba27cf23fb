// Many tokens by many experts straight from their panels, bf16 by bf16: two launches for any number of experts.
//
//   panels_in     h = act(gate x, up x)       one warp: 16 rows of F, gate and up (without a gate, 32 rows)
//   panels_down   v = down h                  one warp: 32 rows of D
//
// With the experts' ACTIVATION and GATED defined this is panels_in, without them panels_down. kTileRows, kPanelWarps,
// kStages and kBlocksPerSm come from kernels/panels.py, the products from panels_mma.cuh or panels_wgmma.cuh.
//
// An item is up to kTileRows activation rows of one expert by two panels a warp; a block takes items in turn. Inputs go
// in tiles of 32 through kStages stages in shared memory, those of the next item behind those of the present one.
// Panels are the left operand, [rows of F or D][inputs], activations the right one. Lane (g = lane / 4, q = lane % 4)
// has rows 2g and 2g + 1 of its warp's panels, as the instructions' rows g and g + 8, and inputs 2q, 2q + 1, 2q + 8 and
// 2q + 9 of 16, which are two lines of a panel; of the sums it has tokens 2q and 2q + 1 of every eight.
//
// Letters: N routed pairs in the order of their experts, T tokens, D model dim, F rows of a piece of an expert.

// Of one expert's rows, none where num_rows is 0; offset: its bytes from the beginning of the blobs; expert: its row of
// the biases.
struct Tile {
  i64 offset, first_row, num_rows, expert;
};

// A warp's part of an item: these rows by panels 2 * unit and 2 * unit + 1.
struct Item {
  i64 offset;
  int first_row, num_rows, expert, unit;
};

// One of the two products.
struct Operands {
  const Tile* tiles;
  int num_tiles;
  const u8* panels;  // of the expert whose offset is 0
  i64 panel_bytes;   // from one to the next
  int num_panels;
  const i64* tokens_N;  // where rows lie, or null: at their own numbers
  const u16* rows;
  int row_stride, num_inputs, num_k_tiles;  // inputs from num_inputs on are zero, of the panels too

  __device__ int blocks_per_tile() const { return ((num_panels + 1) / 2 + kPanelWarps - 1) / kPanelWarps; }
  __device__ int num_items() const { return num_tiles * blocks_per_tile(); }
  // Panels of some tiles, then the next ones of the same tiles: tiles of one expert share panels in L2, and the panels
  // that are multiplied at a time share rows.
  __device__ Item item(int i) const {
    constexpr int kTogether = 16;
    const int per_group = kTogether * blocks_per_tile(), first = i / per_group * kTogether, k = i % per_group;
    const int together = min(kTogether, num_tiles - first);
    const Tile tile = tiles[first + k % together];
    const int unit = k / together * kPanelWarps + int(threadIdx.x) / 32;
    return {tile.offset, int(tile.first_row), int(tile.num_rows), int(tile.expert), unit};
  }
};

// Copies this thread's part of the items' tiles, one after the other, into the stages.
struct Copies {
  const Operands& of;
  Stage* stages;
  int item = blockIdx.x, tile = 0, stage = 0;  // what is next, and where it goes
  const u8* panels = nullptr;  // this lane's part of a warp's first panel, null for a warp without panels
  int second = 0;              // from there to the second one's
  int rows[kCopiedRows];       // -1 beyond an item's rows

  __device__ Copies(const Operands& of, Stage* stages) : of(of), stages(stages) { open(); }

  // The next item that has rows.
  __device__ void open() {
    for (; item < of.num_items(); item += gridDim.x) {
      const Item next = of.item(item);
      if (next.num_rows <= 0) continue;
      const int panel = 2 * next.unit;
      panels = of.panels + next.offset + panel * of.panel_bytes + threadIdx.x % 32 * 16;
      if (panel >= of.num_panels) panels = nullptr;
      second = panel + 1 < of.num_panels ? int(of.panel_bytes) : 0;
#pragma unroll
      for (int i = 0; i < kCopiedRows; ++i) {
        const int row = threadIdx.x / 4 + i * (kPanelThreads / 4), at = next.first_row + row;
        rows[i] = row >= next.num_rows ? -1 : of.tokens_N ? int(of.tokens_N[at]) : at;
      }
      return;
    }
  }

  // A group of copies for every tile, of nothing behind the last.
  __device__ void next() {
    if (item < of.num_items()) {
      Stage& to = stages[stage];
      const int row0 = threadIdx.x / 4, piece = threadIdx.x % 4, input = tile * kTile + piece * 8;
      const bool there = input < of.num_inputs;
#pragma unroll
      for (int i = 0; i < kCopiedRows; ++i)
        if (rows[i] >= 0)
          copy_piece(&to.rows[row0 + i * (kPanelThreads / 4)][place_of(row0, piece)],
                     of.rows + i64(rows[i]) * of.row_stride + (there ? input : 0), there);
      if (panels)
#pragma unroll
        for (int p = 0; p < 2; ++p)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            copy_piece(&to.panels[threadIdx.x / 32][p][i * 32 + threadIdx.x % 32],
                       panels + p * second + (tile * 2 + i) * (kTileBytes / 2), true);
      if (++tile == of.num_k_tiles) {
        tile = 0, item += gridDim.x;
        open();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
};

// Of this warp's two panels the lane's part of 16 inputs, in the instructions' order.
__device__ void read_panels(const uint4 (&panels)[2][64], int step, u32 (&a)[2][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const uint2* words = reinterpret_cast<const uint2*>(panels[p]) + step * 64 + lane % 4 * 8 + lane / 4;
    const uint2 low = words[0], high = words[32];
    a[p][0] = low.x, a[p][1] = low.y, a[p][2] = high.x, a[p][3] = high.y;
  }
}

// threadIdx.x, from which the compiler keeps nothing through an item's products: there are no registers for it.
__device__ int thread() {
  int x = threadIdx.x;
  asm volatile("" : "+r"(x));
  return x;
}

// result(item, acc) for every item: acc[p][4 * j + 2 * r + t] is row 2g + r of the warp's panel p by token 8j + 2q + t.
template <typename Result>
__device__ void multiply(const Operands& of, const Result& result) {
  extern __shared__ __align__(1024) uint4 shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  constexpr int kAhead = kStages - kLag;
  Copies copies(of, stages);
  for (int i = 0; i < kAhead; ++i) copies.next();
  int stage = 0;
  for (int i = blockIdx.x; i < of.num_items(); i += gridDim.x) {
    const int num_rows = of.item(i).num_rows;
    if (num_rows <= 0) continue;
    Sums acc = {};
    for (int tile = 0; tile < of.num_k_tiles; ++tile) {
      asm volatile("cp.async.wait_group %0;" : : "n"(kAhead - 1) : "memory");
      publish_rows();
      __syncthreads();  // everybody's part of this stage is there, and the stages before the last kLag are free
      const Stage& from = stages[stage];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        u32 a[2][4];
        read_panels(from.panels[threadIdx.x / 32], step, a);
        multiply_step(acc, a, from.rows, step, num_rows);
        wait_for_earlier_steps();
        if (step == 0) copies.next();
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    wait_for_steps(acc);
    result(of.item(i), acc);  // registers are few: read once more
  }
}

// Both rows' values of a panel, which are neighbours.
__device__ void store(u16* to, float first, float second) {
  *reinterpret_cast<u32*>(to) = narrow<1>(first) | u32(narrow<1>(second)) << 16;
}

// f(at, k): each of the lane's tokens that is there, `at` values from the item's first row, its sums from acc[.][k].
template <typename F>
__device__ void each_token(int num_rows, int stride, const F& f) {
  int token = thread() % 4 * 2, at = token * stride;
#pragma unroll
  for (int k = 0; k < kTileRows / 2; k += 4) {
    if (2 * k >= num_rows) return;
    if (token < num_rows) f(at, k);
    if (token + 1 < num_rows) f(at + stride, k + 1);
    token += 8, at += 8 * stride;
    asm volatile("" : "+r"(token), "+r"(at));  // one after the other: there are no registers for all of them
  }
}

struct Pair {
  float first, second;
};
__device__ Pair pair_of(const float* bias, i64 at) {
  if (!bias) return {0.f, 0.f};
  return {bias[at], bias[at + 1]};
}

#ifdef ACTIVATION

// h_NF [N, f_pad_k] of a wave's tiles. Biases [experts, piece.up_bias_stride] or null. Grid: up to all items.
extern "C" __global__ void __launch_bounds__(kPanelThreads, kBlocksPerSm)
    panels_in(const PieceLayout piece, const u8* blobs, const Tile* tiles, int num_tiles, const u16* x_TD,
              const i64* tokens_N, u16* h_NF, const float* gate_bias, const float* up_bias) {
  Operands of;
  of.tiles = tiles, of.num_tiles = num_tiles, of.panels = blobs + piece.in_offset_bytes;
  of.panel_bytes = piece.in_panel_bytes, of.num_panels = int(piece.num_f_panels) * (GATED ? 2 : 1);
  of.tokens_N = tokens_N, of.rows = x_TD, of.row_stride = of.num_inputs = piece.d_model;
  of.num_k_tiles = piece.d_pad_k / kTile;
  const int num_f_panels = piece.num_f_panels, f_pad_k = piece.f_pad_k;
  Layer layer;
  layer.activation = ACTIVATION, layer.gated = GATED, layer.limit = piece.limit, layer.alpha = piece.alpha;
  multiply(of, [&](const Item& item, const Sums& acc) {
    // Panels of F, of which one behind the last may be left to a tile of inputs: it must read as zero.
    const int panel = GATED ? item.unit : 2 * item.unit, column = panel * 16 + thread() % 32 / 4 * 2;
    if (panel >= num_f_panels) return;
    const i64 bias_at = i64(item.expert) * piece.up_bias_stride + piece.first_row + column;
    u16* h0 = h_NF + i64(item.first_row) * f_pad_k + column;
    if (GATED) {
      const Pair gate = pair_of(gate_bias, bias_at), up = pair_of(up_bias, bias_at);
      const bool is_last = panel == num_f_panels - 1 && num_f_panels * 16 < f_pad_k;
      each_token(item.num_rows, f_pad_k, [&](int at, int k) {
        u16* h = h0 + at;
        store(h, activate(&layer, acc[0][k] + gate.first, acc[1][k] + up.first),
              activate(&layer, acc[0][k + 2] + gate.second, acc[1][k + 2] + up.second));
        if (is_last) store(h + 16, 0.f, 0.f);
      });
    } else {
      const bool both = panel + 1 < num_f_panels;
      const Pair up[] = {pair_of(up_bias, bias_at), pair_of(both ? up_bias : nullptr, bias_at + 16)};
      each_token(item.num_rows, f_pad_k, [&](int at, int k) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const float first = activate(&layer, acc[p][k] + up[p].first, 0.f);
          const float second = activate(&layer, acc[p][k + 2] + up[p].second, 0.f);
          const bool there = p == 0 || both;
          store(h0 + at + p * 16, there ? first : 0.f, there ? second : 0.f);
        }
      });
    }
  });
}

#else

// v_ND [N, D] of a wave's tiles, bf16, or fp32 where v_is_wide, then added to v_ND unless the pieces begin their
// experts. bias may be null. Grid: up to all items.
extern "C" __global__ void __launch_bounds__(kPanelThreads, kBlocksPerSm)
    panels_down(const PieceLayout piece, const u8* blobs, const Tile* tiles, int num_tiles, const u16* h_NF, void* v_ND,
                const float* bias, int v_is_wide) {
  Operands of;
  of.tiles = tiles, of.num_tiles = num_tiles, of.panels = blobs + piece.down_offset_bytes;
  of.panel_bytes = piece.down_panel_bytes, of.num_panels = piece.num_d_panels;
  of.tokens_N = nullptr, of.rows = h_NF, of.row_stride = of.num_inputs = piece.f_pad_k;
  of.num_k_tiles = piece.f_pad_k / kTile;
  const int D = piece.d_model;
  const bool adds = piece.first_row > 0;
  multiply(of, [&](const Item& item, const Sums& acc) {
    const int column = item.unit * 32 + thread() % 32 / 4 * 2;
    if (column >= D) return;  // D is a multiple of 8
    const bool both = column + 16 < D;
    const i64 bias_at = i64(item.expert) * piece.down_bias_stride + column, v_at = i64(item.first_row) * D + column;
    const Pair more[] = {pair_of(bias, bias_at), pair_of(both ? bias : nullptr, bias_at + 16)};
    // f(n, first, second): sums of neighbours, n values from where the item's begin.
    const auto each = [&](const auto& f) {
      each_token(item.num_rows, D, [&](int at, int k) {
        f(at, acc[0][k] + more[0].first, acc[0][k + 2] + more[0].second);
        if (both) f(at + 16, acc[1][k] + more[1].first, acc[1][k + 2] + more[1].second);
      });
    };
    float* wide = static_cast<float*>(v_ND) + v_at;
    if (!v_is_wide)
      each([&](int n, float first, float second) { store(static_cast<u16*>(v_ND) + v_at + n, first, second); });
    else if (!adds)
      each(
          [&](int n, float first, float second) { *reinterpret_cast<float2*>(wide + n) = make_float2(first, second); });
    else  // nobody else adds meanwhile, but nothing has to be waited for
      each([&](int n, float first, float second) { atomicAdd(wide + n, first), atomicAdd(wide + n + 1, second); });
  });
}

#endif
