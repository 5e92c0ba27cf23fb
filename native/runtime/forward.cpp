// Bank::forward: the wanted pairs grouped by expert, then two phases of units on all threads.
#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>

#include "bank.h"
#include "schedule.h"
#include "timeline.h"

namespace monde {
namespace {

// Scratch memory of a lease, one slot per purpose.
enum Slot { kIndexSlot, kXSlot, kHSlot, kYSlot };

// Tokens are taken in chunks of at most this many routed rows, so that scratch stays bounded; at this size an expert's
// weights are already read for far more rows than the arithmetic needs to hide them.
constexpr int64_t kMaxRowsPerChunk = 32768;

// A matrix tile of the last, ragged block may read so far past its rows.
constexpr size_t kOverreadBytes = size_t(kBlockRows) * kTileBytes;

// What a waiting thread fetches between two looks at whether it still has to wait, and how much at most: the larger
// part of an L2 cache would push out what the unit's first rows need.
constexpr size_t kFetchBytes = 2048, kMaxFetchBytes = size_t(128) << 10;

int64_t id_at(const ForwardArgs& args, int64_t token, int64_t k) {
  const int64_t at = token * args.ids_row_stride + k * args.ids_column_stride;
  if (args.ids_are_64_bit) return reinterpret_cast<const int64_t*>(args.ids)[at];
  return reinterpret_cast<const int32_t*>(args.ids)[at];
}

float weight_at(const ForwardArgs& args, int64_t token, int64_t k) {
  const int64_t at = token * args.weights_row_stride + k * args.weights_column_stride;
  return load_element(args.weights, at, args.weights_dtype);
}

bool is_wanted(const ForwardArgs& args, int64_t id) { return !args.is_wanted_E || args.is_wanted_E[id]; }

// Places in one block of scratch, every one on cache lines of its own.
class Carver {
 public:
  template <class T>
  size_t reserve(int64_t count) {
    const size_t at = num_bytes_;
    num_bytes_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  size_t num_bytes_ = 0;
};

}  // namespace

// Some of a forward's tokens: filled in the order of its methods, then read by the units of all threads.
struct Bank::Plan {
  Plan(const Bank& bank, const ForwardArgs& args, int64_t token_begin, int num_tokens, Pool::Lease& lease);
  void group_pairs();
  void cut_phases();
  ForwardCounts run();

  const Bank& bank;
  const ForwardArgs& args;
  const int64_t token_begin;
  const int num_tokens, num_threads;
  Pool::Lease& lease;
  const Kernels& kernels;
  const ExpertLayout& layout;
  const int rows_at_once;
  ForwardCounts counts{};
  Batch batch{};

  // Index arrays.
  int* next_row_E;  // of an expert's rows: how many there are, then where the next one goes
  ExpertGroup* groups;
  int* row_token;
  float* row_weight;
  Segment* segments;
  int num_segments = 0;
  int *gate_up_ranges, *down_ranges;  // [num_threads + 1] units of each thread
  int* node_of_thread;

  // Every thread gathers the rows of a segment for itself: they are in its own cache then, and nobody waits for others.
  unsigned char* x_blocks;  // a stretch of rows each
  size_t x_stride_bytes = 0;
  const Segment** gathered;  // by thread, whose rows it has

  DownUnits down{};
  int num_down_units = 0;
  float* sums;  // y of a unit: one block a thread, or, where slices wait for each other, a unit
  size_t sums_stride = 0;
  std::atomic<int>* slices_left;  // by panel

  int first_group(int slice) const { return int(int64_t(batch.num_groups) * slice / down.num_slices); }

