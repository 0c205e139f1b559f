// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/cuda/runtime.h and for CUDA's built-ins, so that csrc/cuda/step.cu compiles as
// plain C++ and a launch runs every warp of every block in turn. Include it before step.cu.
#pragma once

#define HIFT_HOST_KERNEL
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

#include <cstddef>
#include <cstdint>
#include <vector>

#include "host_warp.h"

struct HostIndex {
  unsigned x;
};
inline thread_local HostIndex blockIdx{0}, threadIdx{0};

namespace hift::cuda {

struct Launch {
  std::int64_t blocks;
  std::size_t argument_bytes;
  void* stream;
};
inline std::vector<Launch> launches;
inline std::vector<int> devices;

struct DeviceGuard {
  explicit DeviceGuard(int device) { devices.push_back(device); }
};

template <class Argument>
void launch(void (*kernel)(Argument), std::int64_t blocks, int threads, void* stream,
            const Argument& argument) {
  launches.push_back({blocks, sizeof argument, stream});
  for (std::int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    hift_warp::run_block(
        threads, [](int thread) { threadIdx.x = static_cast<unsigned>(thread); },
        [&] { kernel(argument); });
  }
}

}  // namespace hift::cuda
