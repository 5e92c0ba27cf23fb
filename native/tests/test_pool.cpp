// Phases of units on threads: each unit once, phases in order, callers in turn, threads that come and go.
#include <atomic>
#include <chrono>
#include <thread>

#include "../runtime/pool.h"
#include "check.h"
#include "problem.h"

namespace monde::test {
namespace {

// Phase 0 writes one cell a unit, phase 1 sums all cells, phase 2 checks the sums: plain memory, so that
// ThreadSanitizer sees whether a phase really happens after the one before.
struct Step {
  std::vector<int> cells, sums, checked;

  explicit Step(int num_units) : cells(num_units), sums(num_units), checked(num_units) {}

  static void write(void* context, int unit, int) { static_cast<Step*>(context)->cells[unit] += unit + 1; }
  static void sum(void* context, int unit, int) {
    Step& step = *static_cast<Step*>(context);
    for (int cell : step.cells) step.sums[unit] += cell;
  }
  static void check(void* context, int unit, int) {
    Step& step = *static_cast<Step*>(context);
    const int n = int(step.cells.size());
    step.checked[unit] += step.sums[n - 1 - unit] == n * (n + 1) / 2;
  }

  // True when every unit of every phase ran exactly once and in order.
  bool run_in(Pool& pool, const int* range_begin) {
    const int n = int(cells.size());
    const Phase phases[] = {{&write, n, range_begin}, {&sum, n, range_begin}, {&check, n, range_begin}};
    Pool::Lease(pool).run(phases, 3, this);
    for (int i = 0; i < n; ++i)
      if (cells[i] != i + 1 || checked[i] != 1) return false;
    return true;
  }
};

std::vector<int> even_ranges(int num_units, int num_threads) {
  std::vector<int> begin(num_threads + 1);
  split_evenly(num_units, num_threads, begin.data());
  return begin;
}

std::vector<int> nodes_of(int num_threads) {
  std::vector<int> nodes(num_threads);
  for (int i = 0; i < num_threads; ++i) nodes[i] = i >= (num_threads + 1) / 2;
  return nodes;
}

}  // namespace

TEST(pool_runs_every_unit_once_in_order) {
  Random random(1);
  for (const int num_threads : {1, 2, 3, 16}) {
    const auto pool = make_pool(nodes_of(num_threads), 20e-6);
    for (int round = 0; round < repetitions(1000); ++round) {
      const int num_units = random.below(40);
      std::vector<int> begin(num_threads + 1);
      for (int i = 1; i < num_threads; ++i) begin[i] = random.below(num_units + 1);
      begin[num_threads] = num_units;
      std::sort(begin.begin(), begin.end());
      Step step(num_units);
      CHECK(step.run_in(*pool, begin.data()),
            std::to_string(num_units) + " units on " + std::to_string(num_threads) + " threads");
    }
  }
}

TEST(pool_takes_turns_between_callers) {
  const auto pool = make_pool({0, 0, 0, 0}, 20e-6);
  const std::vector<int> begin = even_ranges(23, 4);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < repetitions(3000); ++round) {
        Step step(23);
        CHECK(step.run_in(*pool, begin.data()), "one of four callers");
      }
    });
  for (std::thread& caller : callers) caller.join();
}

// Destroyed before the first step, right after one, while workers spin, and when they sleep.
TEST(pool_can_be_destroyed_at_any_moment) {
  for (const double spin_s : {0.0, 100e-6, 1.0})
    for (const int pause_us : {-1, 0, 50, 2000})
      for (int round = 0; round < repetitions(20); ++round) {
        const auto pool = make_pool({0, 0, 0, 1}, spin_s);
        if (pause_us < 0) continue;
        Step step(8);
        CHECK(step.run_in(*pool, even_ranges(8, 4).data()), "before destruction");
        std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
      }
}

// Workers that fell asleep are woken by the next step, again and again.
TEST(pool_wakes_sleepers) {
  const auto pool = make_pool({0, 0, 0}, 0.0);
  for (int round = 0; round < repetitions(100); ++round) {
    std::this_thread::sleep_for(std::chrono::microseconds(round % 3 * 300));
    Step step(9);
    CHECK(step.run_in(*pool, even_ranges(9, 3).data()), "after sleep");
  }
}

// Pinning moves the caller for the step only.
TEST(pool_gives_the_caller_its_cores_back) {
  cpu_set_t before, after;
  pthread_getaffinity_np(pthread_self(), sizeof before, &before);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE && cpus.size() < 2; ++cpu)
    if (CPU_ISSET(cpu, &before)) cpus.push_back(cpu);
  const size_t num_threads = cpus.size();
  Pool pool(cpus, std::vector<int>(num_threads, 0), 50e-6);
  for (int round = 0; round < repetitions(200); ++round) {
    Step step(10);
    CHECK(step.run_in(pool, even_ranges(10, int(num_threads)).data()), "pinned");
    pthread_getaffinity_np(pthread_self(), sizeof after, &after);
    CHECK(CPU_EQUAL(&before, &after), "the caller's mask changed");
  }
}

TEST(pool_scratch_is_aligned_and_grows) {
  const auto pool = make_pool({0, 0});
  for (const size_t num_bytes : {size_t(1), size_t(63), size_t(100000), size_t(5) << 20, size_t(10)}) {
    Pool::Lease lease(*pool);
    unsigned char* first = lease.scratch(0, num_bytes);
    unsigned char* second = lease.scratch(1, num_bytes);
    std::memset(first, 1, num_bytes);
    std::memset(second, 2, num_bytes);
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0 && reinterpret_cast<uintptr_t>(second) % 64 == 0, "alignment");
    CHECK(std::count(first, first + num_bytes, 1) == int64_t(num_bytes), "slots overlap");
  }
}

}  // namespace monde::test
