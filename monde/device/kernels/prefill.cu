// Around the products of a long prompt: count and order pairs, the sum over a token's experts; and for the libraries'
// products, where panels.cu has none for a pair of types: unpack panels, the non-linearity.
//
// Letters: n pieces of experts, T tokens, K experts per token, N routed pairs, D model dim, F expert hidden dim. X is
// the type that is multiplied in (kernels/elements.cuh), W that of the weights. KIND_ constants and `struct Layer`, as
// far as activation.cuh reads it, come from kernels/__init__.py.

// A word is what a line of a panel holds of one output row: two inputs in bf16, else one.
#if W == 2
typedef u16 Word;
#else
typedef u32 Word;
#endif
constexpr int kLines = 64;  // of a tile: 256 bytes of a row-major row
constexpr int kSortThreads = 1024;

// Panels [lines][16] to rows [16][lines]. Panel j of expert n begins at blobs + offsets[n] + first + j * stride bytes;
// its rows are (j % roles) * rows_per_role + (j / roles) * 16 and the next 15 of the expert's matrix in out.
// Grid: (tiles of lines, panels, n).
extern "C" __global__ void __launch_bounds__(kThreads)
    unpack(const u8* blobs, const i64* offsets_n, i64 first, i64 stride, int roles, int lines, int rows_per_role,
           Word* out, i64 out_words) {
  __shared__ Word tile[16][kLines + 1];
  const int panel = blockIdx.y, line0 = blockIdx.x * kLines;
  const Word* from = reinterpret_cast<const Word*>(blobs + offsets_n[blockIdx.z] + first + panel * stride);
  for (int i = threadIdx.x; i < kLines * 16; i += kThreads) {
    const int line = i / 16;
    if (line0 + line < lines) tile[i % 16][line] = from[i64(line0) * 16 + i];
  }
  __syncthreads();
  const i64 row0 = i64(panel % roles) * rows_per_role + i64(panel / roles) * 16;
  Word* to = out + blockIdx.z * out_words + row0 * lines + line0;
  for (int i = threadIdx.x; i < kLines * 16; i += kThreads) {
    const int row = i / kLines, line = i % kLines;
    if (line0 + line < lines) to[i64(row) * lines + line] = tile[row][line];
  }
}

