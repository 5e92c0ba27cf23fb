#include "doorbell.h"

#include <algorithm>
#include <chrono>

namespace monde {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::atomic_ref<uint64_t> word_at(uintptr_t address) {
  return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(address));
}

// Of the box that a ring arrives in.
uintptr_t box_at(const Mailbox& mailbox, uint32_t number) { return (number & 1) * mailbox.box_bytes; }
uintptr_t rung_at(const Mailbox& mailbox, uint32_t number) { return mailbox.rung + box_at(mailbox, number); }

// Whether the ring of this word came after that number; numbers wrap.
bool is_after(uint64_t word, uint32_t number) { return int32_t(uint32_t(word) - number) > 0; }

// After the last expected ring: the next step follows within this time while a text is being generated.
constexpr double kLingerS = 500e-6;

// A sleeper looks that often, for rings that nobody announced: a graph that somebody else captured and replays.
constexpr auto kNapS = std::chrono::milliseconds(1);

// Looks between two readings of the clock; a look takes some 50 ns.
constexpr int kLooksPerClock = 256;

}  // namespace

Doorbell::Doorbell(std::vector<std::shared_ptr<Bank>> banks, std::shared_ptr<Pool> pool, const Mailbox& mailbox,
                   double deadline_s)
    : banks_(std::move(banks)), pool_(std::move(pool)), mailbox_(mailbox), deadline_s_(deadline_s) {
  last_ring_ = latest_ring();
  thread_ = std::thread([this] { work(); });
}

Doorbell::~Doorbell() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    stop_.store(true);
  }
  changed_.notify_all();
  thread_.join();
}

void Doorbell::expect(int64_t num_rings) {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    expected_.fetch_add(num_rings);
  }
  changed_.notify_one();
}

void Doorbell::reset() {
  // Nobody rings any more; what a GPU that gave up has rung for is waited for, so that its failures end here.
  while (last_ring_.load() != latest_ring() || computing_.load()) std::this_thread::yield();
  later_failed_.store(false);
  forget();
  std::lock_guard<std::mutex> guard(mutex_);
  error_.clear();
}

std::string Doorbell::error() const {
  std::lock_guard<std::mutex> guard(mutex_);
  return error_;
}

DoorbellTotals Doorbell::totals() const {
  std::lock_guard<std::mutex> guard(mutex_);
  return totals_;
}

void Doorbell::reset_totals() {
  std::lock_guard<std::mutex> guard(mutex_);
  totals_ = {};
}

void Doorbell::sleep() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, kNapS, [this] { return stop_.load() || expected_.load() > seen_.load(); });
}

void Doorbell::work() {
  pool_->pin_caller();
  auto quiet_since = Clock::now();
  for (int looks = 1; !stop_.load(std::memory_order_relaxed); ++looks) {
    const uint64_t word = next_ring();
    if (uint32_t(word) != last_ring_.load(std::memory_order_relaxed)) {
      answer(word);
      quiet_since = Clock::now();
      continue;
    }
    relax();
    if (looks % kLooksPerClock != 0) continue;
    const double quiet_s = seconds_since(quiet_since);
    const bool expecting = expected_.load() > seen_.load();
    if (quiet_s < (expecting ? deadline_s_ : kLingerS)) continue;
    // Rings that were announced and did not come belong to a step that was cancelled.
    if (expecting) forget();
    sleep();
    if (expected_.load() > seen_.load()) quiet_since = Clock::now();
  }
}

void Doorbell::forget() {
  std::lock_guard<std::mutex> guard(mutex_);
  expected_.store(seen_.load());
}

// The oldest ring that was not taken yet, or the number of the latest that was. Rings without work may be overtaken by
// the next one but one; a ring with work in the other box may be older than the one in the box that is due.
uint64_t Doorbell::next_ring() const {
  const uint32_t last = last_ring_.load(std::memory_order_relaxed);
  const uint64_t due = word_at(rung_at(mailbox_, last + 1)).load(std::memory_order_acquire);
  if (!is_after(due, last)) return last;
  const uint64_t other = word_at(rung_at(mailbox_, last)).load(std::memory_order_acquire);
  return is_after(other, last) && is_after(due, uint32_t(other)) ? other : due;
}

