// SPDX-License-Identifier: Apache-2.0
// The engine: steps through rings of every size against steps in place, to the bit; what a failed
// read leaves behind; groups that come later; calls that are wrong.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "cpu/step.h"

namespace {

using hift::Engine;
using hift::EngineOptions;
using hift::Update;

using Buffers = std::vector<std::vector<float>>;

const std::vector<std::vector<std::int64_t>> kCounts = {
    {5, 0, 3000, 17}, {1}, {2048, 4096}, {256, 255, 257, 1, 900}};

/// A model of fp32 parameters, stepped by AdamW with the same random gradients for every engine.
struct Model {
  std::vector<Buffers> params;

  Model() {
    std::mt19937 random(7);
    for (const auto& group : kCounts) {
      params.emplace_back();
      for (const std::int64_t count : group) {
        params.back().emplace_back(count);
        for (float& p : params.back().back())
          p = std::uniform_real_distribution<float>(-1, 1)(random);
      }
    }
  }

  hift::StepReport step(Engine& engine, int group, int visit, int next, int threads = 1) {
    std::mt19937 random(visit * 10 + group);
    Buffers grads;
    std::vector<Update> updates;
    for (std::size_t i = 0; i < params[group].size(); ++i) {
      grads.emplace_back(params[group][i].size());
      for (float& g : grads.back()) g = std::uniform_real_distribution<float>(-1, 1)(random);
    }
    for (std::size_t i = 0; i < params[group].size(); ++i) {
      if ((visit + i) % 5 == 4) continue;  // a parameter without a gradient
      Update u;
      u.item = static_cast<std::int64_t>(i);
      u.param = params[group][i].data();
      u.grad = grads[i].data();
      u.rule = hift::cpu::rule_number("adamw");
      u.hyper = {0.99f,  0.1f,  0.999f,
                 0.001f, 0.01f, static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, visit))),
                 1e-8f};
      u.hypers = 7;
      updates.push_back(u);
    }
    return engine.step(group, updates, {}, threads, next);
  }
};

EngineOptions disk(std::int64_t page_bytes, std::int64_t staging) {
  EngineOptions options;
  options.store = "disk";
  options.page_bytes = page_bytes;
  options.staging = staging;
  return options;
}

const std::vector<hift::Stream> kStreams = {{4, 0}, {4, 0x3f000000u}};  // the second starts at 0.5

void run(Engine& engine, Model& model, int threads) {
  for (int pass = 1; pass <= 4; ++pass) {
    for (int group = 0; group < 4; ++group)
      model.step(engine, group, pass, (group + 1) % 4, threads);
  }
}

Buffers state_of(Engine& engine, int stream) {
  Buffers all;
  for (int g = 0; g < 4; ++g) {
    for (std::size_t i = 0; i < kCounts[g].size(); ++i) {
      all.emplace_back(kCounts[g][i]);
      engine.read(g, static_cast<std::int64_t>(i), stream, 0, kCounts[g][i],
                  reinterpret_cast<std::byte*>(all.back().data()));
    }
  }
  return all;
}

TEST(every_ring_gives_the_bits_of_memory) {
  Engine memory(kStreams, {});
  memory.add_groups(kCounts);
  Model expected;
  run(memory, expected, 1);
  for (const std::int64_t page : {2048, 8192, 1 << 20}) {
    const std::int64_t slot = std::max<std::int64_t>(page, 4096);
    for (const std::int64_t slots : {2, 3, 0}) {
      for (const int threads : {1, 3}) {
        Engine engine(kStreams, disk(page, slots == 0 ? EngineOptions::kWholeGroup : slots * slot));
        engine.add_groups(kCounts);
        Model model;
        run(engine, model, threads);
        CHECK(model.params == expected.params, "page ", page, " slots ", slots, " threads ",
              threads);
        for (const int stream : {0, 1}) {
          CHECK(state_of(engine, stream) == state_of(memory, stream), "page ", page, " slots ",
                slots);
        }
        CHECK(slots == 0 || engine.staging_bytes() <= slots * slot, engine.staging_bytes());
      }
    }
  }
}

