// One mixture-of-experts layer for a few tokens, without the host's CPU launching or waiting for anything:
//
//   route     who is resident? cold pairs and their rows go to the mailbox, and the doorbell rings
//   gate_up   h = act(gate x, up x)           one block: 16 rows of F of one expert
//   down      v = down h                      one block: 32 rows of D of one expert
//   combine   y = sum of weight * v, and, when it has answered, what the host computed
//
// A layer may leave pairs to the next one (docs/deferral.md). They are computed with the others, but summed apart: those
// of residents here, into left_TD; those of cold experts by the host alone, after all else, while the GPU goes on. The
// next layer's combine waits for the host's part and adds both.
//
// gate_up and down compute residents from their slots, and of every cold expert the first rows of F, as many as the
// state says, straight from the host's memory: the bus has nothing else to do, and the host reads that much less.
//
// Letters: T tokens, K experts per token, R = T * K routed pairs, S slots, D model dim, F expert hidden dim, G groups
// of pairs that share an expert. Weights lie in panels of 16 output rows (native/layout.h), the same bytes as in host
// memory. Compiled at first use, once for each pair of element types. `Layer` and the RING_, STATE_ and KIND_ constants
// come from kernels/__init__.py, which also puts elements.cuh, overlap.cuh, product.cuh and activation.cuh in front.

// ---- memory shared with the host ----

__device__ void store_release(u64* word, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}
__device__ u64 load_acquire(const u64* word) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Boxes of the mailbox take turns, by the number of the ring.
template <typename T>
__device__ T* in_box(const Layer* layer, i64 part, u64 number) {
  return reinterpret_cast<T*>(part + i64(number & 1) * layer->mailbox_box_bytes);
}

// ---- route ----

// Pairs in groups that share a place, so that an expert's weights are read once per group. Places are slots, and after
// them the experts in the host's memory. One block; counts fit because a layer has at most MAX_EXPERTS experts.
__device__ void make_groups(const Layer* layer, int num_pairs) {
  __shared__ int first_E[2 * MAX_EXPERTS + 1];
  __shared__ int carry_T[kThreads];
  __shared__ int num_shared;
  if (threadIdx.x == 0) num_shared = 0;
  int* slots_R = reinterpret_cast<int*>(layer->slots_R);
  const int num_slots = int(layer->num_slots) + (layer->host_blobs ? int(layer->num_experts) : 0);
  const int per_thread = (num_slots + kThreads - 1) / kThreads;
  for (int s = threadIdx.x; s < num_slots; s += kThreads) first_E[s] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < num_pairs; r += kThreads)
    if (slots_R[r] >= 0) atomicAdd(&first_E[slots_R[r]], 1);
  __syncthreads();
  // Exclusive sums over slots of (pairs, groups), packed as pairs + groups * 2^16.
  int mine = 0;
  for (int i = 0; i < per_thread; ++i) {
    const int s = threadIdx.x * per_thread + i;
    if (s < num_slots) mine += first_E[s] + (first_E[s] > 0) * (1 << 16);
  }
  carry_T[threadIdx.x] = mine;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int before = threadIdx.x >= step ? carry_T[threadIdx.x - step] : 0;
    __syncthreads();
    carry_T[threadIdx.x] += before;
    __syncthreads();
  }
  int sum = carry_T[threadIdx.x] - mine;
  int* group_slot_G = reinterpret_cast<int*>(layer->group_slot_G);
  int* group_first_G = reinterpret_cast<int*>(layer->group_first_G);
  for (int i = 0; i < per_thread; ++i) {
    const int s = threadIdx.x * per_thread + i;
    if (s >= num_slots) break;
    const int count = first_E[s];
    if (count) {
      group_slot_G[sum >> 16] = s;
      group_first_G[sum >> 16] = sum & 0xffff;
      if (s >= layer->num_slots) atomicAdd(&num_shared, 1);
    }
    first_E[s] = sum & 0xffff;
    sum += count + (count > 0) * (1 << 16);
  }
  __syncthreads();
  if (threadIdx.x == kThreads - 1) {
    const int total = carry_T[kThreads - 1];
    group_first_G[total >> 16] = total & 0xffff;
    *reinterpret_cast<int*>(layer->num_groups) = total >> 16;
    u64* state = reinterpret_cast<u64*>(layer->state);
    state[STATE_SHARED_BYTES] += num_shared * state[STATE_SHARED_PANELS] * (layer->blob_bytes / layer->num_f_panels);
  }
  // Within a group the order of pairs is of no consequence: combine sums over K in order.
  int* group_pairs_R = reinterpret_cast<int*>(layer->group_pairs_R);
  for (int r = threadIdx.x; r < num_pairs; r += kThreads)
    if (slots_R[r] >= 0) group_pairs_R[atomicAdd(&first_E[slots_R[r]], 1)] = r;
}

