// Element types of activations and weights. X (activations) and W (weights) are 0 for fp32, 1 for bf16, 2 for fp16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;      // activation rows of one product
constexpr int kTile = 32;      // inputs of a weight tile
constexpr int kLine = 16 * 4;  // bytes of a bf16 line: two inputs of sixteen rows

// ---- elements ----

template <int kType>
struct Element;
template <>
struct Element<0> {
  typedef float type;
};
template <>
struct Element<1> {
  typedef u16 type;
};
template <>
struct Element<2> {
  typedef u16 type;
};
typedef Element<X>::type XElement;
typedef Element<W>::type WElement;

template <int kType>
__device__ float widen(typename Element<kType>::type v);
template <>
__device__ float widen<0>(float v) {
  return v;
}
template <>
__device__ float widen<1>(u16 v) {
  return __uint_as_float(u32(v) << 16);
}
template <>
__device__ float widen<2>(u16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}

template <int kType>
__device__ typename Element<kType>::type narrow(float v);
template <>
__device__ float narrow<0>(float v) {
  return v;
}
template <>
__device__ u16 narrow<1>(float v) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
template <>
__device__ u16 narrow<2>(float v) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

// bf16 activations meet bf16 weights on the tensor cores, and hidden values are rounded to bf16, as on the host.
constexpr bool kTensorCores = X == 1 && W == 1;
constexpr int kHidden = kTensorCores ? 1 : 0;
typedef Element<kHidden>::type HElement;

__device__ float router_weight(const void* weights, int type, int r) {
  if (type == 0) return static_cast<const float*>(weights)[r];
  const u16 bits = static_cast<const u16*>(weights)[r];
  return type == 1 ? widen<1>(bits) : widen<2>(bits);
}
