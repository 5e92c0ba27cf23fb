// Dense layers of a few tokens on the pool's threads; the weights are the caller's and stay where they are.
#pragma once
#include "../isa/isa.h"
#include "pool.h"

namespace monde {

// out = x weights^T + bias. Errors: std::invalid_argument for more than kMaxDenseTokens tokens.
void dense(Pool& pool, const Isa& isa, const DenseArgs& args);

}  // namespace monde