// Panels of a cold expert's F that the GPU computes: whole tiles, and never all of them.
__device__ int shared_panels(const Layer* layer, u64 share) {
  if (layer->host_blobs == 0) return 0;
  const int num_tiles = int(layer->num_f_panels - 1) / 2;
  return 2 * min(num_tiles, int((share * u64(layer->num_f_panels) / 2 + SHARE_ONE / 2) / SHARE_ONE));
}

// Whether pair r is among the num_left lightest of its token; of equal ones those later in K are lighter, as in
// monde/routing/deferral.py.
__device__ bool counts_later(const void* weights_TK, int weights_type, int r, int num_topk, int num_left) {
  const float weight = router_weight(weights_TK, weights_type, r);
  const int first = r / num_topk * num_topk;
  int num_heavier = 0;
  for (int other = first; other < first + num_topk; ++other) {
    const float w = router_weight(weights_TK, weights_type, other);
    num_heavier += w > weight || (w == weight && other < r);
  }
  return num_heavier >= num_topk - num_left;
}

// x_TD [T, D] and ids_TK [T, K] contiguous; weights_TK of weights_type. num_left: pairs of every token that count later.
extern "C" __global__ void __launch_bounds__(kThreads)
    route(const __grid_constant__ Layer record, const XElement* x_TD, const i64* ids_TK, const void* weights_TK,
          int weights_type, int num_tokens, int num_topk, int num_left) {
  await_earlier_launches();
  const Layer* const layer = &record;
  const int num_pairs = num_tokens * num_topk, D = int(layer->d_model), d_pad_k = int(layer->d_pad_k);
  u64* state = reinterpret_cast<u64*>(layer->state);
  const bool rings = layer->rings;
  const u64 number = (state[STATE_RING] + 1) & 0xffffffffull;  // of this layer's ring

  // Rows: padded with zeros for the products here, and as they are for the host.
  constexpr int kVector = 16 / sizeof(XElement);
  XElement* padded = reinterpret_cast<XElement*>(layer->x_TD);
  XElement* posted = rings ? in_box<XElement>(layer, layer->mailbox_x, number) : nullptr;
  const int per_row = d_pad_k / kVector;
  const bool aligned = D % kVector == 0;
  for (int v = blockIdx.x * kThreads + threadIdx.x; v < num_tokens * per_row; v += gridDim.x * kThreads) {
    const int t = v / per_row, d = v % per_row * kVector;
    const XElement* from = x_TD + i64(t) * D + d;
    if (aligned && d < D) {
      const uint4 row = *reinterpret_cast<const uint4*>(from);
      *reinterpret_cast<uint4*>(padded + i64(t) * d_pad_k + d) = row;
      if (posted) *reinterpret_cast<uint4*>(posted + i64(t) * D + d) = row;
    } else {
      for (int i = 0; i < kVector; ++i) {
        padded[i64(t) * d_pad_k + d + i] = d + i < D ? from[i] : XElement(0);
        if (posted && d + i < D) posted[i64(t) * D + d + i] = from[i];
      }
    }
  }

  // Pairs: the table decides, here and nowhere else.
  __shared__ int num_cold, num_later, num_resident;  // of the first block. cold: for the host to compute now
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) {
      num_cold = num_later = num_resident = 0;
      state[STATE_ROUTED_NS] = nanoseconds();
    }
    const int cut = shared_panels(layer, state[STATE_SHARE]);
    __syncthreads();
    const int* slot_of_expert_E = reinterpret_cast<const int*>(layer->slot_of_expert_E);
    float* heat_E = reinterpret_cast<float*>(layer->heat_E);
    int* slots_R = reinterpret_cast<int*>(layer->slots_R);
    int* is_later_R = reinterpret_cast<int*>(layer->is_later_R);
    int* posted_ids_2R = in_box<int>(layer, layer->mailbox_ids, number);
    float* posted_weights_R = in_box<float>(layer, layer->mailbox_weights, number);
    for (int r = threadIdx.x; r < num_pairs; r += kThreads) {
      const i64 id = ids_TK[r];
      const float weight = router_weight(weights_TK, weights_type, r);
      const bool wanted = id >= 0 && id < layer->num_experts && weight != 0.f;
      const int slot = wanted ? slot_of_expert_E[id] : -1;
      const bool is_later = num_left && counts_later(weights_TK, weights_type, r, num_topk, num_left);
      const bool cold = wanted && slot < 0 && !is_later, cold_later = wanted && slot < 0 && is_later;
      slots_R[r] = cold && cut > 0 ? int(layer->num_slots + id) : slot;
      if (num_left) is_later_R[r] = is_later;
      if (wanted) atomicAdd(heat_E + id, 1.f);
      if (rings) {
        posted_ids_2R[r] = cold ? int(id) : -1;
        if (num_left) posted_ids_2R[num_pairs + r] = cold_later ? int(id) : -1;
        posted_weights_R[r] = weight;
      }
      if (cold) atomicAdd(&num_cold, 1);
      if (cold_later) atomicAdd(&num_later, 1);
      if (slot >= 0) atomicAdd(&num_resident, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      state[STATE_COLD] = num_cold;
      state[STATE_LATER] = num_later;
      state[STATE_EARLIER_RING] = state[STATE_LEFT_RING];
      state[STATE_LEFT_RING] = num_later ? number : 0;
      state[STATE_SHARED_PANELS] = cut;
      if (rings) *in_box<u64>(layer, layer->mailbox_cut, number) = cut;
      state[STATE_COLD_PAIRS] += num_cold + num_later;
      state[STATE_RESIDENT_PAIRS] += num_resident;
      if (rings) state[STATE_POSTED_TOKENS] += num_tokens;
      state[STATE_ANSWERED_TOKENS] += ((num_cold > 0) + (num_later > 0)) * num_tokens;
    }
  }

  // The last block to get here rings: everything that is posted is visible to the host by then. One thread's fence
  // covers what its block wrote before the barrier, and the release what came before the ticket.
  if (rings) {
    __syncthreads();
    if (threadIdx.x == 0) {
      bool is_last = gridDim.x == 1;
      u64 cold = num_cold, later = num_later;
      if (!is_last) {
        __threadfence_system();
        is_last = atomicAdd(state + STATE_TICKET, 1ull) == gridDim.x - 1;
        if (is_last) state[STATE_TICKET] = 0;
        cold = *reinterpret_cast<volatile u64*>(state + STATE_COLD);
        later = *reinterpret_cast<volatile u64*>(state + STATE_LATER);
      }
      if (is_last) {
        state[STATE_RING] = number;
        store_release(in_box<u64>(layer, layer->mailbox_rung, number),
                      number | u64(layer->layer_idx) << RING_LAYER_SHIFT | u64(num_tokens) << RING_TOKENS_SHIFT |
                          u64(later > 0) << RING_LATER_SHIFT | u64(num_topk) << RING_TOPK_SHIFT |
                          u64(cold > 0) << RING_WORK_SHIFT);
      }
    }
  }
  if (blockIdx.x == 0 && (layer->num_slots > 0 || layer->host_blobs)) make_groups(layer, num_pairs);
}

