// SPDX-License-Identifier: Apache-2.0
// What the CUDA runtime sees on this machine, for `hift_ext doctor` and for the choice of a
// backend. The runtime is linked statically and loads the driver itself, so all of this answers
// where there is none.
#include <cuda_runtime_api.h>

#include "cuda/step.h"

namespace hift::cuda {

DeviceInfo device_info() {
  DeviceInfo info;
  cudaRuntimeGetVersion(&info.runtime_version);  // a constant of the runtime linked in
  cudaDriverGetVersion(&info.driver_version);    // leaves 0 where no driver is installed
  const cudaError_t error = cudaGetDeviceCount(&info.device_count);
  if (error != cudaSuccess) {
    info.device_count = 0;
    info.error =
        info.driver_version == 0 ? "no CUDA driver is installed" : cudaGetErrorString(error);
    cudaGetLastError();  // reported here, so that the next call does not report it again
  } else if (info.device_count == 0) {
    info.error = "no CUDA device";
  }
  return info;
}

}  // namespace hift::cuda
