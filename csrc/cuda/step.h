// SPDX-License-Identifier: Apache-2.0
// The update on a GPU: one kernel launch covers a list of spans. Element by element the bits are
// those of cpu/step.h (NaNs excepted: a GPU makes its own).
#pragma once

#include <cstddef>
#include <string>

#include "core/span.h"

namespace hift::cuda {

/// Updates all spans in place, on `stream` (a CUDA stream handle; null is the legacy default
/// stream) of `device`. Returns at once; spans may be dropped then, the memory they and `scaling`
/// point to may not. The caller's current device stays what it was. Throws std::invalid_argument
/// for a span without a kernel, std::runtime_error for CUDA's own.
void step(const Span* spans, std::size_t count, const Scaling& scaling, int device, void* stream);

/// What the CUDA runtime sees here. Versions are CUDA's integers (13000 is 13.0), 0 where there is
/// none. The runtime linked in runs on a driver of the same or a later major version.
struct DeviceInfo {
  int driver_version = 0;
  int runtime_version = 0;
  int device_count = 0;
  std::string error;  // why `device_count` is 0; empty if it is not
};

/// Never throws for want of a driver or a GPU.
DeviceInfo device_info();

}  // namespace hift::cuda
