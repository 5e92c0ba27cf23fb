#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "timeline.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace monde {
namespace {

std::atomic<int> g_fork_generation{0};

void count_forks_once() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_fork_generation.fetch_add(1); });
  (void)registered;
}

void pin_to(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // A refusal (the core went offline, a container changed its mask) leaves the thread unpinned, which is only slower.
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// Spins until `ready`; gives the core away now and then in case whoever we wait for needs it.
template <class Ready>
void spin_until(Ready ready) {
  for (int spins = 1; !ready(); ++spins) {
    if (spins % 2048 == 0)
      sched_yield();
    else
      relax();
  }
}

// Between two layers of a decode step lie tens of microseconds; longer gaps mean that somebody else is computing.
constexpr double kRudeSpinS = 50e-6;

struct ScratchBlock {
  unsigned char* data = nullptr;
  size_t num_bytes = 0;
};

constexpr int kMaxScratchSlots = 8;

}  // namespace

struct Pool::State {
  struct alignas(64) Range {
    std::atomic<int> next{0};
    int end = 0;
  };

  State(const std::vector<int>& cpus, const std::vector<int>& nodes, double spin, int fork_generation)
      : cpus(cpus),
        nodes(nodes),
        spin_s(spin),
        generation(fork_generation),
        ranges(std::make_unique<Range[]>(kMaxPhases * cpus.size())) {}

  const std::vector<int> cpus, nodes;
  const double spin_s;
  const int generation;

  std::mutex lease;
  std::vector<std::thread> workers;
  ScratchBlock scratch[kMaxScratchSlots];
  bool caller_moved = false;
  cpu_set_t caller_cpus;

  // The step under way. Written by the leader while `open` is false and nobody is `active`.
  Phase phases[kMaxPhases];
  int num_phases = 0;
  void* context = nullptr;
  std::unique_ptr<Range[]> ranges;  // [phase][thread]
  alignas(64) std::atomic<int> completed[kMaxPhases];

  alignas(64) std::atomic<unsigned> epoch{0};  // bumped once per step; sleepers wait on it
  std::atomic<bool> open{false};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<int> active{0};

  int num_threads() const { return int(cpus.size()); }
  Range& range(int phase, int thread) { return ranges[size_t(phase) * num_threads() + thread]; }

  void start_workers() {
    if (!workers.empty()) return;
    for (int thread = 1; thread < num_threads(); ++thread) workers.emplace_back([this, thread] { work(thread); });
  }

  void work(int thread) {
    pin_to(cpus[thread]);
    unsigned seen = 0;
    for (;;) {
      wait_for_step(seen);
      seen = epoch.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_acquire)) return;
      // Announce, then look: the leader closes, then looks. One of the two sees the other.
      active.fetch_add(1, std::memory_order_seq_cst);
      if (open.load(std::memory_order_seq_cst)) participate(thread);
      active.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_step(unsigned seen) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    for (int spins = 1; epoch.load(std::memory_order_acquire) == seen; ++spins) {
      relax();
      if (spins % 64 != 0) continue;
      const double waited_s = std::chrono::duration<double>(Clock::now() - start).count();
      if (waited_s > spin_s) {
        epoch.wait(seen, std::memory_order_acquire);
        return;
      }
      // Others may want the core by now: give it away, but not at every look, because whoever shares the core's other
      // hyperthread, as the thread that launches the next layer may, is slowed by system calls and not by pauses.
      if (waited_s > kRudeSpinS) sched_yield();
    }
  }

  void participate(int thread) {
    for (int p = 0; p < num_phases; ++p) {
      const Phase& phase = phases[p];
      const int64_t start_ns = timeline::on() ? timeline::now_ns() : 0;
      int done = take_all(p, thread, thread);
      for (int step = 1; step < num_threads(); ++step) {
        const int victim = (thread + step) % num_threads();
        if (nodes[victim] == nodes[thread]) done += take_all(p, victim, thread);
      }
      for (int step = 1; step < num_threads(); ++step) {
        const int victim = (thread + step) % num_threads();
        if (nodes[victim] != nodes[thread]) done += take_all(p, victim, thread);
      }
      if (done && start_ns) timeline::add({phase.name, start_ns, timeline::now_ns(), 0, thread, 0, 0, 0, done});
      if (done) completed[p].fetch_add(done, std::memory_order_acq_rel);
      const auto is_over = [&] { return completed[p].load(std::memory_order_acquire) >= phase.num_units; };
      if (p + 1 < num_phases) fetch_ahead(p + 1, thread, is_over);
      spin_until(is_over);
    }
  }

  template <class IsOver>
  void fetch_ahead(int phase, int thread, IsOver is_over) {
    const Range& units = range(phase, thread);
    const int first = units.next.load(std::memory_order_relaxed);
    if (!phases[phase].fetch_ahead || first >= units.end) return;
    for (int step = 0; !is_over() && phases[phase].fetch_ahead(context, first, step);) ++step;
  }

  int take_all(int phase, int owner, int thread) {
    Range& units = range(phase, owner);
    int done = 0;
    while (units.next.load(std::memory_order_relaxed) < units.end) {
      const int unit = units.next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units.end) break;
      phases[phase].run_unit(context, unit, thread);
      ++done;
    }
    return done;
  }

  void run(const Phase* wanted, int count, void* wanted_context) {
    num_phases = count;
    context = wanted_context;
    for (int p = 0; p < count; ++p) {
      phases[p] = wanted[p];
      completed[p].store(0, std::memory_order_relaxed);
      for (int t = 0; t < num_threads(); ++t) {
        range(p, t).next.store(wanted[p].range_begin[t], std::memory_order_relaxed);
        range(p, t).end = wanted[p].range_begin[t + 1];
      }
    }
    open.store(true, std::memory_order_seq_cst);
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
    participate(0);
    open.store(false, std::memory_order_seq_cst);
    spin_until([&] { return active.load(std::memory_order_seq_cst) == 0; });
  }

  // The caller's thread may sit on a core whose worker is pinned there: then both would wait for each other's time
  // slice. It moves to core 0 for the step.
  void borrow_first_core() {
    caller_moved = false;
    const int here = sched_getcpu();
    if (cpus[0] < 0 || here == cpus[0] || std::find(cpus.begin(), cpus.end(), here) == cpus.end()) return;
    if (pthread_getaffinity_np(pthread_self(), sizeof caller_cpus, &caller_cpus) != 0) return;
    if (!CPU_ISSET(cpus[0], &caller_cpus)) return;
    pin_to(cpus[0]);
    caller_moved = true;
  }

  void return_core() {
    if (caller_moved) pthread_setaffinity_np(pthread_self(), sizeof caller_cpus, &caller_cpus);
  }
};