// ---- gate_up and down ----

// Of an expert's down panels as much as this block's share, from memory into L2: memory idles while the blocks of gate_up
// end and those of down begin. Not where L2 might lose it again: of at least 50 MB that GPUs with the instruction have,
// gate_up's own weights pass through some.
constexpr i64 kFetchedBytes = 32 << 20;
__device__ void fetch_down(const Layer* layer, const u8* blob, int num_groups) {
#if __CUDA_ARCH__ >= 900
  const i64 down_bytes = layer->num_d_panels * layer->down_panel_bytes;
  if (threadIdx.x || num_groups * down_bytes > kFetchedBytes) return;
  const i64 share_bytes = down_bytes / gridDim.x / 16 * 16;
  if (share_bytes == 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
               :
               : "l"(blob + layer->down_offset_bytes + blockIdx.x * share_bytes), "r"(u32(share_bytes))
               : "memory");
#endif
}

struct Group {
  const u8* blob;
  bool is_resident;
  int slot, num_panels, first, count;  // slot of biases, which experts on the host have not here; panels of F
  int num_groups;                      // of all
};

// False where there is no group g. Everything is read at once: one wait for memory before the weights, not two.
__device__ bool group_at(const Layer* layer, int g, Group& group) {
  const int* first_G = reinterpret_cast<const int*>(layer->group_first_G);
  const int num_groups = *reinterpret_cast<const int*>(layer->num_groups), first = first_G[g], count = first_G[g + 1] - first;
  const int place = reinterpret_cast<const int*>(layer->group_slot_G)[g], expert = place - int(layer->num_slots);
  if (g >= num_groups) return false;
  if (expert < 0) {
    const u8* const blob = reinterpret_cast<const u8*>(layer->blobs_SB) + place * layer->blob_bytes;
    group = {blob, true, place, int(layer->num_f_panels), first, count, num_groups};
    return true;
  }
  const int* place_of_expert_E = reinterpret_cast<const int*>(layer->place_of_expert_E);
  const i64 host_place = place_of_expert_E ? place_of_expert_E[expert] : expert;
  const u64* const state = reinterpret_cast<const u64*>(layer->state);
  const u8* const blob = reinterpret_cast<const u8*>(layer->host_blobs) + host_place * layer->host_blob_bytes;
  group = {blob, false, 0, int(state[STATE_SHARED_PANELS]), first, count, num_groups};
  return true;
}

