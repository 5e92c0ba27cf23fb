// Between row-major matrices (of any strides) and panels.
#pragma once
#include <cstdint>

#include "../layout.h"

namespace monde {

// A matrix [num_rows, num_columns] anywhere in memory. Strides count elements: a transposed or interleaved checkpoint
// is only another pair of strides. data == nullptr: absent.
struct MatrixView {
  const unsigned char* data;
  int64_t num_rows, num_columns;
  int64_t row_stride, column_stride;
  DType dtype;
};

// Element `index` of an array of any stored type, widened.
float load_element(const unsigned char* base, int64_t index, DType dtype);

// Where a non-finite weight was found; row < 0: nowhere.
struct BadElement {
  int64_t row = -1, column = -1;
};

// The first element of rows [16 * panel, 16 * panel + 16) that is not finite, or would not be as `dtype`.
BadElement check_panel(const MatrixView& from, int panel, DType dtype);

// Packs the same rows into one panel of `dtype` with K padded to `k_pad`.
void pack_panel(const MatrixView& from, int panel, int k_pad, DType dtype, unsigned char* to);

// The inverse: writes the panel's rows into a contiguous row-major [num_rows, num_columns] matrix of the same type.
void unpack_panel(const unsigned char* from, int panel, int64_t num_rows, int64_t num_columns, DType dtype,
                  unsigned char* to);

// Widens a strided vector to f32, up to `num_padded` values (zeros after the end).
BadElement widen_vector(const unsigned char* data, int64_t count, int64_t stride, DType dtype, float* to,
                        int64_t num_padded);

}  // namespace monde
