// What the host did and when, for a timeline: one span per forward of a bank, and one per thread and phase.
//
// Off, which is the rule, it costs a relaxed load. On, spans go to memory reserved at the start; what does not fit is
// counted and dropped, so that recording never allocates or waits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace monde::timeline {

struct Span {
  const char* name;                             // of static storage: "forward", or the phase
  int64_t start_ns, end_ns;                     // CLOCK_MONOTONIC
  uintptr_t bank;                               // whose forward it is; 0 for a phase
  int64_t thread;                               // of the pool; -1 for a whole forward
  int64_t num_tokens, num_pairs, weight_bytes;  // of a forward
  int64_t num_units;                            // of a phase, done by this thread
};

struct Recorded {
  std::vector<Span> spans;
  size_t num_dropped;
};

// Both may be called while forwards run; spans under way at either end are left out.
void start(size_t capacity);
Recorded stop();

bool on();
int64_t now_ns();
void add(const Span& span);

}  // namespace monde::timeline
