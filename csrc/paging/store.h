// SPDX-License-Identifier: Apache-2.0
// Where pages rest between visits: a slab of host memory, or one file. A store is told of new
// groups and keeps their bytes; it does nothing by itself and starts no thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "paging/owner.h"
#include "paging/page_table.h"

namespace hift {

/// Every call throws std::logic_error in a forked child.
class Store {
 public:
  virtual ~Store() = default;

  /// Makes room for the groups of `table` that were added since the last call. Commits no memory
  /// yet. On an error the store is as it was before. Copies may be under way.
  virtual void grow(const PageTable& table) = 0;

  /// Address of a stream of a page in host memory, or null where pages have none (a file).
  virtual std::byte* address(const PageTable& table, const Page& page, int stream) = 0;

  /// Copies a page's record from and to `record` (aligned to the table's alignment). Blocks;
  /// thread-safe for different pages. They use nothing of `table` that a new group changes.
  virtual void read(const PageTable& table, const Page& page, std::byte* record) = 0;
  virtual void write(const PageTable& table, const Page& page, const std::byte* record) = 0;

  /// Whether pages that were never written read as zero.
  virtual bool zeroed() const { return false; }

  virtual std::string folder() const { return ""; }                   // of the file, if it is one
  virtual int file() const { return -1; }                             // its descriptor
  virtual std::int64_t record_begin(const Page&) const { return 0; }  // bytes of it before a page

  virtual std::int64_t bytes() const = 0;       // reserved: slab or file size
  virtual std::string description() const = 0;  // for messages: "ram", "disk:/path", with
                                                // "(buffered: why)" if so
};

/// Anonymous memory: mmap, rounded up to the system's page only, huge pages advised, none
/// committed before it is touched, not inherited by fork, freed with its last owner.
class Slab {
 public:
  explicit Slab(std::int64_t bytes);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  std::byte* data() const { return data_; }  // null for no bytes
  std::int64_t bytes() const { return bytes_; }

 private:
  OwnerProcess owner_;
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// One slab for the groups known at the first `grow`, one more for each later `grow`. A group lies
/// stream-major: stream s of the whole group is contiguous, so a parameter's state is one
/// contiguous range.
class RamStore final : public Store {
 public:
  void grow(const PageTable& table) override;
  std::byte* address(const PageTable& table, const Page& page, int stream) override;
  void read(const PageTable& table, const Page& page, std::byte* record) override;
  void write(const PageTable& table, const Page& page, const std::byte* record) override;
  std::int64_t bytes() const override;
  bool zeroed() const override { return true; }
  std::string description() const override;

  /// The slab that holds `group`, for views that outlive the store, and the address of the group's
  /// stream.
  std::shared_ptr<Slab> slab(int group) const;
  std::byte* stream_address(const PageTable& table, int group, int stream) const;

 private:
  struct Place {
    std::shared_ptr<Slab> slab;
    std::byte* stream[kMaxStreams];
  };
  Place place(int group) const;

  OwnerProcess owner_;
  mutable std::mutex mutex_;  // a mover's threads look places up while `grow` adds some
  std::vector<Place> places_;
  std::int64_t bytes_ = 0;
};

}  // namespace hift
