# SPDX-License-Identifier: Apache-2.0
# The bounds of bench_step and bench_clip: plain C loops that read and write the same bytes as a
# step or a norm and compute next to nothing. Compiled when needed; torch has no such pass.
"""How fast a step could be if arithmetic were free."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCE = r"""
#include <pthread.h>
#include <stdint.h>

#if defined(__x86_64__)
#define FOR_EACH_TARGET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_TARGET
#endif

typedef struct {
  void* param;
  const void* grad;
  uint32_t* state[2];
  int64_t count;
} Tensor;

/* `zero` is 0, which the compiler cannot know: every value is read and written back unchanged. */
#define LOOP(name, T, states)                                                             \
  FOR_EACH_TARGET static void name(const Tensor* t, int64_t i, int64_t end, T zero) {     \
    T* restrict p = t->param;                                                             \
    const T* restrict g = t->grad;                                                        \
    uint32_t* restrict a = t->state[0];                                                   \
    uint32_t* restrict b = t->state[1];                                                   \
    for (; i < end; ++i) {                                                                \
      const T x = g[i] & zero;                                                            \
      p[i] += x;                                                                          \
      a[i] += x;                                                                          \
      if (states == 2) b[i] += x;                                                         \
    }                                                                                     \
  }
LOOP(wide1, uint32_t, 1)
LOOP(wide2, uint32_t, 2)
LOOP(narrow2, uint16_t, 2)

FOR_EACH_TARGET static uint32_t look(const Tensor* t, int64_t i, int64_t end, int narrow) {
  const uint32_t* restrict words = (const uint32_t*)((const char*)t->grad + (narrow ? 2 : 4) * i);
  const int64_t count = (end - i) / (narrow ? 2 : 1);
  uint32_t all = 0;
  for (int64_t k = 0; k < count; ++k) all |= words[k];
  return all;
}
static volatile uint32_t seen;

typedef struct {
  const Tensor* tensors;
  int64_t count, begin, end;
  int states, narrow;
  uint32_t zero;
} Job;

static void* work(void* argument) {
  const Job* job = argument;
  int64_t first = 0;
  for (int64_t k = 0; k < job->count && first < job->end; first += job->tensors[k++].count) {
    const Tensor* t = &job->tensors[k];
    const int64_t begin = job->begin > first ? job->begin - first : 0;
    const int64_t end = job->end - first < t->count ? job->end - first : t->count;
    if (begin >= end) continue;
    if (job->states == 0) seen = look(t, begin, end, job->narrow);
    else if (job->narrow) narrow2(t, begin, end, (uint16_t)job->zero);
    else if (job->states == 2) wide2(t, begin, end, job->zero);
    else wide1(t, begin, end, job->zero);
  }
  return 0;
}

int ceiling(const Tensor* tensors, int64_t count, int states, int narrow, int threads,
            uint32_t zero) {
  enum { kMost = 256 };
  pthread_t thread[kMost];
  Job job[kMost];
  int64_t total = 0;
  if (threads < 1 || threads > kMost || states < 0 || states > 2) return -1;
  if (narrow && states == 1) return -1;
  for (int64_t k = 0; k < count; ++k) total += tensors[k].count;
  if (total < 65536) threads = 1;
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = total * t / threads, end = total * (t + 1) / threads;
    job[t] = (Job){tensors, count, begin, end, states, narrow, zero};
  }
  for (int t = 1; t < threads; ++t) {
    if (pthread_create(&thread[t], 0, work, &job[t]) != 0) return -1;
  }
  work(&job[0]);
  for (int t = 1; t < threads; ++t) pthread_join(thread[t], 0);
  return 0;
}
"""


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("state", ctypes.c_void_p * 2),
        ("count", ctypes.c_int64),
    ]


def compiled() -> ctypes.CDLL:
    """The loop, compiled into a temporary folder that is gone when this returns.

    Raises:
        RuntimeError: There is no C compiler.
        subprocess.CalledProcessError: The compiler failed.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("the ceiling is a C loop and needs a compiler: apt-get install gcc")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "ceiling.c"), Path(folder, "ceiling.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-fno-tree-loop-distribution", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*compiler.split(), *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def _run(library: ctypes.CDLL, tensors: ctypes.Array[_Tensor], states: int, narrow: int) -> None:
    failed = library.ceiling(
        tensors,
        ctypes.c_int64(len(tensors)),
        states,
        narrow,
        torch.get_num_threads(),
        ctypes.c_uint32(0),
    )
    if failed:
        raise RuntimeError("the ceiling could not start its threads")


class Ceiling:
    """Reads and writes what a step over `params` with `states` fp32 states reads and writes.

    The state is its own, the parameters and gradients are the caller's and keep their values.

    Args:
        params: Parameters with gradients of their own type, 2 or 4 bytes an element.
        states: State streams, 1 or 2.
    """

    def __init__(self, params: Sequence[torch.Tensor], states: int) -> None:
        self._library = compiled()
        total = sum(p.numel() for p in params)
        # Streams at a distance of 2^28 bytes evict each other from the first-level cache of some
        # processors (their way predictor hashes address bits 12 to 27): an odd distance, then.
        stride = 4 * total + 64 * len(params) + 4096 + 1088
        self._memory = mmap.mmap(-1, states * stride, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8).fill_(1)
        self._tensors = (_Tensor * len(params))()
        self._held = [memory, *params, *(p.grad for p in params)]
        offset = 0
        for item, p in zip(self._tensors, params, strict=True):
            assert p.grad is not None
            item.param, item.grad, item.count = p.data_ptr(), p.grad.data_ptr(), p.numel()
            for number in range(states):
                item.state[number] = memory.data_ptr() + number * stride + offset
            offset += (4 * p.numel() + 63) // 64 * 64
        self._states, self._narrow = states, int(params[0].element_size() == 2)

    def __call__(self) -> None:
        """One pass over all bytes, on torch's number of threads."""
        _run(self._library, self._tensors, self._states, self._narrow)


class ReadCeiling:
    """Reads `tensors`, of 2 or 4 bytes an element, and writes nothing."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._library = compiled()
        self._tensors = (_Tensor * len(tensors))()
        self._held = list(tensors)
        for item, tensor in zip(self._tensors, tensors, strict=True):
            item.grad, item.count = tensor.data_ptr(), tensor.numel()
        self._narrow = int(tensors[0].element_size() == 2)

    def __call__(self) -> None:
        """One pass over all bytes, on torch's number of threads."""
        _run(self._library, self._tensors, 0, self._narrow)
