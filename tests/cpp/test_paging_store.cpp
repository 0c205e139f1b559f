// SPDX-License-Identifier: Apache-2.0
// Slabs and the store in memory: sizes, alignment, what fork inherits, records against streams, and
// growth that leaves old addresses alone.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "paging/store.h"

using namespace hift;

TEST(slabs_are_exact) {
  const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  for (const std::int64_t bytes : {std::int64_t{1}, page, page + 1, std::int64_t{3} << 20}) {
    Slab slab(bytes);
    CHECK(slab.bytes() == (bytes + page - 1) / page * page);
    CHECK(reinterpret_cast<std::uintptr_t>(slab.data()) % page == 0);
    for (std::int64_t i = 0; i < slab.bytes(); i += 512) CHECK(slab.data()[i] == std::byte{0});
    std::memset(slab.data(), 1, static_cast<std::size_t>(slab.bytes()));
  }
  Slab large((std::int64_t{2} << 20) + 1);
  CHECK(reinterpret_cast<std::uintptr_t>(large.data()) % (2 << 20) == 0);
  CHECK(Slab(0).data() == nullptr);
  CHECK_THROWS(std::invalid_argument, "-5", Slab(-5));
}

TEST(slabs_give_their_memory_back) {
  std::byte* address;
  {
    Slab slab(5 << 20);
    address = slab.data();
  }
  unsigned char resident[1];
  CHECK(::mincore(address, 4096, resident) != 0 && errno == ENOMEM, "still mapped");
}

TEST(a_slab_that_does_not_fit_says_so) {
  CHECK_THROWS(std::system_error, "store=\"disk\"", Slab(std::int64_t{1} << 60));
  CHECK_THROWS(std::system_error, "1152921504606846976", Slab(std::int64_t{1} << 60));
}

TEST(fork_inherits_no_slab) {
  Slab slab(8192);
  PageTable table({{4, 0}}, 4096);
  table.add_group(100);
  auto store = std::make_unique<RamStore>();
  store->grow(table);
  const pid_t child = ::fork();
  if (child == 0) {
    unsigned char resident[2];
    int wrong = ::mincore(slab.data(), 8192, resident) == 0;
    // What the child maps at the address is its own: no destructor of the slab may remove it.
    void* own = ::mmap(slab.data(), 8192, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    slab.~Slab();
    if (own != MAP_FAILED) static_cast<volatile char*>(own)[0] = 1;
    try {
      store->address(table, table.page(0), 0);
      wrong += 2;
    } catch (const std::logic_error&) {
    }
    store.reset();
    ::_exit(own == MAP_FAILED ? 9 : wrong);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child ended with ", status);
  slab.data()[0] = std::byte{1};
}

TEST(records_and_streams_hold_the_same) {
  PageTable table({{4, 0}, {2, 0}, {1, 0}}, 7 * 512);
  RamStore store;
  table.add_group(1300);
  table.add_group(0);
  store.grow(table);
  const std::byte* before = store.stream_address(table, 0, 0);
  table.add_group(700);
  store.grow(table);
  store.grow(table);
  CHECK(store.stream_address(table, 0, 0) == before, "growth moves nothing");
  CHECK(store.slab(0) != store.slab(2) && store.slab(0) == store.slab(1));
  CHECK(store.bytes() == store.slab(0)->bytes() + store.slab(2)->bytes());
  CHECK(store.description() == "ram");

  Slab record(table.max_record_bytes()), back(table.max_record_bytes());
  for (std::int64_t p = 0; p < table.pages(); ++p) {
    const Page& page = table.page(p);
    const auto bytes = static_cast<std::size_t>(table.bytes_of(page.extent));
    for (std::size_t i = 0; i < bytes; ++i) record.data()[i] = static_cast<std::byte>(i * 7 + p);
    store.write(table, page, record.data());
    store.read(table, page, back.data());
    CHECK(std::memcmp(record.data(), back.data(), bytes) == 0, "page ", p);
  }
  for (int g : {0, 2}) {
    for (int s = 0; s < 3; ++s) {
      const std::int64_t width = table.streams()[s].value_bytes;
      std::byte* stream = store.stream_address(table, g, s);
      CHECK(reinterpret_cast<std::uintptr_t>(stream) % 4096 == 0);
      for (std::int64_t e = 0; e < table.elements(g) * width; ++e) {
        const Page& page = table.page(table.page_of(g, e / width));
        const std::int64_t at = table.stream_offset(page, s) + e - page.begin * width;
        CHECK(stream[e] == static_cast<std::byte>(at * 7 + page.index), "group ", g, " byte ", e);
        CHECK(store.address(table, page, s) == stream + page.begin * width);
      }
    }
  }
  CHECK_THROWS(std::invalid_argument, "group 3", store.slab(3));
  CHECK_THROWS(std::invalid_argument, "stream 3", store.stream_address(table, 0, 3));
}

TEST(a_slab_outlives_its_store) {
  PageTable table({{4, 0}}, 4096);
  table.add_group(100);
  auto store = std::make_unique<RamStore>();
  store->grow(table);
  const std::shared_ptr<Slab> slab = store->slab(0);
  std::byte* address = store->stream_address(table, 0, 0);
  store.reset();
  address[0] = std::byte{1};
  CHECK(slab->data() == address);
}

TEST(memory_is_not_committed_before_it_is_touched) {
  PageTable table({{4, 0}, {4, 0}}, 1 << 20);
  table.add_group(std::int64_t{1} << 30);
  RamStore store;
  struct rusage before, after;
  ::getrusage(RUSAGE_SELF, &before);
  store.grow(table);
  ::getrusage(RUSAGE_SELF, &after);
  CHECK(after.ru_maxrss - before.ru_maxrss < 64 << 10, after.ru_maxrss - before.ru_maxrss, " KiB");
  // Exact but for what keeps streams from contending (PageTable).
  CHECK(store.bytes() - (std::int64_t{8} << 30) <= 2 * 4096, store.bytes());
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
