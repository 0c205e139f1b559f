// SPDX-License-Identifier: Apache-2.0
// State that is kept as 8-bit codes, as floats and back: for state_dicts, not for steps.
#pragma once

#include <cstdint>

namespace hift::cpu {

/// Blocks are counted from the first of the `count` elements; each has a scale.
void decode(const std::uint8_t* codes, const float* scales, std::int64_t count, bool is_signed,
            float* to);

/// Rounds to nearest. What `decode` gave is encoded as it was.
void encode(const float* from, std::int64_t count, bool is_signed, std::uint8_t* codes,
            float* scales);

}  // namespace hift::cpu
