// A persistent pool of pinned threads that runs phases of independent units.
//
// A step is a list of phases; a unit of a later phase starts when every unit of the earlier ones is done. The caller
// leads: it works too. Each thread owns a contiguous range of units (it streams contiguous memory) and, when that is
// empty, takes units from others. A phase is over when its units are, not when every thread has shown up: a thread
// that the operating system delays or that still sleeps costs nothing but its help.
//
// Threads look for the next step for `spin_s`, soon yielding their core between looks, then sleep.
// After fork the child starts its own threads at the first step. Steps of several callers take turns.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace monde {

struct Phase {
  void (*run_unit)(void* context, int unit, int thread);
  int num_units;
  const int* range_begin;     // [num_threads + 1] units owned by thread i: [range_begin[i], range_begin[i + 1])
  const char* name = "work";  // on timelines
  // Fetches the step-th piece of what `unit` will read into the cache; false when there is no more. Threads that wait
  // for the phase before do that for their first unit, as memory would idle. Null: nothing to fetch.
  bool (*fetch_ahead)(void* context, int unit, int step) = nullptr;
};

inline constexpr int kMaxPhases = 4;

class Pool {
 public:
  // One thread per entry: `cpus[i]` is the core that thread i is pinned to (-1: not pinned), `nodes[i]` its NUMA node.
  Pool(std::vector<int> cpus, std::vector<int> nodes, double spin_s);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const;
  int num_nodes() const;
  int node_of_thread(int thread) const;
  // Keeps the calling thread on the core of thread 0, for one that leads steps all the time.
  void pin_caller() const;

  // Holds the pool for a step: scratch memory and phases belong to the holder until it goes.
  class Lease {
   public:
    explicit Lease(Pool& pool);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    void run(const Phase* phases, int num_phases, void* context);
    // 64-byte aligned memory that lives until the lease ends; grows, never shrinks. One block per slot.
    unsigned char* scratch(int slot, size_t num_bytes);

   private:
    Pool& pool_;
    void* state_;
  };

 private:
  struct State;
  State* state();  // this process's, made anew after a fork
  std::vector<int> cpus_, nodes_;
  double spin_s_;
  std::atomic<State*> state_;
};

// One look's pause of a thread that waits for another.
void relax();

// Splits `num_units` into `parts` ranges of equal size, into begin[parts + 1].
void split_evenly(int num_units, int parts, int* begin);

}  // namespace monde