  static void gate_up_unit(void* context, int unit, int thread) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const Segment& segment = segment_of(plan.segments, plan.num_segments, unit);
    const ExpertGroup& group = plan.batch.groups[segment.group];
    const int panel = segment.panel_begin + (unit - segment.first_unit) * segment.panels_per_unit;
    unsigned char* const x_blocks = plan.x_blocks + thread * plan.x_stride_bytes;
    if (plan.gathered[thread] != &segment) {
      plan.kernels.gather(plan.layout, plan.batch, group, segment.row_begin, segment.row_end, x_blocks);
      plan.gathered[thread] = &segment;
    }
    plan.kernels.gate_up(plan.layout, plan.bank.shape_.activation, plan.batch, group, x_blocks, segment.row_begin,
                         segment.row_end, panel, std::min(panel + segment.panels_per_unit, segment.panel_end));
  }
  // Units of a panel follow each other, one for each slice of the groups; whoever is last adds the slices up.
  static void down_unit(void* context, int unit, int thread) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const int S = plan.down.num_slices, slice = unit % S, panel = unit / S * plan.down.panels_per_unit;
    const int panel_end = std::min(panel + plan.down.panels_per_unit, plan.layout.num_d_panels);
    float* const y = plan.sums + (S == 1 ? thread : unit) * plan.sums_stride;
    plan.kernels.down(plan.layout, plan.batch, plan.first_group(slice), plan.first_group(slice + 1), panel, panel_end,
                      y);
    if (S > 1 && plan.slices_left[unit / S].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    plan.kernels.write(plan.layout, plan.batch, panel, panel_end, y - slice * plan.sums_stride, S, plan.sums_stride);
  }
  static bool fetch_down(void* context, int unit, int step) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const ExpertLayout& layout = plan.layout;
    const int slice = unit % plan.down.num_slices, panel = unit / plan.down.num_slices * plan.down.panels_per_unit;
    const int num_panels = std::min(plan.down.panels_per_unit, layout.num_d_panels - panel);
    const size_t group_bytes = num_panels * layout.down_panel_bytes;
    const size_t pieces = (group_bytes + kFetchBytes - 1) / kFetchBytes;
    const int group = plan.first_group(slice) + int(step / pieces);
    if (group >= plan.first_group(slice + 1) || step * kFetchBytes >= kMaxFetchBytes) return false;
    const unsigned char* from = plan.groups[group].down_panels + panel * layout.down_panel_bytes;
    const size_t others = layout.down_panel_bytes / layout.f_pad_k * kLanes * plan.groups[group].first_panel;
    const size_t at = step % pieces * kFetchBytes;
    for (size_t i = at; i < std::min(at + kFetchBytes, group_bytes); i += 64)
      if (i % layout.down_panel_bytes >= others) __builtin_prefetch(from + i, 0, 2);
    return true;
  }
};

Bank::Plan::Plan(const Bank& of, const ForwardArgs& arguments, int64_t first_token, int count, Pool::Lease& pool_lease)
    : bank(of),
      args(arguments),
      token_begin(first_token),
      num_tokens(count),
      num_threads(of.pool_->num_threads()),
      lease(pool_lease),
      kernels(of.kernels_for(arguments.x_dtype)),
      layout(of.layout_),
      rows_at_once(stretch_rows(kernels.stretch_bytes, layout.d_pad_k, kernels.activation_itemsize_bytes)) {
  const int E = bank.shape_.num_experts, num_nodes = bank.pool_->num_nodes();
  const int64_t max_rows = num_tokens * args.num_topk;
  Carver carver;
  const size_t at_next = carver.reserve<int>(E), at_groups = carver.reserve<ExpertGroup>(E);
  const size_t at_token = carver.reserve<int>(max_rows), at_weight = carver.reserve<float>(max_rows);
  const size_t at_segments = carver.reserve<Segment>(max_segments(E, max_rows, rows_at_once, num_nodes));
  const size_t at_ranges = carver.reserve<int>(2 * (num_threads + 1)), at_nodes = carver.reserve<int>(num_threads);
  const size_t at_slices = carver.reserve<std::atomic<int>>(layout.num_d_panels);
  const size_t at_gathered = carver.reserve<const Segment*>(num_threads);
  unsigned char* const index = lease.scratch(kIndexSlot, carver.num_bytes());
  next_row_E = reinterpret_cast<int*>(index + at_next);
  groups = reinterpret_cast<ExpertGroup*>(index + at_groups);
  row_token = reinterpret_cast<int*>(index + at_token);
  row_weight = reinterpret_cast<float*>(index + at_weight);
  segments = reinterpret_cast<Segment*>(index + at_segments);
  gate_up_ranges = reinterpret_cast<int*>(index + at_ranges);
  down_ranges = gate_up_ranges + num_threads + 1;
  node_of_thread = reinterpret_cast<int*>(index + at_nodes);
  slices_left = reinterpret_cast<std::atomic<int>*>(index + at_slices);
  gathered = reinterpret_cast<const Segment**>(index + at_gathered);
}

