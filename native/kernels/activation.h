// The non-linearities on sixteen lanes, in the vector vocabulary.
#pragma once
#include MONDE_SIMD
#include "tasks.h"

namespace MONDE_ISA {

// e^x: x = n ln2 + r with |r| <= ln2/2 and a degree-6 polynomial for e^r; relative error below 2 ulp.
// The argument is clamped so that 2^n stays normal: e^-87 and e^88 stand in for everything beyond.
inline Vec exp_lanes(Vec x) {
  x = max_keep_nan(min_keep_nan(x, splat(88.f)), splat(-87.f));
  const Vec n = round_nearest(mul(x, splat(1.44269504f)));
  Vec r = fma(n, splat(-0.693359375f), x);  // ln2 in two parts: the first has few bits, so the product is exact
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), splat(1.f));
  return mul(p, pow2(n));
}

inline Vec sigmoid(Vec x) { return reciprocal(add(splat(1.f), exp_lanes(mul(x, splat(-1.f))))); }

inline Vec gelu_tanh(Vec x) {
  // 0.5 x (1 + tanh z) = x sigmoid(2z)
  const Vec z = mul(x, fma(mul(x, x), splat(0.044715f * 0.7978845608f), splat(0.7978845608f)));
  return mul(x, sigmoid(add(z, z)));
}

inline Vec gelu_erf(Vec x) {
  // Abramowitz & Stegun 7.1.26 for erf(|x| / sqrt 2): absolute error below 1.5e-7.
  const Vec a = mul(abs(x), splat(0.70710678118f));
  const Vec t = div(splat(1.f), fma(a, splat(0.3275911f), splat(1.f)));
  Vec p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const Vec tail = mul(mul(p, t), exp_lanes(mul(mul(a, a), splat(-1.f))));
  const Vec erf = copy_sign(add(splat(1.f), mul(tail, splat(-1.f))), x);
  return mul(mul(x, splat(0.5f)), add(splat(1.f), erf));
}

// tanh x: its series up to |x|^11 below 0.35 (relative error 2e-8), where 1 - 2 / (e^2|x| + 1) would cancel.
inline Vec tanh_lanes(Vec x) {
  const Vec a = abs(x);
  const Vec is_large = min_keep_nan(max_keep_nan(mul(add(a, splat(-0.35f)), splat(1e30f)), splat(0.f)), splat(1.f));
  const Vec s = min_keep_nan(a, splat(0.35f));
  const Vec q = mul(s, s);
  Vec p = splat(-8.8632355e-3f);
  p = fma(p, q, splat(2.1869489e-2f));
  p = fma(p, q, splat(-5.3968254e-2f));
  p = fma(p, q, splat(1.3333333e-1f));
  p = fma(p, q, splat(-3.3333333e-1f));
  const Vec small = fma(mul(p, q), s, s);
  const Vec large = add(splat(1.f), div(splat(-2.f), add(exp_lanes(add(a, a)), splat(1.f))));
  return copy_sign(fma(is_large, add(large, mul(small, splat(-1.f))), small), x);
}

// cap * tanh(x / cap): close to x near 0, never beyond +-cap.
inline Vec softcap(Vec x, float cap) { return mul(tanh_lanes(mul(x, splat(1.f / cap))), splat(cap)); }

// act(g) * u, or act(g) when ungated (u is then ignored). Formulas: hostcompute.ActivationKind.
inline Vec activate(const monde::Activation& activation, bool gated, Vec g, Vec u) {
  using Kind = monde::ActivationKind;
  if (activation.kind == Kind::kSwigluClamp || activation.kind == Kind::kSwigluAlpha) {
    const Vec limit = splat(activation.limit);
    g = min_keep_nan(g, limit);
    u = max_keep_nan(min_keep_nan(u, limit), splat(-activation.limit));
  }
  Vec h;
  switch (activation.kind) {
    case Kind::kSilu:
    case Kind::kSwigluClamp:
      h = mul(g, sigmoid(g));
      break;
    case Kind::kGeluTanh:
      h = gelu_tanh(g);
      break;
    case Kind::kGeluErf:
      h = gelu_erf(g);
      break;
    case Kind::kRelu:
      h = max_keep_nan(g, splat(0.f));
      break;
    case Kind::kRelu2:
      h = max_keep_nan(g, splat(0.f));
      h = mul(h, h);
      break;
    case Kind::kSwigluAlpha:
      h = mul(g, sigmoid(mul(g, splat(activation.alpha))));
      u = add(u, splat(1.f));
      break;
    case Kind::kSwigluPostClamp:
      h = min_keep_nan(mul(g, sigmoid(g)), splat(activation.limit));
      u = max_keep_nan(min_keep_nan(u, splat(activation.limit)), splat(-activation.limit));
      break;
    case Kind::kSwigluSoftcap:
      h = mul(softcap(g, activation.alpha), sigmoid(g));
      u = softcap(u, activation.limit);
      break;
  }
  return gated ? mul(h, u) : h;
}

}  // namespace MONDE_ISA
