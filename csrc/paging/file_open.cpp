// SPDX-License-Identifier: Apache-2.0
// Opening page files. The lock and the header decide whether a file that exists is a leftover; both
// are looked at through one descriptor that followed no link.
#include "paging/file_open.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <random>

#include "core/check.h"

namespace hift {
namespace {

constexpr char kMagic[] = "hift page file";
constexpr char kVersion = '1';

struct alignas(kFileHeaderBytes) Header {
  char bytes[kFileHeaderBytes];
};

int open_retrying(const char* path, int flags) {
  int fd;
  do {
    fd = ::open(path, flags | O_CLOEXEC, 0600);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::string parent_of(const std::string& path) {
  const auto slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

[[noreturn]] void refuse(int error, const std::string& path, const std::string& why) {
  throw_errno(error, "cannot use '", path, "' as a page file: ", why,
              " (pass another store=\"disk:PATH\", or store=\"disk\" for an unlinked file)");
}

[[noreturn]] void refuse_to_create(int error, const std::string& path) {
  struct stat status;
  if (error == ENOENT) refuse(error, path, "its folder '" + parent_of(path) + "' does not exist");
  if (error == ENOTDIR) refuse(error, path, "'" + parent_of(path) + "' is not a folder");
  if (error == EISDIR || (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode))) {
    refuse(EISDIR, path, "it is a directory");
  }
  if (error == EACCES || error == EPERM) {
    refuse(error, path, "no permission to create a file in '" + parent_of(path) + "'");
  }
  refuse(error, path, "it cannot be created");
}

/// Checks that a file that exists is a leftover of ours and takes it over. Returns false if it
/// vanished meanwhile.
bool claim(const std::string& path, Descriptor& out) {
  struct stat named;
  if (::lstat(path.c_str(), &named) != 0) {
    if (errno == ENOENT) return false;
    refuse(errno, path, "it cannot be examined");
  }
  if (S_ISLNK(named.st_mode)) refuse(ELOOP, path, "it is a symbolic link, which is never followed");
  if (S_ISDIR(named.st_mode)) refuse(EISDIR, path, "it is a directory");
  if (!S_ISREG(named.st_mode)) refuse(EEXIST, path, "it is not a regular file");
  // Non-blocking, in case a pipe has taken the name since.
  Descriptor fd(open_retrying(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
  if (fd.get() < 0) {
    if (errno == ENOENT) return false;
    if (errno == ELOOP) refuse(ELOOP, path, "it is a symbolic link, which is never followed");
    if (errno == EACCES || errno == EPERM) {
      refuse(errno, path, "it exists, and there is no permission to open it");
    }
    refuse(errno, path, "it exists and cannot be opened");
  }
  struct stat opened;
  if (::fstat(fd.get(), &opened) != 0) refuse(errno, path, "it cannot be examined");
  if (!S_ISREG(opened.st_mode)) refuse(EEXIST, path, "it is not a regular file");
  Header header;
  const ssize_t size = ::pread(fd.get(), header.bytes, sizeof header.bytes, 0);
  if (size != kFileHeaderBytes || std::memcmp(header.bytes, file_header(), kFileHeaderBytes) != 0) {
    refuse(EEXIST, path, "it exists and is not a hift page file of this version");
  }
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) refuse(EBUSY, path, "it is in use by another process or optimizer");
    refuse(errno, path, "it cannot be locked");
  }
  // The name may have passed to another file between opening and locking.
  if (::lstat(path.c_str(), &named) != 0 || named.st_ino != opened.st_ino ||
      named.st_dev != opened.st_dev) {
    return false;
  }
  if (opened.st_uid != ::geteuid()) {
    refuse(EPERM, path, text("it belongs to user ", opened.st_uid));
  }
  if (opened.st_nlink != 1)
    refuse(EEXIST, path, "it has a second name, which would lose its bytes");
  // The header stays, so that it is still a leftover of ours if we die right here.
  if (::fchmod(fd.get(), 0600) != 0 || ::ftruncate(fd.get(), kFileHeaderBytes) != 0) {
    refuse(errno, path, "the leftover of a dead process cannot be replaced");
  }
  out = std::move(fd);
  return true;
}

/// Writes our header into an empty file.
void put_header(int fd, const std::string& path) {
  const ssize_t size = ::pwrite(fd, file_header(), kFileHeaderBytes, 0);
  if (size != kFileHeaderBytes) {
    refuse(size < 0 ? errno : ENOSPC, path, "its first block cannot be written");
  }
}

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

const char* file_header() {
  static const Header header = [] {
    Header h{};
    std::memcpy(h.bytes, kMagic, sizeof kMagic);
    h.bytes[sizeof kMagic] = kVersion;
    return h;
  }();
  return header.bytes;
}

std::string memory_file_system(int fd) {
  struct statfs status;
  if (::fstatfs(fd, &status) != 0) throw_errno(errno, "cannot examine a file system");
  if (static_cast<std::uint32_t>(status.f_type) == TMPFS_MAGIC) return "tmpfs";
  if (static_cast<std::uint32_t>(status.f_type) == RAMFS_MAGIC) return "ramfs";
  return "";
}

OpenFile open_named(const std::string& path) {
  for (int attempt = 0; attempt < 8; ++attempt) {
    Descriptor fd(open_retrying(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW));
    if (fd.get() < 0) {
      if (errno != EEXIST) refuse_to_create(errno, path);
      if (!claim(path, fd)) continue;
    } else {
      try {
        if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
          refuse(errno == EWOULDBLOCK ? EBUSY : errno, path, "it cannot be locked");
        }
        // The umask has had its say in open.
        if (::fchmod(fd.get(), 0600) != 0) refuse(errno, path, "its mode cannot be set to 0600");
        put_header(fd.get(), path);
      } catch (...) {
        ::unlink(path.c_str());
        throw;
      }
    }
    const std::string memory = memory_file_system(fd.get());
    const std::size_t slash = path.rfind('/');
    return {std::move(fd), path, slash == std::string::npos ? "." : path.substr(0, slash + 1),
            memory.empty() ? "" : memory + " keeps files in memory"};
  }
  refuse(EBUSY, path, "other processes keep creating and removing it");
}

std::vector<std::string> scratch_folders() {
  std::vector<std::string> folders;
  const char* named = std::getenv("TMPDIR");
  if (named != nullptr && *named != '\0') folders.push_back(named);
  for (const char* folder : {"/var/tmp", "/tmp", "."}) folders.push_back(folder);
  return folders;
}

int create_unlinked(const std::string& folder) {
  std::random_device random;
  for (int attempt = 0; attempt < 64; ++attempt) {
    const std::string path = text(folder, "/.hift-", ::getpid(), "-", random());
    const int fd = open_retrying(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW);
    if (fd < 0 && errno == EEXIST) continue;
    if (fd >= 0) ::unlink(path.c_str());
    return fd;
  }
  errno = EEXIST;
  return -1;
}

OpenFile open_scratch(const std::vector<std::string>& folders) {
  std::string tried;
  int error = ENOENT;
  for (const std::string& folder : folders) {
    // O_EXCL: nobody can give the file a name later.
    int raw = open_retrying(folder.c_str(), O_RDWR | O_TMPFILE | O_EXCL);
    if (raw < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
      raw = create_unlinked(folder);
    }
    const int why = errno;
    Descriptor fd(raw);
    const std::string memory = raw < 0 ? "" : memory_file_system(raw);
    if (raw >= 0 && memory.empty()) {
      if (::fchmod(raw, 0600) != 0) throw_errno(errno, "cannot set a scratch file's mode to 0600");
      return {std::move(fd), text("an unlinked file in ", folder), folder, ""};
    }
    error = raw < 0 ? why : EOPNOTSUPP;
    tried += text(tried.empty() ? "" : ", ", folder, " (",
                  raw < 0 ? std::generic_category().message(why) : memory, ")");
  }
  throw_errno(error, "no folder for a scratch page file; tried ", tried,
              ". Set TMPDIR to a folder on a disk, or pass store=\"disk:PATH\"");
}

}  // namespace hift
