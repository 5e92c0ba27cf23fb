// The instruction sets, and which of them this machine has.
#pragma once
#include "../kernels/tasks.h"

namespace monde {

extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kAvx512Bf16, kAmxBf16;
#endif

inline constexpr int kMaxIsas = 5;

// The ISAs this machine can run, best first; returns how many. Asks the kernel for AMX tile state once.
int available_isas(const Isa* found[kMaxIsas]);

}  // namespace monde
