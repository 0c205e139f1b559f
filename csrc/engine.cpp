// SPDX-License-Identifier: Apache-2.0
// Pages of a group are updated in order. In place they join into whole parameters again, so that
// one parallel pass covers the group; through a ring each page is a pass of its own, while its
// neighbours travel.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "cpu/step.h"

namespace hift {
namespace {

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Parameters start on a cache line of their fp32 streams, or with a run of elements that share a
// value.
constexpr std::int64_t kItemElements = 16;

std::int64_t item_elements(const std::vector<Stream>& streams) {
  std::int64_t unit = kItemElements;
  for (const Stream& s : streams) unit = std::max(unit, s.run);
  return unit;
}

std::unique_ptr<Store> make_store(const std::string& name) {
  if (name == "ram") return std::make_unique<RamStore>();
  if (name == "disk") return std::make_unique<FileStore>("");
  check_argument(name.rfind("disk:", 0) == 0 && name.size() > 5, "store '", name,
                 "' is not one of 'ram', 'disk', 'disk:PATH'");
  return std::make_unique<FileStore>(name.substr(5));
}

/// Whether `b` goes on where `a` ends, in every buffer, under the same rule.
bool continues(const Span& a, const Span& b) {
  const auto follows = [&](const void* first, const void* second, std::int64_t size) {
    return static_cast<const std::byte*>(first) + a.count * size == second;
  };
  if (a.rule != b.rule || a.param_dtype != b.param_dtype || a.grad_dtype != b.grad_dtype)
    return false;
  if (a.weights != b.weights || a.key != b.key) return false;
  // Of the same parameter, or of one whose random numbers and blocks do not depend on that.
  const bool counted = a.key != 0 || a.state_type == StateType::kCode8;
  if (counted && (b.first != a.first + a.count || b.shard != a.shard)) return false;
  if (a.grad_factor != b.grad_factor || std::memcmp(a.hyper, b.hyper, sizeof a.hyper) != 0)
    return false;
  if (!follows(a.param, b.param, size_of(a.param_dtype)) ||
      !follows(a.grad, b.grad, size_of(a.grad_dtype)))
    return false;
  for (int s = 0; s < cpu::rule(a.rule).states; ++s) {
    if (!follows(a.state[s], b.state[s], size_of(a.state_type))) return false;
  }
  return a.master == nullptr || follows(a.master, b.master, master_size(a.weights));
}

}  // namespace

Engine::Engine(std::vector<Stream> streams, EngineOptions options, std::unique_ptr<Compute> compute,
               std::unique_ptr<Store> store)
    : options_(std::move(options)),
      table_(std::move(streams), options_.page_bytes),
      store_(store != nullptr ? std::move(store) : make_store(options_.store)),
      compute_(compute != nullptr ? std::move(compute) : make_host_compute()) {
  check_argument(options_.staging >= EngineOptions::kWholeGroup,
                 "staging must not be negative: ", options_.staging);
  check_argument(options_.readers >= 1 && options_.writers >= 1,
                 "readers and writers must be at least 1: ", options_.readers, ", ",
                 options_.writers);
  if (options_.states == EngineOptions::kEveryStream) {
    options_.states = static_cast<int>(table_.streams().size());
  }
  const int scales = options_.state_type == StateType::kCode8 ? options_.states : 0;
  check_argument(options_.states >= 0 && static_cast<int>(table_.streams().size()) ==
                                             options_.states + (options_.master ? 1 : 0) + scales,
                 table_.streams().size(), " streams are not those of ", options_.states,
                 " states, ", options_.master ? "a" : "no", " master and ", scales, " scales");
  for (int s = 0; s < options_.states; ++s) {
    const std::int64_t bytes = table_.streams()[s].bytes(kPageElements);
    check_argument(bytes == kPageElements * size_of(options_.state_type), "state of ",
                   size_of(options_.state_type), " bytes an element is in a stream of ", bytes,
                   " bytes for ", kPageElements);
  }
  ram_ = dynamic_cast<RamStore*>(store_.get());
  compute_->log_to(intervals_);
}

Engine::~Engine() = default;

void Engine::add_groups(const std::vector<std::vector<std::int64_t>>& counts) {
  const auto lock = enter();
  PageTable table = table_;
  std::vector<std::vector<Item>> items = items_;
  const std::int64_t unit = item_elements(table_.streams());
  for (const auto& group : counts) {
    std::int64_t end = 0;
    items.emplace_back();
    for (const std::int64_t count : group) {
      check_argument(count >= 0, "an item's count must not be negative: ", count);
      items.back().push_back({end, count});
      end += (count + unit - 1) / unit * unit;
    }
    table.add_group(end);
  }
  // The pager and the ring go, and what they hold with them.
  if (pager_ != nullptr) pager_->flush();
  store_->grow(table);
  // The pager and the mover refer to the table: they go before it changes and are made anew after.
  pager_.reset();
  mover_.reset();
  table_ = std::move(table);
  items_ = std::move(items);
  make_pager();
}

void Engine::make_pager() {
  int slots = 0;
  const std::int64_t slot_bytes = table_.max_record_bytes();
  const bool in_place = ram_ != nullptr && (!compute_->has_own_memory() || options_.staging == 0);
  if (!in_place && slot_bytes > 0) {
    std::int64_t staging = options_.staging, largest = 2;
    for (int g = 0; g < table_.groups(); ++g)
      largest = std::max(largest, table_.end_page(g) - table_.first_page(g));
    if (staging == EngineOptions::kWholeGroup) staging = largest * slot_bytes;
    check_argument(staging >= 2 * slot_bytes, "staging of ", staging,
                   " bytes does not hold two pages of ", slot_bytes,
                   " bytes: pass a larger staging or a smaller page_bytes");
    slots = static_cast<int>(std::min(staging / slot_bytes, largest));
    mover_ = compute_->make_mover(*store_, table_, slots, slot_bytes, options_.readers,
                                  options_.writers);
    mover_->log_to(intervals_);
  }
  pager_ = std::make_unique<Pager>(table_, *store_, mover_.get(), slots);
}

void Engine::check(int group, const std::vector<Update>& updates) const {
  check_argument(group >= 0 && group < table_.groups(), "group ", group, " is not one of ",
                 table_.groups());
  std::int64_t previous = -1;
  for (const Update& u : updates) {
    check_argument(u.item > previous, "items of a step must ascend: ", u.item, " after ", previous);
    check_argument(u.item < static_cast<std::int64_t>(items_[group].size()), "item ", u.item,
                   " is not one of group ", group, "'s ", items_[group].size());
    const RuleEntry& rule = cpu::rule(u.rule);
    check_argument(u.hypers == rule.hypers, "rule ", rule.name, " takes ", rule.hypers,
                   " hyper-parameters, not ", u.hypers);
    check_argument(rule.states <= options_.states, "rule ", rule.name, " needs ", rule.states,
                   " state streams; the pages have ", options_.states);
    check_argument(
        master_size(u.weights) == 0 || (options_.master && table_.streams()[options_.states].bytes(
                                                               1) == master_size(u.weights)),
        "masters of ", master_size(u.weights), " bytes an element have no stream in the pages");
    previous = u.item;
  }
}

struct Engine::Step {
  int group;
  const std::vector<Update>& updates;
  const Scaling& scaling;
  int threads;
  void* stream;
  bool stochastic_state;
};

/// Where compute finds element `begin` of the group in one of the page's streams.
std::byte* Engine::reach(const Page& page, const PageView& view, int stream,
                         std::int64_t begin) const {
  std::byte* const value = view.stream[stream] + streams()[stream].bytes(begin - page.begin);
  return mover_ != nullptr ? value : compute_->reach(*ram_, table_, page.group, value);
}

std::vector<Span> Engine::spans_of(const Page& page, const PageView& view, const Step& step) const {
  const std::vector<Item>& items = items_[page.group];
  const std::vector<Update>& updates = step.updates;
  std::vector<Span> spans;
  auto u = std::partition_point(updates.begin(), updates.end(), [&](const Update& update) {
    return items[update.item].begin + items[update.item].count <= page.begin;
  });
  for (; u != updates.end() && items[u->item].begin < page.begin + page.count; ++u) {
    const Item& item = items[u->item];
    const std::int64_t begin = std::max(item.begin, page.begin);
    Span s;
    s.count = std::min(item.begin + item.count, page.begin + page.count) - begin;
    if (s.count <= 0) continue;
    s.param = static_cast<std::byte*>(u->param) + (begin - item.begin) * size_of(u->param_dtype);
    s.grad = static_cast<const std::byte*>(u->grad) + (begin - item.begin) * size_of(u->grad_dtype);
    const int scales = options_.states + (options_.master ? 1 : 0);
    for (int i = 0; i < cpu::rule(u->rule).states; ++i) {
      s.state[i] = reach(page, view, i, begin);
      if (options_.state_type == StateType::kCode8) {
        s.scale[i] = reinterpret_cast<float*>(reach(page, view, scales + i, begin));
      }
    }
    if (master_size(u->weights) > 0) s.master = reach(page, view, options_.states, begin);
    std::copy(u->hyper.begin(), u->hyper.begin() + u->hypers, s.hyper);
    s.grad_factor = u->grad_factor;
    s.rule = u->rule;
    s.param_dtype = u->param_dtype;
    s.grad_dtype = u->grad_dtype;
    s.state_type = options_.state_type;
    s.weights = u->weights;
    s.stochastic_state = step.stochastic_state;
    s.key = u->key;
    s.first = begin - item.begin;
    s.shard = u->shard;
    spans.push_back(s);
  }
  return spans;
}

StepReport Engine::step(int group, const std::vector<Update>& updates, const Scaling& scaling,
                        int threads, int next, void* stream, bool stochastic_state) {
  const auto lock = enter();
  const auto start = Clock::now();
  throw_deferred();
  check(group, updates);
  check_argument(next < table_.groups(), "next group ", next, " is not one of ", table_.groups());
  const Step step{group, updates, scaling, threads, stream, stochastic_state};
  if (mover_ == nullptr) {
    update_in_place(step);
  } else {
    update_in_ring(step);
  }
  try {
    if (next >= 0) pager_->prefetch(next);
  } catch (...) {
    // This step is done: weights and state agree. The next call tells, before it changes anything.
    deferred_ = std::current_exception();
  }
  StepReport report;
  report.moved = pager_->take_counters();
  report.update_ms = compute_->take_update_ms();
  report.step_ms = ms_since(start);
  return report;
}

void Engine::update_in_place(const Step& step) {
  const std::int64_t first = table_.first_page(step.group), end = table_.end_page(step.group);
  std::vector<Span> joined;
  std::int64_t acquired = first;
  const auto let_go = [&](bool dirty) {
    for (std::int64_t p = first; p < acquired; ++p) pager_->release(p, step.stream, dirty);
  };
  try {
    while (acquired < end) {
      const Page& page = table_.page(acquired);
      const PageView view = pager_->acquire(page.index, step.stream);
      ++acquired;
      for (const Span& s : spans_of(page, view, step)) {
        if (!joined.empty() && continues(joined.back(), s)) {
          joined.back().count += s.count;
        } else {
          joined.push_back(s);
        }
      }
    }
    compute_->step(joined.data(), joined.size(), step.scaling, step.threads, step.stream);
  } catch (...) {
    let_go(false);
    throw;
  }
  let_go(true);
}

void Engine::update_in_ring(const Step& step) {
  const std::int64_t first = table_.first_page(step.group), end = table_.end_page(step.group);
  // A file may fail to give a page: all are here before the first changes, if the ring has room.
  const bool at_once = ram_ == nullptr && end - first <= pager_->slots();
  std::vector<PageView> views;
  std::int64_t released = first;
  const auto update = [&](std::int64_t p) {
    const std::vector<Span> spans = spans_of(table_.page(p), views[p - first], step);
    compute_->step(spans.data(), spans.size(), step.scaling, step.threads, step.stream);
    pager_->release(p, step.stream, true);
    released = p + 1;
  };
  try {
    for (std::int64_t p = first; p < end; ++p) {
      views.push_back(pager_->acquire(p, step.stream));
      if (!at_once) update(p);
    }
    for (std::int64_t p = released; p < end; ++p) update(p);
  } catch (const std::exception& error) {
    const std::int64_t updated = released - first;
    for (; released < first + static_cast<std::int64_t>(views.size()); ++released) {
      pager_->release(released, step.stream, false);
    }
    if (updated == 0) throw;
    throw std::runtime_error(text(
        "the step stopped after ", updated, " of ", end - first, " pages of group ", step.group,
        " had been updated; repeat it only from a checkpoint. Cause: ", error.what()));
  }
}

const Engine::Item& Engine::item(int group, std::int64_t index, std::int64_t begin,
                                 std::int64_t count) const {
  check_argument(group >= 0 && group < table_.groups(), "group ", group, " is not one of ",
                 table_.groups());
  check_argument(index >= 0 && index < static_cast<std::int64_t>(items_[group].size()), "item ",
                 index, " is not one of group ", group, "'s ", items_[group].size());
  const Item& it = items_[group][index];
  check_argument(begin >= 0 && count >= 0 && begin <= it.count && count <= it.count - begin,
                 "elements [", begin, ", ", begin, " + ", count, ") are outside the item's ",
                 it.count);
  return it;
}

void Engine::read(int group, std::int64_t index, int stream, std::int64_t begin, std::int64_t count,
                  std::byte* to) {
  const auto lock = enter();
  // Over the bus, pages change in host memory.
  compute_->wait();
  pager_->read(group, stream, item(group, index, begin, count).begin + begin, count, to);
}

void Engine::write(int group, std::int64_t index, int stream, std::int64_t begin,
                   std::int64_t count, const std::byte* from) {
  const auto lock = enter();
  // Over the bus, pages change in host memory.
  compute_->wait();
  pager_->write(group, stream, item(group, index, begin, count).begin + begin, count, from);
}

std::byte* Engine::address(int group, std::int64_t index, int stream,
                           std::shared_ptr<Slab>* owner) {
  const auto lock = enter();
  const Item& it = item(group, index, 0, 0);
  check_argument(stream >= 0 && stream < static_cast<int>(streams().size()), "stream ", stream,
                 " is not one of ", streams().size());
  if (ram_ == nullptr) return nullptr;
  const std::int64_t last = it.begin + std::max<std::int64_t>(it.count, 1) - 1;
  if (it.count > 0) {
    for (std::int64_t p = table_.page_of(group, it.begin); p <= table_.page_of(group, last); ++p) {
      if (table_.page(p).touched) continue;
      pager_->acquire(p, nullptr);
      pager_->release(p, nullptr, true);
    }
  }
  // What the view shows has been computed and has come back.
  compute_->wait();
  pager_->flush();
  *owner = ram_->slab(group);
  return ram_->stream_address(table_, group, stream) + streams()[stream].bytes(it.begin);
}

std::vector<std::int64_t> Engine::parts(int group, std::int64_t index) {
  const auto lock = enter();
  const Item& it = item(group, index, 0, 0);
  return table_.parts(group, it.begin, it.count);
}

void Engine::prefetch(int group) {
  const auto lock = enter();
  check_argument(group >= 0 && group < table_.groups(), "group ", group, " is not one of ",
                 table_.groups());
  pager_->prefetch(group);
}

std::unique_lock<std::mutex> Engine::enter() {
  // Before the lock: a fork may have come while another thread held it, and that thread is not
  // here.
  owner_.check("the optimizer's state");
  return std::unique_lock<std::mutex>(mutex_);
}

void Engine::throw_deferred() {
  if (deferred_ != nullptr) std::rethrow_exception(std::exchange(deferred_, nullptr));
}

void Engine::flush() {
  const auto lock = enter();
  throw_deferred();
  // All state is to be in the store.
  compute_->wait();
  if (pager_ != nullptr) pager_->flush();
}

std::int64_t Engine::staging_bytes() const {
  return pager_ == nullptr ? 0 : pager_->resident_bytes();
}

std::int64_t Engine::touched_bytes() const {
  std::int64_t bytes = 0;
  for (int g = 0; g < table_.groups(); ++g) {
    for (std::int64_t p = table_.first_page(g); p < table_.end_page(g); ++p) {
      if (table_.page(p).touched) bytes += table_.bytes_of(table_.page(p).count);
    }
  }
  return bytes;
}

}  // namespace hift