// Counting sort of the wanted pairs by expert.
void Bank::Plan::group_pairs() {
  const int E = bank.shape_.num_experts;
  const auto for_each_pair = [&](auto&& visit) {
    for (int t = 0; t < num_tokens; ++t)
      for (int64_t k = 0; k < args.num_topk; ++k) {
        const int64_t id = id_at(args, token_begin + t, k);
        if (id < 0 || id >= E || !is_wanted(args, id)) continue;
        const float weight = weight_at(args, token_begin + t, k);
        if (weight != 0.f) visit(t, int(id), weight);
      }
  };
  std::fill(next_row_E, next_row_E + E, 0);
  for_each_pair([&](int, int id, float) { ++next_row_E[id]; });
  int num_groups = 0, num_rows = 0;
  for (int id = 0; id < E; ++id) {
    const int rows = next_row_E[id];
    if (!rows) continue;
    const unsigned char* data = bank.experts_[id].data;
    const int cut_panel = args.cut_expert == kAllExperts || id == args.cut_expert ? args.cut_panel : 0;
    groups[num_groups++] = {data,
                            data + layout.down_offset_bytes,
                            bank.bias(id, "gate_bias"),
                            bank.bias(id, "up_bias"),
                            bank.bias(id, "down_bias"),
                            rows,
                            num_rows,
                            cut_panel};
    counts.weight_bytes += int64_t(layout.weight_bytes) * (layout.num_f_panels - cut_panel) / layout.num_f_panels;
    next_row_E[id] = num_rows;
    num_rows += rows;
  }
  for_each_pair([&](int t, int id, float weight) {
    row_token[next_row_E[id]] = t;
    row_weight[next_row_E[id]++] = weight;
  });
  counts.num_pairs = num_rows;
  counts.num_experts = batch.num_groups = num_groups;
}

void Bank::Plan::cut_phases() {
  const size_t item_bytes = kernels.activation_itemsize_bytes;
  batch = {args.x + token_begin * args.x_row_stride * itemsize_bytes(args.x_dtype),
           ptrdiff_t(args.x_row_stride),
           args.x_dtype,
           args.out + token_begin * args.out_row_stride * itemsize_bytes(args.out_dtype),
           ptrdiff_t(args.out_row_stride),
           args.out_dtype,
           args.adds,
           num_tokens,
           row_token,
           row_weight,
           groups,
           batch.num_groups,
           lease.scratch(kHSlot, size_t(counts.num_pairs) * layout.f_pad_k * item_bytes + kOverreadBytes)};
  int most_rows = 0;
  for (int g = 0; g < batch.num_groups; ++g) most_rows = std::max(most_rows, groups[g].num_rows);
  x_stride_bytes = size_t(std::min(most_rows, rows_at_once)) * layout.d_pad_k * item_bytes + kOverreadBytes;
  x_blocks = lease.scratch(kXSlot, x_stride_bytes * num_threads);
  std::fill(gathered, gathered + num_threads, nullptr);
  for (int i = 0; i < num_threads; ++i) node_of_thread[i] = bank.pool_->node_of_thread(i);
  num_segments = schedule_gate_up(layout, groups, batch.num_groups, rows_at_once, {num_threads, node_of_thread},
                                  segments, gate_up_ranges);
  down = cut_down(layout, num_tokens, int(counts.num_pairs), batch.num_groups, num_threads);
  const int num_down_panels = (layout.num_d_panels + down.panels_per_unit - 1) / down.panels_per_unit;
  num_down_units = num_down_panels * down.num_slices;
  sums_stride = size_t(num_tokens) * kLanes * down.panels_per_unit;
  const int num_sums = down.num_slices > 1 ? num_down_units : num_threads;
  sums = reinterpret_cast<float*>(lease.scratch(kYSlot, sums_stride * num_sums * sizeof(float)));
  for (int panel = 0; panel < num_down_panels; ++panel) new (slices_left + panel) std::atomic<int>(down.num_slices);
  split_evenly(num_down_units, num_threads, down_ranges);
}

