// SPDX-License-Identifier: Apache-2.0
// Pages in host memory. A record is gathered from the group's streams and scattered back into them;
// in place nothing is copied at all.
#include "paging/store.h"

#include <sys/mman.h>

#include <cstring>

#include "core/check.h"

namespace hift {
namespace {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

}  // namespace

Slab::Slab(std::int64_t bytes) {
  check_argument(bytes >= 0, "a slab's size must not be negative: ", bytes);
  if (bytes == 0) return;
  const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  bytes_ = (bytes + page - 1) / page * page;
  // A start on a huge page's boundary costs address space for a moment, no memory.
  const std::int64_t spare = bytes_ >= kHugePage ? kHugePage : 0;
  void* mapped = ::mmap(nullptr, static_cast<std::size_t>(bytes_ + spare), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw_errno(
        errno, "cannot map ", bytes_,
        " bytes of host memory for optimizer state (free memory, raise 'ulimit -v', or pass "
        "store=\"disk\")");
  }
  data_ = static_cast<std::byte*>(mapped);
  if (spare > 0) {
    const auto start = reinterpret_cast<std::uintptr_t>(data_);
    const std::int64_t head = static_cast<std::int64_t>(-start & (kHugePage - 1));
    if (head > 0) ::munmap(data_, static_cast<std::size_t>(head));
    if (head < spare) ::munmap(data_ + head + bytes_, static_cast<std::size_t>(spare - head));
    data_ += head;
  }
  // Only advice: a kernel without huge pages refuses it and works as well.
  ::madvise(data_, static_cast<std::size_t>(bytes_), MADV_HUGEPAGE);
  // Direct I/O into memory that a fork has made copy-on-write may land in the wrong process.
  if (::madvise(data_, static_cast<std::size_t>(bytes_), MADV_DONTFORK) != 0) {
    const int error = errno;
    ::munmap(data_, static_cast<std::size_t>(bytes_));
    throw_errno(error, "cannot keep ", bytes_, " bytes of host memory out of forked children");
  }
}

Slab::~Slab() {
  // In a forked child the range was never mapped, and may be someone else's by now.
  if (data_ != nullptr && owner_.here()) ::munmap(data_, static_cast<std::size_t>(bytes_));
}

void RamStore::grow(const PageTable& table) {
  owner_.check("the memory of optimizer state");
  const int known = static_cast<int>(places_.size());
  std::int64_t bytes = 0;
  for (int g = known; g < table.groups(); ++g) bytes += table.group_bytes(g);
  check_argument(table.alignment() <= ::sysconf(_SC_PAGESIZE), "a slab is aligned to ",
                 ::sysconf(_SC_PAGESIZE), " bytes; the records' alignment is ", table.alignment());
  const auto slab = std::make_shared<Slab>(bytes);
  std::vector<Place> added;
  std::int64_t offset = 0;
  for (int g = known; g < table.groups(); ++g) {
    Place place{slab, {}};
    for (int s = 0; s < static_cast<int>(table.streams().size()); ++s) {
      // Without elements there is no memory, and no address.
      if (bytes > 0) place.stream[s] = slab->data() + offset + table.group_stream_offset(g, s);
    }
    offset += table.group_bytes(g);
    added.push_back(std::move(place));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  places_.insert(places_.end(), added.begin(), added.end());
  bytes_ += slab->bytes();
}

RamStore::Place RamStore::place(int group) const {
  owner_.check("the memory of optimizer state");
  const std::lock_guard<std::mutex> lock(mutex_);
  check_argument(group >= 0 && group < static_cast<int>(places_.size()), "group ", group,
                 " is not one of the store's ", places_.size());
  return places_[group];
}

std::byte* RamStore::address(const PageTable& table, const Page& page, int stream) {
  return stream_address(table, page.group, stream) + table.streams()[stream].bytes(page.begin);
}

void RamStore::read(const PageTable& table, const Page& page, std::byte* record) {
  for (int s = 0; s < static_cast<int>(table.streams().size()); ++s) {
    std::memcpy(record + table.stream_offset(page, s), address(table, page, s),
                static_cast<std::size_t>(table.streams()[s].bytes(page.extent)));
  }
}

void RamStore::write(const PageTable& table, const Page& page, const std::byte* record) {
  for (int s = 0; s < static_cast<int>(table.streams().size()); ++s) {
    std::memcpy(address(table, page, s), record + table.stream_offset(page, s),
                static_cast<std::size_t>(table.streams()[s].bytes(page.extent)));
  }
}

std::int64_t RamStore::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

std::string RamStore::description() const { return "ram"; }

std::shared_ptr<Slab> RamStore::slab(int group) const { return place(group).slab; }

std::byte* RamStore::stream_address(const PageTable& table, int group, int stream) const {
  check_argument(stream >= 0 && stream < static_cast<int>(table.streams().size()), "stream ",
                 stream, " is not one of ", table.streams().size());
  return place(group).stream[stream];
}

}  // namespace hift
