#define MONDE_ISA monde_scalar
#define MONDE_FAR_TILES 0
#define MONDE_SIMD "../simd/scalar.h"
#include "../kernels/body.h"
#include "../kernels/dense.h"
#include "isa.h"

namespace monde {

const Isa kScalar = {
    "scalar",
    MONDE_ISA::kernels_of<MONDE_ISA::VectorMultiply<MONDE_ISA::F32ByF32>>(),
    MONDE_ISA::kernels_of<MONDE_ISA::VectorMultiply<MONDE_ISA::F32ByBF16>>(),
    MONDE_ISA::kernels_of<MONDE_ISA::VectorMultiply<MONDE_ISA::F32ByF16>>(),
    {},
    &MONDE_ISA::dense,
    &MONDE_ISA::read_bytes,
    &MONDE_ISA::vector_peak<MONDE_ISA::F32ByF32>,
};

}  // namespace monde
