// SPDX-License-Identifier: Apache-2.0
// Random training: steps over random groups, reads and writes in between, against plain arrays and
// against pages in place in memory; through every kind of ring, with a dawdling disk and a failing
// one.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "paging/file_store.h"
#include "paging/host_mover.h"
#include "paging/pager.h"
#include "paging_stores.h"

using namespace hift;
using namespace hift_test;
using Failure = std::system_error;

namespace {

const std::vector<Stream> kStreams = {{4, 0}, {2, 0x3c01}, {1, 7}, {4, 0x3dcccccd}};

/// What every stream of every group holds, as plain bytes.
class Model {
 public:
  explicit Model(const PageTable& table) : table_(table) {
    for (int g = 0; g < table.groups(); ++g) {
      for (int s = 0; s < static_cast<int>(kStreams.size()); ++s) {
        bytes_.emplace_back(table.elements(g) * kStreams[s].value_bytes);
        fill_elements(bytes_.back().data(), table.elements(g), kStreams[s]);
      }
    }
  }
  std::byte* at(int group, int stream, std::int64_t element) {
    return bytes_[group * kStreams.size() + stream].data() + element * kStreams[stream].value_bytes;
  }
  bool is(const Page& page, const PageView& view) {
    for (int s = 0; s < static_cast<int>(kStreams.size()); ++s) {
      if (std::memcmp(view.stream[s], at(page.group, s, page.begin), size(page, s)) != 0)
        return false;
    }
    return true;
  }
  /// A new value for every byte, from the old one and the step.
  void change(const Page& page, unsigned step, const PageView* view) {
    for (int s = 0; s < static_cast<int>(kStreams.size()); ++s) {
      std::byte* bytes = view != nullptr ? view->stream[s] : at(page.group, s, page.begin);
      for (std::size_t i = 0; i < size(page, s); ++i) {
        const unsigned old = static_cast<unsigned>(bytes[i]);
        bytes[i] = static_cast<std::byte>(old * 5 + step + i % 251 + 13 * s);
      }
    }
  }

 private:
  std::size_t size(const Page& page, int stream) const {
    return static_cast<std::size_t>(page.count * kStreams[stream].value_bytes);
  }
  const PageTable& table_;
  std::vector<std::vector<std::byte>> bytes_;
};

struct Plan {
  int slots;  // -1: room for the largest group, 0: in place
  std::int64_t page_bytes;
  int max_us;
  int faults = 0;  // per mille
  int steps = 30;
};

class Training {
 public:
  Training(const Plan& plan, unsigned seed)
      : plan_(plan),
        random_(seed),
        table_(kStreams, plan.page_bytes),
        elements_{900, 2600, 256, 1, 3000} {
    for (const std::int64_t n : elements_) table_.add_group(n);
    if (plan.slots == 0 || random_() % 3 == 0) {
      disk_ = std::make_unique<RamStore>();
    } else {
      disk_ = std::make_unique<FileStore>("");
    }
    faults_ = std::make_unique<FaultStore>(*disk_);
    chaos_ = std::make_unique<ChaosStore>(*faults_, seed, plan.max_us);
    chaos_->grow(table_);
    int slots = plan.slots;
    for (int g = 0; slots < 0 && g < table_.groups(); ++g) {
      largest_ = std::max(largest_, static_cast<int>(table_.end_page(g) - table_.first_page(g)));
    }
    if (slots < 0) slots = largest_;
    if (slots > 0) {
      mover_ = std::make_unique<HostMover>(*chaos_, table_, slots, table_.max_record_bytes(),
                                           1 + random_() % 3, 1 + random_() % 3);
    }
    Store& store = slots > 0 ? static_cast<Store&>(*chaos_) : *disk_;
    pager_ = std::make_unique<Pager>(table_, store, mover_.get(), slots);
    model_ = std::make_unique<Model>(table_);
    slots_ = slots;
  }
  ~Training() {
    pager_.reset();
    mover_.reset();
  }

