// Forwards in flight: many at once, awaited from anywhere, errors where they are awaited.
#include <atomic>
#include <stdexcept>

#include "../runtime/submit.h"
#include "check.h"
#include "problem.h"

namespace monde::test {
namespace {

constexpr int kMany = 200;

struct Fixture {
  Problem problem{{3, 30, 40, true, false, DType::kBF16, {ActivationKind::kSilu, 0, 0}}, 4, 2, DType::kF32, 1};
  std::shared_ptr<Bank> bank = std::make_shared<Bank>(problem.shape, *isas()[0], make_pool({0, 0}));
  std::vector<unsigned char> wanted;
  std::vector<Array> outs;

  Fixture() : outs(repetitions(kMany), problem.make_out(DType::kF32)) {
    problem.load_into(*bank);
    wanted = problem.run(*bank, DType::kF32).bytes;
  }
};

}  // namespace

TEST(submit_many_outstanding) {
  Fixture f;
  SubmitQueue queue;
  std::vector<std::shared_ptr<Pending>> pending;
  for (Array& out : f.outs) pending.push_back(queue.submit(f.bank, f.problem.args(out)));
  // Latest first: the order of waiting is free. A second wait returns the same.
  for (size_t i = pending.size(); i-- > 0;) {
    const ForwardCounts counts = pending[i]->wait();
    CHECK(pending[i]->done() && counts.num_pairs > 0 && pending[i]->wait().num_pairs == counts.num_pairs, "counts");
    CHECK(f.outs[i].bytes == f.wanted, "forward " + std::to_string(i));
  }
  CHECK(f.bank.use_count() == 1, "a finished forward still holds its bank");
}

TEST(submit_from_and_wait_in_several_threads) {
  Fixture f;
  SubmitQueue queue;
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (size_t i = caller; i < f.outs.size(); i += 4) {
        const auto pending = queue.submit(f.bank, f.problem.args(f.outs[i]));
        std::thread waiter([&] { CHECK(pending->wait().num_pairs > 0, "waiter"); });
        pending->wait();
        CHECK(f.outs[i].bytes == f.wanted, "forward " + std::to_string(i));
        waiter.join();
      }
    });
  for (std::thread& caller : callers) caller.join();
}

// The error of one forward reaches everybody who waits for it, and only them.
TEST(submit_error_travels_to_wait) {
  Fixture f;
  Problem wrong = f.problem;
  wrong.ids_TK[0] = 2;  // never loaded
  wrong.weights_TK.set(0, 1.f);
  SubmitQueue queue;
  Array out = f.problem.make_out(DType::kF32);
  for (int round = 0; round < repetitions(20); ++round) {
    const auto good = queue.submit(f.bank, f.problem.args(f.outs[0]));
    const auto bad = queue.submit(f.bank, wrong.args(out));
    const auto after = queue.submit(f.bank, f.problem.args(f.outs[1]));
    std::atomic<int> raised{0};
    const auto wait = [&] {
      try {
        bad->wait();
      } catch (const std::out_of_range& error) {
        raised += std::string(error.what()) == "2";
      }
    };
    std::vector<std::thread> waiters;
    for (int i = 0; i < 3; ++i) waiters.emplace_back(wait);
    for (std::thread& waiter : waiters) waiter.join();
    wait();
    CHECK(raised == 4, std::to_string(raised) + " of 4 waits raised");
    good->wait();
    after->wait();
    CHECK(f.outs[0].bytes == f.wanted && f.outs[1].bytes == f.wanted, "forwards beside the bad one");
  }
}

// A queue that goes away finishes what it was given.
TEST(submit_queue_finishes_before_it_goes) {
  Fixture f;
  std::vector<std::shared_ptr<Pending>> pending;
  {
    SubmitQueue queue;
    for (Array& out : f.outs) pending.push_back(queue.submit(f.bank, f.problem.args(out)));
  }
  for (size_t i = 0; i < pending.size(); ++i)
    CHECK(pending[i]->done() && f.outs[i].bytes == f.wanted, "forward " + std::to_string(i));
  SubmitQueue unused;
}

}  // namespace monde::test
