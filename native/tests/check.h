// Tests without a framework: a test registers itself, a failed CHECK prints what it saw and the run goes on.
#pragma once
#include <cstdio>
#include <string>

namespace monde::test {

// Every access costs several times more under a sanitizer, most under TSan: repetitions shrink, kinds of cases do not.
#if defined(__SANITIZE_THREAD__)
inline constexpr int kSlowdown = 10;
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr int kSlowdown = 3;
#else
inline constexpr int kSlowdown = 1;
#endif
constexpr int repetitions(int wanted) { return wanted < kSlowdown ? 1 : wanted / kSlowdown; }

struct Registered {
  Registered(const char* name, void (*run)());
};

// Counts and prints a failure; from any thread.
void report_failure(const char* file, int line, const char* condition, const std::string& seen);
bool failed_so_far();

}  // namespace monde::test

#define TEST(name)                                                        \
  static void name();                                                     \
  static const ::monde::test::Registered registered_##name{#name, &name}; \
  static void name()

// `seen` is a std::string, built only on failure.
#define CHECK(condition, seen)                                                               \
  do {                                                                                       \
    if (!(condition)) ::monde::test::report_failure(__FILE__, __LINE__, #condition, (seen)); \
  } while (0)
