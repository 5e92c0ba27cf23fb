// One forward with everything it needs: experts, routing, arrays; loads itself into any bank and runs there.
//
// Letters: T tokens, E experts, K top-k, D model dim, F expert hidden dim.
#pragma once
#include <cmath>

#include "../runtime/bank.h"
#include "arrays.h"

namespace monde::test {

struct ExpertArrays {
  Array gate_FD, up_FD, down_DF, gate_bias_F, up_bias_F, down_bias_D;
};

// Weights of the bank's type in row-major order; absent ones stay absent.
inline ExpertSource source_of(const BankShape& shape, const ExpertArrays& e) {
  const int64_t D = shape.d_model, F = shape.d_ffn;
  const auto vector = [&](const Array& a, int64_t n) { return MatrixView{a.data(), 1, n, 0, 1, a.dtype}; };
  ExpertSource source{};
  source.up = {e.up_FD.data(), F, D, D, 1, shape.dtype};
  source.down = {e.down_DF.data(), D, F, F, 1, shape.dtype};
  if (shape.gated) source.gate = {e.gate_FD.data(), F, D, D, 1, shape.dtype};
  if (shape.has_bias) {
    source.up_bias = vector(e.up_bias_F, F);
    source.down_bias = vector(e.down_bias_D, D);
    if (shape.gated) source.gate_bias = vector(e.gate_bias_F, F);
  }
  return source;
}

inline ExpertArrays random_expert(const BankShape& shape, Random& random) {
  const int64_t D = shape.d_model, F = shape.d_ffn;
  const DType type = shape.dtype;
  ExpertArrays e{{type, F * D}, {type, F * D}, {type, D * F}, {type, F}, {type, F}, {type, D}};
  const auto scale = [](int64_t inputs) { return 1.7f / std::sqrt(float(inputs)); };  // keeps values near 1
  random.fill(e.gate_FD, scale(D));
  random.fill(e.up_FD, scale(D));
  random.fill(e.down_DF, scale(F));
  for (Array* bias : {&e.gate_bias_F, &e.up_bias_F, &e.down_bias_D}) random.fill(*bias, 0.5f);
  return e;
}

struct Problem {
  BankShape shape;
  int T, K;
  int x_row_stride, out_row_stride;
  Array x_TD, weights_TK;
  std::vector<int64_t> ids_TK;
  std::vector<ExpertArrays> experts;  // the shape's last expert is never loaded and only routed to with weight 0

  // Routing repeats experts, skips pairs by weight 0 and by ids on both sides of the range.
  Problem(const BankShape& bank_shape, int num_tokens, int topk, DType x_dtype, unsigned seed)
      : shape(bank_shape),
        T(num_tokens),
        K(topk),
        x_row_stride(shape.d_model + 3),
        out_row_stride(shape.d_model + 5),
        x_TD(x_dtype, T ? int64_t(T - 1) * x_row_stride + shape.d_model : 0),
        weights_TK(x_dtype, int64_t(T) * K),
        ids_TK(size_t(T) * K) {
    Random random(seed);
    random.fill(x_TD, 1.f);
    random.fill(weights_TK, 1.f);
    for (int i = 0; i < T * K; ++i) {
      ids_TK[i] = random.below(shape.num_experts + 2) - 1;
      if (ids_TK[i] == shape.num_experts - 1 || random.below(8) == 0) weights_TK.set(i, 0.f);
    }
    for (int e = 0; e + 1 < shape.num_experts; ++e) experts.push_back(random_expert(shape, random));
  }

  void load_into(Bank& bank) const {
    for (size_t e = 0; e < experts.size(); ++e) bank.load(int(e), source_of(shape, experts[e]));
  }

  Array make_out(DType dtype) const {
    Array out(dtype, T ? int64_t(T - 1) * out_row_stride + shape.d_model : 0);
    std::fill(out.bytes.begin(), out.bytes.end(), kCanary);
    return out;
  }

  ForwardArgs args(Array& out) const {
    ForwardArgs a{};
    a.x = x_TD.data();
    a.x_dtype = x_TD.dtype;
    a.num_tokens = T;
    a.x_row_stride = x_row_stride;
    a.ids = reinterpret_cast<const unsigned char*>(ids_TK.data());
    a.ids_are_64_bit = true;
    a.num_topk = a.ids_row_stride = a.weights_row_stride = K;
    a.ids_column_stride = a.weights_column_stride = 1;
    a.weights = weights_TK.data();
    a.weights_dtype = weights_TK.dtype;
    a.out = out.data();
    a.out_dtype = out.dtype;
    a.out_row_stride = out_row_stride;
    return a;
  }

  // y in `dtype`, rows out_row_stride apart with untouched canaries between.
  Array run(Bank& bank, DType dtype) const {
    Array out = make_out(dtype);
    bank.forward(args(out));
    return out;
  }

  static constexpr unsigned char kCanary = 0xa5;
};

inline std::shared_ptr<Pool> make_pool(std::vector<int> nodes, double spin_s = 1e-4) {
  return std::make_shared<Pool>(std::vector<int>(nodes.size(), -1), nodes, spin_s);
}

inline std::vector<const Isa*> isas() {
  const Isa* found[kMaxIsas];
  const int count = available_isas(found);
  return {found, found + count};
}

}  // namespace monde::test
