// One query of every sequence over the keys and values that it sees: two launches, or one where nothing is split.
//
//   attend   one block: the heads that share a key-value head, over every gridDim.x-th block of keys
//   join     y of the splits' parts
//
// Keys and values are read once for all query heads that share them, and nothing is read of blocks that nobody sees: so
// a step costs what its context is long, however much room its cache has. Softmax as it goes, in fp32.
//
// Scores are keys by queries and outputs values by weights, both transposed, because eight heads are what an mma is
// wide. Inputs of a dot product may come in any order if both operands agree: lane (g = lane / 4, q = lane % 4) reads
// 16 bytes of a key or value at a time. Heads past those that share a key-value head are zero.
//
// Letters: B sequences, H query heads, S keys, C dims of a key, V dims of a value. `Attention`, KEY_DIM, VALUE_DIM,
// GROUPS of eight heads and MAX_SPLITS come from attention.py, which also puts elements.cuh and overlap.cuh in front.

constexpr int kAttendWarps = 4, kAttendThreads = 32 * kAttendWarps;
constexpr int kWarpKeys = 32, kBlockKeys = kWarpKeys * kAttendWarps;  // a lane tells of one key who sees it
constexpr int kHeads = 8 * GROUPS;
constexpr int kKeyTiles = (KEY_DIM + 31) / 32, kValueTiles = (VALUE_DIM + 63) / 64;

constexpr float kUnseen = -3.4028234e38f;  // the score of a key that is not seen

// What a warp, a block or a split knows of its keys: sums [V] are relative to the greatest score.
struct Softmax {
  float top, total;
};

__device__ float share_of(float top, float greatest) { return top == kUnseen ? 0.f : exp2f(top - greatest); }

__device__ uint4 zero_unless(bool wanted, uint4 v) { return wanted ? v : uint4{0, 0, 0, 0}; }

__device__ u32 pair_of(float low, float high) { return narrow<X>(low) | u32(narrow<X>(high)) << 16; }

// Of an 8 x 8 matrix whose row g has its elements 2q and 2q + 1 in lane (g, q).
__device__ u32 transposed(u32 v) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(v));
  return result;
}

// Grid: (splits, key-value heads times blocks of kHeads that share one, B). parts: [B, H, splits] of V sums and a
// Softmax, unless there is one split.
extern "C" __global__ void __launch_bounds__(kAttendThreads, GROUPS * KEY_DIM <= 128 ? 4 : 1)
    attend(const __grid_constant__ Attention record) {
  await_earlier_launches();
  const Attention* const a = &record;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int num_shared = int(a->heads_per_kv), num_keys = int(a->num_keys), b = blockIdx.z;
  const int blocks_per_kv = (num_shared + kHeads - 1) / kHeads;
  const int kv = blockIdx.y / blocks_per_kv, first_shared = blockIdx.y % blocks_per_kv * kHeads;
  const int first_head = kv * num_shared + first_shared, num_heads = min(kHeads, num_shared - first_shared);
  const u16* keys_SC = reinterpret_cast<const u16*>(a->keys) + b * a->key_row + kv * a->key_head;
  const u16* values_SV = reinterpret_cast<const u16*>(a->values) + b * a->value_row + kv * a->value_head;
  const u8* mask_S = a->mask ? reinterpret_cast<const u8*>(a->mask) + b * a->mask_row : nullptr;
  const float scale = float(a->scale);  // with log2 e in it

  uint4 query[GROUPS][kKeyTiles];
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      const int head = n * 8 + g, c = t * 32 + q * 8;
      const u16* from = reinterpret_cast<const u16*>(a->queries) + b * a->query_row + first_head * a->query_head;
      query[n][t] = uint4{0, 0, 0, 0};
      if (head < num_heads && c < KEY_DIM)
        query[n][t] = *reinterpret_cast<const uint4*>(from + head * a->query_head + c);
    }

  Softmax known[GROUPS][2];  // of heads 2q and 2q + 1; totals of this lane's keys alone
  float sums[GROUPS][kValueTiles][4][4] = {};
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) known[n][0] = known[n][1] = {kUnseen, 0.f};

  const int num_blocks = (num_keys + kBlockKeys - 1) / kBlockKeys;
  const auto is_seen = [&](int block) {
    const int mine = block * kBlockKeys + warp * kWarpKeys + lane;
    return mine < num_keys && (!mask_S || mask_S[mine]);
  };
  bool next_seen = is_seen(blockIdx.x);
  for (int block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    const u32 seen_32 = __ballot_sync(0xffffffffu, next_seen);
    next_seen = is_seen(block + gridDim.x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 seen = seen_32 >> 16 * half & 0xffffu;
      if (!seen) continue;
      const int first = block * kBlockKeys + warp * kWarpKeys + 16 * half, last = num_keys - 1;

      uint4 key[2][kKeyTiles], value[4][kValueTiles];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t) {
          const int s = min(first + g + 8 * i, last), c = t * 32 + q * 8;
          key[i][t] = c < KEY_DIM ? load_once(keys_SC + s * a->key_stride + c) : uint4{0, 0, 0, 0};
        }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int t = 0; t < kValueTiles; ++t) {
          const int s = min(first + 2 * q + i % 2 + i / 2 * 8, last), v = t * 64 + g * 8;
          value[i][t] = v < VALUE_DIM ? load_once(values_SV + s * a->value_stride + v) : uint4{0, 0, 0, 0};
        }
      if (seen != 0xffffu)  // what is not seen may be anything, and NaN times zero is NaN
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int t = 0; t < kValueTiles; ++t)
            value[i][t] = zero_unless(seen >> (2 * q + i % 2 + i / 2 * 8) & 1, value[i][t]);

