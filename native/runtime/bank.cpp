#include "bank.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <stdexcept>

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

// Below this many elements, waking the threads costs more than gathering alone.
constexpr int64_t kGatherAloneElements = 1 << 13;

int64_t id_at(const ForwardArgs& args, int64_t token, int64_t k) {
  const int64_t at = token * args.ids_row_stride + k * args.ids_column_stride;
  if (args.ids_are_64_bit) return reinterpret_cast<const int64_t*>(args.ids)[at];
  return reinterpret_cast<const int32_t*>(args.ids)[at];
}

float weight_at(const ForwardArgs& args, int64_t token, int64_t k) {
  const int64_t at = token * args.weights_row_stride + k * args.weights_column_stride;
  return load_element(args.weights, at, args.weights_dtype);
}

std::string describe(const char* name, BadElement bad, bool is_vector = false) {
  const std::string row = is_vector ? "" : std::to_string(bad.row) + ", ";
  return "a weight is NaN or infinite: " + std::string(name) + "[" + row + std::to_string(bad.column) + "]";
}

}  // namespace

Bank::Bank(const BankShape& shape, const Isa& isa, std::shared_ptr<Pool> pool)
    : shape_(shape),
      layout_(make_layout(shape.d_model, shape.d_ffn, shape.gated, shape.dtype)),
      isa_(isa),
      pool_(std::move(pool)),
      expert_stride_bytes_((layout_.weight_bytes + 4095) / 4096 * 4096),
      arena_(expert_stride_bytes_ * shape.num_experts),
      experts_(shape.num_experts) {}

// ---- weights ----

namespace {

// One matrix of an expert on its way into panels: unit u is panel u.
struct PackJob {
  const char* name;
  const MatrixView* from;
  DType dtype;
  int k_pad;
  unsigned char* to;
  size_t panel_stride_bytes;
  std::atomic<int> first_bad_panel;

  static void check_unit(void* context, int panel, int) {
    PackJob& job = *static_cast<PackJob*>(context);
    if (check_panel(*job.from, panel, job.dtype).row < 0) return;
    int seen = job.first_bad_panel.load();
    while (panel < seen && !job.first_bad_panel.compare_exchange_weak(seen, panel)) {
    }
  }
  static void pack_unit(void* context, int panel, int) {
    PackJob& job = *static_cast<PackJob*>(context);
    pack_panel(*job.from, panel, job.k_pad, job.dtype, job.to + job.panel_stride_bytes * panel);
  }
};

}  // namespace

void Bank::load(int expert, const ExpertSource& source) {
  const int f_pad = layout_.num_f_panels * kLanes, d_pad = layout_.num_d_panels * kLanes;
  std::vector<float> biases;
  if (shape_.has_bias) {
    biases.resize(2 * f_pad + d_pad);
    float* to = biases.data();
    const struct {
      const char* name;
      const MatrixView& view;
      int padded;
    } vectors[] = {{"gate_bias", source.gate_bias, f_pad},
                   {"up_bias", source.up_bias, f_pad},
                   {"down_bias", source.down_bias, d_pad}};
    for (const auto& [name, view, padded] : vectors) {
      const int64_t count = view.data ? view.num_columns : 0;
      const BadElement bad = widen_vector(view.data, count, view.column_stride, view.dtype, to, padded);
      if (bad.row >= 0) throw std::invalid_argument(describe(name, bad, /*is_vector=*/true));
      to += padded;
    }
  }
  unsigned char* to = expert_data(expert);
  constexpr int kNoPanel = std::numeric_limits<int>::max();
  const DType dtype = layout_.dtype;
  PackJob jobs[] = {
      {"gate", &source.gate, dtype, layout_.d_pad_k, to, layout_.in_unit_bytes, kNoPanel},
      {"up", &source.up, dtype, layout_.d_pad_k, to + layout_.in_unit_bytes - layout_.in_panel_bytes,
       layout_.in_unit_bytes, kNoPanel},
      {"down", &source.down, dtype, layout_.f_pad_k, to + layout_.down_offset_bytes, layout_.down_panel_bytes,
       kNoPanel},
  };
  Pool::Lease lease(*pool_);
  std::vector<int> ranges(pool_->num_threads() + 1);
  const auto run = [&](PackJob& job, void (*unit)(void*, int, int)) {
    const int num_panels = int((job.from->num_rows + kLanes - 1) / kLanes);
    split_evenly(num_panels, pool_->num_threads(), ranges.data());
    const Phase phase{unit, num_panels, ranges.data(), "pack"};
    lease.run(&phase, 1, &job);
  };
  // All checks come before the first write: a refused expert leaves the one before it intact.
  for (PackJob& job : jobs) {
    if (job.from->data == nullptr) continue;
    run(job, &PackJob::check_unit);
    if (job.first_bad_panel != kNoPanel)
      throw std::invalid_argument(describe(job.name, check_panel(*job.from, job.first_bad_panel, dtype)));
  }
  for (PackJob& job : jobs)
    if (job.from->data != nullptr) run(job, &PackJob::pack_unit);
  experts_[expert] = {true, std::move(biases)};
}