  void run(const std::string& name) {
    for (step_ = 0; step_ < plan_.steps; ++step_) {
      if (hift_test::failures > 0) {
        failed(__FILE__, __LINE__, text(name, " failed before step ", step_));
        return;
      }
      faults_->fail_at_random(plan_.faults, random_());
      const int group = static_cast<int>(random_() % table_.groups());
      if (random_() % 2 == 0) attempt([&] { pager_->prefetch(group); });
      for (int i = random_() % 3; i > 0; --i) between();
      step(group);
      if (random_() % 2 == 0) attempt([&] { pager_->prefetch((group + 1) % table_.groups()); });
      for (int i = random_() % 4; i > 0; --i) between();
    }
    faults_->heal();
    for (int tries = 0; !attempt([&] { pager_->flush(); }); ++tries) CHECK(tries < 50, name);
    compare_all();
    // The store has all of it: a pager with nothing in its slots finds the same.
    pager_ = std::make_unique<Pager>(table_, slots_ > 0 ? static_cast<Store&>(*chaos_) : *disk_,
                                     mover_.get(), slots_);
    compare_all();
  }

  std::vector<std::byte> contents() {
    std::vector<std::byte> all;
    for (int g = 0; g < table_.groups(); ++g) {
      for (int s = 0; s < static_cast<int>(kStreams.size()); ++s) {
        const auto bytes = table_.elements(g) * kStreams[s].value_bytes;
        all.resize(all.size() + bytes);
        pager_->read(g, s, 0, table_.elements(g), all.data() + all.size() - bytes);
      }
    }
    return all;
  }

 private:
  /// Runs `call`; false if the disk failed in it, which it may only where failures are planned.
  template <class Call>
  bool attempt(Call call) {
    try {
      call();
      return true;
    } catch (const Failure& error) {
      CHECK(plan_.faults > 0, error.what());
      return false;
    }
  }

  void step(int group) {
    const unsigned mark = random_();
    std::deque<std::pair<std::int64_t, PageView>> held;
    const auto release = [&](bool change) {
      const auto at = random_() % held.size();
      const auto [p, view] = held[at];
      held.erase(held.begin() + at);
      const Page& page = table_.page(p);
      CHECK(model_->is(page, view), "step ", step_, " page ", p, ", before its update");
      if (change) {
        model_->change(page, mark, &view);
        model_->change(page, mark, nullptr);
      }
      pager_->release(p, nullptr, change);
    };
    const std::size_t most = slots_ == 0 ? 100 : slots_;
    const std::size_t window = 1 + random_() % most;
    for (std::int64_t p = table_.first_page(group); p < table_.end_page(group); ++p) {
      if (random_() % 8 == 0) continue;
      if (held.size() == window) release(random_() % 8 != 0);
      PageView view;
      // A second attempt may succeed where the first reported; after some, the step is given up.
      bool here = false;
      for (int tries = 0; tries < 3 && !here; ++tries) {
        here = attempt([&] { view = pager_->acquire(p, nullptr); });
      }
      if (!here) break;
      held.emplace_back(p, view);
    }
    while (!held.empty()) release(random_() % 8 != 0);
  }

  void between() {
    const int group = static_cast<int>(random_() % table_.groups());
    const int stream = static_cast<int>(random_() % kStreams.size());
    const std::int64_t n = table_.elements(group);
    const std::int64_t begin = random_() % n, count = random_() % (n - begin) + 1;
    const std::int64_t width = kStreams[stream].value_bytes;
    std::vector<std::byte> bytes(count * width);
    switch (random_() % 6) {
      case 0:
      case 1:
        if (attempt([&] { pager_->read(group, stream, begin, count, bytes.data()); })) {
          CHECK(std::memcmp(bytes.data(), model_->at(group, stream, begin), bytes.size()) == 0,
                "step ", step_, " reads group ", group, " from ", begin, " on");
        }
        break;
      case 2:
      case 3: {
        // Page by page, so that the model knows which were written when one fails.
        for (auto& b : bytes) b = static_cast<std::byte>(random_());
        for (std::int64_t at = begin; at < begin + count;) {
          const Page& page = table_.page(table_.page_of(group, at));
          const std::int64_t some = std::min(page.begin + page.count, begin + count) - at;
          const std::byte* from = bytes.data() + (at - begin) * width;
          if (attempt([&] { pager_->write(group, stream, at, some, from); })) {
            std::memcpy(model_->at(group, stream, at), from, some * width);
          }
          at += some;
        }
        break;
      }
      case 4:
        attempt([&] { pager_->flush(); });
        break;
      case 5: {
        // Forgetting needs everything at rest.
        if (random_() % 3 != 0 || !attempt([&] { pager_->flush(); })) break;
        const Page& page = table_.page(table_.page_of(group, begin));
        table_.forget(page.index);
        for (int s = 0; s < static_cast<int>(kStreams.size()); ++s) {
          fill_elements(model_->at(group, s, page.begin), page.count, kStreams[s]);
        }
        break;
      }
    }
  }