// Grid: (num_f_panels, or half of them where there is no gate; groups at most).
extern "C" __global__ void __launch_bounds__(kThreads) gate_up(const __grid_constant__ Layer record, int num_topk) {
  await_earlier_launches();
  const Layer* const layer = &record;
  __shared__ Sums sums;
  __shared__ const XElement* rows[kRows];
  Group group;
  if (!group_at(layer, blockIdx.y, group)) return;
  const int* pairs = reinterpret_cast<const int*>(layer->group_pairs_R) + group.first;
  const bool gated = layer->gated;
  const int num_panels = int(layer->num_f_panels), f_pad_k = int(layer->f_pad_k);
  const int panel = gated ? blockIdx.x : 2 * blockIdx.x;
  if (panel >= group.num_panels) return;
  const bool two = gated || panel + 1 < num_panels;
  const u8 *first = group.blob + panel * layer->in_unit_bytes, *second = first + (two ? layer->in_panel_bytes : 0);
  const float* gate_bias = layer->gate_bias_SF ? reinterpret_cast<const float*>(layer->gate_bias_SF) : nullptr;
  const float* up_bias = layer->up_bias_SF ? reinterpret_cast<const float*>(layer->up_bias_SF) : nullptr;
  HElement* h_RF = reinterpret_cast<HElement*>(layer->h_RF);
  for (int begin = 0; begin < group.count; begin += kRows) {
    const int num_rows = min(kRows, group.count - begin);
    if (threadIdx.x < num_rows)
      rows[threadIdx.x] = reinterpret_cast<const XElement*>(layer->x_TD) +
                          i64(pairs[begin + threadIdx.x] / num_topk) * layer->d_pad_k;
    __syncthreads();
    product<X>(first, second, int(layer->d_pad_k) / kTile, rows, num_rows, sums);
    if (begin == 0 && group.is_resident) fetch_down(layer, group.blob, group.num_groups);
    __syncthreads();
    for (int i = threadIdx.x; i < num_rows * 16; i += kThreads) {
      const int row = i / 16, lane = i % 16;
      HElement* to = h_RF + i64(pairs[begin + row]) * f_pad_k;
      const i64 at = i64(group.slot) * num_panels * 16 + panel * 16 + lane;
      const float a = sum_of_warps(sums, row, 0, lane), b = sum_of_warps(sums, row, 1, lane);
      if (gated) {
        const float gate = a + (gate_bias ? gate_bias[at] : 0.f), up = b + (up_bias ? up_bias[at] : 0.f);
        to[panel * 16 + lane] = narrow<kHidden>(activate(layer, gate, up));
      } else {
        to[panel * 16 + lane] = narrow<kHidden>(activate(layer, a + (up_bias ? up_bias[at] : 0.f), 0.f));
        if (two) to[panel * 16 + 16 + lane] = narrow<kHidden>(activate(layer, b + (up_bias ? up_bias[at + 16] : 0.f), 0.f));
      }
      // F padded to 32 may exceed the panels of 16: the last half tile must read as zero.
      if (blockIdx.x == gridDim.x - 1 && num_panels * 16 < f_pad_k) to[num_panels * 16 + lane] = narrow<kHidden>(0.f);
    }
    __syncthreads();
  }
}

