// What every family has between the products of a decode step, one launch each where torch has five to ten:
//
//   rotate      queries and keys turned by their positions' angles
//   append      one key and value of every sequence into a static cache, whose length grows
//   choose      softmax over experts, and the largest of it
//   normalise   RMS norms
//
// and what libraries are slow at:
//
//   project     a product of one token and a matrix, at the rate that the matrix is read
//
// Letters: B sequences, T tokens, H query heads, N key-value heads, C dims of a head, E experts, K experts a token; for
// products D inputs and F outputs.
// `Rotation` and `Addition` come from step.py, which also puts elements.cuh and overlap.cuh in front. Of fp32 rounding
// follows torch, which multiplies and adds apart.

constexpr int kVector = 16 / sizeof(XElement);

__device__ float rounded(float v) { return widen<X>(narrow<X>(v)); }

struct alignas(16) Piece {
  XElement v[kVector];
};

__device__ float sum_of_lanes(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// y = x cos + (second half negated, first half) sin, every product rounded. A thread has kVector dims of the first half
// and those that they turn with. cos_TC and sin_TC have a row for every sequence, or one for all.
extern "C" __global__ void __launch_bounds__(kThreads) rotate(const __grid_constant__ Rotation r) {
  await_earlier_launches();
  const int per_head = int(r.dim) / 2 / kVector, heads = int(r.num_heads + r.num_kv_heads);
  const i64 i = i64(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= r.num_rows * r.num_tokens * heads * per_head) return;
  const int piece = int(i % per_head), head = int(i / per_head % heads);
  const i64 t = i / per_head / heads % r.num_tokens, b = i / per_head / heads / r.num_tokens;
  const bool is_key = head >= r.num_heads;
  const i64 h = is_key ? head - r.num_heads : head, row = b * r.num_tokens + t;
  const XElement* from = is_key ? reinterpret_cast<const XElement*>(r.keys) + b * r.key_row + t * r.key_token + h * r.key_head
                                : reinterpret_cast<const XElement*>(r.queries) + b * r.query_row + t * r.query_token +
                                      h * r.query_head;
  XElement* to = is_key ? reinterpret_cast<XElement*>(r.keys_out) + (row * r.num_kv_heads + h) * r.dim
                        : reinterpret_cast<XElement*>(r.queries_out) + (row * r.num_heads + h) * r.dim;
  const i64 angle = b * r.angle_row + t * r.angle_token;
  const XElement* cos = reinterpret_cast<const XElement*>(r.cos) + angle;
  const XElement* sin = reinterpret_cast<const XElement*>(r.sin) + angle;
  const auto load = [&](const XElement* p, int half) {
    return *reinterpret_cast<const Piece*>(p + half * (r.dim / 2) + piece * kVector);
  };
  const Piece x[2] = {load(from, 0), load(from, 1)}, c[2] = {load(cos, 0), load(cos, 1)};
  const Piece s[2] = {load(sin, 0), load(sin, 1)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Piece y;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float turned = widen<X>(x[1 - half].v[k]);
      const float own = rounded(__fmul_rn(widen<X>(x[half].v[k]), widen<X>(c[half].v[k])));
      const float other = rounded(__fmul_rn(half ? turned : -turned, widen<X>(s[half].v[k])));
      y.v[k] = narrow<X>(__fadd_rn(own, other));
    }
    *reinterpret_cast<Piece*>(to + half * (r.dim / 2) + piece * kVector) = y;
  }
}

// The last block to get here moves the length on, when all have read it. A full cache ends the program, as torch's own
// check of indices does.
extern "C" __global__ void __launch_bounds__(kThreads) append(const __grid_constant__ Addition a) {
  await_earlier_launches();
  const i64 position = *reinterpret_cast<const volatile i64*>(a.length);
  if (position < 0 || position >= a.num_positions) __trap();
  const int per_key = int(a.key_dim) / kVector, per_value = int(a.value_dim) / kVector, per_head = per_key + per_value;
  const i64 i = i64(blockIdx.x) * kThreads + threadIdx.x, num_heads = a.num_rows * a.num_kv_heads;
  if (i < num_heads * per_head) {
    const i64 head = i / per_head, b = head / a.num_kv_heads, h = head % a.num_kv_heads;
    const int piece = int(i % per_head);
    const bool is_key = piece < per_key;
    const XElement* from = is_key ? reinterpret_cast<const XElement*>(a.key) + b * a.key_row + h * a.key_head
                                  : reinterpret_cast<const XElement*>(a.value) + b * a.value_row + h * a.value_head;
    XElement* to = reinterpret_cast<XElement*>(is_key ? a.keys : a.values);
    to += (head * a.num_positions + position) * (is_key ? a.key_dim : a.value_dim);
    const int at = (is_key ? piece : piece - per_key) * kVector;
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
  }
  __syncthreads();
  if (threadIdx.x == 0 && atomicInc(reinterpret_cast<u32*>(a.ticket), gridDim.x - 1) == gridDim.x - 1)
    *reinterpret_cast<volatile i64*>(a.length) = position + 1;
}

