# SPDX-License-Identifier: Apache-2.0
# Whether the compiler keeps what it may drop without changing a result: the CPU loops' requests for
# memory (csrc/cpu/ahead.inl). Without them a step takes a tenth to a third longer.
"""The CPU loops' machine code, compiled here with the product's flags."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
STATES = {"AmsgradRule": 3, "AdamRule": 2, "Adagrad": 1, "Momentum": 1}
LOOP = re.compile(r"(update_range|update_words|update_staged|square_sums_of)<(?:[\w:]+::)?(\w+)")
REQUEST = re.compile(r"\s(prefetch\w*|prfm)\s")


def flags() -> list[str]:
    """What the build gives every source, of csrc/CMakeLists.txt."""
    found = re.search(r"set\(bits (.+)\)", (CSRC / "CMakeLists.txt").read_text())
    assert found is not None
    return [*found[1].split(), "-fopenmp-simd"]


@pytest.fixture(scope="module")
def requests() -> Counter[str]:
    """Requests for memory in each function of the baseline loops, by its whole name."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    source = CSRC / "cpu" / "step_baseline.cpp"
    command = [*compiler.split(), "-O3", "-std=c++17", *flags(), f"-I{CSRC}", "-S", "-o", "-"]
    compiled = subprocess.run([*command, str(source)], capture_output=True, text=True, check=True)
    named = subprocess.run(
        ["c++filt"], input=compiled.stdout, capture_output=True, text=True, check=True
    )
    counts: Counter[str] = Counter()
    function = ""
    for line in named.stdout.splitlines():
        if line.endswith("):") and not line[0].isspace():
            function = line[:-1]
            counts[function] += 0
        elif REQUEST.search(line):
            counts[function] += 1
    return counts


def test_every_stream_of_every_loop_is_asked_for(requests: Counter[str]) -> None:
    loops = {name: found for name in requests if (found := LOOP.search(name))}
    assert {found[1] for found in loops.values()} == {
        "update_range", "update_words", "update_staged", "square_sums_of",
    }  # fmt: skip
    for name, found in loops.items():
        # The parameter, the gradient, each state; a norm reads the gradient alone.
        streams = 1 if found[1] == "square_sums_of" else 2 + STATES.get(found[2], 0)
        assert requests[name] >= streams, name
