// SPDX-License-Identifier: Apache-2.0
// The update on a GPU for spans whose numbers are not kept as they are computed: state in fewer
// bits, masters, rounding at random. Called by step.cu, which has checked the spans.
#pragma once

#include <cstddef>

#include "core/span.h"

namespace hift::cuda {

/// Spans of one number are updated by one kernel.
int kept_kernel(const Span& span);

/// Updates `count` spans of one kernel, none of them empty; adds to `launches`.
void run_kept(const Span* const* spans, std::size_t count, const Scaling& scaling, void* stream,
              int* launches);

}  // namespace hift::cuda
