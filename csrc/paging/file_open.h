// SPDX-License-Identifier: Apache-2.0
// How a page file comes into being: an unlinked scratch file, or a named one that is ours alone.
// Whatever stands in the way is refused with a sentence; nothing that is not ours is changed.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace hift {

/// An open file, closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

inline constexpr std::int64_t kFileHeaderBytes = 4096;  // the first record starts behind it

struct OpenFile {
  Descriptor fd;
  std::string name;    // for messages: "/path", or "an unlinked file in /dir"
  std::string folder;  // it is in
  std::string cached;  // why direct I/O is pointless here, if it is: the file system is memory
};

/// A file without a name in the first of `folders` that is writable and not in memory. It is gone
/// with its last descriptor, however the process ends.
OpenFile open_scratch(const std::vector<std::string>& folders);

/// $TMPDIR, /var/tmp, /tmp and the current directory.
std::vector<std::string> scratch_folders();

/// Creates a file and removes its name at once, where the file system has no O_TMPFILE. Returns the
/// descriptor, or -1 with errno.
int create_unlinked(const std::string& folder);

/// A new file at `path`, mode 0600, locked for its life; or one that a dead process of ours left
/// there, emptied. It has our header on return.
OpenFile open_named(const std::string& path);

/// A block of kFileHeaderBytes that marks a file as ours, aligned to its size.
const char* file_header();

/// "tmpfs" or "ramfs" if the file is in memory, "" if not.
std::string memory_file_system(int fd);

}  // namespace hift
