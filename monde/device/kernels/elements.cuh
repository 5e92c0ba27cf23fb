// Element types of activations and weights. X (activations) and W (weights) are 0 for fp32, 1 for bf16, 2 for fp16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int kThreads = 256;

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

// ---- products and loads ----

// c[16, 8] += a[16, 16] b[16, 8] of bf16 or fp16, by a warp: mma.m16n8k16's order of elements.
template <int kType>
__device__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (kType == 1)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Into L2: what is read soon and not waited for here.
__device__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }
