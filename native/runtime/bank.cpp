#include "bank.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>

namespace monde {
namespace {

std::string describe(const char* name, BadElement bad, bool is_vector = false) {
  const std::string row = is_vector ? "" : std::to_string(bad.row) + ", ";
  return "a weight is NaN or infinite: " + std::string(name) + "[" + row + std::to_string(bad.column) + "]";
}

}  // namespace

Bank::Bank(const BankShape& shape, const Isa& isa, std::shared_ptr<Pool> pool, std::shared_ptr<Arena> places)
    : shape_(shape),
      layout_(make_layout(shape.d_model, shape.d_ffn, shape.gated, shape.dtype)),
      isa_(isa),
      pool_(std::move(pool)),
      expert_stride_bytes_((layout_.weight_bytes + 4095) / 4096 * 4096),
      has_own_places_(places == nullptr),
      arena_(has_own_places_ ? std::make_shared<Arena>(expert_stride_bytes_ * shape.num_experts) : std::move(places)),
      experts_(shape.num_experts) {
  if (!has_own_places_) return;
  for (int e = 0; e < shape.num_experts; ++e) experts_[e].data = arena_->data() + size_t(e) * expert_stride_bytes_;
}

namespace {

// One matrix of an expert on its way into panels: unit u is panel u.
struct PackJob {
  const char* name;
  const MatrixView* from;
  DType dtype;
  int k_pad;
  size_t offset_bytes, panel_stride_bytes;  // in the expert
  unsigned char* to;                        // the expert
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
    unsigned char* const to = job.to + job.offset_bytes + job.panel_stride_bytes * panel;
    pack_panel(*job.from, panel, job.k_pad, job.dtype, to);
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
  unsigned char* const to = experts_[expert].data;
  constexpr int kNoPanel = std::numeric_limits<int>::max();
  const DType dtype = layout_.dtype;
  PackJob jobs[] = {
      {"gate", &source.gate, dtype, layout_.d_pad_k, 0, layout_.in_unit_bytes, to, kNoPanel},
      {"up", &source.up, dtype, layout_.d_pad_k, layout_.in_unit_bytes - layout_.in_panel_bytes, layout_.in_unit_bytes,
       to, kNoPanel},
      {"down", &source.down, dtype, layout_.f_pad_k, layout_.down_offset_bytes, layout_.down_panel_bytes, to, kNoPanel},
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
    if (to != nullptr && job.from->data != nullptr) run(job, &PackJob::pack_unit);
  experts_[expert] = {to, to != nullptr, std::move(biases)};
}

void Bank::release(int expert) {
  unsigned char* const data = has_own_places_ ? experts_[expert].data : nullptr;
  experts_[expert] = {data, false, {}};
  if (data != nullptr) arena_->discard(data - arena_->data(), expert_stride_bytes_);
}

void Bank::place(int expert, int place, bool is_filled) {
  if (has_own_places_) throw std::invalid_argument("place: this bank has a place of its own for every expert");
  if (place < kNowhere || (place + 1) * int64_t(expert_stride_bytes_) > int64_t(arena_->num_bytes()))
    throw std::invalid_argument("place: there is none with number " + std::to_string(place));
  Expert& of = experts_[expert];
  of.data = place == kNowhere ? nullptr : arena_->data() + size_t(place) * expert_stride_bytes_;
  of.loaded = place != kNowhere && is_filled;
}

void Bank::export_matrix(int expert, const std::string& name, unsigned char* to) const {
  const unsigned char* from = experts_[expert].data;
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
    bytes += (expert.loaded ? int64_t(layout_.weight_bytes) : 0) + int64_t(expert.biases.size() * sizeof(float));
  return bytes;
}

}  // namespace monde
