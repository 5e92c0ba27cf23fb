#include "timeline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>

namespace monde::timeline {
namespace {

struct Recording {
  explicit Recording(size_t capacity) : spans(capacity) {}
  std::vector<Span> spans;
  std::atomic<size_t> next{0};
};

std::mutex g_mutex;
std::unique_ptr<Recording> g_recording;  // guarded by g_mutex
std::atomic<Recording*> g_current{nullptr};
std::atomic<int> g_writers{0};

}  // namespace

void start(size_t capacity) {
  stop();
  std::lock_guard<std::mutex> guard(g_mutex);
  g_recording = std::make_unique<Recording>(capacity);
  g_current.store(g_recording.get());
}

Recorded stop() {
  std::lock_guard<std::mutex> guard(g_mutex);
  g_current.store(nullptr);
  while (g_writers.load() != 0) {  // who saw the recording finishes its span, nanoseconds later
  }
  if (!g_recording) return {};
  const size_t asked = g_recording->next.load(), kept = std::min(asked, g_recording->spans.size());
  Recorded recorded{std::move(g_recording->spans), asked - kept};
  recorded.spans.resize(kept);
  g_recording.reset();
  return recorded;
}

bool on() { return g_current.load(std::memory_order_relaxed) != nullptr; }

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void add(const Span& span) {
  g_writers.fetch_add(1);
  if (Recording* const recording = g_current.load()) {
    const size_t place = recording->next.fetch_add(1);
    if (place < recording->spans.size()) recording->spans[place] = span;
  }
  g_writers.fetch_sub(1);
}

}  // namespace monde::timeline
