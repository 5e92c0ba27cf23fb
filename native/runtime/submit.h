// Forwards that run while the caller does something else: one thread that leads the pool's steps in order.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "bank.h"

namespace monde {

class Pending {
 public:
  // Blocks until done. Errors: what the forward raised.
  ForwardCounts wait() const;
  bool done() const { return done_.load(std::memory_order_acquire) != 0; }
  // Whether it was done in time. Looks every 20 us: one that spins would take a core from the forward's threads.
  bool wait_for(double seconds_s) const;
  double busy_s() const { return busy_s_; }  // what the forward took; 0 until done

 private:
  friend class SubmitQueue;
  std::atomic<int> done_{0};
  ForwardCounts counts_;
  std::exception_ptr error_;
  double busy_s_ = 0;
};

class SubmitQueue {
 public:
  ~SubmitQueue();
  std::shared_ptr<Pending> submit(std::shared_ptr<Bank> bank, const ForwardArgs& args);

 private:
  struct Job {
    std::shared_ptr<Bank> bank;
    ForwardArgs args;
    std::shared_ptr<Pending> pending;
  };
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool stop_ = false;
  std::thread thread_;
};

// The process's queue, made at the first submit and again in a forked child.
SubmitQueue& submit_queue();

}  // namespace monde
