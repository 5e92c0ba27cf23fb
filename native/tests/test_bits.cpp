// Conversions between f32, bf16 and f16, against arithmetic on doubles.
#include <cmath>

#include "../simd/bits.h"
#include "check.h"

namespace {

constexpr int kExponentsF16 = 5, kExponentsBF16 = 8;

// The value of a 16-bit float with that many exponent bits, by definition.
double value_of(int bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(exponent ? mantissa + (1 << mantissa_bits) : mantissa,
                           (exponent ? exponent : 1) - bias - mantissa_bits);
}

void check_type(const char* name, int exponent_bits, float (*widen)(uint16_t), uint16_t (*narrow)(float)) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const double value = value_of(bits, exponent_bits);
    const std::string what = std::string(name) + " " + std::to_string(bits);
    const float wide = widen(uint16_t(bits));
    CHECK(std::isnan(value) ? std::isnan(wide) : wide == value, what + " widens to " + std::to_string(wide));
    if (std::isnan(value)) {
      CHECK(std::isnan(widen(narrow(wide))), what + " does not stay NaN");
      continue;
    }
    CHECK(narrow(wide) == bits, what + " does not come back");
    // Half way to the next larger magnitude goes to the even one, anything beside it to the nearer one.
    const double above = value_of(bits + 1, exponent_bits);
    if ((bits & 0x7fff) == 0x7fff || !std::isfinite(value)) continue;
    const double step = std::isfinite(above) ? above - value : value - value_of(bits - 1, exponent_bits);
    const double half_way = value + step / 2;
    if (float(half_way) != half_way) continue;  // beyond f32: bf16 subnormals have no room below
    const float middle = float(half_way), beyond = std::nextafter(middle, float(value + step));
    const float before = std::nextafter(middle, float(value));
    CHECK(narrow(middle) == (bits % 2 ? bits + 1 : bits), what + ": a tie does not go to even");
    CHECK(narrow(before) == bits, what + ": just below a tie");
    CHECK(narrow(beyond) == bits + 1, what + ": just above a tie");
  }
}

}  // namespace

TEST(f16_conversions) { check_type("f16", kExponentsF16, &f16_to_float, &float_to_f16); }
TEST(bf16_conversions) { check_type("bf16", kExponentsBF16, &bf16_to_float, &float_to_bf16); }