TEST(written_state_is_used_and_fill_is_seen_before_any_step) {
  for (const char* store : {"ram", "disk"}) {
    EngineOptions options = disk(4096, EngineOptions::kWholeGroup);
    options.store = store;
    Engine engine(kStreams, options);
    engine.add_groups(kCounts);
    const Buffers fill = state_of(engine, 1);
    for (const auto& item : fill)
      CHECK(std::all_of(item.begin(), item.end(), [](float v) { return v == 0.5f; }));
    CHECK(engine.touched_bytes() == 0, engine.touched_bytes());
    std::vector<float> moments(3000, 3.0f);
    engine.prefetch(0);
    engine.write(0, 2, 0, 0, 3000, reinterpret_cast<const std::byte*>(moments.data()));
    engine.write(0, 2, 0, 5, 1, reinterpret_cast<const std::byte*>(fill[0].data()));
    moments[5] = 0.5f;
    CHECK(state_of(engine, 0)[2] == moments, store);
    CHECK(state_of(engine, 1)[2] == fill[2], store);
    Model model;
    model.step(engine, 0, 1, 1);
    CHECK(state_of(engine, 0)[2] != moments, store);
  }
}

TEST(groups_may_come_later) {
  Engine early(kStreams, disk(4096, 8192)), late(kStreams, disk(4096, 8192));
  early.add_groups(kCounts);
  late.add_groups({kCounts.begin(), kCounts.begin() + 2});
  Model one, two;
  for (Engine* engine : {&early, &late}) {
    Model& model = engine == &early ? one : two;
    model.step(*engine, 0, 1, 1);
    model.step(*engine, 1, 1, 0);
  }
  late.add_groups({kCounts.begin() + 2, kCounts.end()});
  run(early, one, 1);
  run(late, two, 1);
  CHECK(one.params == two.params);
}

/// A file whose reads fail while `broken`, from the nth on.
class BrokenStore final : public hift::Store {
 public:
  void grow(const hift::PageTable& table) override { file_.grow(table); }
  std::byte* address(const hift::PageTable&, const hift::Page&, int) override { return nullptr; }
  void read(const hift::PageTable& table, const hift::Page& page, std::byte* record) override {
    if (page.group == broken_group && page.index >= broken_page) throw std::runtime_error("broken");
    file_.read(table, page, record);
  }
  void write(const hift::PageTable& table, const hift::Page& page,
             const std::byte* record) override {
    if (page.group == unwritable_group) throw std::runtime_error("unwritable");
    file_.write(table, page, record);
  }
  std::int64_t bytes() const override { return file_.bytes(); }
  std::string description() const override { return "broken"; }

  std::atomic<int> broken_group{-1}, unwritable_group{-1};
  std::atomic<std::int64_t> broken_page{0};

 private:
  hift::FileStore file_{""};
};

TEST(a_failed_read_changes_nothing_where_the_ring_holds_the_group) {
  auto owned = std::make_unique<BrokenStore>();
  BrokenStore& store = *owned;
  Engine engine(kStreams, disk(4096, EngineOptions::kWholeGroup), nullptr, std::move(owned)),
      healthy(kStreams, disk(4096, EngineOptions::kWholeGroup));
  engine.add_groups(kCounts);
  healthy.add_groups(kCounts);
  Model model, expected;
  run(engine, model, 1);
  run(healthy, expected, 1);
  engine.flush();
  store.broken_group = 2;
  engine.prefetch(3);  // group 2 leaves the ring
  engine.prefetch(0);
  const auto before = model.params;
  bool thrown = false;
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      model.step(engine, 2, 5, 3);
    } catch (const std::exception& error) {
      thrown = std::strstr(error.what(), "broken") != nullptr;
    }
    CHECK(model.params == before, "a weight changed in attempt ", attempt);
  }
  CHECK(thrown);
  store.broken_group = -1;
  for (int attempt = 0; attempt < 3; ++attempt) {  // the error is told once more at the most
    try {
      model.step(engine, 2, 5, 3);
      break;
    } catch (const std::exception&) {
      CHECK(attempt < 2);
    }
  }
  expected.step(healthy, 2, 5, 3);
  CHECK(model.params == expected.params);
  CHECK(state_of(engine, 0) == state_of(healthy, 0));
}