#pragma unroll
      for (int n = 0; n < GROUPS; ++n) {
        float score[4] = {};  // [2i + h]: of key g + 8i and head 2q + h
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t) {
          const uint4 x = key[0][t], z = key[1][t], y = query[n][t];
          mma<X>(score, x.x, z.x, x.y, z.y, y.x, y.y);
          mma<X>(score, x.z, z.z, x.w, z.w, y.z, y.w);
        }
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            score[2 * i + h] = seen >> (g + 8 * i) & 1 ? score[2 * i + h] * scale : kUnseen;
          float top = fmaxf(known[n][h].top, fmaxf(score[h], score[2 + h]));
#pragma unroll
          for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
          factor[h] = share_of(known[n][h].top, top);
#pragma unroll
          for (int i = 0; i < 2; ++i) score[2 * i + h] = share_of(score[2 * i + h], top);
          known[n][h] = {top, known[n][h].total * factor[h] + score[h] + score[2 + h]};
        }
        const u32 low = transposed(pair_of(score[0], score[1])), high = transposed(pair_of(score[2], score[3]));
#pragma unroll
        for (int t = 0; t < kValueTiles; ++t)
#pragma unroll
          for (int w = 0; w < 4; ++w) {  // dims 2w and 2w + 1 of this lane's eight
            const auto word = [&](int i) { return (&value[i][t].x)[w]; };
            float* sum = sums[n][t][w];
            sum[0] *= factor[0], sum[1] *= factor[1], sum[2] *= factor[0], sum[3] *= factor[1];
            mma<X>(sum, __byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                   __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632), low, high);
          }
      }
    }
  }

  // The warps' parts, and the block's.
  __shared__ Softmax parts[kAttendWarps][kHeads];
  extern __shared__ float sums_WHV[];
#pragma unroll
  for (int n = 0; n < GROUPS; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = n * 8 + 2 * q + h;
      float total = known[n][h].total;
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (g == 0) parts[warp][head] = {known[n][h].top, total};
      float* to = sums_WHV + (warp * kHeads + head) * VALUE_DIM;
#pragma unroll
      for (int t = 0; t < kValueTiles; ++t)
#pragma unroll
        for (int w = 0; w < 4; ++w)
          if (t * 64 + g * 8 < VALUE_DIM)
            *reinterpret_cast<float2*>(to + t * 64 + g * 8 + 2 * w) = {sums[n][t][w][h], sums[n][t][w][2 + h]};
    }
  __syncthreads();
  const bool is_whole = gridDim.x == 1;
  for (int i = threadIdx.x; i < num_heads * VALUE_DIM; i += kAttendThreads) {
    const int head = i / VALUE_DIM, v = i % VALUE_DIM;
    Softmax all = {kUnseen, 0.f};
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) all.top = fmaxf(all.top, parts[w][head].top);
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const float share = share_of(parts[w][head].top, all.top);
      all.total += share * parts[w][head].total;
      if (share != 0.f) sum += share * sums_WHV[(w * kHeads + head) * VALUE_DIM + v];
    }
    const i64 row = i64(b) * a->num_heads + first_head + head;
    if (is_whole) {
      reinterpret_cast<u16*>(a->y)[row * VALUE_DIM + v] = narrow<X>(all.total ? sum / all.total : 0.f);
    } else {
      const i64 part = row * gridDim.x + blockIdx.x;
      reinterpret_cast<float*>(a->sums)[part * VALUE_DIM + v] = sum;
      if (v == 0) reinterpret_cast<Softmax*>(a->parts)[part] = all;
    }
  }
}

// Grid: (H, B).
extern "C" __global__ void __launch_bounds__(VALUE_DIM) join(const __grid_constant__ Attention record, int num_splits) {
  await_earlier_launches();
  __shared__ Softmax parts[MAX_SPLITS];
  const i64 row = i64(blockIdx.y) * record.num_heads + blockIdx.x;
  for (int i = threadIdx.x; i < num_splits; i += VALUE_DIM)
    parts[i] = reinterpret_cast<const Softmax*>(record.parts)[row * num_splits + i];
  __syncthreads();
  const float* sums = reinterpret_cast<const float*>(record.sums) + row * num_splits * VALUE_DIM + threadIdx.x;
  Softmax all = {kUnseen, 0.f};
  for (int i = 0; i < num_splits; ++i) all.top = fmaxf(all.top, parts[i].top);
  float sum = 0.f;
#pragma unroll 16
  for (int i = 0; i < num_splits; ++i) {
    const float share = share_of(parts[i].top, all.top);
    all.total += share * parts[i].total;
    sum += share * sums[i * VALUE_DIM];
  }
  reinterpret_cast<u16*>(record.y)[row * VALUE_DIM + threadIdx.x] = narrow<X>(all.total ? sum / all.total : 0.f);
}
