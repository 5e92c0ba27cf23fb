// The host's end of the mailbox: a thread that polls a word in memory shared with a GPU, computes what was posted and
// answers. The GPU waits in its own kernel, so neither side makes a system call or involves Python per layer.
//
//   GPU:   writes x, ids and weights into a box, then the box's ringing word (release)
//   host:  sees the word (acquire), computes out, then writes the answered word (release)
//   GPU:   sees the answer (acquire), reads out
//
// A ring may bring pairs for later as well: those that the GPU waits for only in its next layer. They are computed when
// the others have been answered, and answered by themselves. Meanwhile the next ring arrives, so there are two boxes,
// of rings with even and with odd numbers. Rings are taken in order, so an answer to one says that all before it are
// done. Before it fills a box again, the GPU has waited for all that the host was given in it.
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
//   bits 0-31 number of the ring, 32-43 layer, 44-54 tokens, 55 there are pairs for later, 56-62 experts per token,
//   63 there is work.
namespace ring {
inline constexpr int kLayerShift = 32, kTokensShift = 44, kLaterShift = 55, kTopkShift = 56, kWorkShift = 63;
inline constexpr int kMaxLayers = 1 << 12, kMaxTokens = (1 << 11) - 1, kMaxTopk = (1 << 7) - 1;
// An answer: bits 0-31 number of the ring, bit 32 its forward raised, or that of the pairs for later of the ring
// before, bit 33 its own pairs for later are still to come.
inline constexpr int kFailedShift = 32, kOwingShift = 33;
}  // namespace ring

// Addresses in memory that both sides see, of the first box where there are two. Words are 64 bits, each on a cache
// line of its own. Halves: what counts now, and behind it what counts later.
struct Mailbox {
  uintptr_t answered;   // the answer to the latest ring; the only thing that boxes share
  uintptr_t rung;       // written by the GPU
  uintptr_t x;          // [tokens, d_model] of x_dtype
  uintptr_t ids;        // [2 halves, tokens, topk] int32; -1: not for the host
  uintptr_t weights;    // [tokens, topk] float
  uintptr_t out;        // [2 halves, tokens, d_model] float
  uintptr_t cut;        // a word: of what counts now the host computes panels of F from this one on, of every expert
  uintptr_t box_bytes;  // from the box of even rings to that of odd ones
  DType x_dtype;
};

struct DoorbellTotals {
  int64_t num_rings = 0, num_pairs = 0, weight_bytes = 0;
  double busy_s = 0;
  double later_s = 0;  // of busy_s, for pairs that count later
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
  enum class Half { kNow, kLater };

  void work();
  uint64_t next_ring() const;
  uint32_t latest_ring() const;
  void answer(uint64_t word);
  // False, and error_ says why, when the forward raised.
  bool compute(uint64_t word, Half half, DoorbellTotals& done);
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
  std::atomic<bool> later_failed_{false};  // of the latest ring, for whoever looks at the next one's answer only
  std::atomic<uint32_t> last_ring_{0};     // that was taken

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  DoorbellTotals totals_;
  std::string error_;
  std::thread thread_;
};

}  // namespace monde
