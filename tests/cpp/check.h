// SPDX-License-Identifier: Apache-2.0
// The tests' own small harness: TEST defines and registers a case, CHECK and CHECK_THROWS report
// what failed and go on, run_tests runs every case or those whose names contain an argument.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "core/check.h"

namespace hift_test {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int failures = 0;

inline bool add(const char* name, void (*body)()) {
  cases().push_back({name, body});
  return true;
}

inline void failed(const char* file, int line, const std::string& what) {
  // A broken order may fail a check for every element; the first ones tell it.
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <class... Parts>
void check(bool ok, const char* file, int line, const char* expression, const Parts&... parts) {
  if (!ok) failed(file, line, hift::text("CHECK(", expression, ") failed. ", parts...));
}

template <class Exception, class Call>
void check_throws(const char* file, int line, const char* expression, const std::string& words,
                  Call call) {
  try {
    call();
    failed(file, line, hift::text(expression, " did not throw"));
  } catch (const Exception& error) {
    if (std::strstr(error.what(), words.c_str()) == nullptr) {
      failed(file, line,
             hift::text(expression, " threw '", error.what(), "', without '", words, "'"));
    }
  } catch (const std::exception& error) {
    failed(file, line, hift::text(expression, " threw another type: ", error.what()));
  }
}

inline int run_tests(int argc, char** argv) {
  int ran = 0;
  for (const Case& c : cases()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(c.name, argv[i]) != nullptr;
    if (!wanted) continue;
    ++ran;
    const int before = failures;
    try {
      c.body();
    } catch (const std::exception& error) {
      failed(c.name, 0, hift::text("ended with an exception: ", error.what()));
    }
    if (failures != before) std::fprintf(stderr, "FAILED %s\n", c.name);
  }
  if (ran == 0) {
    std::fprintf(stderr, "no such test\n");
    return 2;
  }
  std::printf("%d tests, %d failures\n", ran, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace hift_test

#define TEST(name)                                              \
  static void name();                                           \
  static const bool name##_added = hift_test::add(#name, name); \
  static void name()

/// CHECK(expression, anything to print if it fails...)
#define CHECK(...) HIFT_CHECK_(__VA_ARGS__, "")
#define HIFT_CHECK_(expression, ...) \
  hift_test::check(static_cast<bool>(expression), __FILE__, __LINE__, #expression, __VA_ARGS__)

/// CHECK_THROWS(Exception, "words its message has", expression)
#define CHECK_THROWS(Exception, words, ...)                                   \
  hift_test::check_throws<Exception>(__FILE__, __LINE__, #__VA_ARGS__, words, \
                                     [&] { (void)(__VA_ARGS__); })
