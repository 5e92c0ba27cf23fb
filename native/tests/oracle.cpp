#include "oracle.h"

#include <cmath>

#include "check.h"

namespace monde::test {
namespace {

constexpr double kConfidence = 6, kEvaluation = 4, kUnitF32 = 0x1p-24, kUnitBF16 = 0x1p-8, kFlushed = 0x1p-126;

double unit_of(DType dtype) { return dtype == DType::kF32 ? kUnitF32 : dtype == DType::kBF16 ? kUnitBF16 : 0x1p-11; }
double half_subnormal(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-150 : dtype == DType::kBF16 ? 0x1p-134 : 0x1p-25;
}

struct Approximate {
  double value = 0, deviation = 0;
};
using Vector = std::vector<Approximate>;

void round_to_bf16(Vector& v) {
  for (Approximate& a : v)
    a.deviation = std::hypot(a.deviation, kUnitBF16 * std::abs(a.value)) + half_subnormal(DType::kBF16);
}

Vector linear(const Array& weight_NK, const Vector& x_K, const Array* bias_N, size_t N) {
  const size_t K = x_K.size();
  Vector y(N);
  for (size_t n = 0; n < N; ++n) {
    const double bias = bias_N ? (*bias_N)[n] : 0;
    double value = bias, magnitude = std::abs(bias), variance = 0, inputs = 0;
    for (size_t k = 0; k < K; ++k) {
      const double w = weight_NK[n * K + k];
      value += w * x_K[k].value;
      magnitude += std::abs(w * x_K[k].value);
      variance += w * w * x_K[k].deviation * x_K[k].deviation;
      inputs += std::abs(x_K[k].value);
    }
    const double summed = kUnitF32 * magnitude;
    y[n] = {value, std::sqrt(variance + (K + 2) * summed * summed) + kFlushed * (K + inputs)};
  }
  return y;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double clamp(double x, double limit) { return std::clamp(x, -limit, limit); }

double act(const Activation& a, double g) {
  switch (a.kind) {
    case ActivationKind::kSilu:
      return g * sigmoid(g);
    case ActivationKind::kSwigluClamp:
      return std::min<double>(g, a.limit) * sigmoid(std::min<double>(g, a.limit));
    case ActivationKind::kSwigluAlpha:
      return std::min<double>(g, a.limit) * sigmoid(a.alpha * std::min<double>(g, a.limit));
    case ActivationKind::kSwigluPostClamp:
      return std::min<double>(g * sigmoid(g), a.limit);
    case ActivationKind::kSwigluSoftcap:
      return a.alpha * std::tanh(g / a.alpha) * sigmoid(g);
    case ActivationKind::kGeluTanh:
      return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
    case ActivationKind::kGeluErf:
      return 0.5 * g * (1 + std::erf(g / M_SQRT2));
    case ActivationKind::kRelu:
      return std::max(g, 0.0);
    case ActivationKind::kRelu2:
      return std::max(g, 0.0) * std::max(g, 0.0);
  }
  return NAN;
}

Approximate activated(const Activation& a, Approximate g, const Approximate* up) {
  Approximate factor{1, 0};
  if (up) {
    factor = *up;
    if (a.kind == ActivationKind::kSwigluSoftcap) {
      factor.value = a.limit * std::tanh(up->value / a.limit);
      factor.deviation += kEvaluation * kUnitF32 * std::abs(factor.value);
    } else if (a.kind >= ActivationKind::kSwigluClamp) {
      factor.value = clamp(up->value, a.limit);
    }
    if (a.kind == ActivationKind::kSwigluAlpha) {
      factor.value += 1;
      factor.deviation += kUnitF32;
    }
  }
  const double magnitude = std::abs(g.value) + g.deviation;
  const bool is_square = a.kind == ActivationKind::kRelu2;
  const bool is_gelu = a.kind == ActivationKind::kGeluTanh || a.kind == ActivationKind::kGeluErf;
  const double slope = is_square ? 2 * magnitude : is_gelu ? 1.13 : a.kind == ActivationKind::kRelu ? 1 : 1.1;
  const double largest_act = is_square ? magnitude * magnitude : magnitude;
  const double largest_factor = std::abs(factor.value) + factor.deviation;
  return {act(a, g.value) * factor.value, slope * g.deviation * largest_factor + largest_act * factor.deviation +
                                              kEvaluation * kUnitF32 * largest_act * largest_factor};
}

Vector expert_output(const BankShape& shape, const ExpertArrays& e, const Vector& x, bool bf16_dots) {
  const auto bias = [&](const Array& a) { return shape.has_bias ? &a : nullptr; };
  Vector h(shape.d_ffn);
  const Vector up = linear(e.up_FD, x, bias(e.up_bias_F), shape.d_ffn);
  if (shape.gated) {
    const Vector gate = linear(e.gate_FD, x, bias(e.gate_bias_F), shape.d_ffn);
    for (int f = 0; f < shape.d_ffn; ++f) h[f] = activated(shape.activation, gate[f], &up[f]);
  } else {
    for (int f = 0; f < shape.d_ffn; ++f) h[f] = activated(shape.activation, up[f], nullptr);
  }
  if (bf16_dots) round_to_bf16(h);
  return linear(e.down_DF, h, bias(e.down_bias_D), shape.d_model);
}

}  // namespace

Expected expected(const Problem& p, bool bf16_dots) {
  const int D = p.shape.d_model;
  Expected result;
  for (int t = 0; t < p.T; ++t) {
    Vector x(D);
    for (int d = 0; d < D; ++d) x[d].value = p.x_TD[int64_t(t) * p.x_row_stride + d];
    // For bf16 dots x is bf16 already: nothing is rounded.
    std::vector<double> y(D), variance(D), magnitude(D);
    for (size_t e = 0; e < p.experts.size(); ++e) {
      // Pairs that repeat an expert make the same errors: their weights add before the squares do.
      double weight = 0, weight_magnitude = 0;
      for (int k = 0; k < p.K; ++k)
        if (p.ids_TK[size_t(t) * p.K + k] == int64_t(e)) {
          weight += p.weights_TK[int64_t(t) * p.K + k];
          weight_magnitude += std::abs(p.weights_TK[int64_t(t) * p.K + k]);
        }
      if (weight_magnitude == 0) continue;
      const Vector v = expert_output(p.shape, p.experts[e], x, bf16_dots);
      for (int d = 0; d < D; ++d) {
        y[d] += weight * v[d].value;
        variance[d] += weight * weight * v[d].deviation * v[d].deviation;
        magnitude[d] += weight_magnitude * std::abs(v[d].value);
      }
    }
    for (int d = 0; d < D; ++d) {
      const double summed = kUnitF32 * magnitude[d];
      result.y_TD.push_back(y[d]);
      result.deviation_TD.push_back(std::sqrt(variance[d] + (p.K + 2) * summed * summed));
    }
  }
  return result;
}

void check_within(const Problem& p, const Expected& wanted, const Array& y, const std::string& what) {
  const int D = p.shape.d_model;
  double worst = 0, worst_y = 0, worst_wanted = 0;
  int worst_t = -1, worst_d = -1;
  bool is_intact = true;
  for (int t = 0; t < p.T; ++t) {
    for (int d = 0; d < D; ++d) {
      const double value = wanted.y_TD[size_t(t) * D + d], got = y[int64_t(t) * p.out_row_stride + d];
      const double computed = kConfidence * wanted.deviation_TD[size_t(t) * D + d];
      const double error = computed + unit_of(y.dtype) * (std::abs(value) + computed) + half_subnormal(y.dtype);
      const double ratio = std::isnan(got) ? INFINITY : std::abs(got - value) / error;
      if (ratio > worst) worst = ratio, worst_y = got, worst_wanted = value, worst_t = t, worst_d = d;
    }
    const size_t item_bytes = itemsize_bytes(y.dtype);
    const size_t row_end = (size_t(t) * p.out_row_stride + D) * item_bytes;
    const size_t next_row = std::min(y.bytes.size(), (size_t(t) + 1) * p.out_row_stride * item_bytes);
    for (size_t i = row_end; i < next_row; ++i) is_intact &= y.bytes[i] == Problem::kCanary;
  }
  CHECK(worst <= 1, what + ": y[" + std::to_string(worst_t) + ", " + std::to_string(worst_d) + "] is " +
                        std::to_string(worst_y) + ", expected " + std::to_string(worst_wanted) + ": " +
                        std::to_string(worst) + " times the bound");
  CHECK(is_intact, what + ": memory between rows of out was written");
}

}  // namespace monde::test
