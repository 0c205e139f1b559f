// SPDX-License-Identifier: Apache-2.0
// The norm of a group's gradients on a GPU, with the bits of cpu/norm.h. Both calls return at once:
// between them, on the same stream, several processes may add their totals up.
#pragma once

#include <cstddef>

#include "core/norm.h"

namespace hift::cuda {

/// Writes the sum of all gradients' squares to `total`, on `stream` (a CUDA stream handle) of
/// `device`. `sums` has a place for each of the gradients' blocks (`norm_blocks`); it, `total` and
/// the gradients stay until that is done. Throws std::invalid_argument for a gradient of an unknown
/// type, a negative count or no address, std::runtime_error for CUDA's own.
void sum_of_squares(const Gradient* gradients, std::size_t count, double* sums, double* total,
                    int device, void* stream);

/// Writes the norm and the coefficient of such a sum, behind the work on `stream`.
void write_clip(const double* total, const Clip& clip, int device, void* stream);

}  // namespace hift::cuda
