// What the kernels are asked to do, as raw pointers: the only types that cross between ISA files and the rest.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../layout.h"

namespace monde {

enum class ActivationKind : int {
  kSilu,
  kGeluTanh,
  kGeluErf,
  kRelu,
  kRelu2,
  kSwigluClamp,
  kSwigluAlpha,
  kSwigluPostClamp,
  kSwigluSoftcap,
};

struct Activation {
  ActivationKind kind;
  float limit;
  float alpha;
};

// The rows of one forward that go to one expert, and that expert's memory.
struct ExpertGroup {
  const unsigned char* in_panels;    // ExpertLayout order
  const unsigned char* down_panels;  // null biases mean zero; biases are padded to kLanes
  const float* gate_bias;
  const float* up_bias;
  const float* down_bias;
  int num_rows;
  int first_row;  // into row_token, row_weight, and (times the padded K) into h_blocks
  // Panels of F before this one are somebody else's, and with panel 0 down_bias. A whole number of tiles of K.
  int first_panel = 0;
};

// A forward's arrays. Element type of the activation blocks is the kernel's: f32 or bf16.
struct Batch {
  const unsigned char* x;  // [num_tokens, d_model]
  ptrdiff_t x_row_stride;  // elements
  DType x_dtype;
  unsigned char* out;  // [num_tokens, d_model]
  ptrdiff_t out_row_stride;
  DType out_dtype;
  bool adds;  // to what out holds
  int num_tokens;
  const int* row_token;     // token of each routed row, grouped by expert
  const float* row_weight;  // router weight of each routed row
  const ExpertGroup* groups;
  int num_groups;
  unsigned char* h_blocks;  // hidden rows in blocks, K = F
};

// One ISA's kernels for one (activation element, weight element) pair. Panel ranges are [begin, end).
struct Kernels {
  int activation_itemsize_bytes;  // 4: f32 blocks, 2: bf16 blocks
  int stretch_bytes;              // of activations that stay in L2 while weights pass over them
  // Rows [row_begin, row_end) of a group, row_begin a multiple of kBlockRows: x -> x_blocks, K = D.
  void (*gather)(const ExpertLayout&, const Batch&, const ExpertGroup&, int row_begin, int row_end,
                 unsigned char* x_blocks);
  // h_blocks[rows, panels] = act(gate, up) for the rows that x_blocks holds.
  void (*gate_up)(const ExpertLayout&, const Activation&, const Batch&, const ExpertGroup&,
                  const unsigned char* x_blocks, int row_begin, int row_end, int panel_begin, int panel_end);
  // y[:, columns of panels] = sum over groups [group_begin, group_end), in order; y holds num_tokens * 16 * (panel_end
  // - panel_begin) floats.
  void (*down)(const ExpertLayout&, const Batch&, int group_begin, int group_end, int panel_begin, int panel_end,
               float* y);
  // out[:, columns of panels] = (or, if the batch adds, +=) sum of as many such y, in order, `sum_stride` floats apart.
  void (*write)(const ExpertLayout&, const Batch&, int panel_begin, int panel_end, const float* y, int num_sums,
                ptrdiff_t sum_stride);
};

// A dense layer: x [num_tokens, num_inputs] by weights [num_outputs, num_inputs], all bf16. Strides count elements.
struct DenseArgs {
  const uint16_t* x;
  ptrdiff_t x_row_stride;
  const uint16_t* weights;
  ptrdiff_t weights_row_stride;
  const uint16_t* bias;  // null: none
  uint16_t* out;
  ptrdiff_t out_row_stride;
  int num_tokens, num_inputs, num_outputs;
};

inline constexpr int kMaxDenseTokens = 4;

// One instruction set. Entries are null where an element combination has no special kernel.
struct Isa {
  const char* name;
  Kernels f32_by_f32, f32_by_bf16, f32_by_f16;
  Kernels bf16_by_bf16;  // gather == nullptr: use f32_by_bf16
  void (*dense)(const DenseArgs&, int row_begin, int row_end);
  float (*read)(const void* data, size_t num_bytes);  // the plain read test: loads every byte once
  double (*peak)(int num_iterations);  // runs the widest multiply-add from registers or L1, returns operations done
};

}  // namespace monde
