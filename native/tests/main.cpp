// Runs every test, or those whose name contains the argument. Exit status 1: something failed, or nothing ran.
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "../isa/isa.h"
#include "check.h"

#if defined(__SANITIZE_THREAD__)
// Stop at the first race, as the other sanitizers do, and let forked children exit without a second of sleep.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "halt_on_error=1:atexit_sleep_ms=0";
}
#endif

namespace monde::test {
namespace {

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

std::atomic<int> g_failures{0};
constexpr int kMaxPrinted = 20;

}  // namespace

Registered::Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }

void report_failure(const char* file, int line, const char* condition, const std::string& seen) {
  if (g_failures.fetch_add(1) < kMaxPrinted)
    std::fprintf(stderr, "%s:%d: failed: %s: %s\n", file, line, condition, seen.c_str());
}

bool failed_so_far() { return g_failures.load() != 0; }

}  // namespace monde::test

int main(int argc, char** argv) {
  using namespace monde::test;
  const monde::Isa* isas[monde::kMaxIsas];
  const int num_isas = monde::available_isas(isas);
  std::printf("instruction sets:");
  for (int i = 0; i < num_isas; ++i) std::printf(" %s", isas[i]->name);
  std::printf(" (%d of %d)\n", num_isas, monde::kMaxIsas);
  int num_run = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    const int failures_before = g_failures.load();
    const auto start = std::chrono::steady_clock::now();
    test.run();
    const double elapsed_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s %-50s %6.2f s\n", g_failures.load() == failures_before ? "ok  " : "FAIL", test.name, elapsed_s);
    std::fflush(stdout);
    ++num_run;
  }
  std::printf("%d tests, %d failed checks\n", num_run, g_failures.load());
  return g_failures.load() || num_run == 0;
}
