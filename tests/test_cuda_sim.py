# SPDX-License-Identifier: Apache-2.0
# The CUDA path without a GPU: the product's own sources against a runtime that runs on the host.
# What is built here is in tests/cuda_sim; which ordering edge is caught by what, in docs/edges.md.

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIM = ROOT / "tests" / "cuda_sim"

pytestmark = pytest.mark.needs("cuda_headers")


def run(command: list[str], **environ: str) -> str:
    """What a program prints; fails with its output."""
    done = subprocess.run(
        command,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-4000:]}"
    return done.stdout


def test_the_simulated_runtime_sees_misuse(cuda_sim: Path) -> None:
    run([str(cuda_sim / "test_sim")])


def test_the_mover_keeps_its_promises(cuda_sim: Path) -> None:
    run([str(cuda_sim / "test_mover")])


def test_a_thousand_schedules_give_the_bits_of_the_host(cuda_sim: Path) -> None:
    run([str(cuda_sim / "test_schedules"), "1000"])


def test_no_failing_call_loses_a_page(cuda_sim: Path) -> None:
    printed = run([str(cuda_sim / "test_faults"), "11"])
    failed = [int(n) for n in re.findall(r"(\d+) calls failed", printed)]
    assert len(failed) == 14
    assert sum(failed) > 1000


def test_the_optimizer_end_to_end(cuda_sim: Path) -> None:
    path = f"{cuda_sim}{os.pathsep}{ROOT}"
    printed = run([sys.executable, str(SIM / "optimizer.py")], PYTHONPATH=path)
    assert re.search(r"^\d+ trainings on the simulated device$", printed, re.M)


def test_the_table_of_edges_is_of_this_source() -> None:
    """What was proven by taking out each wait is proven for the waits that are there now."""
    spec = importlib.util.spec_from_file_location("mutate", SIM / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    mutate = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = mutate  # dataclasses look their module up
    spec.loader.exec_module(mutate)
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (ROOT / "docs" / "edges.md").read_text().splitlines()
        if line.startswith("| `") or re.match(r"\| (cuda/|engine)", line)
    ]
    listed = [(where.split(":")[0], statement.strip("`")) for where, statement, _, _ in rows]
    assert listed == [(site.file, site.text) for site in mutate.sites()]
    for where, statement, reason, caught in rows:
        assert reason, f"{where}: {statement} stands without a reason"
        names = {name for name, *_ in mutate.TESTS}
        assert set(caught.split(", ")) <= names, f"{where}: {caught}"