void Bank::release(int expert) {
  experts_[expert] = {};
  arena_.discard(size_t(expert) * expert_stride_bytes_, expert_stride_bytes_);
}

void Bank::export_matrix(int expert, const std::string& name, unsigned char* to) const {
  const unsigned char* from = expert_data(expert);
  if (name == "down") {
    for (int panel = 0; panel < layout_.num_d_panels; ++panel)
      unpack_panel(from + layout_.down_offset_bytes + layout_.down_panel_bytes * panel, panel, shape_.d_model,
                   shape_.d_ffn, shape_.dtype, to);
    return;
  }
  const size_t offset = name == "up" && shape_.gated ? layout_.in_panel_bytes : 0;
  for (int panel = 0; panel < layout_.num_f_panels; ++panel)
    unpack_panel(from + layout_.in_unit_bytes * panel + offset, panel, shape_.d_ffn, shape_.d_model, shape_.dtype, to);
}

const float* Bank::bias(int expert, const std::string& name) const {
  if (!shape_.has_bias) return nullptr;
  const std::vector<float>& biases = experts_[expert].biases;
  if (biases.empty()) return nullptr;
  const int f_pad = layout_.num_f_panels * kLanes;
  return biases.data() + (name == "gate_bias" ? 0 : name == "up_bias" ? f_pad : 2 * f_pad);
}

int64_t Bank::resident_bytes() const {
  int64_t bytes = 0;
  for (const Expert& expert : experts_)
    if (expert.loaded) bytes += int64_t(layout_.weight_bytes) + int64_t(expert.biases.size() * sizeof(float));
  return bytes;
}

// ---- forward ----

struct Bank::Plan {
  const Kernels* kernels;
  const ExpertLayout* layout;
  const Activation* activation;
  Batch batch;
  const Segment* segments;
  int num_segments;
  int down_panels_per_unit, num_slices;
  float* y_scratch;  // one block per thread; sliced: per unit
  size_t y_stride;
  std::atomic<int>* slices_left;  // by panel
  int* gather_group;              // group of each gather unit
  int* gather_row;                // and its first row

