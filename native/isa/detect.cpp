#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace monde {

#if defined(__x86_64__)
namespace {

constexpr bool bit(unsigned value, int index) { return value >> index & 1; }

struct Cpu {
  unsigned leaf1_ecx = 0, leaf7_ebx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
  unsigned long long xcr0 = 0;
};

Cpu read_cpu() {
  Cpu cpu;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  cpu.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    cpu.leaf7_ebx = b;
    cpu.leaf7_edx = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.leaf7_1_eax = a;
  }
  if (bit(cpu.leaf1_ecx, 27)) {  // OSXSAVE: XGETBV may be executed
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.xcr0 = (static_cast<unsigned long long>(high) << 32) | low;
  }
  return cpu;
}

// Linux hands out the 8 KiB of tile state only to processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool request_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

int available_isas(const Isa* found[kMaxIsas]) {
  int count = 0;
#if defined(__x86_64__)
  const Cpu cpu = read_cpu();
  const bool ymm = (cpu.xcr0 & 0x6) == 0x6, zmm = (cpu.xcr0 & 0xe6) == 0xe6, tiles = (cpu.xcr0 & 0x60000) == 0x60000;
  const bool avx2 = ymm && bit(cpu.leaf7_ebx, 5) && bit(cpu.leaf1_ecx, 12) && bit(cpu.leaf1_ecx, 29);  // FMA, F16C
  const bool avx512 = avx2 && zmm && bit(cpu.leaf7_ebx, 16) && bit(cpu.leaf7_ebx, 17) && bit(cpu.leaf7_ebx, 30) &&
                      bit(cpu.leaf7_ebx, 31);  // F, DQ, BW, VL
  const bool avx512_bf16 = avx512 && bit(cpu.leaf7_1_eax, 5);
  const bool amx = avx512_bf16 && tiles && bit(cpu.leaf7_edx, 22) && bit(cpu.leaf7_edx, 24);  // AMX-BF16, AMX-TILE
  static const bool tiles_granted = amx && request_tiles();
  if (tiles_granted) found[count++] = &kAmxBf16;
  if (avx512_bf16) found[count++] = &kAvx512Bf16;
  if (avx512) found[count++] = &kAvx512;
  if (avx2) found[count++] = &kAvx2;
#endif
  found[count++] = &kScalar;
  return count;
}

}  // namespace monde
