// SPDX-License-Identifier: Apache-2.0
// The page file: who may have it, what happens on a full, truncated or missing one, what is left
// behind, and that bytes come back whatever the system calls do.
#include "file_fixtures.h"

using namespace hift;
using namespace hift_test;

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

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
