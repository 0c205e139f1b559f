// SPDX-License-Identifier: Apache-2.0
// The order of copies as bookkeeping: random copies on few slots and pages, ended in any order and
// with any failures, against the rules of mover.h checked one by one.
#include <algorithm>
#include <deque>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "paging/copy_queue.h"

using namespace hift;

namespace {

Page page_of(std::int64_t index) {
  Page page;
  page.index = index;
  return page;
}

std::exception_ptr error_of(const char* words) {
  return std::make_exception_ptr(std::runtime_error(words));
}

}  // namespace

TEST(only_the_first_in_both_lines_may_run) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const int slots = 1 + random() % 4, pages = 1 + random() % 5;
    CopyQueue queue(slots);
    struct Issued {
      Copy copy;
      std::uint64_t number;
    };
    std::vector<Issued> open;  // by issue: what has not ended
    std::vector<std::pair<CopyQueue::Ticket, std::uint64_t>> running;
    std::uint64_t numbers = 0;
    for (int turn = 0; turn < 200; ++turn) {
      if (random() % 2 == 0 && open.size() < 12) {
        Copy copy;
        copy.page = page_of(random() % pages);
        copy.slot = static_cast<int>(random() % slots);
        copy.out = random() % 2 == 0;
        queue.push(copy.page, copy.slot, copy.out);
        open.push_back({copy, numbers++});
      }
      const bool out = random() % 2 == 0;
      if (queue.ready(out) && random() % 2 == 0) {
        const auto ticket = queue.take(out);
        const Copy& copy = queue.copy(ticket);
        CHECK(copy.out == out && queue.doomed(ticket) == nullptr);
        const auto self = std::find_if(open.begin(), open.end(),
                                       [&](const Issued& i) { return i.copy.slot == copy.slot; });
        CHECK(self != open.end() && self->copy.page.index == copy.page.index &&
                  self->copy.out == copy.out,
              "not the oldest of its slot");
        for (auto i = open.begin(); i != self; ++i) {
          CHECK(i->copy.page.index != copy.page.index, "an older copy of the page has not ended");
        }
        running.emplace_back(ticket, self->number);
      }
      if (!running.empty() && random() % 3 == 0) {
        const auto one = running.begin() + random() % running.size();
        queue.finish(one->first, nullptr);
        open.erase(std::find_if(open.begin(), open.end(),
                                [&](const Issued& i) { return i.number == one->second; }));
        running.erase(one);
      }
      CHECK(running.size() > 0 || open.empty() || queue.ready(false) || queue.ready(true), "stuck");
      CHECK(queue.idle() == open.empty());
      for (int s = 0; s < slots; ++s) {
        CHECK(queue.idle(s) == std::none_of(open.begin(), open.end(),
                                            [&](const Issued& i) { return i.copy.slot == s; }));
      }
    }
  }
}

