#include "submit.h"

#include <unistd.h>

#include <chrono>

namespace monde {

ForwardCounts Pending::wait() const {
  while (!done()) done_.wait(0, std::memory_order_acquire);
  if (error_) std::rethrow_exception(error_);
  return counts_;
}

bool Pending::wait_for(double seconds_s) const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds_s);
  while (!done()) {
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

std::shared_ptr<Pending> SubmitQueue::submit(std::shared_ptr<Bank> bank, const ForwardArgs& args) {
  auto pending = std::make_shared<Pending>();
  {
    std::lock_guard<std::mutex> guard(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    jobs_.push_back({std::move(bank), args, pending});
  }
  changed_.notify_one();
  return pending;
}

void SubmitQueue::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    const auto start = std::chrono::steady_clock::now();
    try {
      job.pending->counts_ = job.bank->forward(job.args);
    } catch (...) {
      job.pending->error_ = std::current_exception();
    }
    job.pending->busy_s_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // Before the waiter knows: dropping the last reference may need the interpreter, which may leave once all is done.
    job.bank.reset();
    job.pending->done_.store(1, std::memory_order_release);
    job.pending->done_.notify_all();
    job = {};
    lock.lock();
  }
}

SubmitQueue::~SubmitQueue() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    stop_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
}

SubmitQueue& submit_queue() {
  // Never destroyed: in a forked child the parent's thread cannot be joined, and at exit jobs may still run. No lock:
  // a fork while another thread holds it would leave it locked in the child for ever.
  struct Owned {
    const pid_t owner = getpid();
    SubmitQueue queue;
  };
  static std::atomic<Owned*> current{nullptr};
  Owned* owned = current.load();
  if (owned && owned->owner == getpid()) return owned->queue;
  auto renewed = std::make_unique<Owned>();
  return (current.compare_exchange_strong(owned, renewed.get()) ? renewed.release() : owned)->queue;
}

}  // namespace monde
