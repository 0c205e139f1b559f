// SPDX-License-Identifier: Apache-2.0
// The engine: acquire -> step -> release over the pages of one group, then the next group's pages
// start to move in. It joins the pager, which knows bytes, with the update, which knows arithmetic.
// One lock, one call a step.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/intervals.h"
#include "core/span.h"
#include "engine_compute.h"
#include "paging/file_store.h"
#include "paging/owner.h"
#include "paging/pager.h"
#include "paging/store.h"

namespace hift {

struct EngineOptions {
  std::string store = "ram";          // "ram", "disk" (unlinked scratch) or "disk:PATH"
  std::int64_t page_bytes = 8 << 20;  // upper bound of a page's record
  // Bytes of ring in compute memory; kWholeGroup: room for the largest group; 0: none, pages in
  // host memory are updated where they are (on a GPU over the bus). On the host they always are.
  std::int64_t staging = kWholeGroup;
  int readers = 2;  // threads that bring pages in from a file, and that write them back
  int writers = 2;
  StateType state_type = StateType::kFloat32;
  // Streams come in this order: the rule's state, a master if there is one, a scale for each state
  // that is kept as codes.
  int states = kEveryStream;
  bool master = false;

  static constexpr std::int64_t kWholeGroup = -1;
  static constexpr int kEveryStream = -1;
};

/// One parameter's part in a step. `item` is its place in the group, as given to `add_groups`;
/// `key` is that of its random numbers, `shard` the number of elements before the item's where it
/// is a part of a parameter.
struct Update {
  std::int64_t item = 0;
  void* param = nullptr;
  const void* grad = nullptr;
  std::int32_t rule = 0;
  DType param_dtype = DType::kFloat32;
  DType grad_dtype = DType::kFloat32;
  Weights weights = Weights::kNearest;
  float grad_factor = 1.0f;
  std::uint64_t key = 0;
  std::int64_t shard = 0;
  std::array<float, kMaxHyper> hyper{};  // the rule's Hyper, float by float
  int hypers = 0;                        // of them
};

/// Times on a GPU are those known by now: of the step before, mostly.
struct StepReport {
  PagerCounters moved;   // since the last step
  double update_ms = 0;  // arithmetic
  double step_ms = 0;    // the host, in this call
};

class Engine {
 public:
  /// `compute` is the host's if there is none; `store` replaces the one that the options name.
  Engine(std::vector<Stream> streams, EngineOptions options,
         std::unique_ptr<Compute> compute = nullptr, std::unique_ptr<Store> store = nullptr);
  ~Engine();

  /// Adds groups; `counts[g][i]` is the number of elements of item i of group g. All or nothing.
  void add_groups(const std::vector<std::vector<std::int64_t>>& counts);

  /// Updates `group`, then prefetches `next` (negative: nothing). Items of one call ascend.
  /// Where the ring holds the whole group, every page is brought in before the first weight
  /// changes, so that a failed read changes nothing; where it does not, the error says how many
  /// pages were already updated.
  /// On a GPU all of it is queued behind the work on `stream` (a CUDA stream handle; one that is
  /// new to the engine comes after the last one, by the caller's care as everywhere in CUDA), and
  /// scalars and tensors must stay until that is done.
  StepReport step(int group, const std::vector<Update>& updates, const Scaling& scaling,
                  int threads, int next, void* stream = nullptr, bool stochastic_state = false);

  /// Copies the values of `count` elements of one stream of an item, from element `begin` of the
  /// item on. Where elements share a value, `begin` is the first of those that do.
  void read(int group, std::int64_t item, int stream, std::int64_t begin, std::int64_t count,
            std::byte* to);
  void write(int group, std::int64_t item, int stream, std::int64_t begin, std::int64_t count,
             const std::byte* from);

  /// For state that rests in host memory: the item's stream in place, and the slab that keeps it
  /// alive. Null for files. Pages the item lies in are given their fill value first, as they would
  /// be by a first visit.
  std::byte* address(int group, std::int64_t item, int stream, std::shared_ptr<Slab>* owner);

  /// Elements of the item in each page it lies in, in order.
  std::vector<std::int64_t> parts(int group, std::int64_t item);

  /// Where a page has some of an item's elements in the page file.
  struct Place {
    std::int64_t elements;
    bool touched;                       // false: the file has nothing of them yet
    std::vector<std::int64_t> offsets;  // of each stream's first, bytes from the file's beginning
  };
  /// Of each page the item lies in, in order; after `flush` the file has there what `read` gives.
  /// None for state that rests in host memory.
  std::vector<Place> places(int group, std::int64_t item);
  int file() const { return store_->file(); }  // descriptor of the page file, or -1

  void prefetch(int group);
  void flush();

  /// When copies, updates and waits ran. On a GPU a step tells those that are done by then.
  IntervalLog& intervals() { return intervals_; }

  std::int64_t store_bytes() const { return store_->bytes(); }       // reserved where pages rest
  std::int64_t staging_bytes() const;                                // ring in compute memory
  std::int64_t page_bytes() const { return options_.page_bytes; }    // at most, of a page's record
  std::int64_t touched_bytes() const;                                // of pages that hold something
  std::string description() const { return store_->description(); }  // with its fallbacks
  std::string folder() const { return store_->folder(); }  // where its file is, "" without one
  const std::vector<Stream>& streams() const { return table_.streams(); }

 private:
  struct Item {
    std::int64_t begin;  // in the group's elements
    std::int64_t count;
  };
  const Item& item(int group, std::int64_t index, std::int64_t begin, std::int64_t count) const;
  struct Step;
  /// Locks the engine. Throws in a forked child.
  std::unique_lock<std::mutex> enter();
  void make_pager();
  void throw_deferred();
  void update_in_place(const Step& step);
  void update_in_ring(const Step& step);
  std::vector<Span> spans_of(const Page& page, const PageView& view, const Step& step) const;
  std::byte* reach(const Page& page, const PageView& view, int stream, std::int64_t begin) const;
  void check(int group, const std::vector<Update>& updates) const;

  OwnerProcess owner_;
  IntervalLog intervals_;  // outlives those who write to it
  EngineOptions options_;
  std::mutex mutex_;
  PageTable table_;
  std::vector<std::vector<Item>> items_;
  std::unique_ptr<Store> store_;
  RamStore* ram_ = nullptr;  // store_, if it is one
  std::unique_ptr<Compute> compute_;
  std::unique_ptr<Mover> mover_;
  std::unique_ptr<Pager> pager_;
  std::exception_ptr deferred_;  // of the prefetch after a step that was done
};

}  // namespace hift