  static void gather_unit(void* context, int unit, int) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const ExpertGroup& group = plan.batch.groups[plan.gather_group[unit]];
    const int row = plan.gather_row[unit];
    plan.kernels->gather(*plan.layout, plan.batch, group, row, std::min(row + kBlockRows, group.num_rows));
  }
  static void gate_up_unit(void* context, int unit, int) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const Segment& segment = segment_of(plan.segments, plan.num_segments, unit);
    const int panel = segment.panel_begin + (unit - segment.first_unit) * segment.panels_per_unit;
    plan.kernels->gate_up(*plan.layout, *plan.activation, plan.batch, plan.batch.groups[segment.group],
                          segment.row_begin, segment.row_end, panel,
                          std::min(panel + segment.panels_per_unit, segment.panel_end));
  }
  // Units of a panel follow each other, one for each slice of the groups; whoever is last adds the slices up.
  static void down_unit(void* context, int unit, int thread) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const int S = plan.num_slices, slice = unit % S, panel = unit / S * plan.down_panels_per_unit;
    const int panel_end = std::min(panel + plan.down_panels_per_unit, plan.layout->num_d_panels);
    float* const y = plan.y_scratch + (S == 1 ? thread : unit) * plan.y_stride;
    plan.kernels->down(*plan.layout, plan.batch, plan.first_group(slice), plan.first_group(slice + 1), panel, panel_end,
                       y);
    if (S > 1 && plan.slices_left[unit / S].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    plan.kernels->write(*plan.layout, plan.batch, panel, panel_end, y - slice * plan.y_stride, S);
  }
  static bool fetch_down(void* context, int unit, int step) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const ExpertLayout& layout = *plan.layout;
    const int panel = unit / plan.num_slices * plan.down_panels_per_unit;
    const size_t pieces = (layout.down_panel_bytes + kFetchBytes - 1) / kFetchBytes;
    const int group = plan.first_group(unit % plan.num_slices) + int(step / pieces);
    const size_t at = step % pieces * kFetchBytes;
    if (group >= plan.first_group(unit % plan.num_slices + 1) || step * kFetchBytes >= kMaxFetchBytes) return false;
    const ExpertGroup& from_group = plan.batch.groups[group];
    const unsigned char* from = from_group.down_panels + panel * layout.down_panel_bytes;
    const size_t others = layout.down_panel_bytes / layout.f_pad_k * kLanes * from_group.first_panel;  // not read here
    for (size_t i = std::max(at, others); i < std::min(at + kFetchBytes, layout.down_panel_bytes); i += 64)
      __builtin_prefetch(from + i, 0, 2);
    return true;
  }
  int first_group(int slice) const { return int(int64_t(batch.num_groups) * slice / num_slices); }
};

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
      if (id >= 0 && id < shape_.num_experts && !experts_[id].loaded && weight_at(args, t, k) != 0.f)
        throw std::out_of_range(std::to_string(id));
    }
}

ForwardCounts Bank::forward(const ForwardArgs& args) {
  check_loaded(args);
  if (args.cut_panel % 2 || args.cut_panel < 0 || args.cut_panel >= layout_.num_f_panels)
    throw std::invalid_argument("cut: expected an even panel within F, got " + std::to_string(args.cut_panel));
  ForwardCounts total;
  if (args.num_tokens == 0) return total;
  const int64_t tokens_per_chunk = std::max<int64_t>(1, kMaxRowsPerChunk / std::max<int64_t>(1, args.num_topk));
  Pool::Lease lease(*pool_);
  const int64_t start_ns = timeline::on() ? timeline::now_ns() : 0;
  for (int64_t begin = 0; begin < args.num_tokens; begin += tokens_per_chunk) {
    const int count = int(std::min(tokens_per_chunk, args.num_tokens - begin));
    const ForwardCounts counts = forward_chunk(args, begin, count, lease);
    total.num_pairs += counts.num_pairs;
    total.num_experts += counts.num_experts;
    total.weight_bytes += counts.weight_bytes;
  }
  if (start_ns)
    timeline::add({"forward", start_ns, timeline::now_ns(), reinterpret_cast<uintptr_t>(this), -1, args.num_tokens,
                   total.num_pairs, total.weight_bytes, 0});
  return total;
}