// scores_TK of score_type and ids_TK: the largest of softmax(logits_TE), of equal ones the first; NaN counts as the
// greatest, as in torch. A warp has one token. Shared memory: a float for every expert of the block's tokens.
extern "C" __global__ void __launch_bounds__(kThreads)
    choose(const XElement* logits_TE, void* scores_TK, int score_type, i64* ids_TK, int num_tokens, int num_experts,
           int num_topk, int normalises) {
  await_earlier_launches();
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = blockIdx.x * (blockDim.x / 32) + warp;
  if (t >= num_tokens) return;
  float* p_E = shared + warp * num_experts;
  const XElement* logits = logits_TE + i64(t) * num_experts;
  float top = -3.4028234e38f, total = 0.f;
  for (int e = lane; e < num_experts; e += 32) {
    p_E[e] = widen<X>(logits[e]);
    top = fmaxf(top, p_E[e]);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  for (int e = lane; e < num_experts; e += 32) total += p_E[e] = expf(p_E[e] - top);
  total = sum_of_lanes(total);
  for (int e = lane; e < num_experts; e += 32) p_E[e] /= total;

  // Rank after rank; lane k keeps the k-th, so K is at most 32. Keys are in the order of scores: their bits and one, for
  // none is negative; 0 stands for what is taken. A lane looks again only where one of its own was.
  const auto key_of = [&](int e) { return p_E[e] < 0.f ? 0u : (p_E[e] != p_E[e] ? 0x7fc00000u : __float_as_uint(p_E[e])) + 1; };
  float mine = 0.f, sum = 0.f;
  u32 own = 0, own_id = num_experts, my_id = 0;
  const auto look = [&] {
    own = 0, own_id = num_experts;
    for (int e = lane; e < num_experts; e += 32)
      if (key_of(e) > own) own = key_of(e), own_id = e;
  };
  look();
  for (int k = 0; k < num_topk; ++k) {
    const u32 best = __reduce_max_sync(0xffffffffu, own);
    const u32 id = __reduce_min_sync(0xffffffffu, own == best ? own_id : u32(num_experts));
    const float score = __uint_as_float(best - 1);
    if (lane == k) mine = score, my_id = id;
    sum += score;
    if (id == own_id) p_E[id] = -1.f, look();
  }
  if (lane < num_topk) {
    if (normalises) mine /= sum;
    const i64 at = i64(t) * num_topk + lane;
    if (score_type == 0)
      static_cast<float*>(scores_TK)[at] = mine;
    else
      static_cast<u16*>(scores_TK)[at] = score_type == 1 ? narrow<1>(mine) : narrow<2>(mine);
    ids_TK[at] = my_id;
  }
}

// y = weight * x / sqrt(mean(x^2) + eps), in fp32, rounded once. x and y [rows, D]. A warp has a row where there are
// more warps than one (blockDim.y), else the block.
extern "C" __global__ void __launch_bounds__(kThreads)
    normalise(const XElement* x, const XElement* weight_D, XElement* y, i64 num_rows, int D, float eps) {
  __shared__ float sums[kThreads / 32];
  const i64 row = i64(blockIdx.x) * blockDim.y + threadIdx.y;
  const int num_pieces = D / kVector;
  for (int i = threadIdx.x; i < num_pieces; i += blockDim.x) prefetch(reinterpret_cast<const Piece*>(weight_D) + i);
  await_earlier_launches();
  if (row >= num_rows) return;  // whole warps, and of blocks with a row each none
  const Piece* from = reinterpret_cast<const Piece*>(x + row * D);
  float sum = 0.f;
  for (int i = threadIdx.x; i < num_pieces; i += blockDim.x) {
    const Piece piece = from[i];
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum += widen<X>(piece.v[k]) * widen<X>(piece.v[k]);
  }
  sum = sum_of_lanes(sum);
  if (blockDim.x > 32) {
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (int i = 0; i < int(blockDim.x) / 32; ++i) sum += sums[i];
  }
  const float factor = rsqrtf(sum / D + eps);
  for (int i = threadIdx.x; i < num_pieces; i += blockDim.x) {
    const Piece piece = from[i], weight = reinterpret_cast<const Piece*>(weight_D)[i];
    Piece result;
#pragma unroll
    for (int k = 0; k < kVector; ++k) result.v[k] = narrow<X>(widen<X>(piece.v[k]) * factor * widen<X>(weight.v[k]));
    reinterpret_cast<Piece*>(y + row * D)[i] = result;
  }
}

constexpr int kProjectThreads = 128, kAhead = 8;  // pieces of a row that are under way at once

// y_F = weight_FD x_D + bias_F, summed in fp32; bias_F may be null. A warp has an output. Weights, which nothing on the
// stream writes, are asked for before x is there; it lies in shared memory, D floats.
extern "C" __global__ void __launch_bounds__(kProjectThreads)
    project(const XElement* x_D, const XElement* weight_FD, const XElement* bias_F, XElement* y_F, int F, int D) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, f = blockIdx.x * (kProjectThreads / 32) + threadIdx.x / 32;
  const int num_pieces = f < F ? D / kVector : 0;
  const Piece* weight = reinterpret_cast<const Piece*>(weight_FD + i64(f) * D);
  uint4 ahead[kAhead];
  const auto ask = [&](int first) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      ahead[j] = first + 32 * j < num_pieces ? load_once(weight + first + 32 * j) : uint4{0, 0, 0, 0};
  };
  ask(lane);
  await_earlier_launches();
  for (int i = threadIdx.x; i < D / kVector; i += kProjectThreads) {
    const Piece piece = reinterpret_cast<const Piece*>(x_D)[i];
#pragma unroll
    for (int k = 0; k < kVector; ++k) shared[i * kVector + k] = widen<X>(piece.v[k]);
  }
  __syncthreads();
  float sum = 0.f;
  for (int first = lane; first < num_pieces; first += 32 * kAhead) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + 32 * j;
      if (i >= num_pieces) break;
      const Piece& piece = reinterpret_cast<const Piece&>(ahead[j]);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sum += widen<X>(piece.v[k]) * shared[i * kVector + k];
    }
    if (first + 32 * kAhead < num_pieces) ask(first + 32 * kAhead);
  }
  sum = sum_of_lanes(sum);
  if (lane == 0 && f < F) y_F[f] = narrow<X>(sum + (bias_F ? widen<X>(bias_F[f]) : 0.f));
}
