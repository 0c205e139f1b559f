// SPDX-License-Identifier: Apache-2.0
// A kernel's operand: at a chosen distance from an aligned address, and with what lies around it
// under watch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace hift_test {

/// Elements that begin `offset` elements after a 64-byte boundary, between sentinels that compare
/// along with them.
class Buffer {
 public:
  Buffer(std::int64_t count, int offset, std::size_t element)
      : lines_(3 + (count + offset) * element / sizeof(Line)),
        begin_(sizeof(Line) + offset * element),
        bytes_(count * element) {
    std::memset(lines_.data(), 0xa5, lines_.size() * sizeof(Line));
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(lines_.data()) + begin_);
  }
  std::size_t bytes() const { return bytes_; }
  bool operator==(const Buffer& other) const {
    return std::memcmp(lines_.data(), other.lines_.data(), lines_.size() * sizeof(Line)) == 0;
  }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> lines_;
  std::size_t begin_, bytes_;
};

}  // namespace hift_test
