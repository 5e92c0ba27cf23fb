// What a forward must give: plain loops in double over the same stored values, and how far a correct answer may be.
//
// The bound. u = 2^-p is the unit roundoff of a p-bit significand. A rounding is an error of either sign of at most u
// times the value; independent ones add in squares, so a sum of n f32 terms deviates by sqrt(n) u |W||x| (the worst
// case n u would let bf16 arithmetic pass for f32). Deviations are propagated to first order:
//   g = W x + b         s_g^2 = |W|^2 s_x^2 + (n + 2) (u (|W||x| + |b|))^2, with s_x = 0 for the stored x
//   h = act(g) v        s_h = L s_g (|v| + s_v) + |act g| s_v + kEvaluation u |act g| |v|, |act g| taken as |g| + s_g
//   h rounded for dots  s_h^2 += (u_bf16 |h|)^2
//   y = sum w v         s_y^2 = sum (w s_v)^2 + (K + 2) (u sum |w v|)^2
//   stored              |error| <= kConfidence s_y + u_out (|y| + kConfidence s_y) + half a subnormal
// L bounds |act'|: 1.1 SiLU, 1.13 GELU, 1 ReLU, 2 |g| for ReLU^2; clamps and cap tanh(x / cap) are 1-Lipschitz. A
// correct element exceeds six deviations with a probability of 3e-8. Instructions on bf16 pairs flush subnormals.
#pragma once
#include "problem.h"

namespace monde::test {

struct Expected {
  std::vector<double> y_TD, deviation_TD;
};

inline bool uses_bf16_dots(const Isa& isa, DType weights, DType x) {
  return weights == DType::kBF16 && x == DType::kBF16 && isa.bf16_by_bf16.gather != nullptr;
}

Expected expected(const Problem& problem, bool bf16_dots);

// Checks every element of y, and that nothing between its rows was written; the message names the worst element.
void check_within(const Problem& problem, const Expected& wanted, const Array& y, const std::string& what);

}  // namespace monde::test
