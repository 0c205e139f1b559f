// SPDX-License-Identifier: Apache-2.0
// Where state lies in the page file, for those who take it from there in whole blocks. A record is
// the same whoever moves it: movers to a GPU take it as it is.
#include "engine.h"

#include <utility>

namespace hift {

std::vector<Engine::Place> Engine::places(int group, std::int64_t index) {
  const auto lock = enter();
  const Item& it = item(group, index, 0, 0);
  std::vector<Place> all;
  if (store_->file() < 0) return all;
  std::int64_t begin = it.begin;
  for (const std::int64_t elements : table_.parts(group, it.begin, it.count)) {
    const Page& page = table_.page(table_.page_of(group, begin));
    Place place{elements, page.touched, {}};
    for (int s = 0; s < static_cast<int>(streams().size()); ++s) {
      place.offsets.push_back(store_->record_begin(page) + table_.stream_offset(page, s) +
                              streams()[s].bytes(begin - page.begin));
    }
    all.push_back(std::move(place));
    begin += elements;
  }
  return all;
}

}  // namespace hift
