# SPDX-License-Identifier: Apache-2.0
# The machine code of a norm's kernels for an A6000 passes every verdict, and verdicts can fail:
# faults planted in the source and in the compiler's flags are found.

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import inspect_kernels  # noqa: E402
import norm_verdicts  # noqa: E402

pytestmark = pytest.mark.needs("nvcc")


def failed(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Kernel and verdict of what is wrong."""
    return {(row["kernel"], name) for row in rows for name, why in row["verdicts"].items() if why}


def test_kernels_pass() -> None:
    rows = inspect_kernels.inspect_norm(inspect_kernels.find_tools(), "86")
    assert failed(rows) == set()
    loads = {row["grad"]: row["load_bits"] for row in rows if row["kernel"] == "square_sums"}
    assert loads == {"fp32": {"128": 8}, "bf16": {"64": 8}, "fp16": {"64": 8}}
    for row in rows:
        if row["kernel"] == "square_sums":
            assert row["blocks_per_sm"] >= 4
            assert row["in_flight_bytes_per_sm"] >= 64 << 10


CHANGES = {
    ("square_sums", "fused"): ("fma(wide, wide, sum)", "sum + wide * wide"),
    ("square_sums", "width"): ("sizeof(T) * N) Pack", "sizeof(T)) Pack"),
    ("add_up", "order"): (
        "sum += shuffle(now[r], from)",
        "if (from % 2) sum += shuffle(now[r], from)",
    ),
}


def test_faults_in_the_source_are_found(tmp_path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for before, after in CHANGES.values():
        changed = 0
        for path in (*csrc.glob("core/*.h"), *csrc.glob("cuda/*.h")):
            text = path.read_text()
            changed += text.count(before)
            path.write_text(text.replace(before, after))
        assert changed == 1, before
    rows = inspect_kernels.inspect_norm(inspect_kernels.find_tools(), "86", csrc)
    assert failed(rows) >= CHANGES.keys()


def test_spills_are_found() -> None:
    tools = inspect_kernels.find_tools()
    rows = inspect_kernels.inspect_norm(tools, "86", more_flags=["-maxrregcount=24"])
    assert ("square_sums", "spills") in failed(rows)


def test_names_are_known() -> None:
    name = "void hift::cuda::square_sums<hift::cuda::NormTable<hift::generic::BFloat16> >(...)"
    assert norm_verdicts.identify(name) == ("square_sums", "bf16")
    with pytest.raises(ValueError, match="teach `identify`"):
        norm_verdicts.identify("void hift::cuda::other(int)")
