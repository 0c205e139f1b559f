#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds all C++ tests, and the CUDA sources on the simulated runtime, in a temporary folder and runs
# them: with ThreadSanitizer and, beside it, with Address- and UndefinedBehaviorSanitizer. Fails on
# any report. Arguments are passed on to ctest.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=$(mktemp -d "${TMPDIR:-/tmp}/hift-sanitizers-XXXXXX")
jobs=$(nproc) # of each sanitizer: the one that ends later has all cores then

# A sanitizer's report must end the program, in forked children too.
export TSAN_OPTIONS="halt_on_error=1 exitcode=66 ${TSAN_OPTIONS:-}"
export ASAN_OPTIONS="detect_leaks=1 abort_on_error=0 exitcode=66 ${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="halt_on_error=1 print_stacktrace=1 ${UBSAN_OPTIONS:-}"

# GCC 12's ThreadSanitizer knows no address-space layout of more than 28 random bits.
fixed=()
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed=(setarch "$(uname -m)" -R); fi

if [ -z "${CUDA_HEADERS:-}" ]; then
  nvcc=$(command -v nvcc || true)
  for home in "${CUDA_HOME:-}" ${nvcc:+"$(dirname "$(dirname "$(readlink -f "$nvcc")")")"} /usr/local/cuda; do
    if [ -f "$home/include/cuda_runtime.h" ]; then CUDA_HEADERS=$home/include; fi
  done
fi

# With ThreadSanitizer each stream of the simulated runtime is a thread of its own, so that a missing
# wait is reported even where the result was right.
all_of() {
  local sanitizer=$1 folder=$build/$1
  shift
  echo "== $sanitizer"
  if [ -z "${CUDA_HEADERS:-}" ]; then
    echo "no headers of CUDA's runtime: the simulated one is left out (set CUDA_HEADERS)"
  fi
  cmake -S "$here" -B "$folder" -G Ninja -DSANITIZE="$sanitizer" \
    -DCUDA_HEADERS="${CUDA_HEADERS:-}" >/dev/null
  cmake --build "$folder" -j "$jobs" -- --quiet
  "${fixed[@]}" ctest --test-dir "$folder" -j "$jobs" --output-on-failure "$@"
}

# One sanitizer's output at a time: the other's is kept until its end. `set -e` has no effect in a
# function whose status is tested, so each runs in a shell of its own, and `wait` asks how it ended.
set -m # process groups: what ends this script ends what it started
all_of thread "$@" >"$build/thread.log" 2>&1 &
thread=$!
trap 'kill -- -"$thread" 2>/dev/null || true; rm -rf "$build"' EXIT
(all_of address "$@") &
address=$!
trap 'kill -- -"$thread" -"$address" 2>/dev/null || true; rm -rf "$build"' EXIT
failed=0
wait "$address" || failed=$?
wait "$thread" || failed=$?
cat "$build/thread.log"
exit "$failed"