TEST(a_failed_write_is_told_by_the_next_step_and_loses_nothing) {
  auto owned = std::make_unique<BrokenStore>();
  BrokenStore& store = *owned;
  Engine engine(kStreams, disk(4096, 2 * 4096), nullptr, std::move(owned)),
      healthy(kStreams, disk(4096, EngineOptions::kWholeGroup));
  engine.add_groups(kCounts);
  healthy.add_groups(kCounts);
  Model model, expected;
  run(engine, model, 1);
  run(healthy, expected, 1);
  engine.flush();
  store.unwritable_group = 1;
  model.step(engine, 1, 5, 2);  // done, whatever becomes of its pages
  expected.step(healthy, 1, 5, 2);
  CHECK(model.params == expected.params);
  int told = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const auto before = model.params;
    try {
      engine.flush();
      model.step(engine, 1, 6, 2);
      break;
    } catch (const std::exception& error) {
      told += std::strstr(error.what(), "unwritable") != nullptr;
      CHECK(model.params == before, "attempt ", attempt);
      CHECK(state_of(engine, 0)[4] == state_of(healthy, 0)[4], "the page is readable");
      store.unwritable_group = attempt > 0 ? -1 : 1;  // cured after it was told twice
    }
  }
  CHECK(told == 2, told);
  expected.step(healthy, 1, 6, 2);
  CHECK(model.params == expected.params);
  CHECK(state_of(engine, 0) == state_of(healthy, 0));
}

TEST(a_small_ring_says_how_far_it_came) {
  auto owned = std::make_unique<BrokenStore>();
  BrokenStore& store = *owned;
  Engine engine(kStreams, disk(4096, 2 * 4096), nullptr, std::move(owned));
  engine.add_groups(kCounts);
  Model model;
  run(engine, model, 1);
  engine.flush();
  engine.prefetch(0);
  store.broken_page = 100;  // none yet
  store.broken_group = 2;
  engine.prefetch(2);
  store.broken_page = 0;
  std::string said;
  try {
    for (int attempt = 0; attempt < 2 && said.empty(); ++attempt) model.step(engine, 2, 5, 3);
  } catch (const std::exception& error) {
    said = error.what();
  }
  CHECK(said.find("broken") != std::string::npos, said);
}

TEST(wrong_calls_are_refused) {
  Engine engine(kStreams, disk(4096, EngineOptions::kWholeGroup));
  engine.add_groups(kCounts);
  float weight[5] = {}, grad[5] = {};
  Update good;
  good.param = weight;
  good.grad = grad;
  good.rule = hift::cpu::rule_number("adamw");
  good.hyper.fill(0.5f);
  good.hypers = 7;
  const auto step = [&](int group, std::vector<Update> updates, int next = -1) {
    return engine.step(group, updates, {}, 1, next);
  };
  step(0, {good});
  const auto with = [&](auto change) {
    Update u = good;
    change(u);
    return std::vector<Update>{u};
  };
  using Error = std::invalid_argument;
  CHECK_THROWS(Error, "group 4 is not one of 4", step(4, {}));
  CHECK_THROWS(Error, "next group 9", step(0, {good}, 9));
  CHECK_THROWS(Error, "items of a step must ascend", step(0, {good, good}));
  CHECK_THROWS(Error, "item 4 is not one of group 0's 4",
               step(0, with([](Update& u) { u.item = 4; })));
  CHECK_THROWS(Error, "takes 7 hyper-parameters, not 6",
               step(0, with([](Update& u) { --u.hypers; })));
  CHECK_THROWS(Error, "needs 3 state streams; the pages have 2",
               step(0, with([](Update& u) { u.rule = hift::cpu::rule_number("adamw_amsgrad"); })));
  CHECK_THROWS(Error, "null address", step(0, with([](Update& u) { u.grad = nullptr; })));
  CHECK_THROWS(Error, "outside the item's 5", engine.read(0, 0, 0, 3, 3, nullptr));
  CHECK_THROWS(Error, "must not be negative", engine.add_groups({{-1}}));
  CHECK_THROWS(Error, "does not hold two pages",
               Engine(kStreams, disk(1 << 20, 4096)).add_groups({{1 << 20}}));
  CHECK_THROWS(Error, "is not one of 'ram'", Engine(kStreams, [] {
                 EngineOptions options;
                 options.store = "tape";
                 return options;
               }()));
  step(0, {good}, 1);  // all of that left the engine usable
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
