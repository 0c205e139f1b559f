// SPDX-License-Identifier: Apache-2.0
// Folders, children, limits and environments that go with their owners, for tests of the page file.
// Each leaves the process as it found it.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "paging/file_open.h"
#include "paging/file_store.h"
#include "paging/transfer.h"

namespace hift_test {

using namespace hift;
namespace fs = std::filesystem;
using Failure = std::system_error;

/// A folder on a disk that goes with its owner.
class Folder {
 public:
  Folder() {
    char name[] = "/var/tmp/hift-test-XXXXXX";
    if (::mkdtemp(name) == nullptr) throw_errno(errno, "mkdtemp");
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  bool empty() const { return fs::is_empty(path_); }

 private:
  std::string path_;
};

inline PageTable table_of(std::int64_t elements, std::int64_t page_bytes = 8192) {
  PageTable table({{4, 0}, {4, 0}}, page_bytes);
  table.add_group(elements);
  return table;
}

inline void put(std::byte* record, std::int64_t bytes, int seed) {
  for (std::int64_t i = 0; i < bytes; ++i) record[i] = static_cast<std::byte>(i / 7 * 31 + seed);
}

inline bool holds(FileStore& store, const PageTable& table, std::int64_t p, int seed) {
  const std::int64_t bytes = table.record_bytes(table.page(p));
  Slab wanted(bytes), got(bytes);
  put(wanted.data(), bytes, seed);
  store.read(table, table.page(p), got.data());
  return std::memcmp(wanted.data(), got.data(), static_cast<std::size_t>(bytes)) == 0;
}

inline void keep(FileStore& store, const PageTable& table, std::int64_t p, int seed) {
  const std::int64_t bytes = table.record_bytes(table.page(p));
  Slab record(bytes);
  put(record.data(), bytes, seed);
  store.write(table, table.page(p), record.data());
}

inline int error_of(const std::string& path) {
  try {
    FileStore store(path);
    return 0;
  } catch (const Failure& error) {
    return error.code().value();
  }
}

inline void write_text(const std::string& path, const std::string& words) {
  std::ofstream(path) << words;
}

inline std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline mode_t mode_of(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0 ? status.st_mode & 07777 : 0;
}

/// Runs `body` in a child and returns its status; the body's result is the exit code.
template <class Body>
inline int in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 99;
    hift_test::failures = 0;
    try {
      code = body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "child: %s\n", error.what());
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

/// A child that has `path` open (all of it written) until it is killed.
class Holder {
 public:
  explicit Holder(const std::string& path) {
    int pipe[2];
    if (::pipe(pipe) != 0) throw_errno(errno, "pipe");
    child_ = ::fork();
    if (child_ < 0) throw_errno(errno, "fork");
    if (child_ == 0) {
      FileStore store(path);
      const PageTable table = table_of(5000);
      store.grow(table);
      for (std::int64_t p = 0; p < table.pages(); ++p) keep(store, table, p, 77);
      (void)!::write(pipe[1], "x", 1);
      for (;;) ::pause();
    }
    ::close(pipe[1]);
    char ready;
    if (::read(pipe[0], &ready, 1) != 1) throw_errno(EIO, "the holder did not start");
    ::close(pipe[0]);
  }
  void kill() {
    if (child_ < 0) return;
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
    child_ = -1;
  }
  ~Holder() { kill(); }

 private:
  pid_t child_;
};

class FileSizeLimit {
 public:
  explicit FileSizeLimit(std::int64_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    struct rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(bytes);
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  struct rlimit before_;
};

class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) {
    const char* before = std::getenv(name);
    had_ = before != nullptr;
    if (had_) before_ = before;
    ::setenv(name, value.c_str(), 1);
  }
  ~Environment() { had_ ? ::setenv(name_, before_.c_str(), 1) : ::unsetenv(name_); }

 private:
  const char* name_;
  bool had_;
  std::string before_;
};

}  // namespace hift_test
