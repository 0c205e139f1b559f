// SPDX-License-Identifier: Apache-2.0
// Where the engine says that state lies in the page file: read from there, behind its back, it is
// what the engine reads, in every stream and page; what was never written is said to be.
#include <cstring>

#include "engine.h"
#include "file_fixtures.h"

namespace {

using hift::Engine;
using hift::EngineOptions;
using hift::Stream;

/// A state as codes, a split master, the state's scales.
const std::vector<Stream> kStreams = {{256, 0, 256}, {2, 0}, {4, 0, 256}};
const std::vector<std::vector<std::int64_t>> kCounts = {{5, 0, 3000, 17}, {1}, {2048, 4096}};

EngineOptions options(const std::string& store) {
  EngineOptions options;
  options.store = store;
  options.page_bytes = 8192;
  options.states = 1;
  options.state_type = hift::StateType::kCode8;
  options.master = true;
  return options;
}

TEST(state_lies_where_it_is_said_to_lie) {
  const hift_test::Folder folder;
  Engine engine(kStreams, options("disk:" + (folder / "pages")));
  engine.add_groups(kCounts);
  CHECK(engine.file() >= 0);
  const hift::Descriptor file(::open((folder / "pages").c_str(), O_RDONLY | O_CLOEXEC));
  std::uint32_t next = 1;
  for (int g = 0; g < 3; ++g) {
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(kCounts[g].size()); ++i) {
      std::int64_t told = 0;
      for (const Engine::Place& place : engine.places(g, i)) {
        CHECK(place.offsets.size() == kStreams.size());
        told += place.elements;
      }
      CHECK(told == kCounts[g][i], "item ", i, " of group ", g);
      for (int s = 0; s < 3; ++s) {
        std::vector<std::byte> bytes(kStreams[s].bytes(kCounts[g][i]));
        for (std::byte& b : bytes) b = static_cast<std::byte>((next = next * 69069 + 1) >> 24);
        engine.write(g, i, s, 0, kCounts[g][i], bytes.data());
      }
    }
  }
  engine.flush();
  for (int g = 0; g < 3; ++g) {
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(kCounts[g].size()); ++i) {
      std::int64_t begin = 0;
      for (const Engine::Place& place : engine.places(g, i)) {
        CHECK(place.touched);
        for (int s = 0; s < 3; ++s) {
          std::vector<std::byte> expected(kStreams[s].bytes(place.elements)), found(expected);
          engine.read(g, i, s, begin, place.elements, expected.data());
          const ssize_t size = ::pread(file.get(), found.data(), found.size(), place.offsets[s]);
          CHECK(size == static_cast<ssize_t>(found.size()));
          CHECK(found == expected, "stream ", s, " of item ", i, " of group ", g, " from ", begin);
          CHECK(place.offsets[s] % (s == 0 ? 1 : kStreams[s].value_bytes) == 0);
        }
        begin += place.elements;
      }
    }
  }
}

TEST(what_was_never_written_is_untouched) {
  Engine engine({{4, 0x3f000000u}}, [] {
    EngineOptions options;
    options.store = "disk";
    options.page_bytes = 4096;
    return options;
  }());
  engine.add_groups({{3000}});
  CHECK(engine.places(0, 0).size() == 3);
  for (const Engine::Place& place : engine.places(0, 0)) CHECK(!place.touched);
  const float one = 1;
  engine.write(0, 0, 0, 1500, 1, reinterpret_cast<const std::byte*>(&one));
  const auto places = engine.places(0, 0);
  CHECK(!places[0].touched && places[1].touched && !places[2].touched);
}

TEST(host_memory_is_no_file) {
  Engine engine({{4, 0}}, {});
  engine.add_groups({{3000}});
  CHECK(engine.file() == -1);
  CHECK(engine.places(0, 0).empty());
  CHECK_THROWS(std::invalid_argument, "item 1 is not one of", engine.places(0, 1));
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
