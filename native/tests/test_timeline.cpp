// Spans of forwards and phases: complete while recording, none otherwise, and starting and stopping disturb nobody.
#include <atomic>
#include <string>
#include <thread>

#include "../runtime/timeline.h"
#include "check.h"
#include "problem.h"

namespace monde::test {
namespace {

Problem problem() {
  return {{3, 30, 40, true, false, DType::kBF16, {ActivationKind::kSilu, 0, 0}}, 4, 2, DType::kF32, 1};
}

int count(const timeline::Recorded& recorded, const std::string& name) {
  int found = 0;
  for (const timeline::Span& span : recorded.spans) found += span.name == name;
  return found;
}

}  // namespace

TEST(timeline_records_forwards_and_phases) {
  Problem p = problem();
  Bank bank(p.shape, *isas()[0], make_pool({0, 0}));
  p.load_into(bank);
  const auto before = p.run(bank, DType::kF32).bytes;
  timeline::start(1000);
  CHECK(timeline::on(), "not on");
  for (int i = 0; i < 5; ++i) CHECK(p.run(bank, DType::kF32).bytes == before, "another answer while recording");
  const timeline::Recorded recorded = timeline::stop();
  CHECK(!timeline::on() && recorded.num_dropped == 0, std::to_string(recorded.num_dropped));
  CHECK(count(recorded, "forward") == 5, std::to_string(count(recorded, "forward")));
  CHECK(count(recorded, "gate_up") >= 5 && count(recorded, "down") >= 5, "phases");
  int64_t num_units = 0;
  for (const timeline::Span& span : recorded.spans) {
    CHECK(span.start_ns > 0 && span.end_ns >= span.start_ns, std::string(span.name) + " ends before it starts");
    const bool is_forward = span.thread < 0;
    CHECK(is_forward == (span.bank == reinterpret_cast<uintptr_t>(&bank)), "whose span it is");
    CHECK(!is_forward || (span.num_tokens == 4 && span.num_pairs > 0 && span.weight_bytes > 0), "what it did");
    if (!is_forward) num_units += span.num_units;
  }
  CHECK(num_units % 5 == 0 && num_units > 0, std::to_string(num_units));
  p.run(bank, DType::kF32);
  CHECK(timeline::stop().spans.empty(), "spans while off");
}

TEST(timeline_drops_what_does_not_fit) {
  Problem p = problem();
  Bank bank(p.shape, *isas()[0], make_pool({0, 0}));
  p.load_into(bank);
  timeline::start(3);
  for (int i = 0; i < 4; ++i) p.run(bank, DType::kF32);
  const timeline::Recorded recorded = timeline::stop();
  CHECK(recorded.spans.size() == 3, std::to_string(recorded.spans.size()));
  CHECK(recorded.num_dropped >= 4 * 3 - 3, std::to_string(recorded.num_dropped));
}

TEST(timeline_starts_and_stops_while_forwards_run) {
  std::atomic<bool> stop{false};
  std::thread workers[2];
  for (std::thread& worker : workers)
    worker = std::thread([&stop] {
      Problem p = problem();
      Bank bank(p.shape, *isas()[0], make_pool({0, 0}));
      p.load_into(bank);
      while (!stop.load()) p.run(bank, DType::kF32);
    });
  size_t num_spans = 0;
  for (int i = 0; i < repetitions(300) || num_spans == 0; ++i) {
    timeline::start(64);
    std::this_thread::yield();
    for (const timeline::Span& span : timeline::stop().spans) {
      CHECK(span.name != nullptr && span.end_ns >= span.start_ns, "a span that was not written");
      ++num_spans;
    }
  }
  stop.store(true);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace monde::test
