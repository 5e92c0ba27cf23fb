#define MONDE_ISA monde_amx_bf16
#define MONDE_FAR_TILES 16
#define MONDE_AMX_CUT 12
#define MONDE_SIMD "../simd/avx512.h"
#include "../kernels/amx_multiply.h"
#include "../kernels/body.h"
#include "../kernels/dense.h"
#include "isa.h"

namespace monde {

const Isa kAmxBf16 = {
    "amx_bf16",
    MONDE_ISA::kernels_of<MONDE_ISA::VectorMultiply<MONDE_ISA::F32ByF32>>(),
    MONDE_ISA::kernels_of<MONDE_ISA::VectorMultiply<MONDE_ISA::F32ByBF16>>(),
    MONDE_ISA::kernels_of<MONDE_ISA::VectorMultiply<MONDE_ISA::F32ByF16>>(),
    MONDE_ISA::kernels_of<MONDE_ISA::AmxMultiply>(),
    &MONDE_ISA::dense,
    &MONDE_ISA::read_bytes,
    &MONDE_ISA::amx_peak,
};

}  // namespace monde
