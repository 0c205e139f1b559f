# SPDX-License-Identifier: Apache-2.0
# Whether the compiler keeps what it may drop without changing a result: the CPU loops' requests for
# memory (csrc/cpu/ahead.inl). Only a benchmark would notice.
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
LOOP = re.compile(r"(update_range|update_words|update_staged|square_sums_of)<(.+)>\(hift::")
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


def lines(loop: str, template: str) -> int:
    """Cache lines of a stretch: of the parameter, the gradient and each state."""
    names = re.findall(r"\w+", template.replace("hift::", "").replace("baseline::", ""))
    states = STATES.get(names[0], 0)
    widths = {"float": 4, "BFloat16": 2, "Float16": 2}  # of 64 elements
    if loop == "square_sums_of":  # 128 elements of a gradient
        return 2 * widths[names[0]]
    if loop == "update_range":
        return sum(widths[name] for name in names[-2:]) + 4 * states
    if loop == "update_words":
        return 4 * (2 + states)
    return 4 + min(states, 1)  # in loops: parameter, gradient, both kinds of master, the states


def test_every_line_of_every_stream_is_asked_for(requests: Counter[str]) -> None:
    loops = {name: found for name in requests if (found := LOOP.search(name))}
    assert {found[1] for found in loops.values()} == {
        "update_range", "update_words", "update_staged", "square_sums_of",
    }  # fmt: skip
    for name, found in loops.items():
        assert requests[name] >= lines(found[1], found[2]), name