ForwardCounts Bank::forward_chunk(const ForwardArgs& args, int64_t token_begin, int num_tokens, Pool::Lease& lease) {
  const int E = shape_.num_experts, num_threads = pool_->num_threads();
  const int64_t max_rows = num_tokens * args.num_topk;
  const Kernels& kernels = kernels_for(args.x_dtype);
  const size_t item_bytes = kernels.activation_itemsize_bytes;
  const int rows_at_once = stretch_rows(layout_.d_pad_k, int(item_bytes));
  const int64_t max_blocks = max_rows / kBlockRows + E;

  // Index arrays, carved from one block of scratch.
  size_t used = 0;
  const auto reserve = [&used](size_t num_bytes) {
    const size_t at = used;
    used += (num_bytes + 63) / 64 * 64;
    return at;
  };
  const size_t at_group_of = reserve(E * sizeof(int)), at_groups = reserve(E * sizeof(ExpertGroup));
  const size_t at_token = reserve(max_rows * sizeof(int)), at_weight = reserve(max_rows * sizeof(float));
  const size_t at_segments = reserve(max_segments(E, max_rows, rows_at_once, pool_->num_nodes()) * sizeof(Segment));
  const size_t at_token_row = reserve(num_tokens * sizeof(int)),
               at_slices = reserve(layout_.num_d_panels * sizeof(int));
  const size_t at_gather_group = reserve(max_blocks * sizeof(int)), at_gather_row = reserve(max_blocks * sizeof(int));
  const size_t at_ranges = reserve(3 * (num_threads + 1) * sizeof(int)), at_nodes = reserve(num_threads * sizeof(int));
  unsigned char* index = lease.scratch(kIndexSlot, used);
  int* counts = reinterpret_cast<int*>(index + at_group_of);
  ExpertGroup* groups = reinterpret_cast<ExpertGroup*>(index + at_groups);
  int* row_token = reinterpret_cast<int*>(index + at_token);
  float* row_weight = reinterpret_cast<float*>(index + at_weight);
  Segment* segments = reinterpret_cast<Segment*>(index + at_segments);
  int* x_row_of_token = reinterpret_cast<int*>(index + at_token_row);
  int* gather_group = reinterpret_cast<int*>(index + at_gather_group);
  int* gather_row = reinterpret_cast<int*>(index + at_gather_row);
  int* ranges = reinterpret_cast<int*>(index + at_ranges);
  int* nodes = reinterpret_cast<int*>(index + at_nodes);

  // Counting sort of the wanted pairs by expert.
  std::fill(counts, counts + E, 0);
  const auto for_each_pair = [&](auto&& visit) {
    for (int t = 0; t < num_tokens; ++t)
      for (int64_t k = 0; k < args.num_topk; ++k) {
        const int64_t id = id_at(args, token_begin + t, k);
        if (id < 0 || id >= E) continue;
        const float weight = weight_at(args, token_begin + t, k);
        if (weight != 0.f) visit(t, int(id), weight);
      }
  };
  for_each_pair([&](int, int id, float) { ++counts[id]; });
  int num_groups = 0, num_rows = 0;
  int64_t weight_bytes = 0;
  for (int id = 0; id < E; ++id) {
    if (!counts[id]) continue;
    const unsigned char* data = expert_data(id);
    groups[num_groups] = {data,
                          data + layout_.down_offset_bytes,
                          bias(id, "gate_bias"),
                          bias(id, "up_bias"),
                          bias(id, "down_bias"),
                          counts[id],
                          num_rows,
                          0,
                          args.cut_expert == kAllExperts || id == args.cut_expert ? args.cut_panel : 0};
    weight_bytes +=
        int64_t(layout_.weight_bytes) * (layout_.num_f_panels - groups[num_groups].first_panel) / layout_.num_f_panels;
    num_rows += counts[id];
    counts[id] = groups[num_groups++].first_row;  // from here on: where the expert's next row goes
  }
  for_each_pair([&](int t, int id, float weight) {
    row_token[counts[id]] = t;
    row_weight[counts[id]++] = weight;
  });

  // What to gather: every group's blocks, and a token that comes alone to several experts once.
  std::fill(x_row_of_token, x_row_of_token + num_tokens, -1);
  int num_x_rows = 0, num_blocks = 0;
  for (int g = 0; g < num_groups; ++g) {
    ExpertGroup& group = groups[g];
    int& x_row = x_row_of_token[row_token[group.first_row]];
    if (group.num_rows == 1 && x_row >= 0) {
      group.x_row = x_row;
      continue;
    }
    group.x_row = num_x_rows;
    if (group.num_rows == 1) x_row = num_x_rows;
    num_x_rows += group.num_rows;
    for (int row = 0; row < group.num_rows; row += kBlockRows) {
      gather_group[num_blocks] = g;
      gather_row[num_blocks++] = row;
    }
  }

  Plan plan{};
  plan.kernels = &kernels;
  plan.layout = &layout_;
  plan.activation = &shape_.activation;
  plan.batch = {args.x + token_begin * args.x_row_stride * itemsize_bytes(args.x_dtype),
                ptrdiff_t(args.x_row_stride),
                args.x_dtype,
                args.out + token_begin * args.out_row_stride * itemsize_bytes(args.out_dtype),
                ptrdiff_t(args.out_row_stride),
                args.out_dtype,
                num_tokens,
                row_token,
                row_weight,
                groups,
                num_groups,
                lease.scratch(kXSlot, size_t(num_x_rows) * layout_.d_pad_k * item_bytes + kOverreadBytes),
                lease.scratch(kHSlot, size_t(num_rows) * layout_.f_pad_k * item_bytes + kOverreadBytes)};
  for (int i = 0; i < num_threads; ++i) nodes[i] = pool_->node_of_thread(i);
  plan.segments = segments;
  plan.num_segments =
      schedule_gate_up(layout_, groups, num_groups, rows_at_once, {num_threads, nodes}, segments, ranges);
  plan.down_panels_per_unit = down_panels_per_unit(layout_, num_rows, num_groups, num_threads);
  plan.num_slices = plan.down_panels_per_unit > 1 ? 1 : down_slices(layout_, num_tokens, num_groups);
  const int num_down_panels = (layout_.num_d_panels + plan.down_panels_per_unit - 1) / plan.down_panels_per_unit;
  const int num_down_units = num_down_panels * plan.num_slices;
  plan.y_stride = size_t(num_tokens) * kLanes * plan.down_panels_per_unit;
  const int num_sums = plan.num_slices > 1 ? num_down_units : num_threads;
  plan.y_scratch = reinterpret_cast<float*>(lease.scratch(kYSlot, plan.y_stride * num_sums * sizeof(float)));
  plan.slices_left = reinterpret_cast<std::atomic<int>*>(index + at_slices);
  for (int panel = 0; panel < num_down_panels; ++panel)
    new (plan.slices_left + panel) std::atomic<int>(plan.num_slices);
  plan.gather_group = gather_group;
  plan.gather_row = gather_row;

  int* gather_ranges = ranges + num_threads + 1;
  int* down_ranges = gather_ranges + num_threads + 1;
  split_evenly(num_blocks, num_threads, gather_ranges);
  split_evenly(num_down_units, num_threads, down_ranges);
  const Phase phases[] = {{&Plan::gather_unit, num_blocks, gather_ranges, "gather"},
                          {&Plan::gate_up_unit, ranges[num_threads], ranges, "gate_up"},
                          {&Plan::down_unit, num_down_units, down_ranges, "down", &Plan::fetch_down}};
  if (int64_t(num_x_rows) * layout_.d_model <= kGatherAloneElements) {
    for (int unit = 0; unit < num_blocks; ++unit) Plan::gather_unit(&plan, unit, 0);
    lease.run(phases + 1, 2, &plan);
  } else {
    lease.run(phases, 3, &plan);
  }
  return {num_rows, num_groups, weight_bytes};
}

}  // namespace monde
