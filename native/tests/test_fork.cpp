// A forked child has none of the parent's threads: it must start its own and never touch a lock somebody else held.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "../runtime/submit.h"
#include "check.h"
#include "problem.h"

namespace monde::test {
namespace {

constexpr unsigned kDeadlineS = 60;

// ThreadSanitizer keeps the parent's threads in its books and dies when a child's new thread gets the handle of one of
// them. Under it only forks of a process without other threads are possible; the other sanitizers run all of these.
#if defined(__SANITIZE_THREAD__)
constexpr bool kMayForkWithThreads = false;
#else
constexpr bool kMayForkWithThreads = true;
#endif

// Runs `body` in a child and says whether it returned true before the deadline.
template <class Body>
bool succeeds_in_child(Body body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kDeadlineS);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

struct Fixture {
  Problem problem{{3, 64, 200, true, true, DType::kF32, {ActivationKind::kSilu, 0, 0}}, 20, 2, DType::kF32, 1};
  std::shared_ptr<Pool> pool = make_pool({0, 0, 1});
  std::shared_ptr<Bank> bank = std::make_shared<Bank>(problem.shape, *isas()[0], pool);
  std::vector<unsigned char> wanted;

  Fixture() {
    problem.load_into(*bank);
    wanted = problem.run(*bank, DType::kF32).bytes;
  }
  bool answers() { return problem.run(*bank, DType::kF32).bytes == wanted; }
};

}  // namespace

TEST(fork_child_computes) {
  if (!kMayForkWithThreads) return;
  Fixture f;
  CHECK(succeeds_in_child([&] { return f.answers() && f.answers(); }), "the child's forward");
  CHECK(f.answers(), "the parent's forward after the fork");
}

// Several threads of the child take the first step of a pool that the parent made: all must meet in one new state.
TEST(fork_child_renews_once) {
  for (int round = 0; round < repetitions(100); ++round) {
    const auto pool = make_pool({0, 0, 1});
    CHECK(succeeds_in_child([&] {
            int steps = 0;  // plain memory: the lease is what keeps callers apart
            const auto count = [](void* context, int, int) { ++*static_cast<int*>(context); };
            const int begin[] = {0, 1, 1, 1};
            const Phase phase{count, 1, begin};
            std::vector<std::thread> callers;
            for (int caller = 0; caller < 4; ++caller)
              callers.emplace_back([&] { Pool::Lease(*pool).run(&phase, 1, &steps); });
            for (std::thread& caller : callers) caller.join();
            return steps == 4;
          }),
          "four callers in a child");
  }
}

TEST(fork_child_computes_for_several_callers) {
  if (!kMayForkWithThreads) return;
  Fixture f;
  for (int round = 0; round < repetitions(20); ++round)
    CHECK(succeeds_in_child([&] {
            std::atomic<int> right{0};
            std::vector<std::thread> callers;
            for (int caller = 0; caller < 4; ++caller) callers.emplace_back([&] { right += f.answers(); });
            for (std::thread& caller : callers) caller.join();
            return right == 4;
          }),
          "four callers in a child");
}

// The fork falls into steps of another thread, whose lease the child inherits locked.
TEST(fork_during_a_step) {
  if (!kMayForkWithThreads) return;
  Fixture f;
  std::atomic<bool> stop{false};
  // No allocation in this loop: AddressSanitizer cannot fork while another thread holds its allocator's lock.
  Array out = f.problem.make_out(DType::kF32);
  std::thread caller([&] {
    while (!stop) f.bank->forward(f.problem.args(out));
  });
  for (int round = 0; round < repetitions(20); ++round)
    CHECK(succeeds_in_child([&] { return f.answers(); }), "a child of a busy parent");
  stop = true;
  caller.join();
  CHECK(out.bytes == f.wanted, "the parent's answer");
}

// A child that only drops the pool, or forks again, must not wait for threads that are not there.
TEST(fork_child_lets_go) {
  if (!kMayForkWithThreads) return;
  Fixture f;
  CHECK(succeeds_in_child([&] {
          f.bank.reset();
          f.pool.reset();
          return true;
        }),
        "a child that drops the pool unused");
  CHECK(succeeds_in_child([&] {
          const bool right = f.answers() && succeeds_in_child([&] { return f.answers(); });
          f.bank.reset();
          f.pool.reset();
          return right;
        }),
        "a child of a child");
}

TEST(fork_child_submits) {
  if (!kMayForkWithThreads) return;
  Fixture f;
  const auto submits = [&] {
    Array out = f.problem.make_out(DType::kF32);
    submit_queue().submit(f.bank, f.problem.args(out))->wait();
    return out.bytes == f.wanted;
  };
  CHECK(submits(), "the parent");
  CHECK(succeeds_in_child(submits), "the child");
  CHECK(submits(), "the parent again");
}

}  // namespace monde::test
