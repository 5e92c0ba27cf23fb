#include "probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

namespace monde {
namespace {

constexpr size_t kPieceBytes = size_t(1) << 20;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct ReadJob {
  const Isa* isa;
  const unsigned char* data;
  std::atomic<unsigned> sink{0};
  static void run_unit(void* context, int unit, int) {
    ReadJob& job = *static_cast<ReadJob*>(context);
    const float seen = job.isa->read(job.data + size_t(unit) * kPieceBytes, kPieceBytes);
    job.sink.fetch_or(seen != 0.f, std::memory_order_relaxed);
  }
};

struct FillJob {
  unsigned char* data;
  static void run_unit(void* context, int unit, int) {
    std::memset(static_cast<FillJob*>(context)->data + size_t(unit) * kPieceBytes, unit | 1, kPieceBytes);
  }
};

struct PeakJob {
  const Isa* isa;
  int num_iterations;
  std::vector<double> operations;  // by unit
  static void run_unit(void* context, int unit, int) {
    PeakJob& job = *static_cast<PeakJob*>(context);
    job.operations[unit] = job.isa->peak(job.num_iterations);
  }
};

double run_evenly(Pool& pool, int num_units, void (*run_unit)(void*, int, int), void* context) {
  std::vector<int> ranges(pool.num_threads() + 1);
  split_evenly(num_units, pool.num_threads(), ranges.data());
  const Phase phase{run_unit, num_units, ranges.data()};
  Pool::Lease lease(pool);
  const auto start = Clock::now();
  lease.run(&phase, 1, context);
  return seconds_since(start);
}

}  // namespace

double read_bytes_per_s_of(Pool& pool, const Isa& isa, const unsigned char* data, size_t num_bytes, int repeats) {
  const int pieces = int(num_bytes / kPieceBytes);
  ReadJob job{&isa, data};
  double best = 0;
  for (int i = 0; i < repeats; ++i)
    best = std::max(best, double(pieces) * kPieceBytes / run_evenly(pool, pieces, &ReadJob::run_unit, &job));
  return best;
}

double read_bytes_per_s(Pool& pool, const Isa& isa, size_t num_bytes, bool huge_pages, int repeats) {
  const size_t rounded = std::max(kPieceBytes, num_bytes / kPieceBytes * kPieceBytes);
  void* mapped = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(mapped, rounded, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  FillJob fill{static_cast<unsigned char*>(mapped)};
  run_evenly(pool, int(rounded / kPieceBytes), &FillJob::run_unit, &fill);
  const double rate = read_bytes_per_s_of(pool, isa, fill.data, rounded, repeats);
  munmap(mapped, rounded);
  return rate;
}

double peak_flops_per_s(Pool& pool, const Isa& isa) {
  const int num_threads = pool.num_threads();
  PeakJob job{&isa, 1000, std::vector<double>(num_threads)};
  double best = 0;
  for (int repeat = 0; repeat < 8; ++repeat) {
    const double elapsed_s = run_evenly(pool, num_threads, &PeakJob::run_unit, &job);
    double operations = 0;
    for (double thread_operations : job.operations) operations += thread_operations;
    if (elapsed_s < 5e-3) {
      job.num_iterations = int(std::min(1e9, job.num_iterations * 8e-3 / std::max(elapsed_s, 1e-6)));
      continue;
    }
    best = std::max(best, operations / elapsed_s);
  }
  return best;
}

}  // namespace monde
