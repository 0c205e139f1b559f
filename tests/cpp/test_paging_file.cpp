// SPDX-License-Identifier: Apache-2.0
// The page file: who may have it, what happens on a full, truncated or missing one, what is left
// behind, and that bytes come back whatever the system calls do.
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

using namespace hift;
namespace fs = std::filesystem;
using Failure = std::system_error;

namespace {

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

PageTable table_of(std::int64_t elements, std::int64_t page_bytes = 8192) {
  PageTable table({{4, 0}, {4, 0}}, page_bytes);
  table.add_group(elements);
  return table;
}

void put(std::byte* record, std::int64_t bytes, int seed) {
  for (std::int64_t i = 0; i < bytes; ++i) record[i] = static_cast<std::byte>(i / 7 * 31 + seed);
}

bool holds(FileStore& store, const PageTable& table, std::int64_t p, int seed) {
  const std::int64_t bytes = table.record_bytes(table.page(p));
  Slab wanted(bytes), got(bytes);
  put(wanted.data(), bytes, seed);
  store.read(table, table.page(p), got.data());
  return std::memcmp(wanted.data(), got.data(), static_cast<std::size_t>(bytes)) == 0;
}

void keep(FileStore& store, const PageTable& table, std::int64_t p, int seed) {
  const std::int64_t bytes = table.record_bytes(table.page(p));
  Slab record(bytes);
  put(record.data(), bytes, seed);
  store.write(table, table.page(p), record.data());
}

int error_of(const std::string& path) {
  try {
    FileStore store(path);
    return 0;
  } catch (const Failure& error) {
    return error.code().value();
  }
}

void write_text(const std::string& path, const std::string& words) { std::ofstream(path) << words; }

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

mode_t mode_of(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0 ? status.st_mode & 07777 : 0;
}

/// Runs `body` in a child and returns its status; the body's result is the exit code.
template <class Body>
int in_child(Body body) {
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

}  // namespace

TEST(bytes_come_back) {
  const Folder folder;
  for (const std::string& path : {std::string(), folder / "pages"}) {
    FileStore store(path);
    PageTable table({{4, 0}, {2, 0}, {1, 0}}, 10000);
    table.add_group(7001);
    store.grow(table);
    table.add_group(300);
    store.grow(table);
    CHECK(store.bytes() == kFileHeaderBytes + table.total_record_bytes());
    CHECK(store.address(table, table.page(0), 0) == nullptr);
    std::vector<std::int64_t> order(table.pages());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    for (const std::int64_t p : order) keep(store, table, p, static_cast<int>(p) + 1);
    for (const std::int64_t p : order) CHECK(holds(store, table, p, static_cast<int>(p) + 1));
    if (!path.empty()) {
      CHECK(fs::file_size(path) == static_cast<std::uintmax_t>(store.bytes()));
      CHECK(store.description().rfind("disk:" + path, 0) == 0, store.description());
    }
    const bool buffered = store.description().find("buffered") != std::string::npos;
    CHECK(buffered == !store.direct() && store.why_buffered().empty() == store.direct());
  }
}

TEST(direct_where_the_file_system_allows) {
  const Folder folder;
  const std::string probe = folder / "probe";
  const int fd = ::open(probe.c_str(), O_RDWR | O_CREAT | O_DIRECT, 0600);
  const bool allowed = fd >= 0;
  if (fd >= 0) ::close(fd);
  const FileStore store(folder / "pages");
  CHECK(store.direct() == allowed, store.description());
}

TEST(buffered_is_reported_with_its_reason) {
  if (::access("/dev/shm", W_OK) != 0) return;
  const std::string path = text("/dev/shm/hift-test-", ::getpid());
  {
    FileStore store(path);
    const PageTable table = table_of(5000);
    store.grow(table);
    CHECK(!store.direct() && store.why_buffered().find("memory") != std::string::npos);
    CHECK(store.description().find("(buffered: ") != std::string::npos, store.description());
    keep(store, table, 2, 5);
    CHECK(holds(store, table, 2, 5));
    struct stat status;
    ::stat(path.c_str(), &status);
    CHECK(status.st_size == store.bytes());
  }
  ::unlink(path.c_str());
}

TEST(scratch_has_no_name) {
  const Folder folder;
  const Environment tmpdir("TMPDIR", folder.path());
  FileStore store("");
  CHECK(store.description().find(folder.path()) != std::string::npos, store.description());
  CHECK(folder.empty(), "a scratch file shows in its folder");
  const PageTable table = table_of(5000);
  store.grow(table);
  keep(store, table, 0, 1);
  CHECK(folder.empty());
  const int fd = create_unlinked(folder.path());
  CHECK(fd >= 0 && folder.empty(), "the fallback shows in its folder");
  struct stat status;
  CHECK(::fstat(fd, &status) == 0 && status.st_nlink == 0 && (status.st_mode & 0777) == 0600);
  ::close(fd);
}

TEST(scratch_never_goes_to_memory) {
  const Folder folder;
  if (::access("/dev/shm", W_OK) == 0) {
    const OpenFile file = open_scratch({"/dev/shm", folder.path()});
    CHECK(file.name.find(folder.path()) != std::string::npos, file.name);
    CHECK_THROWS(Failure, "/dev/shm (tmpfs)", open_scratch({"/dev/shm"}));
  }
  CHECK_THROWS(Failure, "store=\"disk:PATH\"", open_scratch({folder / "missing"}));
  CHECK_THROWS(Failure, (folder / "missing") + " (No such file",
               open_scratch({folder / "missing"}));
  const Environment tmpdir("TMPDIR", folder / "missing");
  const std::vector<std::string> folders = scratch_folders();
  CHECK(folders == std::vector<std::string>({folder / "missing", "/var/tmp", "/tmp", "."}));
  FileStore store("");
  CHECK(store.description().find("/var/tmp") != std::string::npos, store.description());
}

TEST(scratch_is_gone_after_a_kill) {
  const Folder folder;
  {
    const Environment tmpdir("TMPDIR", folder.path());
    Holder holder("");
    CHECK(folder.empty());
    holder.kill();
  }
  CHECK(folder.empty());
}

TEST(a_named_file_stays_and_is_private) {
  const Folder folder;
  const mode_t before = ::umask(0);
  for (const mode_t mask : {0000, 0777, 0022}) {
    const std::string path = folder / text("pages-", mask);
    ::umask(mask);
    {
      FileStore store(path);
    }
    CHECK(mode_of(path) == 0600, "umask ", mask, " gives mode ", mode_of(path));
    CHECK(fs::file_size(path) == 4096);
  }
  ::umask(before);
  FileStore scratch("");
}

TEST(a_leftover_is_replaced) {
  const Folder folder;
  const std::string path = folder / "pages";
  Holder holder(path);
  const auto size = fs::file_size(path);
  CHECK(size > 40000);
  CHECK_THROWS(Failure, "in use", FileStore(path));
  CHECK(error_of(path) == EBUSY);
  CHECK(fs::file_size(path) == size, "a refused file was changed");
  holder.kill();
  ::chmod(path.c_str(), 0644);
  FileStore store(path);
  CHECK(fs::file_size(path) == 4096 && mode_of(path) == 0600);
  const PageTable table = table_of(5000);
  store.grow(table);
  Slab record(table.max_record_bytes());
  store.read(table, table.page(0), record.data());
  CHECK(std::all_of(record.data(), record.data() + 8192,
                    [](std::byte b) { return b == std::byte{0}; }),
        "the dead process's bytes are still there");
}

TEST(one_file_one_store) {
  const Folder folder;
  const std::string path = folder / "pages";
  auto store = std::make_unique<FileStore>(path);
  CHECK_THROWS(Failure, "in use", FileStore(path));
  store.reset();
  FileStore again(path);
}

TEST(what_is_not_ours_is_refused) {
  const Folder folder;
  const std::string path = folder / "x";
  for (const std::string& words :
       {std::string(), std::string("my thesis"), std::string(9000, '1')}) {
    write_text(path, words);
    CHECK_THROWS(Failure, "not a hift page file", FileStore(path));
    CHECK(error_of(path) == EEXIST && text_of(path) == words);
  }
  fs::remove(path);
  // Our header under another version.
  std::string header(file_header(), kFileHeaderBytes);
  header[std::strlen(file_header()) + 1] = '0';
  write_text(path, header + "more");
  CHECK_THROWS(Failure, "this version", FileStore(path));
  CHECK(text_of(path) == header + "more");
  fs::remove(path);

  write_text(folder / "target", std::string(file_header(), kFileHeaderBytes));
  fs::create_symlink(folder / "target", path);
  CHECK_THROWS(Failure, "symbolic link", FileStore(path));
  CHECK(error_of(path) == ELOOP && fs::file_size(folder / "target") == 4096);
  fs::remove(path);
  fs::create_symlink(folder / "nowhere", path);
  CHECK_THROWS(Failure, "symbolic link", FileStore(path));
  CHECK(!fs::exists(folder / "nowhere"), "a link was followed");
  fs::remove(path);

  fs::create_directory(path);
  CHECK_THROWS(Failure, "directory", FileStore(path));
  CHECK_THROWS(Failure, "directory", FileStore(path + "/"));
  CHECK(error_of(path) == EISDIR && fs::is_directory(path));
  fs::remove(path);

  ::mkfifo(path.c_str(), 0600);
  CHECK_THROWS(Failure, "not a regular file", FileStore(path));
  fs::remove(path);

  {
    FileStore store(path);
  }
  fs::create_hard_link(path, folder / "second");
  CHECK_THROWS(Failure, "second name", FileStore(path));
  CHECK_THROWS(Failure, "does not exist", FileStore(folder / "missing/x"));
  CHECK(error_of(folder / "missing/x") == ENOENT);
  CHECK_THROWS(Failure, "not a folder", FileStore(path + "/x"));
}

TEST(no_permission) {
  const Folder folder;
  const std::string path = folder / "pages";
  if (::geteuid() == 0) {
    {
      FileStore store(path);
    }
    ::chmod(folder.path().c_str(), 0755);
    const int status = in_child([&] {
      if (::setgid(65534) != 0 || ::setuid(65534) != 0) return 98;
      int code = 0;
      CHECK_THROWS(Failure, "no permission to open", FileStore(path));
      CHECK_THROWS(Failure, "no permission to create", FileStore(folder / "other"));
      code += error_of(folder / "other") != EACCES;
      return code + hift_test::failures;
    });
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
    CHECK(::chown(path.c_str(), 65534, 65534) == 0);
    CHECK_THROWS(Failure, "belongs to user 65534", FileStore(path));
  } else {
    ::chmod(folder.path().c_str(), 0555);
    CHECK_THROWS(Failure, "no permission", FileStore(path));
    CHECK(error_of(path) == EACCES);
    ::chmod(folder.path().c_str(), 0755);
  }
}

TEST(a_full_disk_changes_nothing) {
  const Folder folder;
  const std::string path = folder / "pages";
  FileStore store(path);
  PageTable table = table_of(5000);
  store.grow(table);
  const std::int64_t had = store.bytes();
  for (std::int64_t p = 0; p < table.pages(); ++p) keep(store, table, p, 3);
  PageTable grown = table;
  grown.add_group(100000);
  {
    // SIGXFSZ keeps its deadly default: the limit must be seen before it is hit.
    const FileSizeLimit limit(had + 8192);
    CHECK_THROWS(Failure, "cannot reserve", store.grow(grown));
    CHECK_THROWS(Failure, text(grown.total_record_bytes() - table.total_record_bytes()),
                 store.grow(grown));
    CHECK_THROWS(Failure, "bytes are free", store.grow(grown));
    try {
      store.grow(grown);
    } catch (const Failure& error) {
      CHECK(error.code().value() == EFBIG);
    }
  }
  // More than any disk has, so that fallocate itself refuses.
  PageTable huge({{4, 0}, {4, 0}}, std::int64_t{1} << 50);
  huge.add_group(std::int64_t{1} << 42);
  CHECK_THROWS(Failure, "cannot reserve", store.grow(huge));
  CHECK(store.bytes() == had && fs::file_size(path) == static_cast<std::uintmax_t>(had));
  for (std::int64_t p = 0; p < table.pages(); ++p) CHECK(holds(store, table, p, 3));
  CHECK_THROWS(std::invalid_argument, "not grown", keep(store, grown, grown.pages() - 1, 1));
  store.grow(grown);
  keep(store, grown, grown.pages() - 1, 4);
  CHECK(holds(store, grown, grown.pages() - 1, 4) && holds(store, table, 1, 3));
}

TEST(a_refused_file_is_not_left_behind) {
  const Folder folder;
  const auto ignored = ::signal(SIGXFSZ, SIG_IGN);
  {
    const FileSizeLimit limit(100);
    CHECK_THROWS(Failure, "first block", FileStore(folder / "pages"));
    CHECK(folder.empty());
  }
  ::signal(SIGXFSZ, ignored);
}

TEST(truncated_under_us) {
  const Folder folder;
  const std::string path = folder / "pages";
  FileStore store(path);
  const PageTable table = table_of(5000);
  store.grow(table);
  for (std::int64_t p = 0; p < table.pages(); ++p) keep(store, table, p, 9);
  const std::int64_t left = kFileHeaderBytes + table.page(2).offset + 512;
  CHECK(::truncate(path.c_str(), left) == 0);
  const auto read = [&](std::int64_t p) {
    Slab record(table.max_record_bytes());
    store.read(table, table.page(p), record.data());
  };
  CHECK(holds(store, table, 0, 9) && holds(store, table, 1, 9), "what is left is good");
  CHECK_THROWS(Failure, "truncated under us", read(2));
  CHECK_THROWS(Failure, path, read(3));
  CHECK_THROWS(Failure, text("byte ", kFileHeaderBytes + table.page(3).offset), read(3));
  CHECK_THROWS(Failure, text("the file has ", left), read(3));
  // A write may not make it long again: the pages between would read as zeros.
  CHECK_THROWS(Failure, "truncated under us", keep(store, table, 4, 1));
  CHECK(fs::file_size(path) == static_cast<std::uintmax_t>(left));
  PageTable grown = table;
  grown.add_group(1000);
  CHECK_THROWS(Failure, "truncated under us", store.grow(grown));
  CHECK(fs::file_size(path) == static_cast<std::uintmax_t>(left));
  keep(store, table, 1, 10);
  CHECK(holds(store, table, 1, 10));
}

TEST(misaligned_records_are_refused) {
  FileStore store("");
  const PageTable table = table_of(1000);
  store.grow(table);
  Slab record(3 * 8192);
  if (store.direct()) {
    CHECK_THROWS(std::invalid_argument, "aligned",
                 store.read(table, table.page(0), record.data() + 8));
  }
  PageTable odd({{4, 0}}, 4096, 512);
  odd.add_group(100000);
  CHECK_THROWS(std::invalid_argument, "512", store.grow(odd));
}

TEST(a_forked_child_leaves_the_file_alone) {
  const Folder folder;
  const std::string path = folder / "pages";
  auto store = std::make_unique<FileStore>(path);
  auto scratch = std::make_unique<FileStore>("");
  const PageTable table = table_of(5000);
  store->grow(table);
  scratch->grow(table);
  keep(*store, table, 1, 6);
  keep(*scratch, table, 1, 6);
  int go[2];
  CHECK(::pipe(go) == 0);
  const int status = in_child([&] {
    CHECK_THROWS(std::logic_error, "forked child", keep(*store, table, 1, 7));
    CHECK_THROWS(std::logic_error, "forked child", holds(*store, table, 1, 7));
    PageTable grown = table;
    grown.add_group(1000);
    CHECK_THROWS(std::logic_error, "forked child", store->grow(grown));
    store.reset();
    scratch.reset();
    return hift_test::failures;
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
  CHECK(holds(*store, table, 1, 6) && holds(*scratch, table, 1, 6), "the child changed the file");
  CHECK_THROWS(Failure, "in use", FileStore(path));
  // A child that lives on keeps neither the name locked nor the scratch's space.
  const pid_t sleeper = ::fork();
  if (sleeper == 0) {
    char c;
    ::close(go[1]);
    (void)!::read(go[0], &c, 1);
    ::_exit(0);
  }
  store.reset();
  FileStore again(path);
  const std::string open = text("/proc/", sleeper, "/fd");
  scratch.reset();
  for (const auto& entry : fs::directory_iterator(open)) {
    struct stat entry_status;
    if (::stat(entry.path().c_str(), &entry_status) != 0 || !S_ISREG(entry_status.st_mode))
      continue;
    if (entry_status.st_nlink == 0) CHECK(entry_status.st_size == 0, "the child keeps the scratch");
  }
  ::close(go[1]);
  ::close(go[0]);
  ::kill(sleeper, SIGKILL);
  ::waitpid(sleeper, nullptr, 0);
}

TEST(children_that_exec_get_no_descriptor) {
  const Folder folder;
  FileStore store(folder / "pages"), scratch("");
  int marked = 0, open = 0;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    const int fd = std::atoi(entry.path().filename().c_str());
    struct stat status;
    if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size != 4096) continue;
    ++open;
    marked += (::fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0;
  }
  CHECK(open >= 2 && marked == open, marked, " of ", open);
}

TEST(transfers_are_whole) {
  std::mt19937 random(5);
  for (int round = 0; round < 2000; ++round) {
    const std::int64_t bytes = (1 + random() % 6) * kFileBlock;
    std::vector<char> moved(bytes, 0);
    const std::int64_t total = transfer(bytes, [&](std::int64_t done) -> ssize_t {
      if (done % kFileBlock != 0) {
        CHECK(false, "goes on at ", done);
      }
      errno = EINTR;
      if (random() % 3 == 0) return -1;
      // At least a block: less is progress only at a file's end.
      const std::int64_t n = std::min<std::int64_t>(bytes - done, kFileBlock + random() % 9000);
      std::fill_n(moved.begin() + done, n, 1);
      return n;
    });
    CHECK(total == bytes && std::count(moved.begin(), moved.end(), 1) == bytes);
  }
  errno = 0;
  CHECK(transfer(8192,
                 [](std::int64_t) -> ssize_t {
                   errno = EIO;
                   return -1;
                 }) == 0 &&
        errno == EIO);
  errno = EIO;
  CHECK(transfer(8192, [](std::int64_t) -> ssize_t { return 0; }) == 0 && errno == 0);
  // The last block is there in part: that much is reported, once.
  CHECK(transfer(8192, [](std::int64_t done) -> ssize_t { return 5000 - done; }) == 5000 &&
        errno == 0);
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
