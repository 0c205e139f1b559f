// SPDX-License-Identifier: Apache-2.0
// A small pool of threads that sleep between steps. Not OpenMP: no second runtime beside torch's,
// and nothing that ThreadSanitizer cannot see through.
#pragma once

#include <cstdint>
#include <functional>

namespace hift::cpu {

/// Calls `body(begin, end)` on disjoint ranges that cover [0, count), on the caller and on up to
/// `threads` - 1 workers, and returns when all are done. Ranges begin at multiples of `grain` and
/// are no longer than it, unless the caller does all alone; a thread that is held up leaves its
/// share to the others. Workers take the caller's floating-point mode (flush-to-zero, rounding).
/// `body` must not throw. Calls from several threads take turns; after a fork the child gets
/// workers of its own.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace hift::cpu
