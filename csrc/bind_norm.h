// SPDX-License-Identifier: Apache-2.0
// The norm of a step's gradients, from the rows that the step itself takes. Part of the module
// `_hift_ext`; like bind.cpp it takes addresses and stream handles as integers.
#pragma once

#include <pybind11/pybind11.h>

namespace hift {

/// Adds `sum_of_squares` and `write_clip`, and with CUDA `cuda_sum_of_squares` and
/// `cuda_write_clip`.
void bind_norm(pybind11::module_& m);

}  // namespace hift
