#include "pack.h"

#include <cmath>
#include <cstring>

#include "../simd/bits.h"

namespace monde {

float load_element(const unsigned char* base, int64_t index, DType dtype) {
  if (dtype == DType::kF32) {
    float v;
    std::memcpy(&v, base + index * 4, 4);
    return v;
  }
  uint16_t h;
  std::memcpy(&h, base + index * 2, 2);
  return dtype == DType::kBF16 ? bf16_to_float(h) : f16_to_float(h);
}

namespace {

void store_element(unsigned char* base, int64_t index, DType dtype, float v) {
  if (dtype == DType::kF32) {
    std::memcpy(base + index * 4, &v, 4);
    return;
  }
  const uint16_t h = dtype == DType::kBF16 ? float_to_bf16(v) : float_to_f16(v);
  std::memcpy(base + index * 2, &h, 2);
}

// Exponent bits all ones: infinite or NaN. `T` holds the element's bits; elements may lie at any byte, as in mapped
// checkpoints whose header was not padded.
template <class T>
bool any_non_finite(const unsigned char* elements, int64_t count, T exponent) {
  unsigned found = 0;
  for (int64_t i = 0; i < count; ++i) {
    T bits;
    std::memcpy(&bits, elements + i * int64_t(sizeof(T)), sizeof(T));
    found |= unsigned((bits & exponent) == exponent);
  }
  return found != 0;
}

bool row_is_finite(const MatrixView& m, int64_t row) {
  if (m.column_stride != 1) {
    for (int64_t k = 0; k < m.num_columns; ++k)
      if (!std::isfinite(load_element(m.data, row * m.row_stride + k * m.column_stride, m.dtype))) return false;
    return true;
  }
  const unsigned char* p = m.data + row * m.row_stride * itemsize_bytes(m.dtype);
  if (m.dtype == DType::kF32) return !any_non_finite<uint32_t>(p, m.num_columns, 0x7f800000u);
  const uint16_t exponent = m.dtype == DType::kBF16 ? 0x7f80 : 0x7c00;
  return !any_non_finite<uint16_t>(p, m.num_columns, exponent);
}

// Moves the bits of sixteen rows of equal element type, `kUnitBytes` (one group of one row) at a time.
template <class Unit>
void interleave_rows(const MatrixView& from, int64_t first_row, int rows, int64_t num_units, unsigned char* to) {
  const int64_t row_bytes = from.row_stride * itemsize_bytes(from.dtype);
  const unsigned char* base = from.data + first_row * row_bytes;
  for (int64_t u = 0; u < num_units; ++u)
    for (int r = 0; r < rows; ++r)
      std::memcpy(to + (u * kLanes + r) * sizeof(Unit), base + r * row_bytes + u * sizeof(Unit), sizeof(Unit));
}

int group_of(DType dtype) { return dtype == DType::kBF16 ? 2 : 1; }

}  // namespace

BadElement check_panel(const MatrixView& from, int panel, DType dtype) {
  const int64_t first_row = int64_t(panel) * kLanes;
  for (int64_t row = first_row; row < from.num_rows && row < first_row + kLanes; ++row) {
    if (from.dtype == dtype && row_is_finite(from, row)) continue;
    for (int64_t k = 0; k < from.num_columns; ++k) {
      const float value = load_element(from.data, row * from.row_stride + k * from.column_stride, from.dtype);
      unsigned char stored[4];
      store_element(stored, 0, dtype, value);
      if (!std::isfinite(load_element(stored, 0, dtype))) return {row, k};
    }
  }
  return {};
}

void pack_panel(const MatrixView& from, int panel, int k_pad, DType dtype, unsigned char* to) {
  const int64_t first_row = int64_t(panel) * kLanes;
  const int rows = int(from.num_rows - first_row < kLanes ? from.num_rows - first_row : kLanes);
  const int64_t K = from.num_columns;
  const int group = group_of(dtype);
  const int64_t whole = from.dtype == dtype && from.column_stride == 1 ? K / group * group : 0;
  if (rows < kLanes || whole < k_pad) std::memset(to, 0, size_t(k_pad) * kLanes * itemsize_bytes(dtype));
  if (whole) {
    if (dtype == DType::kF16)
      interleave_rows<uint16_t>(from, first_row, rows, whole, to);
    else
      interleave_rows<uint32_t>(from, first_row, rows, whole / group, to);
  }
  for (int r = 0; r < rows; ++r)
    for (int64_t k = whole; k < K; ++k) {
      const int64_t at = (first_row + r) * from.row_stride + k * from.column_stride;
      store_element(to, int64_t(panel_offset(group, r, int(k))), dtype, load_element(from.data, at, from.dtype));
    }
}

void unpack_panel(const unsigned char* from, int panel, int64_t num_rows, int64_t num_columns, DType dtype,
                  unsigned char* to) {
  const int64_t first_row = int64_t(panel) * kLanes;
  const int64_t rows = num_rows - first_row < kLanes ? num_rows - first_row : kLanes;
  const int item_bytes = itemsize_bytes(dtype), group = group_of(dtype);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < num_columns; ++k)
      std::memcpy(to + ((first_row + r) * num_columns + k) * item_bytes,
                  from + panel_offset(group, int(r), int(k)) * item_bytes, item_bytes);
}

BadElement widen_vector(const unsigned char* data, int64_t count, int64_t stride, DType dtype, float* to,
                        int64_t num_padded) {
  for (int64_t i = 0; i < num_padded; ++i) {
    to[i] = i < count ? load_element(data, i * stride, dtype) : 0.f;
    if (!std::isfinite(to[i])) return {0, i};
  }
  return {};
}

}  // namespace monde