uint32_t Doorbell::latest_ring() const {
  const uint64_t even = word_at(rung_at(mailbox_, 0)).load(std::memory_order_acquire);
  const uint64_t odd = word_at(rung_at(mailbox_, 1)).load(std::memory_order_acquire);
  return uint32_t(is_after(odd, uint32_t(even)) ? odd : even);
}

void Doorbell::answer(uint64_t word) {
  const uint32_t number = uint32_t(word);
  computing_.store(true);
  DoorbellTotals done{.num_rings = uint32_t(number - last_ring_.load(std::memory_order_relaxed))};
  last_ring_.store(number);
  const auto tell = [&](bool failed, bool owing) {
    const uint64_t flags = uint64_t(failed) << ring::kFailedShift | uint64_t(owing) << ring::kOwingShift;
    word_at(mailbox_.answered).store(number | flags, std::memory_order_release);
  };
  bool failed = later_failed_.exchange(false);
  if (word >> ring::kWorkShift & 1) failed |= !compute(word, Half::kNow, done);
  if (word >> ring::kLaterShift & 1) {
    tell(failed, true);
    const bool later_failed = !compute(word, Half::kLater, done);
    later_failed_.store(later_failed);
    failed |= later_failed;
  }
  tell(failed, false);
  seen_.fetch_add(done.num_rings);
  computing_.store(false);
  std::lock_guard<std::mutex> guard(mutex_);
  totals_.num_rings += done.num_rings;
  totals_.num_pairs += done.num_pairs;
  totals_.weight_bytes += done.weight_bytes;
  totals_.busy_s += done.busy_s;
  totals_.later_s += done.later_s;
}

bool Doorbell::compute(uint64_t word, Half half, DoorbellTotals& done) {
  const int layer = int(word >> ring::kLayerShift) & (ring::kMaxLayers - 1);
  const int num_tokens = int(word >> ring::kTokensShift) & ring::kMaxTokens;
  const int num_topk = int(word >> ring::kTopkShift) & ring::kMaxTopk;
  const uintptr_t box = box_at(mailbox_, uint32_t(word));
  const bool later = half == Half::kLater;
  const auto start = Clock::now();
  std::string problem;
  try {
    Bank& bank = *banks_.at(layer);
    const int d_model = bank.shape().d_model;
    ForwardArgs args{};
    args.x = reinterpret_cast<const unsigned char*>(mailbox_.x + box);
    args.x_dtype = mailbox_.x_dtype;
    args.num_tokens = num_tokens;
    args.x_row_stride = d_model;
    args.ids = reinterpret_cast<const unsigned char*>(mailbox_.ids + box) + later * sizeof(int) * num_tokens * num_topk;
    args.num_topk = num_topk;
    args.ids_row_stride = num_topk;
    args.ids_column_stride = 1;
    args.weights = reinterpret_cast<const unsigned char*>(mailbox_.weights + box);
    args.weights_dtype = DType::kF32;
    args.weights_row_stride = num_topk;
    args.weights_column_stride = 1;
    args.out = reinterpret_cast<unsigned char*>(mailbox_.out + box) + later * sizeof(float) * num_tokens * d_model;
    args.out_dtype = DType::kF32;
    args.out_row_stride = d_model;
    args.cut_panel = later ? 0 : int(word_at(mailbox_.cut + box).load(std::memory_order_relaxed));
    const ForwardCounts counts = bank.forward(args);
    done.num_pairs += counts.num_pairs;
    done.weight_bytes += counts.weight_bytes;
  } catch (const std::out_of_range& missing) {
    problem = std::string("expert ") + missing.what() + " is not in host memory";
  } catch (const std::exception& other) {
    problem = other.what();
  }
  const double took_s = seconds_since(start);
  done.busy_s += took_s;
  if (later) done.later_s += took_s;
  if (problem.empty()) return true;
  std::lock_guard<std::mutex> guard(mutex_);
  error_ = "layer " + std::to_string(layer) + ": " + problem;
  return false;
}

}  // namespace monde