  void compare_all() {
    const std::vector<std::byte> all = contents();
    const std::byte* at = all.data();
    for (int g = 0; g < table_.groups(); ++g) {
      for (int s = 0; s < static_cast<int>(kStreams.size()); ++s) {
        const auto bytes = table_.elements(g) * kStreams[s].value_bytes;
        CHECK(std::memcmp(at, model_->at(g, s, 0), bytes) == 0, "group ", g, " stream ", s);
        at += bytes;
      }
    }
  }

  Plan plan_;
  std::mt19937 random_;
  PageTable table_;
  std::vector<std::int64_t> elements_;
  std::unique_ptr<Store> disk_;
  std::unique_ptr<FaultStore> faults_;
  std::unique_ptr<ChaosStore> chaos_;
  std::unique_ptr<HostMover> mover_;
  std::unique_ptr<Pager> pager_;
  std::unique_ptr<Model> model_;
  int slots_ = 0, largest_ = 1, step_ = 0;
};

}  // namespace

TEST(any_ring_any_page_size) {
  for (unsigned seed = 0; seed < 3; ++seed) {
    for (const int slots : {0, 1, 2, 3, -1}) {
      for (const std::int64_t page_bytes : {1, 11 * 700, 1 << 20}) {
        Training training({slots, page_bytes, 200, 0, 20}, seed);
        training.run(text("seed ", seed, ", ", slots, " slots, pages of ", page_bytes));
      }
    }
  }
}

TEST(a_slow_disk) {
  for (unsigned seed = 100; seed < 103; ++seed) {
    for (const int slots : {1, 2, 3, -1}) {
      Training training({slots, 1, 2000, 0, 8}, seed);
      training.run(text("seed ", seed, ", ", slots, " slots, slow"));
    }
  }
}

TEST(a_failing_disk) {
  for (unsigned seed = 200; seed < 216; ++seed) {
    for (const int slots : {1, 2, 3, -1}) {
      Training training({slots, 1, 60, seed % 2 == 0 ? 30 : 200, 25}, seed);
      training.run(text("seed ", seed, ", ", slots, " slots, failing"));
    }
  }
}

TEST(every_store_gives_the_same_bytes) {
  // The same updates through each: the contents must be equal, whatever the model says.
  std::vector<std::vector<std::byte>> results;
  for (const int slots : {0, 1, 3, -1}) {
    PageTable table(kStreams, 11 * 300);
    for (const std::int64_t n : {2000, 500, 1300}) table.add_group(n);
    std::unique_ptr<Store> disk;
    if (slots == 0) {
      disk = std::make_unique<RamStore>();
    } else {
      disk = std::make_unique<FileStore>("");
    }
    disk->grow(table);
    const int ring = slots < 0 ? 8 : slots;
    std::unique_ptr<HostMover> mover;
    if (ring > 0) {
      mover = std::make_unique<HostMover>(*disk, table, ring, table.max_record_bytes(), 2, 2);
    }
    Pager pager(table, *disk, mover.get(), ring);
    for (int step = 0; step < 60; ++step) {
      const int group = step % 3;
      for (std::int64_t p = table.first_page(group); p < table.end_page(group); ++p) {
        const PageView view = pager.acquire(p, nullptr);
        for (std::int64_t i = 0; i < table.page(p).count; ++i) {
          std::uint32_t x;
          std::memcpy(&x, view.stream[0] + 4 * i, 4);
          x = x * 1664525 + static_cast<std::uint32_t>(table.page(p).begin + i) + step;
          std::memcpy(view.stream[0] + 4 * i, &x, 4);
          view.stream[2][i] = static_cast<std::byte>(x >> 24);
        }
        pager.release(p, nullptr, true);
      }
      pager.prefetch((group + 1) % 3);
    }
    pager.flush();
    std::vector<std::byte> all;
    for (int g = 0; g < 3; ++g) {
      for (int s = 0; s < 4; ++s) {
        std::vector<std::byte> got(table.elements(g) * kStreams[s].value_bytes);
        pager.read(g, s, 0, table.elements(g), got.data());
        all.insert(all.end(), got.begin(), got.end());
      }
    }
    results.push_back(std::move(all));
    CHECK(results.back() == results.front(), slots, " slots");
  }
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
