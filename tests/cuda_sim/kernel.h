// SPDX-License-Identifier: Apache-2.0
// Included before every .cu that a host compiler compiles: CUDA's built-in variables, and a launch
// that knows the type of the kernel's argument, as nvcc does.
#pragma once

#include "host_warp.h"
#include "sim.h"

#define threadIdx (::hift_sim::thread_index())
#define blockIdx (::hift_sim::block_index())
#define gridDim (::hift_sim::grid_size())
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__

/// A better match for a kernel than the runtime's own `const void*`. The argument is copied at
/// once.
template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             std::size_t /*shared*/, cudaStream_t stream) {
  const auto argument = *static_cast<const std::remove_const_t<Argument>*>(arguments[0]);
  const auto body = [kernel, grid, block, argument] {
    hift_sim::run_grid(grid, block, [&] { kernel(argument); });
  };
  return hift_sim::enqueue(stream, body, "kernel");
}
