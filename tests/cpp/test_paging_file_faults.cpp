// SPDX-License-Identifier: Apache-2.0
// The page file in trouble: no permission, a full disk, truncation, forks, short transfers.
// Each is told with what is wrong, and leaves nothing behind.
#include "file_fixtures.h"

using namespace hift;
using namespace hift_test;

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
  if (sleeper < 0) throw_errno(errno, "fork");
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
