// SPDX-License-Identifier: Apache-2.0
// Reading, writing and growing the page file. The file's size is checked at every access: a file
// truncated by someone else would otherwise give zeros, or grow back with holes, without a word.
#include "paging/file_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstring>

#include "core/check.h"
#include "paging/transfer.h"

namespace hift {
namespace {

std::string message_of(int error) { return std::generic_category().message(error); }

}  // namespace

FileStore::FileStore(std::string path)
    : named_(!path.empty()), file_(named_ ? open_named(path) : open_scratch(scratch_folders())) {
  choose_direct();
}

FileStore::~FileStore() {
  // A forked child shares the lock and the file: it only closes its descriptor.
  if (!owner_.here()) return;
  if (named_) {
    // Children that were forked meanwhile hold the lock too; the name is free from now on.
    ::flock(file_.fd.get(), LOCK_UN);
  } else {
    // And they hold the file: its space is free from now on.
    (void)!::ftruncate(file_.fd.get(), 0);
  }
}

void FileStore::choose_direct() {
  const int fd = file_.fd.get();
  why_buffered_ = file_.cached;
  if (why_buffered_.empty()) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0) throw_errno(errno, "cannot examine ", file_.name);
    if (::fcntl(fd, F_SETFL, flags | O_DIRECT) == 0) {
      // Some file systems take the flag and refuse the access, or want larger blocks.
      struct alignas(kFileHeaderBytes) Block {
        char bytes[kFileHeaderBytes];
      } block;
      if (::pwrite(fd, file_header(), kFileHeaderBytes, 0) == kFileHeaderBytes &&
          ::pread(fd, block.bytes, kFileHeaderBytes, 0) == kFileHeaderBytes) {
        return;
      }
      why_buffered_ = "direct I/O failed: " + message_of(errno);
      if (::fcntl(fd, F_SETFL, flags) != 0) throw_errno(errno, "cannot use ", file_.name);
    } else {
      why_buffered_ = "no direct I/O: " + message_of(errno);
    }
  }
  const ssize_t size = ::pwrite(fd, file_header(), kFileHeaderBytes, 0);
  if (size != kFileHeaderBytes) {
    throw_errno(size < 0 ? errno : ENOSPC, "cannot write the first block of ", file_.name);
  }
}

std::int64_t FileStore::check_size() const {
  struct stat status;
  if (::fstat(file_.fd.get(), &status) != 0) throw_errno(errno, "cannot examine ", file_.name);
  return status.st_size;
}

void FileStore::grow(const PageTable& table) {
  owner_.check("the page file");
  check_argument(table.alignment() % kFileBlock == 0, "records in a file are aligned to ",
                 kFileBlock, " bytes; the table's alignment is ", table.alignment());
  const std::int64_t bytes = kFileHeaderBytes + table.total_record_bytes();
  if (bytes <= bytes_) return;
  reserve(bytes);
  bytes_ = bytes;
}

void FileStore::reserve(std::int64_t bytes) {
  const int fd = file_.fd.get();
  const std::int64_t had = bytes_, more = bytes - had;
  if (const std::int64_t size = check_size(); size < had) {
    throw_errno(EIO, file_.name, " was truncated under us: it has ", size, " bytes instead of ",
                had);
  }
  // Some file systems do not say; then only the reservation itself can tell.
  struct statvfs space;
  const bool told = ::fstatvfs(fd, &space) == 0 && space.f_blocks > 0;
  const std::int64_t free =
      told ? static_cast<std::int64_t>(space.f_bavail) * static_cast<std::int64_t>(space.f_frsize)
           : more;
  const auto fail = [&](int error) {
    // What was reserved before the error goes back, and the groups that were there stay.
    (void)!::ftruncate(fd, had);
    throw_errno(error, "cannot reserve ", more, " bytes for pages in ", file_.name, " (",
                told ? text(free) : "an unknown number of",
                " bytes are free there; the file would have ", bytes,
                " bytes): make room, raise 'ulimit -f' or the quota, or pass another "
                "store=\"disk:PATH\"");
  };
  // Asked first, because reaching the limit raises a signal that ends the process by default.
  struct rlimit limit;
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
      static_cast<rlim_t>(bytes) > limit.rlim_cur) {
    fail(EFBIG);
  }
  int result;
  do {
    result = ::fallocate(fd, 0, had, more);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return;
  if (errno != EOPNOTSUPP && errno != ENOSYS) fail(errno);
  // Without fallocate nothing is promised; what is plainly too much is refused now.
  if (free < more) fail(ENOSPC);
  if (::ftruncate(fd, bytes) != 0) fail(errno);
}

std::int64_t FileStore::place(const PageTable& table, const Page& page,
                              const std::byte* record) const {
  owner_.check("the page file");
  const std::int64_t bytes = table.record_bytes(page), offset = kFileHeaderBytes + page.offset;
  check_argument(offset + bytes <= bytes_, "page ", page.index, " ends at byte ", offset + bytes,
                 " of ", file_.name, ", which has ", bytes_, ": the store was not grown for it");
  check_argument(!direct() || reinterpret_cast<std::uintptr_t>(record) % kFileBlock == 0,
                 "a record in memory must be aligned to ", kFileBlock, " bytes");
  // A write beyond the end would make the file long again, with holes for other pages.
  const std::int64_t size = check_size();
  if (size < bytes_) {
    // Reads inside what is left are still right.
    if (size >= offset + bytes) return offset;
    throw_errno(EIO, file_.name, " was truncated under us: page ", page.index, " at byte ", offset,
                " needs ", bytes, " bytes, and the file has ", size, " instead of ", bytes_);
  }
  return offset;
}

void FileStore::read(const PageTable& table, const Page& page, std::byte* record) {
  const std::int64_t bytes = table.record_bytes(page), offset = place(table, page, record);
  const std::int64_t moved = transfer(bytes, [&](std::int64_t done) {
    return ::pread(file_.fd.get(), record + done, static_cast<std::size_t>(bytes - done),
                   offset + done);
  });
  if (moved == bytes) return;
  if (errno != 0) {
    throw_errno(errno, "cannot read page ", page.index, " (", bytes, " bytes at byte ", offset,
                ") of ", file_.name);
  }
  throw_errno(EIO, file_.name, " was truncated under us: page ", page.index, " at byte ", offset,
              " needs ", bytes, " bytes, and only ", moved, " came; the file has ", check_size(),
              " instead of ", bytes_);
}

void FileStore::write(const PageTable& table, const Page& page, const std::byte* record) {
  const std::int64_t bytes = table.record_bytes(page), offset = place(table, page, record);
  const std::int64_t moved = transfer(bytes, [&](std::int64_t done) {
    return ::pwrite(file_.fd.get(), record + done, static_cast<std::size_t>(bytes - done),
                    offset + done);
  });
  if (moved == bytes) return;
  throw_errno(errno != 0 ? errno : EIO, "cannot write page ", page.index, " (", bytes,
              " bytes at byte ", offset, ") of ", file_.name, ": only ", moved, " were taken");
}

std::string FileStore::description() const {
  const std::string what = named_ ? "disk:" + file_.name : "disk (" + file_.name + ")";
  return direct() ? what : what + " (buffered: " + why_buffered_ + ")";
}

}  // namespace hift
