// SPDX-License-Identifier: Apache-2.0
// A page is filled once, at its first visit: this kernel is plain, four bytes a thread at a time.
#include "cuda/fill.h"

#include "cuda/runtime.h"

namespace hift::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 4096;

struct Words {
  std::uint32_t* to;
  std::int64_t count;
  std::uint32_t value;
};

__global__ void fill_words(const Words words) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words.count;
       i += stride) {
    words.to[i] = words.value;
  }
}

}  // namespace

void fill(std::byte* to, std::int64_t count, std::int64_t element_bytes, std::uint32_t pattern,
          int device, void* stream) {
  check_argument(element_bytes == 1 || element_bytes == 2 || element_bytes == 4, "an element of ",
                 element_bytes, " bytes is not one of 1, 2, 4");
  const std::int64_t bytes = count * element_bytes;
  check_argument(count >= 0 && bytes % 4 == 0 && reinterpret_cast<std::uintptr_t>(to) % 4 == 0,
                 bytes, " bytes are not whole words of 4, or do not begin at one");
  if (bytes == 0) return;
  // Shorter elements stand side by side in a word.
  if (element_bytes == 1) pattern = (pattern & 0xffu) * 0x01010101u;
  if (element_bytes == 2) pattern = (pattern & 0xffffu) * 0x00010001u;
  const Words words{reinterpret_cast<std::uint32_t*>(to), bytes / 4, pattern};
  const std::int64_t blocks = (words.count - 1) / kThreads + 1;
  const DeviceGuard guard(device);
  launch(fill_words, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, stream, words);
}

}  // namespace hift::cuda
