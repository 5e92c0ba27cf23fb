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
  last_ring_ = uint32_t(word_at(mailbox_.rung).load(std::memory_order_acquire));
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
  // Nobody rings any more; a forward under way for a GPU that gave up is waited for.
  while (computing_.load(std::memory_order_acquire)) std::this_thread::yield();
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
    const uint64_t word = word_at(mailbox_.rung).load(std::memory_order_acquire);
    if (uint32_t(word) != last_ring_) {
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

void Doorbell::answer(uint64_t word) {
  const uint32_t number = uint32_t(word);
  // Rings without work may be overtaken by the next one; the GPU waits for those with work.
  const int64_t num_rings = uint32_t(number - last_ring_);
  last_ring_ = number;
  DoorbellTotals done{num_rings, 0, 0, 0};
  uint64_t failed = 0;
  if (word >> ring::kWorkShift & 1) {
    const int layer = int(word >> ring::kLayerShift) & (ring::kMaxLayers - 1);
    const int num_tokens = int(word >> ring::kTokensShift) & ring::kMaxTokens;
    const int num_topk = int(word >> ring::kTopkShift) & ring::kMaxTopk;
    computing_.store(true, std::memory_order_release);
    const auto start = Clock::now();
    try {
      Bank& bank = *banks_.at(layer);
      const int d_model = bank.shape().d_model;
      ForwardArgs args{};
      args.x = reinterpret_cast<const unsigned char*>(mailbox_.x);
      args.x_dtype = mailbox_.x_dtype;
      args.num_tokens = num_tokens;
      args.x_row_stride = d_model;
      args.ids = reinterpret_cast<const unsigned char*>(mailbox_.ids);
      args.num_topk = num_topk;
      args.ids_row_stride = num_topk;
      args.ids_column_stride = 1;
      args.weights = reinterpret_cast<const unsigned char*>(mailbox_.weights);
      args.weights_dtype = DType::kF32;
      args.weights_row_stride = num_topk;
      args.weights_column_stride = 1;
      args.out = reinterpret_cast<unsigned char*>(mailbox_.out);
      args.out_dtype = DType::kF32;
      args.out_row_stride = d_model;
      args.cut_panel = int(word_at(mailbox_.cut).load(std::memory_order_relaxed));
      const ForwardCounts counts = bank.forward(args);
      done.num_pairs = counts.num_pairs;
      done.weight_bytes = counts.weight_bytes;
    } catch (const std::out_of_range& missing) {
      std::lock_guard<std::mutex> guard(mutex_);
      error_ = "layer " + std::to_string(layer) + ": expert " + missing.what() + " is not in host memory";
      failed = 1;
    } catch (const std::exception& problem) {
      std::lock_guard<std::mutex> guard(mutex_);
      error_ = "layer " + std::to_string(layer) + ": " + problem.what();
      failed = 1;
    }
    done.busy_s = seconds_since(start);
  }
  word_at(mailbox_.answered).store(number | failed << ring::kFailedShift, std::memory_order_release);
  computing_.store(false, std::memory_order_release);
  seen_.fetch_add(num_rings);
  std::lock_guard<std::mutex> guard(mutex_);
  totals_.num_rings += done.num_rings;
  totals_.num_pairs += done.num_pairs;
  totals_.weight_bytes += done.weight_bytes;
  totals_.busy_s += done.busy_s;
}

}  // namespace monde
