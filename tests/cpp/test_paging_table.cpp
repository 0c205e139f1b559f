// SPDX-License-Identifier: Apache-2.0
// How groups are cut into pages and where their streams lie, in memory and in a record; the fill
// pattern at every width and length; what the table refuses.
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "paging/page_table.h"

using namespace hift;

namespace {

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

TEST(pages_cover_a_group) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    std::vector<Stream> streams(1 + random() % 4);
    std::int64_t width = 0;  // bytes of a run of elements
    for (Stream& s : streams) {
      s.value_bytes = std::int64_t{1} << random() % 3;
      if (random() % 3 == 0) s.run = kPageElements;
      if (s.run > 1 && random() % 2 == 0) s.value_bytes = 256;
      width += s.bytes(kPageElements);
    }
    const std::int64_t page_bytes = 1 + random() % 20000;
    const std::int64_t alignment = std::int64_t{1} << random() % 13;
    PageTable table(streams, page_bytes, alignment);
    std::int64_t offset = 0, index = 0, largest = 0;
    for (int g = 0; g < 4; ++g) {
      const std::int64_t elements = random() % 5000;
      CHECK(table.add_group(elements) == g);
      CHECK(table.elements(g) == elements && table.first_page(g) == index);
      std::int64_t begin = 0, stream_major = 0;
      for (; index < table.end_page(g); ++index) {
        const Page& page = table.page(index);
        CHECK(page.index == index && page.group == g && page.begin == begin && page.count > 0);
        CHECK(page.begin % kPageElements == 0 &&
              page.extent == round_up(page.count, kPageElements));
        CHECK(page.extent / kPageElements * width <= std::max(page_bytes, width));
        CHECK(page.offset == offset && offset % alignment == 0 && !page.touched);
        CHECK(table.record_bytes(page) == round_up(page.extent / kPageElements * width, alignment));
        std::int64_t inside = 0;
        for (int s = 0; s < static_cast<int>(streams.size()); ++s) {
          CHECK(table.stream_offset(page, s) == inside);
          inside += streams[s].bytes(page.extent);
        }
        CHECK(table.page_of(g, begin) == index &&
              table.page_of(g, begin + page.count - 1) == index);
        largest = std::max(largest, table.record_bytes(page));
        begin += page.count;
        offset += table.record_bytes(page);
      }
      CHECK(begin == elements, begin, " of ", elements);
      for (int s = 0; s < static_cast<int>(streams.size()); ++s) {
        CHECK(table.group_stream_offset(g, s) == stream_major);
        stream_major += round_up(streams[s].bytes(round_up(elements, 256)), alignment);
        // Not at a multiple of 64 KiB from the one before.
        if (elements > 0 && stream_major % 65536 == table.group_stream_offset(g, s) % 65536) {
          stream_major += alignment;
        }
      }
      CHECK(table.group_bytes(g) == stream_major);
    }
    CHECK(table.total_record_bytes() == offset && table.max_record_bytes() == largest);
    CHECK(table.pages() == index);
  }
}

TEST(pages_are_as_large_as_they_may_be) {
  PageTable table({{4, 0}, {4, 0}}, 8 * 1000, 4096);
  table.add_group(2000);
  CHECK(table.end_page(0) == 3, "768 elements fit into 8000 bytes");
  CHECK(table.page(0).count == 768 && table.page(2).count == 464 && table.page(2).extent == 512);
  PageTable tiny({{4, 0}}, 1, 4096);
  tiny.add_group(600);
  CHECK(tiny.end_page(0) == 3, "at least one run of 256");
}

TEST(no_streams_no_bytes) {
  PageTable table({}, 8 << 20);
  table.add_group(std::int64_t{1} << 40);
  table.add_group(0);
  CHECK(table.end_page(0) == 1 && table.end_page(1) == 1 && table.first_page(1) == 1);
  CHECK(table.page(0).count == std::int64_t{1} << 40 && table.page_of(0, 12345678901) == 0);
  CHECK(table.record_bytes(table.page(0)) == 0 && table.max_record_bytes() == 0);
  CHECK(table.group_bytes(0) == 0 && table.bytes_of(256) == 0);
}

TEST(touch_and_forget) {
  PageTable table({{4, 0}}, 4096);
  table.add_group(3000);
  table.touch(1);
  CHECK(!table.page(0).touched && table.page(1).touched && !table.page(2).touched);
  table.forget(1);
  CHECK(!table.page(1).touched);
}

TEST(fill_patterns) {
  for (const std::int64_t width : {1, 2, 4}) {
    for (int misaligned = 0; misaligned < 4; ++misaligned) {
      for (std::int64_t count = 0; count < 70; ++count) {
        std::vector<std::byte> bytes(misaligned + count * width + 8, std::byte{0x55});
        fill_elements(bytes.data() + misaligned, count, {width, 0xa1b2c3d4});
        const unsigned char pattern[] = {0xd4, 0xc3, 0xb2, 0xa1};
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(bytes.size()); ++i) {
          const std::int64_t at = i - misaligned;
          const bool inside = at >= 0 && at < count * width;
          const int wanted = inside ? pattern[at % width] : 0x55;
          CHECK(static_cast<int>(bytes[i]) == wanted, "width ", width, " count ", count);
        }
      }
    }
  }
}

TEST(bad_arguments) {
  using Bad = std::invalid_argument;
  CHECK_THROWS(Bad, "3", PageTable({{3, 0}}, 4096));
  CHECK_THROWS(Bad, "page_bytes", PageTable({{4, 0}}, 0));
  CHECK_THROWS(Bad, "3000", PageTable({{4, 0}}, 4096, 3000));
  CHECK_THROWS(Bad, "8 streams", PageTable(std::vector<Stream>(9), 4096));
  PageTable table({{4, 0}}, 4096);
  CHECK_THROWS(Bad, "-1", table.add_group(-1));
  CHECK_THROWS(Bad, "too large", table.add_group(std::numeric_limits<std::int64_t>::max()));
  CHECK(table.groups() == 0 && table.pages() == 0, "a refused group leaves nothing");
  table.add_group(10);
  CHECK_THROWS(Bad, "page 1 ", table.page(1));
  CHECK_THROWS(Bad, "page -1 ", table.page(-1));
  CHECK_THROWS(Bad, "page 7 ", table.touch(7));
  CHECK_THROWS(Bad, "group 1 ", table.elements(1));
  CHECK_THROWS(Bad, "group -1 ", table.first_page(-1));
  CHECK_THROWS(Bad, "element 10 ", table.page_of(0, 10));
  CHECK_THROWS(Bad, "stream 1 ", table.stream_offset(table.page(0), 1));
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
