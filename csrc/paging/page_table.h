// SPDX-License-Identifier: Apache-2.0
// Which page holds which elements. A group is a range of elements [0, n); a page is one span of it
// with all its streams. The table knows counts and byte sizes, never a rule, a dtype or a tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hift {

inline constexpr int kMaxStreams = 8;
inline constexpr std::int64_t kPageElements = 256;  // page boundaries are multiples of this

/// One stream of a page: so many bytes a value (1, 2 or 4; any multiple of 4 for a run's), how many
/// elements share a value (1, or a run of kPageElements), and four bytes, little-endian, that a
/// value is made of where no step has been: its first ones, or those again and again.
struct Stream {
  std::int64_t value_bytes = 4;
  std::uint32_t fill = 0;
  std::int64_t run = 1;

  /// Values, and bytes, of `elements` elements that begin at a multiple of `run`.
  std::int64_t values(std::int64_t elements) const { return (elements + run - 1) / run; }
  std::int64_t bytes(std::int64_t elements) const { return values(elements) * value_bytes; }
};

/// Writes the stream's fill value for `count` elements from `to` on, which may be unaligned.
void fill_elements(std::byte* to, std::int64_t count, const Stream& stream);

/// Elements [begin, begin + count) of a group. Its record holds the streams back to back, each
/// `extent` elements long (`count` rounded up to kPageElements).
struct Page {
  std::int64_t index = 0;  // place in the table
  int group = 0;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::int64_t extent = 0;
  std::int64_t offset = 0;  // of its record in a record-major store, bytes, a multiple of the
                            // record alignment
  bool touched = false;     // false: still the fill value everywhere, nothing has been stored
  bool fresh = true;        // never touched, not even before a `forget`
};

class PageTable {
 public:
  /// `page_bytes` bounds the streams of a page (at least one run of kPageElements); records start
  /// at multiples of `alignment`, a power of two.
  PageTable(std::vector<Stream> streams, std::int64_t page_bytes, std::int64_t alignment = 4096);

  /// Cuts `elements` elements into pages at the table's end and returns the new group's number. No
  /// elements, no pages. Without streams the whole group is one page of no bytes.
  int add_group(std::int64_t elements);

  int groups() const { return static_cast<int>(first_page_.size()); }
  std::int64_t pages() const { return static_cast<std::int64_t>(pages_.size()); }
  const std::vector<Stream>& streams() const { return streams_; }
  std::int64_t alignment() const { return alignment_; }
  std::int64_t elements(int group) const;    // as given
  std::int64_t first_page(int group) const;  // index of the group's first page
  std::int64_t end_page(int group) const;    // one past its last
  const Page& page(std::int64_t index) const;
  void touch(std::int64_t index);
  void forget(std::int64_t index);  // back to untouched; flush the pager first
  std::int64_t page_of(int group, std::int64_t element) const;  // index of the element's page
  /// How many of `count` elements lie in each page, in order.
  std::vector<std::int64_t> parts(int group, std::int64_t begin, std::int64_t count) const;
  std::int64_t bytes_of(std::int64_t elements) const;              // all streams together
  std::int64_t stream_offset(const Page& page, int stream) const;  // inside the record, bytes
  std::int64_t record_bytes(const Page& page) const;  // as moved, a multiple of the alignment
  std::int64_t max_record_bytes() const;              // what a slot must hold for the groups so far
  std::int64_t total_record_bytes() const;            // all records

  /// A group stream-major: each stream of the whole group starts at a multiple of the alignment,
  /// and not at a distance from another that is a multiple of a large power of two.
  std::int64_t group_bytes(int group) const;
  std::int64_t group_stream_offset(int group, int stream) const;

 private:
  std::int64_t stream_bytes(int group, int stream) const;

  void check_group(int group) const;
  void check_stream(int stream) const;

  std::vector<Stream> streams_;
  std::vector<std::int64_t> prefix_;  // bytes of kPageElements elements in the streams before;
                                      // the last is all
  std::int64_t page_elements_;        // 0: a page holds a whole group
  std::int64_t alignment_;
  std::vector<std::int64_t> first_page_;
  std::vector<std::int64_t> elements_;
  std::vector<Page> pages_;
  std::int64_t end_offset_ = 0;
  std::int64_t max_record_bytes_ = 0;
};

}  // namespace hift