TEST(failures_lose_nothing) {
  // What the bytes are, followed copy by copy: a slot holds a version of a page, the store one of
  // each. A page's newest version must be in the store, or be the unsaved one of a slot.
  for (unsigned seed = 0; seed < 400; ++seed) {
    std::mt19937 random(seed);
    const int slots = 1 + random() % 4, pages = 1 + random() % 4;
    CopyQueue queue(slots);
    std::vector<int> store(pages, 0), newest(pages, 0);
    std::vector<std::pair<std::int64_t, int>> slot(slots, {-1, 0});
    std::vector<std::deque<int>> seen(slots);  // per copy: the page's newest version at its issue
    const auto push = [&](std::int64_t page, int s, bool out) {
      queue.push(page_of(page), s, out);
      seen[s].push_back(newest[page]);
    };
    const auto retry = [&](int s) {
      if (queue.error(s) && queue.unsaved(s) >= 0) seen[s].push_back(0);
      queue.retry(s);
    };
    const auto run = [&](bool out) {
      const auto ticket = queue.take(out);
      const Copy copy = queue.copy(ticket);
      const auto page = copy.page.index;
      std::exception_ptr error = queue.doomed(ticket);
      if (!error && random() % 4 == 0) {
        error = error_of("disk");
        if (out) store[page] = -1;  // torn
      } else if (!error && out) {
        store[page] = slot[copy.slot].second;
      } else if (!error) {
        const int wanted = seen[copy.slot].front();
        CHECK(store[page] == wanted, "page ", page, " comes in as ", store[page], ", not ", wanted);
        slot[copy.slot] = {page, store[page]};
      }
      if (error && !out) slot[copy.slot] = {-1, 0};
      seen[copy.slot].pop_front();
      if (error) seen[copy.slot].clear();
      queue.finish(ticket, error);
    };
    for (int turn = 0; turn < 300; ++turn) {
      for (const bool out : {false, true}) {
        if (queue.ready(out) && random() % 2 == 0) run(out);
      }
      const int s = static_cast<int>(random() % slots);
      if (queue.error(s)) {
        CHECK_THROWS(std::runtime_error, "disk", queue.push(page_of(0), s, false));
        CHECK(queue.idle(s));
        if (random() % 3 == 0) retry(s);
        continue;
      }
      if (!queue.idle(s)) {
        // Behind a write-back the next page may be asked for.
        if (random() % 3 == 0) push(random() % pages, s, false);
        continue;
      }
      // The owner changes the page that is there, if it is the newest, and sends it back.
      const auto [page, version] = slot[s];
      if (page >= 0 && version == newest[page] && random() % 2 == 0) {
        slot[s].second = ++newest[page];
        push(page, s, true);
        if (random() % 2 == 0) push(random() % pages, s, false);
      } else {
        push(random() % pages, s, false);
      }
    }
    // The cause is cured: everything gets home.
    for (int round = 0; round < 1000; ++round) {
      for (int s = 0; s < slots; ++s) retry(s);
      for (const bool out : {false, true}) {
        if (queue.ready(out)) run(out);
      }
    }
    for (int p = 0; p < pages; ++p) {
      bool found = store[p] == newest[p];
      for (int s = 0; s < slots; ++s) {
        found = found || (queue.unsaved(s) == p && slot[s].second == newest[p]);
      }
      CHECK(found, "seed ", seed, ": page ", p, " is lost");
    }
  }
}

TEST(a_newer_write_back_replaces_a_lost_one) {
  CopyQueue queue(2);
  queue.push(page_of(5), 0, true);
  queue.finish(queue.take(true), error_of("full"));
  CHECK(queue.unsaved(0) == 5 && queue.unsaved(1) == -1);
  queue.push(page_of(5), 1, true);
  CHECK(queue.unsaved(0) == -1, "the old bytes would follow the new");
  queue.retry(0);
  CHECK(queue.idle(0));
  queue.finish(queue.take(true), nullptr);
  queue.push(page_of(5), 0, false);
  CHECK(queue.doomed(queue.take(false)) == nullptr);
}

TEST(a_newer_write_back_on_its_way_replaces_a_failing_one) {
  CopyQueue queue(2);
  queue.push(page_of(5), 0, true);
  queue.push(page_of(5), 1, true);
  queue.finish(queue.take(true), error_of("full"));
  CHECK(queue.unsaved(0) == -1);
  queue.finish(queue.take(true), nullptr);
  queue.retry(0);
  CHECK(queue.idle(), "the old bytes follow the new");
}

TEST(useless_fetches_are_dropped) {
  CopyQueue queue(3);
  queue.push(page_of(0), 0, true);
  queue.push(page_of(1), 0, false);
  queue.push(page_of(2), 1, false);
  queue.push(page_of(2), 1, true);
  queue.push(page_of(3), 2, false);
  const auto started = queue.take(false), leaving = queue.take(true);
  queue.drop_useless_fetches();
  CHECK(!queue.ready(true), "what runs already may not run again");
  CHECK(queue.copy(started).page.index == 2);
  queue.finish(started, nullptr);
  CHECK(!queue.ready(false) && queue.idle(2), "page 1 and 3 are not wanted any more");
  queue.finish(leaving, nullptr);
  queue.finish(queue.take(true), nullptr);
  CHECK(queue.idle());
}

TEST(the_first_error_is_the_oldest) {
  CopyQueue queue(2);
  queue.push(page_of(1), 1, true);
  queue.push(page_of(0), 0, true);
  queue.finish(queue.take(true), error_of("first"));
  queue.finish(queue.take(true), error_of("second"));
  CHECK_THROWS(std::runtime_error, "first", std::rethrow_exception(queue.first_error()));
  queue.retry(1);
  CHECK_THROWS(std::runtime_error, "second", std::rethrow_exception(queue.first_error()));
  queue.retry(0);
  CHECK(queue.first_error() == nullptr);
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
