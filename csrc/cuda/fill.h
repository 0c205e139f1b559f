// SPDX-License-Identifier: Apache-2.0
// Filling device memory with a pattern of 32 bits, which the runtime's own memset cannot.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hift::cuda {

/// Writes `pattern`, an element of `element_bytes` (1, 2 or 4) bytes, into `count` elements from
/// `to` on, on `stream` of `device`. `to` and the bytes written are multiples of 4.
void fill(std::byte* to, std::int64_t count, std::int64_t element_bytes, std::uint32_t pattern,
          int device, void* stream);

}  // namespace hift::cuda