ForwardCounts Bank::Plan::run() {
  const Phase phases[] = {{&Plan::gate_up_unit, gate_up_ranges[num_threads], gate_up_ranges, "gate_up"},
                          {&Plan::down_unit, num_down_units, down_ranges, "down", &Plan::fetch_down}};
  lease.run(phases, 2, this);
  return counts;
}

// bf16 dot products only where activations are bf16 already: f32 activations keep their precision.
const Kernels& Bank::kernels_for(DType x_dtype) const {
  switch (shape_.dtype) {
    case DType::kF32:
      return isa_.f32_by_f32;
    case DType::kF16:
      return isa_.f32_by_f16;
    case DType::kBF16:
      break;
  }
  return x_dtype == DType::kBF16 && isa_.bf16_by_bf16.gather ? isa_.bf16_by_bf16 : isa_.f32_by_bf16;
}

void Bank::check_loaded(const ForwardArgs& args) const {
  for (int64_t t = 0; t < args.num_tokens; ++t)
    for (int64_t k = 0; k < args.num_topk; ++k) {
      const int64_t id = id_at(args, t, k);
      if (id < 0 || id >= shape_.num_experts || !is_wanted(args, id)) continue;
      if (!experts_[id].loaded && weight_at(args, t, k) != 0.f) throw std::out_of_range(std::to_string(id));
    }
}

ForwardCounts Bank::forward(const ForwardArgs& args) {
  check_loaded(args);
  if (args.cut_panel % 2 || args.cut_panel < 0 || args.cut_panel >= layout_.num_f_panels)
    throw std::invalid_argument("cut: expected an even panel within F, got " + std::to_string(args.cut_panel));
  if (args.adds && args.out_dtype != DType::kF32) throw std::invalid_argument("adds: expected an out in fp32");
  ForwardCounts total;
  if (args.num_tokens == 0) return total;
  const int64_t tokens_per_chunk = std::max<int64_t>(1, kMaxRowsPerChunk / std::max<int64_t>(1, args.num_topk));
  Pool::Lease lease(*pool_);
  const int64_t start_ns = timeline::on() ? timeline::now_ns() : 0;
  for (int64_t begin = 0; begin < args.num_tokens; begin += tokens_per_chunk) {
    const int count = int(std::min(tokens_per_chunk, args.num_tokens - begin));
    Plan plan(*this, args, begin, count, lease);
    plan.group_pairs();
    plan.cut_phases();
    const ForwardCounts counts = plan.run();
    total.num_pairs += counts.num_pairs;
    total.num_experts += counts.num_experts;
    total.weight_bytes += counts.weight_bytes;
  }
  if (start_ns)
    timeline::add({"forward", start_ns, timeline::now_ns(), reinterpret_cast<uintptr_t>(this), -1, args.num_tokens,
                   total.num_pairs, total.weight_bytes, 0});
  return total;
}

}  // namespace monde
