// SPDX-License-Identifier: Apache-2.0
// Cuts groups into pages. All sizes are 64-bit and checked before anything is added, so that a
// table never holds an offset that has wrapped around.
#include "paging/page_table.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/check.h"

namespace hift {
namespace {

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Far above any memory, far below where sums of sizes could overflow.
constexpr std::int64_t kMaxBytes = std::numeric_limits<std::int64_t>::max() / 16;

constexpr std::int64_t kMaxValueBytes = 4096;

// Every distance at which streams were found to contend is a multiple of this.
constexpr std::int64_t kContention = 65536;

}  // namespace

void fill_elements(std::byte* to, std::int64_t count, const Stream& stream) {
  if (count == 0) return;
  const std::int64_t bytes = stream.bytes(count);
  const std::int64_t pattern = std::min<std::int64_t>(stream.value_bytes, 4);
  for (std::int64_t i = 0; i < pattern; ++i) {
    to[i] = static_cast<std::byte>(stream.fill >> (8 * i));
  }
  // The filled part doubles until it is the whole.
  for (std::int64_t done = pattern; done < bytes; done += std::min(done, bytes - done)) {
    std::memcpy(to + done, to, static_cast<std::size_t>(std::min(done, bytes - done)));
  }
}

PageTable::PageTable(std::vector<Stream> streams, std::int64_t page_bytes, std::int64_t alignment)
    : streams_(std::move(streams)), prefix_{0}, page_elements_(0), alignment_(alignment) {
  check_argument(streams_.size() <= static_cast<std::size_t>(kMaxStreams), "a page has at most ",
                 kMaxStreams, " streams, not ", streams_.size());
  check_argument(page_bytes > 0, "page_bytes must be positive: ", page_bytes);
  check_argument(page_bytes <= kMaxBytes, "page_bytes is too large: ", page_bytes);
  check_argument(alignment > 0 && (alignment & (alignment - 1)) == 0 && alignment <= (1 << 30),
                 "the record alignment must be a power of two up to 2^30: ", alignment);
  for (const Stream& s : streams_) {
    check_argument(s.run == 1 || s.run == kPageElements, "a stream has a value for 1 or ",
                   kPageElements, " elements, not for ", s.run);
    const bool whole =
        s.value_bytes > 0 && s.value_bytes <= kMaxValueBytes && s.value_bytes % 4 == 0;
    check_argument(
        s.value_bytes == 1 || s.value_bytes == 2 || s.value_bytes == 4 || (s.run > 1 && whole),
        "a stream has 1, 2 or 4 bytes a value, or a multiple of 4 for a run's, not ",
        s.value_bytes);
    prefix_.push_back(prefix_.back() + s.bytes(kPageElements));
  }
  if (!streams_.empty()) {
    page_elements_ = std::max<std::int64_t>(page_bytes / prefix_.back(), 1) * kPageElements;
  }
}

int PageTable::add_group(std::int64_t elements) {
  check_argument(elements >= 0, "a group's number of elements must not be negative: ", elements);
  const std::int64_t width = prefix_.back() / kPageElements + 1;
  check_argument(elements <= kMaxBytes / width / 2 && end_offset_ <= kMaxBytes, "a group of ",
                 elements, " elements of ", width, " bytes is too large");
  const std::int64_t step =
      page_elements_ > 0 ? page_elements_ : std::max<std::int64_t>(elements, 1);
  const std::int64_t first = pages();
  const int group = groups();
  pages_.reserve(static_cast<std::size_t>(first + (elements + step - 1) / step));
  first_page_.reserve(first_page_.size() + 1);
  elements_.reserve(elements_.size() + 1);
  for (std::int64_t begin = 0; begin < elements; begin += step) {
    Page page;
    page.index = pages();
    page.group = group;
    page.begin = begin;
    page.count = std::min(step, elements - begin);
    page.extent = round_up(page.count, kPageElements);
    page.offset = end_offset_;
    end_offset_ += record_bytes(page);
    max_record_bytes_ = std::max(max_record_bytes_, record_bytes(page));
    pages_.push_back(page);
  }
  first_page_.push_back(first);
  elements_.push_back(elements);
  return group;
}

void PageTable::check_group(int group) const {
  check_argument(group >= 0 && group < groups(), "group ", group, " is not one of ", groups());
}

void PageTable::check_stream(int stream) const {
  check_argument(stream >= 0 && stream < static_cast<int>(streams_.size()), "stream ", stream,
                 " is not one of ", streams_.size());
}

std::int64_t PageTable::elements(int group) const {
  check_group(group);
  return elements_[group];
}

std::int64_t PageTable::first_page(int group) const {
  check_group(group);
  return first_page_[group];
}

std::int64_t PageTable::end_page(int group) const {
  check_group(group);
  return group + 1 < groups() ? first_page_[group + 1] : pages();
}

const Page& PageTable::page(std::int64_t index) const {
  check_argument(index >= 0 && index < pages(), "page ", index, " is not one of ", pages());
  return pages_[index];
}

void PageTable::touch(std::int64_t index) {
  Page& touched = pages_[page(index).index];
  touched.touched = true;
  touched.fresh = false;
}

void PageTable::forget(std::int64_t index) { pages_[page(index).index].touched = false; }

std::int64_t PageTable::page_of(int group, std::int64_t element) const {
  check_group(group);
  check_argument(element >= 0 && element < elements_[group], "element ", element, " is not one of ",
                 elements_[group], " in group ", group);
  return first_page_[group] + (page_elements_ > 0 ? element / page_elements_ : 0);
}

std::vector<std::int64_t> PageTable::parts(int group, std::int64_t begin,
                                           std::int64_t count) const {
  std::vector<std::int64_t> counts;
  for (const std::int64_t end = begin + count; begin < end; begin += counts.back()) {
    const Page& there = page(page_of(group, begin));
    counts.push_back(std::min(there.begin + there.count, end) - begin);
  }
  return counts;
}

std::int64_t PageTable::stream_offset(const Page& page, int stream) const {
  check_stream(stream);
  return page.extent / kPageElements * prefix_[stream];
}

std::int64_t PageTable::record_bytes(const Page& page) const {
  return round_up(page.extent / kPageElements * prefix_.back(), alignment_);
}

std::int64_t PageTable::bytes_of(std::int64_t elements) const {
  std::int64_t bytes = 0;
  for (const Stream& s : streams_) bytes += s.bytes(elements);
  return bytes;
}

std::int64_t PageTable::max_record_bytes() const { return max_record_bytes_; }

std::int64_t PageTable::total_record_bytes() const { return end_offset_; }

std::int64_t PageTable::group_bytes(int group) const {
  std::int64_t bytes = 0;
  for (int s = 0; s < static_cast<int>(streams_.size()); ++s) bytes += stream_bytes(group, s);
  return bytes;
}

std::int64_t PageTable::stream_bytes(int group, int stream) const {
  check_group(group);
  const std::int64_t extent = round_up(elements_[group], kPageElements);
  const std::int64_t bytes = round_up(streams_[stream].bytes(extent), alignment_);
  // A step walks through all streams at once. At a distance of a large power of two they contend
  // for the same places in the caches; one record's alignment more, and they do not.
  return bytes > 0 && bytes % kContention == 0 ? bytes + alignment_ : bytes;
}

std::int64_t PageTable::group_stream_offset(int group, int stream) const {
  check_stream(stream);
  std::int64_t offset = 0;
  for (int s = 0; s < stream; ++s) offset += stream_bytes(group, s);
  return offset;
}

}  // namespace hift
