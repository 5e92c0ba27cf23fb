// Ceilings, measured with the pool's own threads and pages: what a plain read and a plain multiply-add reach.
#pragma once
#include "../isa/isa.h"
#include "pool.h"

namespace monde {

// Bytes per second of reading `num_bytes` once, in 1 MiB pieces, with huge or 4 KiB pages. Best of `repeats`.
double read_bytes_per_s(Pool& pool, const Isa& isa, size_t num_bytes, bool huge_pages, int repeats);

// The same over memory that is already there (a mapped file, say).
double read_bytes_per_s_of(Pool& pool, const Isa& isa, const unsigned char* data, size_t num_bytes, int repeats);

// Operations per second (a multiply-add is two) of the ISA's widest unit, all threads, operands in L1. Best of 5.
double peak_flops_per_s(Pool& pool, const Isa& isa);

}  // namespace monde