// Ids and pairs per expert: known_TK = id, or E where the pair counts for nothing; counts_E may lie in pinned memory.
// One block, and so is `place`: some tens of pairs a thread.
extern "C" __global__ void __launch_bounds__(kSortThreads)
    count(const i64* __restrict__ ids_TK, const float* __restrict__ weights_TK, i64* __restrict__ known_TK, i64* counts_E,
          int num_pairs, int E) {
  __shared__ int count_E[MAX_EXPERTS];
  for (int e = threadIdx.x; e < E; e += kSortThreads) count_E[e] = 0;
  __syncthreads();
#pragma unroll 8  // so many loads under way
  for (int r = threadIdx.x; r < num_pairs; r += kSortThreads) {
    const i64 id = ids_TK[r];
    const bool counts = id >= 0 && id < E && weights_TK[r] != 0.f;
    known_TK[r] = counts ? id : E;
    if (counts) atomicAdd(count_E + id, 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kSortThreads) counts_E[e] = count_E[e];
}

// Pairs in the order of their experts: begin_E, -1 for those that others compute, says where an expert's rows begin.
// Within an expert any order will do: a row's product does not depend on it. N rows in all; others get position N.
extern "C" __global__ void __launch_bounds__(kSortThreads)
    place(const i64* __restrict__ known_TK, const i64* __restrict__ begin_E, i64* __restrict__ position_TK,
          i64* __restrict__ tokens_N, i64 N, int num_pairs, int K, int E) {
  __shared__ int next_E[MAX_EXPERTS + 1];
  for (int e = threadIdx.x; e <= E; e += kSortThreads) next_E[e] = e < E ? int(begin_E[e]) : -1;
  __syncthreads();
#pragma unroll 8
  for (int r = threadIdx.x; r < num_pairs; r += kSortThreads) {
    const int e = int(known_TK[r]);
    const bool here = next_E[e] >= 0;
    const i64 position = here ? atomicAdd(next_E + e, 1) : N;
    position_TK[r] = position;
    if (here) tokens_N[position] = r / K;
  }
}

// What Python says where it knows the counts, of a layer whose experts all have slots: begin_E, and for panels.cu the
// tiles as in executors/waves.py, up to max_tiles, those that are left without rows. slot_bytes: from one to the next.
// *num_pairs grows by the pairs. One block.
extern "C" __global__ void __launch_bounds__(kSortThreads)
    lay_out(const i64* counts_E, const int* slot_of_expert_E, i64 slot_bytes, i64* begin_E, i64* tiles_4, i64* num_pairs,
            int max_tiles, int tile_rows, int E) {
  __shared__ int rows_E[kSortThreads], tiles_E[kSortThreads];
  const int e = threadIdx.x, count = e < E ? int(counts_E[e]) : 0, num_tiles = (count + tile_rows - 1) / tile_rows;
  rows_E[e] = count, tiles_E[e] = num_tiles;
  __syncthreads();
  for (int step = 1; step < kSortThreads; step *= 2) {
    const int rows = e >= step ? rows_E[e - step] : 0, tiles = e >= step ? tiles_E[e - step] : 0;
    __syncthreads();
    rows_E[e] += rows, tiles_E[e] += tiles;
    __syncthreads();
  }
  const int begin = rows_E[e] - count, first = tiles_E[e] - num_tiles;
  if (e < E) begin_E[e] = begin;
  if (e == 0) *num_pairs += rows_E[kSortThreads - 1];
  const int per_tile = num_tiles ? (count + num_tiles * 16 - 1) / (num_tiles * 16) * 16 : 0;  // an mma takes 16
  for (int i = 0; i < num_tiles; ++i) {
    i64* tile = tiles_4 + i64(first + i) * 4;
    tile[0] = slot_of_expert_E[e] * slot_bytes;
    tile[1] = begin + i * per_tile;
    tile[2] = min(per_tile, count - i * per_tile);
    tile[3] = slot_of_expert_E[e];
  }
  for (int i = tiles_E[kSortThreads - 1] + e; i < max_tiles; i += kSortThreads) tiles_4[i64(i) * 4 + 2] = 0;
}

// h [rows, F] = act(in[:, :F], in[:, F:]), or of in [rows, F] alone. F is a multiple of 4.
extern "C" __global__ void __launch_bounds__(kThreads)
    hidden(const XElement* in, XElement* h, i64 rows, int F, int kind, int gated, double limit, double alpha) {
  Layer layer;
  layer.activation = kind, layer.gated = gated, layer.limit = limit, layer.alpha = alpha;
  struct alignas(4 * sizeof(XElement)) Four {
    XElement v[4];
  };
  const int per_row = F / 4, width = gated ? 2 * F : F;
  for (i64 i = i64(blockIdx.x) * kThreads + threadIdx.x; i < rows * per_row; i += i64(gridDim.x) * kThreads) {
    const i64 row = i / per_row, f = i % per_row * 4;
    const Four gate = *reinterpret_cast<const Four*>(in + row * width + f);
    Four up = gate, result;
    if (gated) up = *reinterpret_cast<const Four*>(in + row * width + F + f);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      result.v[j] = narrow<X>(activate(&layer, widen<X>(gate.v[j]), gated ? widen<X>(up.v[j]) : 0.f));
    *reinterpret_cast<Four*>(h + row * F + f) = result;
  }
}

// Eight consecutive values, of which those from `count` on are not there; at one go where they lie on 16 bytes.
template <int kType>
__device__ void load_eight(const typename Element<kType>::type* from, int count, bool aligned, float (&to)[8]) {
  typedef typename Element<kType>::type Value;
  struct alignas(16) Eight {
    Value v[8];
  };
  if (aligned) {
    const Eight eight = *reinterpret_cast<const Eight*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = widen<kType>(eight.v[i]);
  } else {
    for (int i = 0; i < 8; ++i) to[i] = i < count ? widen<kType>(from[i]) : 0.f;
  }
}

// y [T, D] = host_TD + sum over k, in order, of weight * v[position]; positions from N on add nothing. host_TD may be
// null; it lies in pinned memory. v is of type X, or fp32 where v_is_wide. All begin on 16 bytes.
// Grid: (enough for D, eight columns a thread; T).
extern "C" __global__ void __launch_bounds__(kThreads)
    combine(const void* v_ND, int v_is_wide, const i64* position_TK, const float* weights_TK, const float* host_TD,
            XElement* y_TD, i64 N, int D, int K) {
  const int d = (blockIdx.x * kThreads + threadIdx.x) * 8, count = min(8, D - d);
  if (count <= 0) return;
  const bool aligned = D % 8 == 0;
  const i64 t = blockIdx.y;
  float sum[8] = {}, v[8];
  if (host_TD) load_eight<0>(host_TD + t * D + d, count, aligned, sum);
  for (int k = 0; k < K; ++k) {
    const i64 r = position_TK[t * K + k];
    if (r >= N) continue;
    if (v_is_wide)
      load_eight<0>(static_cast<const float*>(v_ND) + r * D + d, count, aligned, v);
    else
      load_eight<X>(static_cast<const XElement*>(v_ND) + r * D + d, count, aligned, v);
    const float weight = weights_TK[t * K + k];
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += weight * v[i];
  }
  struct alignas(16) Eight {
    XElement v[8];
  } result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.v[i] = narrow<X>(sum[i]);
  if (aligned)
    *reinterpret_cast<Eight*>(y_TD + t * D + d) = result;
  else
    for (int i = 0; i < count; ++i) y_TD[t * D + d + i] = result.v[i];
}
