// SPDX-License-Identifier: Apache-2.0
// What a device is and how fast its link is, for hift_ext/hardware.py and probe.py. Part of the
// module `_hift_ext`; like bind.cpp it takes addresses and stream handles as integers.
#pragma once

#include <pybind11/pybind11.h>

namespace hift {

/// With CUDA adds `Bus` and `cuda_device`, without it nothing.
void bind_probe(pybind11::module_& m);

}  // namespace hift
