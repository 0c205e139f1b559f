#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds all C++ tests with ThreadSanitizer, then with Address- and UndefinedBehaviorSanitizer, in a
# temporary folder, and runs them. Fails on the first report. Arguments are passed on to ctest.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=$(mktemp -d "${TMPDIR:-/tmp}/hift-sanitizers-XXXXXX")
trap 'rm -rf "$build"' EXIT
jobs=$(nproc)

# A sanitizer's report must end the program, in forked children too.
export TSAN_OPTIONS="halt_on_error=1 exitcode=66 ${TSAN_OPTIONS:-}"
export ASAN_OPTIONS="detect_leaks=1 abort_on_error=0 exitcode=66 ${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="halt_on_error=1 print_stacktrace=1 ${UBSAN_OPTIONS:-}"

# GCC 12's ThreadSanitizer knows no address-space layout of more than 28 random bits.
fixed=()
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed=(setarch "$(uname -m)" -R); fi

for sanitizer in thread address; do
  echo "== $sanitizer"
  cmake -S "$here" -B "$build/$sanitizer" -G Ninja -DSANITIZE="$sanitizer" >/dev/null
  cmake --build "$build/$sanitizer" -j "$jobs" -- --quiet
  "${fixed[@]}" ctest --test-dir "$build/$sanitizer" -j "$jobs" --output-on-failure "$@"
done

# The CUDA sources on the simulated runtime: with ThreadSanitizer each stream is a thread of its own,
# so that a missing wait is reported even where the result was right.
if [ -z "${CUDA_HEADERS:-}" ]; then
  nvcc=$(command -v nvcc || true)
  for home in "${CUDA_HOME:-}" ${nvcc:+"$(dirname "$(dirname "$(readlink -f "$nvcc")")")"} /usr/local/cuda; do
    if [ -f "$home/include/cuda_runtime.h" ]; then CUDA_HEADERS=$home/include; fi
  done
fi
if [ -z "${CUDA_HEADERS:-}" ]; then
  echo "== no headers of CUDA's runtime: the simulated runtime is left out (set CUDA_HEADERS)"
  exit 0
fi
for sanitizer in thread address; do
  echo "== $sanitizer, simulated CUDA runtime"
  folder=$build/cuda-$sanitizer
  cmake -S "$here/../cuda_sim" -B "$folder" -G Ninja -DSANITIZE="$sanitizer" \
    -DCUDA_HEADERS="$CUDA_HEADERS" >/dev/null
  cmake --build "$folder" -j "$jobs" -- --quiet
  "${fixed[@]}" "$folder/test_mover"
  "${fixed[@]}" "$folder/test_schedules" 20
  if [ "$sanitizer" = address ]; then
    "$folder/test_sim"
    "$folder/test_faults" 101
  fi
done
