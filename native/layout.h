// How weights and activations lie in memory: the agreement between packer, kernels and (through Python) GPU copies.
//
// Letters: D model dim, F expert hidden dim, N output rows of a matrix, K its input columns.
//
// Weights. A matrix [N, K] is stored as panels of 16 output rows. Inside a panel, k advances in groups: a group
// holds `k_group` consecutive inputs of each of the 16 rows, so one 64-byte load serves 16 outputs:
//     panel n:  [K_pad / k_group][16 rows][k_group]
// For bf16 (k_group 2) this is at once the operand of VDPBF16PS and, 16 groups at a time, the B tile of TDPBF16PS.
// K is padded with zeros to 32, N to 16. Gate and up panels alternate, so a task streams one contiguous range:
//     expert:   [F_pad / 16][gate panel, up panel][K = D]  then  [D_pad / 16][down panel][K = F]
//
// Activations. The rows routed to one expert are cut into blocks of 16; a block is a sequence of tiles 64 bytes wide:
//     block:    [K_pad / tile_k][rows in block <= 16][tile_k]     tile_k = 64 / sizeof(element)
// which is the A operand of TDPBF16PS and keeps broadcasts of neighbouring rows in few cache lines.
#pragma once
#include <cstddef>
#include <cstdint>

namespace monde {

enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

inline constexpr int kLanes = 16;      // output rows of a panel
inline constexpr int kBlockRows = 16;  // activation rows of a block
inline constexpr int kPadK = 32;       // K is padded to this: the depth of one bf16 tile
inline constexpr int kTileBytes = 64;  // width of an activation tile row

// One expert's shape with padding, and where its panels are. Plain data, because ISA files read it: an inline
// function shared with them could be linked in its AVX-512 form and crash an older CPU.
struct ExpertLayout {
  int d_model, d_ffn;
  bool gated;
  DType dtype;
  int d_pad_k, f_pad_k;            // padded to kPadK: as inputs
  int num_f_panels, num_d_panels;  // padded to kLanes: as output rows
  int k_group;                     // consecutive inputs per row in a group
  size_t in_panel_bytes;           // one panel of gate or up
  size_t in_unit_bytes;            // gate and up panel of the same rows; ungated: one panel
  size_t down_panel_bytes;
  size_t down_offset_bytes;  // where the down panels begin
  size_t weight_bytes;       // the whole expert

  // Input panel of rows 16f..16f+15: byte offset in the expert; up is the second of a gated pair.
  // Down panel of rows 16d..16d+15: down_offset_bytes + d * down_panel_bytes.
};

ExpertLayout make_layout(int d_model, int d_ffn, bool gated, DType dtype);

int itemsize_bytes(DType dtype);

// Activation rows of so many bytes together: whole pairs of blocks, at least one pair.
int stretch_rows(int stretch_bytes, int k_pad, int activation_itemsize_bytes);

// Element offset of weight (row, k) inside its panel; row counts from the panel's first.
size_t panel_offset(int k_group, int row, int k);

}  // namespace monde
