// The host's end of the mailbox: a thread that polls a word in memory shared with a GPU, computes what was posted and
// answers. The GPU waits in its own kernel, so neither side makes a system call or involves Python per layer.
//
//   GPU:   writes x, ids and weights into the mailbox, then the ringing word (release)
//   host:  sees the word (acquire), computes out, then writes the answered word (release)
//   GPU:   sees the answer (acquire), reads out
//
// Numbers only grow, so nothing is ever reset between layers. A layer that has nothing for the host rings as well, so
// that the host knows how many rings to wait for: it polls while rings are expected and sleeps otherwise, looking once
// a millisecond.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "bank.h"

namespace monde {

// A ring is one 64-bit word, so that it is never seen half written:
//   bits 0-31 number of the ring, 32-43 layer, 44-55 tokens, 56-62 experts per token, 63 there is work.
namespace ring {
inline constexpr int kLayerShift = 32, kTokensShift = 44, kTopkShift = 56, kWorkShift = 63;
inline constexpr int kMaxLayers = 1 << 12, kMaxTokens = (1 << 12) - 1, kMaxTopk = (1 << 7) - 1;
// An answer: bits 0-31 number of the ring, bit 32 its forward raised.
inline constexpr int kFailedShift = 32;
}  // namespace ring

// Addresses in memory that both sides see. Words are 64 bits, each on a cache line of its own.
struct Mailbox {
  uintptr_t rung;      // written by the GPU
  uintptr_t answered;  // the answer to the latest ring
  uintptr_t x;         // [tokens, d_model] of x_dtype
  uintptr_t ids;       // [tokens, topk] int32; -1: not for the host
  uintptr_t weights;   // [tokens, topk] float
  uintptr_t out;       // [tokens, d_model] float
  uintptr_t cut;       // a word: the host computes panels of F from this one on, of every expert
  DType x_dtype;
};

struct DoorbellTotals {
  int64_t num_rings = 0, num_pairs = 0, weight_bytes = 0;
  double busy_s = 0;
};

class Doorbell {
 public:
  // `banks[layer]` computes that layer's rings. `deadline_s`: after so long without an expected ring the thread sleeps
  // and expects no more; the wait itself is bounded by the GPU's own deadline.
  Doorbell(std::vector<std::shared_ptr<Bank>> banks, std::shared_ptr<Pool> pool, const Mailbox& mailbox,
           double deadline_s);
  ~Doorbell();
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  // `num_rings` more are on their way. Wakes the thread.
  void expect(int64_t num_rings);
  // Forgets the rings that did not come and what went wrong; call it when the GPU is idle.
  void reset();
  // What the latest forward that failed said; empty if none did.
  std::string error() const;
  DoorbellTotals totals() const;
  void reset_totals();

 private:
  void work();
  void answer(uint64_t word);
  void sleep();
  void forget();

  const std::vector<std::shared_ptr<Bank>> banks_;
  const std::shared_ptr<Pool> pool_;
  const Mailbox mailbox_;
  const double deadline_s_;

  std::atomic<int64_t> expected_{0};  // rings announced since the start
  std::atomic<int64_t> seen_{0};      // rings seen since the start
  std::atomic<bool> stop_{false};
  std::atomic<bool> computing_{false};
  uint32_t last_ring_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  DoorbellTotals totals_;
  std::string error_;
  std::thread thread_;
};

}  // namespace monde
