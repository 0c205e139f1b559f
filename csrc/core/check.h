// SPDX-License-Identifier: Apache-2.0
// Checks that throw: every size and address that crosses a boundary is checked, and the error
// carries the value. std::invalid_argument becomes ValueError in Python, std::runtime_error
// RuntimeError, std::system_error OSError.
#pragma once

#include <cerrno>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace hift {

/// Concatenates its arguments as a stream would print them.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Throws std::invalid_argument with `parts` unless `ok`: the caller passed something wrong.
template <class... Parts>
void check_argument(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(text(parts...));
}

/// Throws std::logic_error with `parts` unless `ok`: calls came in an illegal order.
template <class... Parts>
void check_order(bool ok, const Parts&... parts) {
  if (!ok) throw std::logic_error(text(parts...));
}

/// Throws std::system_error for `error` (errno by default) with `parts` in front of the system's
/// own words.
template <class... Parts>
[[noreturn]] void throw_errno(int error, const Parts&... parts) {
  throw std::system_error(error, std::generic_category(), text(parts...));
}

}  // namespace hift