Pool::Pool(std::vector<int> cpus, std::vector<int> nodes, double spin_s)
    : cpus_(std::move(cpus)), nodes_(std::move(nodes)), spin_s_(spin_s) {
  count_forks_once();
  state_ = new State(cpus_, nodes_, spin_s_, g_fork_generation.load());
}

Pool::~Pool() {
  State* const state = state_.load();
  if (state->generation != g_fork_generation.load()) return;  // the threads are the parent's: nothing to join here
  state->stop.store(true, std::memory_order_release);
  state->epoch.fetch_add(1, std::memory_order_release);
  state->epoch.notify_all();
  for (std::thread& worker : state->workers) worker.join();
  for (ScratchBlock& block : state->scratch) std::free(block.data);
  delete state;
}

Pool::State* Pool::state() {
  // Another thread of the parent may have held the old state's lock during the fork, so the child abandons it whole.
  // A lock around the renewal could be lost the same way; instead, the first of several callers wins.
  const int generation = g_fork_generation.load();
  State* current = state_.load();
  if (current->generation == generation) return current;
  auto renewed = std::make_unique<State>(cpus_, nodes_, spin_s_, generation);
  return state_.compare_exchange_strong(current, renewed.get()) ? renewed.release() : current;
}

int Pool::num_threads() const { return int(cpus_.size()); }
int Pool::num_nodes() const { return 1 + *std::max_element(nodes_.begin(), nodes_.end()); }
int Pool::node_of_thread(int thread) const { return nodes_[thread]; }
void Pool::pin_caller() const { pin_to(cpus_[0]); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

Pool::Lease::Lease(Pool& pool) : pool_(pool), state_(pool.state()) {
  State* state = static_cast<State*>(state_);
  std::unique_lock<std::mutex> guard(state->lease);
  state->start_workers();  // the system may refuse threads: then the lease must be free again
  state->borrow_first_core();
  guard.release();
}

Pool::Lease::~Lease() {
  State* state = static_cast<State*>(state_);
  state->return_core();
  state->lease.unlock();
}

void Pool::Lease::run(const Phase* phases, int num_phases, void* context) {
  static_cast<State*>(state_)->run(phases, num_phases, context);
}

unsigned char* Pool::Lease::scratch(int slot, size_t num_bytes) {
  ScratchBlock& block = static_cast<State*>(state_)->scratch[slot];
  if (block.num_bytes < num_bytes) {
    constexpr size_t kHugePageBytes = size_t(2) << 20;
    const size_t alignment = num_bytes >= kHugePageBytes ? kHugePageBytes : 64;
    const size_t rounded = (num_bytes + num_bytes / 4 + alignment - 1) / alignment * alignment;
    std::free(block.data);
    block = {};
    block.data = static_cast<unsigned char*>(std::aligned_alloc(alignment, rounded));
    if (!block.data) throw std::bad_alloc();
    block.num_bytes = rounded;
#if defined(__linux__)
    if (alignment == kHugePageBytes) madvise(block.data, rounded, MADV_HUGEPAGE);
#endif
  }
  return block.data;
}

void split_evenly(int num_units, int parts, int* begin) {
  for (int i = 0; i <= parts; ++i) begin[i] = int(int64_t(num_units) * i / parts);
}

}  // namespace monde