// Grid: (half of num_d_panels, groups at most).
extern "C" __global__ void __launch_bounds__(kThreads) down(const __grid_constant__ Layer record) {
  await_earlier_launches();
  const Layer* const layer = &record;
  __shared__ Sums sums;
  __shared__ const HElement* rows[kRows];
  Group group;
  if (!group_at(layer, blockIdx.y, group)) return;
  const int* pairs = reinterpret_cast<const int*>(layer->group_pairs_R) + group.first;
  const int num_panels = int(layer->num_d_panels), panel = 2 * blockIdx.x;
  const bool two = panel + 1 < num_panels;
  const u8* first = group.blob + layer->down_offset_bytes + panel * layer->down_panel_bytes;
  const u8* second = first + (two ? layer->down_panel_bytes : 0);
  const int num_tiles = (group.num_panels * 16 + kTile - 1) / kTile;
  const float* bias = layer->down_bias_SD ? reinterpret_cast<const float*>(layer->down_bias_SD) : nullptr;
  float* v_RD = reinterpret_cast<float*>(layer->v_RD);
  for (int begin = 0; begin < group.count; begin += kRows) {
    const int num_rows = min(kRows, group.count - begin);
    if (threadIdx.x < num_rows)
      rows[threadIdx.x] =
          reinterpret_cast<const HElement*>(layer->h_RF) + i64(pairs[begin + threadIdx.x]) * layer->f_pad_k;
    __syncthreads();
    product<kHidden>(first, second, num_tiles, rows, num_rows, sums);
    __syncthreads();
    for (int i = threadIdx.x; i < num_rows * 32; i += kThreads) {
      const int row = i / 32, half = i / 16 % 2, lane = i % 16;
      if (half && !two) continue;
      const int d = (panel + half) * 16 + lane;
      const float b = bias ? bias[i64(group.slot) * num_panels * 16 + d] : 0.f;
      v_RD[i64(pairs[begin + row]) * num_panels * 16 + d] = sum_of_warps(sums, row, half, lane) + b;
    }
    __syncthreads();
  }
}

// ---- combine ----

// From here on this layer, and all after it, give NaN at once, so that the GPU is free again; the host's side of the
// program raises.
__device__ void fail(const Layer* layer) {
  atomicExch(reinterpret_cast<u64*>(layer->state) + STATE_FAILED, u64(layer->layer_idx) + 1);
  store_release(reinterpret_cast<u64*>(layer->mailbox_failed), u64(layer->layer_idx) + 1);
}

