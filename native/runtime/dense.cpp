#include "dense.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace monde {
namespace {

// A unit's weights: small enough to balance, large enough that taking one costs nothing beside reading it.
constexpr int64_t kUnitBytes = 1 << 16;

struct Job {
  const Isa* isa;
  const DenseArgs* args;
  int rows_per_unit;

  static void run_unit(void* context, int unit, int) {
    const Job& job = *static_cast<const Job*>(context);
    const int row = unit * job.rows_per_unit;
    job.isa->dense(*job.args, row, std::min(row + job.rows_per_unit, job.args->num_outputs));
  }
};

}  // namespace

void dense(Pool& pool, const Isa& isa, const DenseArgs& args) {
  if (args.num_tokens > kMaxDenseTokens)
    throw std::invalid_argument("[dense] x: expected at most " + std::to_string(kMaxDenseTokens) + " rows, got " +
                                std::to_string(args.num_tokens));
  if (args.num_tokens == 0 || args.num_outputs == 0) return;
  const int64_t row_bytes = std::max<int64_t>(1, args.num_inputs) * int64_t(sizeof(uint16_t));
  const Job job{&isa, &args, int(std::clamp<int64_t>(kUnitBytes / row_bytes, 1, args.num_outputs))};
  const int num_units = (args.num_outputs + job.rows_per_unit - 1) / job.rows_per_unit;
  Pool::Lease lease(pool);
  int* ranges = reinterpret_cast<int*>(lease.scratch(0, (pool.num_threads() + 1) * sizeof(int)));
  split_evenly(num_units, pool.num_threads(), ranges);
  const Phase phase{&Job::run_unit, num_units, ranges, "dense"};
  lease.run(&phase, 1, const_cast<Job*>(&job));
}

}  // namespace monde
