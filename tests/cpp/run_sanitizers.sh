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