// Until the host has answered this ring, with its pairs for later if `whole`, and so all rings before it.
// False when a forward raised, or when there was no answer in time.
__device__ bool host_answered(const Layer* layer, u64 number, bool whole) {
  u64* state = reinterpret_cast<u64*>(layer->state);
  if (*reinterpret_cast<volatile u64*>(state + STATE_FAILED)) return false;
  const u64 deadline_ns = state[STATE_DEADLINE_NS], start = nanoseconds();
  for (;;) {
    const u64 answered = load_acquire(reinterpret_cast<const u64*>(layer->mailbox_answered));
    const int ahead = int(u32(answered) - u32(number));
    const bool done = ahead > 0 || (ahead == 0 && !(whole && answered >> RING_OWING_SHIFT & 1));
    if (done && (answered >> RING_FAILED_SHIFT & 1) == 0) return true;
    if (!done && nanoseconds() - start <= deadline_ns) continue;
    fail(layer);
    return false;
  }
}

// What the host computed with the ring of this number, [2, T, D]: now, and later.
__device__ const volatile float* host_out(const Layer* layer, u64 number) {
  return in_box<const volatile float>(layer, layer->mailbox_out, number);
}

// earlier_TD: what the layer before left here; the host's part of it is added too if `owed`. left_TD: what this one
// leaves. Either may be null. A box is filled again after the next layer's combine, so that waits for what the host was
// given in any case. Grid: (enough for D, T).
extern "C" __global__ void __launch_bounds__(kThreads)
    combine(const __grid_constant__ Layer record, const void* weights_TK, int weights_type, XElement* y_TD,
            int num_topk, const float* earlier_TD, int owed, float* left_TD) {
  await_earlier_launches();
  const Layer* const layer = &record;
  __shared__ bool ok;
  u64* state = reinterpret_cast<u64*>(layer->state);
  const bool waits = layer->rings && state[STATE_COLD] > 0;
  const u64 number = state[STATE_RING], earlier = state[STATE_EARLIER_RING];
  if (waits && threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0)
    *reinterpret_cast<volatile u64*>(layer->mailbox_gpu_ns) = state[STATE_GPU_NS] +=
        nanoseconds() - state[STATE_ROUTED_NS];
  // What is here is summed before the host is waited for: that would only come on top.
  const int t = blockIdx.y, D = int(layer->d_model), d = blockIdx.x * kThreads + threadIdx.x;
  const int* slots_R = reinterpret_cast<const int*>(layer->slots_R);
  const int* is_later_R = reinterpret_cast<const int*>(layer->is_later_R);
  const i64 v_stride = layer->num_d_panels * 16, at = i64(t) * D + d;
  const float* v_RD = reinterpret_cast<const float*>(layer->v_RD) + d;
  const float nan = __int_as_float(0x7fc00000);
  float sum = 0.f, left = 0.f;
  if (d < D) {
#pragma unroll 8
    for (int r = t * num_topk; r < (t + 1) * num_topk; ++r) {
      const float v = slots_R[r] >= 0 ? router_weight(weights_TK, weights_type, r) * v_RD[r * v_stride] : 0.f;
      (left_TD && is_later_R[r] ? left : sum) += v;
    }
  }
  if (threadIdx.x == 0) ok = (!waits && !earlier) || host_answered(layer, waits ? number : earlier, !waits);
  __syncthreads();
  if (d >= D) return;
  if (waits) sum += host_out(layer, number)[at];
  if (earlier_TD) sum += earlier_TD[at];
  if (owed && earlier) sum += host_out(layer, earlier)[i64(gridDim.y) * D + at];
  y_TD[at] = narrow<X>(ok ? sum : nan);
  if (left_TD) left_TD[at] = ok ? left : nan;
}

// Adds the host's part to what the latest layer left, for whoever takes it not right after that layer. Grid: as combine.
extern "C" __global__ void __launch_bounds__(kThreads) collect(const __grid_constant__ Layer record, float* left_TD) {
  await_earlier_launches();
  const Layer* const layer = &record;
  __shared__ bool ok;
  const u64 number = reinterpret_cast<const u64*>(layer->state)[STATE_LEFT_RING];
  if (number == 0) return;
  if (threadIdx.x == 0) ok = host_answered(layer, number, true);
  __syncthreads();
  const int D = int(layer->d_model), d = blockIdx.x * kThreads + threadIdx.x;
  if (d >= D) return;
  const i64 at = i64(blockIdx.y) * D + d;
  left_TD[at] += ok ? host_out(layer, number)[i64(gridDim.y) * D + at] : __int_as_float(0x7fc00000);
}
