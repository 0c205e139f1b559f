// SPDX-License-Identifier: Apache-2.0
// Pages in one file, one aligned record each, behind a header block. Direct I/O where the file
// system has it: the page cache would keep a second copy of what was paged out to save memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "paging/file_open.h"
#include "paging/owner.h"
#include "paging/store.h"

namespace hift {

class FileStore final : public Store {
 public:
  /// An empty `path` is an unlinked scratch file on a disk; a named file is created mode 0600 and
  /// locked, replaces a dead process's leftover, and stays when the store goes. Errors are
  /// std::system_error with what to do.
  explicit FileStore(std::string path);
  ~FileStore() override;

  void grow(const PageTable& table) override;
  std::byte* address(const PageTable&, const Page&, int) override { return nullptr; }
  void read(const PageTable& table, const Page& page, std::byte* record) override;
  void write(const PageTable& table, const Page& page, const std::byte* record) override;
  std::int64_t bytes() const override { return bytes_; }
  std::string description() const override;
  std::string folder() const override { return file_.folder; }
  int file() const override {
    owner_.check("the page file");
    return file_.fd.get();
  }
  std::int64_t record_begin(const Page& page) const override {
    return kFileHeaderBytes + page.offset;
  }

  bool direct() const { return why_buffered_.empty(); }
  const std::string& why_buffered() const { return why_buffered_; }
  const std::string& name() const { return file_.name; }  // for messages

 private:
  void choose_direct();
  void reserve(std::int64_t bytes);
  std::int64_t check_size() const;
  std::int64_t place(const PageTable& table, const Page& page, const std::byte* record) const;

  OwnerProcess owner_;
  bool named_;
  OpenFile file_;
  std::string why_buffered_;
  std::atomic<std::int64_t> bytes_{kFileHeaderBytes};
};

}  // namespace hift
