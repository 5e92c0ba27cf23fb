// One layer's experts in host memory, and a forward over them.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../isa/isa.h"
#include "arena.h"
#include "pack.h"
#include "pool.h"

namespace monde {

struct BankShape {
  int num_experts, d_model, d_ffn;
  bool gated, has_bias;
  DType dtype;
  Activation activation;
};

// Six arrays of one expert; a null `data` means absent. Biases are vectors: num_rows 1.
struct ExpertSource {
  MatrixView gate, up, down, gate_bias, up_bias, down_bias;
};

inline constexpr int kAllExperts = -1;
inline constexpr int kNowhere = -1;

// A forward's arguments. Strides count elements; ids are int64 or int32.
struct ForwardArgs {
  const unsigned char* x;
  DType x_dtype;
  int64_t num_tokens, x_row_stride;
  const unsigned char* ids;
  bool ids_are_64_bit;
  int64_t num_topk, ids_row_stride, ids_column_stride;
  const unsigned char* weights;
  DType weights_dtype;
  int64_t weights_row_stride, weights_column_stride;
  unsigned char* out;
  DType out_dtype;
  int64_t out_row_stride;
  // Of this expert, of all experts if it is kAllExperts, only rows of F from 16 * cut_panel on are computed, and no
  // down bias: somebody else does the rest.
  int cut_expert = kAllExperts, cut_panel = 0;
  const uint8_t* is_wanted_E = nullptr;  // by expert, whether its pairs count; null: all do
  bool adds = false;                     // to what is in out, which is fp32 then
};

struct ForwardCounts {
  int64_t num_pairs = 0, num_experts = 0, weight_bytes = 0;
};

class Bank {
 public:
  // `places` is memory that banks share, with places for fewer experts than they have: `place` says who lies where, and
  // at first nobody does. Without it the bank has a place of its own for every expert.
  Bank(const BankShape& shape, const Isa& isa, std::shared_ptr<Pool> pool, std::shared_ptr<Arena> places = nullptr);

  // Copies one expert into panels, on all threads; one without a place is checked and its biases are kept. Errors:
  // std::invalid_argument for a non-finite weight.
  void load(int expert, const ExpertSource& source);
  void release(int expert);

  // In shared memory: the expert's panels lie in this place from now on, or, if not yet filled, `load` puts them there;
  // kNowhere: nowhere. Other experts may be computed meanwhile. Errors: std::invalid_argument for a place that is not
  // there and for a bank with places of its own.
  void place(int expert, int place, bool is_filled);
  bool loaded(int expert) const { return experts_[expert].loaded; }

  // Row-major copies in the bank's type: matrices "gate" [F, D], "up" [F, D], "down" [D, F].
  void export_matrix(int expert, const std::string& name, unsigned char* to) const;
  // Null when the bank keeps no such bias. Valid until release.
  const float* bias(int expert, const std::string& name) const;

  // Errors: std::out_of_range naming an expert that was asked for and never loaded, std::invalid_argument for a cut
  // that is no whole number of tiles, and for sums that go to another type than fp32.
  ForwardCounts forward(const ForwardArgs& args);

  const BankShape& shape() const { return shape_; }
  const Isa& isa() const { return isa_; }
  const Arena& arena() const { return *arena_; }
  int64_t resident_bytes() const;
  size_t expert_stride_bytes() const { return expert_stride_bytes_; }

 private:
  struct Expert {
    unsigned char* data = nullptr;  // its place
    bool loaded = false;
    std::vector<float> biases;  // gate [F_pad], up [F_pad], down [D_pad]
  };
  struct Plan;

  const Kernels& kernels_for(DType x_dtype) const;
  void check_loaded(const ForwardArgs& args) const;

  const BankShape shape_;
  const ExpertLayout layout_;
  const Isa& isa_;
  const std::shared_ptr<Pool> pool_;
  const size_t expert_stride_bytes_;
  const bool has_own_places_;
  const std::shared_ptr<Arena> arena_;
  std::vector<Expert> experts_;
};

}  // namespace monde
