#include "layout.h"

namespace monde {
namespace {
int round_up(int value, int step) { return (value + step - 1) / step * step; }
}  // namespace

int itemsize_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

ExpertLayout make_layout(int d_model, int d_ffn, bool gated, DType dtype) {
  ExpertLayout layout{};
  layout.d_model = d_model;
  layout.d_ffn = d_ffn;
  layout.gated = gated;
  layout.dtype = dtype;
  layout.d_pad_k = round_up(d_model, kPadK);
  layout.f_pad_k = round_up(d_ffn, kPadK);
  layout.num_f_panels = round_up(d_ffn, kLanes) / kLanes;
  layout.num_d_panels = round_up(d_model, kLanes) / kLanes;
  layout.k_group = dtype == DType::kBF16 ? 2 : 1;
  const size_t row_bytes = size_t(kLanes) * itemsize_bytes(dtype);
  layout.in_panel_bytes = layout.d_pad_k * row_bytes;
  layout.in_unit_bytes = layout.in_panel_bytes * (gated ? 2 : 1);
  layout.down_panel_bytes = layout.f_pad_k * row_bytes;
  layout.down_offset_bytes = layout.in_unit_bytes * layout.num_f_panels;
  layout.weight_bytes = layout.down_offset_bytes + layout.down_panel_bytes * layout.num_d_panels;
  return layout;
}

int stretch_rows(int stretch_bytes, int k_pad, int activation_itemsize_bytes) {
  constexpr int kPairRows = 2 * kBlockRows;
  const int pairs = stretch_bytes / (k_pad * activation_itemsize_bytes * kPairRows);
  return (pairs > 0 ? pairs : 1) * kPairRows;
}

size_t panel_offset(int k_group, int row, int k) {
  return (size_t(k / k_group) * kLanes + row) * k_group + k % k_group;
}

}  // namespace monde
