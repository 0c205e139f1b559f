# SPDX-License-Identifier: Apache-2.0
# The benchmarks run, in small: what they write keeps the contract, and the bytes they divide by are
# counted here once more. How fast anything is, is not a test's business.

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BYTES = {("adamw", "fp32"): 28, ("adagrad", "fp32"): 20, ("sgd", "fp32"): 20, ("adamw", "bf16"): 22}
"""Read and written for each element: parameter and state in and out, gradient in."""


def run(script: str, folder: Path, *flags: str, **options: object) -> dict[str, Any]:
    """Runs a benchmark in a process of its own; returns its JSON."""
    figures, picture = folder / "figures.json", folder / "picture.png"
    options |= {"json": figures, "plot": picture}
    named = (f"--{name.replace('_', '-')}={value}" for name, value in options.items())
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *flags, *named],
        cwd=folder,
        # Threads that spin while they wait starve each other where cores are shared.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    result: dict[str, Any] = json.loads(figures.read_text())
    assert {"cpu", "cores", "isa", "memory_bytes", "torch", "date"} <= result["machine"].keys()
    return result


def test_step(tmp_path: Path) -> None:
    result = run("bench_step.py", tmp_path, "--quick")
    absent = {(a["rule"], a["param"], a["impl"]) for a in result["absent"]}
    assert ("adamw", "bf16", "torch_fused") in absent  # torch refuses fp32 state there
    assert all(a["reason"] for a in result["absent"])
    for rule, param in BYTES:
        rows = [r for r in result["rows"] if (r["rule"], r["param"]) == (rule, param)]
        for shape in {row["shape"] for row in rows}:
            impls = {row["impl"] for row in rows if row["shape"] == shape}
            peers = {"torch_fused", "torch_foreach", "deepspeed"}
            there = {peer for peer in peers if (rule, param, peer) not in absent}
            assert impls == {"hift", "ceiling"} | there
        for row in rows:
            assert row["grad"] == param
            assert row["state"] == "fp32"
            assert row["bytes"] == BYTES[rule, param] * row["elements"]
            assert row["gbps"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
            assert 0 < row["min_ms"] <= row["median_ms"]
            ceiling = next(r for r in rows if r["shape"] == row["shape"] and r["impl"] == "ceiling")
            assert row["ceiling_gbps"] == ceiling["gbps"]
            assert row["ratio_to_ceiling"] > 0
    assert {1 << 16, 3 << 10} < {row["elements"] for row in result["rows"]}


def test_paging(tmp_path: Path) -> None:
    result = run("bench_paging.py", tmp_path, model="tiny", rounds=1, steps=2)
    assert result["disk"]["read_gbps"] > 0
    assert result["disk"]["write_gbps"] > 0
    assert {row["store"] for row in result["rows"]} == {"ram", "disk"}
    for row in result["rows"]:
        paged = row["store"] == "disk"
        assert row["model"] == "tiny"
        assert row["step_ms"] > row["compute_ms"] > 0
        assert row["hidden_ms"] >= 0
        assert row["wait_ms"] >= 0
        assert (row["staging_bytes"] > 0) == paged
        for group in row["groups"]:
            # A step writes its group back, exp_avg and exp_avg_sq in fp32, in whole records.
            least = 8 * group["parameters"] if paged else 0
            assert least <= group["bytes_out"] <= 1.05 * least + 4096 * paged
    ram = result["rows"][0]
    assert ram["store"] == "ram"
    assert ram["ratio_to_ram"] == 1
    four_pages = result["rows"][4]
    assert four_pages["staging_bytes"] <= four_pages["staging"]


def test_checkpoint(tmp_path: Path) -> None:
    result = run("bench_checkpoint.py", tmp_path, f"--folder={tmp_path}", mebibytes=32, rounds=1)
    rows = {row["name"]: row for row in result["rows"]}
    saves, loads = {"save from ram", "save from disk"}, {"load to ram", "load to disk"}
    plain = {"plain write", "plain read", "plain copy", "read into new memory"}
    shared = {"save copying from disk"}  # where the file system shares blocks
    assert rows.keys() - shared == plain | saves | loads | {"resume in ram", "resume in disk"}
    for row in rows.values():
        assert row["bytes"] - (32 << 20) in range(1, 1 << 14)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert (row["ratio"] is None) == (row["against"] is None)
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "picture.png"}


def test_train(tmp_path: Path) -> None:
    result = run("bench_train.py", tmp_path, steps=2, held_out=20, max_length=16)
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {"hift", "torch_hift", "full"}
    for row in rows.values():
        assert row["dataset"] == "rotten_tomatoes"
        assert row["seed"] == 0
        assert row["steps"] == 2
        assert 0 < row["epochs"] < 1
        assert 0 <= row["accuracy"] <= 1
        assert row["step_ms"] > 0
        assert row["peak_bytes"] > 4 * 22_700_000  # the weights alone
    # The same groups, rates, batches and dropout: only the arithmetic's last bits may differ.
    assert rows["hift"]["loss"] == pytest.approx(rows["torch_hift"]["loss"], rel=1e-4)
    assert rows["hift"]["accuracy"] == rows["torch_hift"]["accuracy"]
    assert rows["full"]["peak_bytes"] > rows["hift"]["peak_bytes"]


def test_clip(tmp_path: Path) -> None:
    result = run("bench_clip.py", tmp_path, "--quick")
    absent = {(a["rule"], a["param"], a["impl"]) for a in result["absent"]}
    assert ("adamw", "bf16", "torch_fused") in absent
    assert {(row["rule"], row["param"]) for row in result["rows"]} == set(BYTES) - {
        ("adagrad", "fp32")
    }
    for row in result["rows"]:
        grad = 4 if row["grad"] == "fp32" else 2
        # A clipped step reads the gradient once more; a norm reads nothing else.
        each = grad + (BYTES[row["rule"], row["param"]] if row["part"] == "step" else 0)
        assert row["bytes"] == each * row["elements"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert (row["ratio_to_best_peer"] is not None) == (row["best_peer"] is not None)
        assert row["impl"] == "hift" or row["best_peer"] is None
    for part, peers in (("step", {"torch_fused", "torch_foreach"}), ("norm", {"torch"})):
        found = {r["impl"] for r in result["rows"] if (r["part"], r["param"]) == (part, "fp32")}
        assert found == {"hift", "ceiling"} | peers


def test_monitor(tmp_path: Path) -> None:
    result = run("bench_monitor.py", tmp_path, "--quick")
    small, demo = result["rows"]
    assert [row["model"] for row in result["rows"]] == ["small", "minilm"]
    for row in result["rows"]:
        samples = row["samples"]
        assert {len(samples[way]) for way in ("off", "on")} == {row["rounds"]} == {3}
        assert row["steps"] % row["groups"] == 0  # whole passes: groups take different times
        for way in ("off", "on"):
            assert row[f"{way}_ms"] == pytest.approx(1e3 * sorted(samples[way])[1])
        ratios = [on / off for off, on in zip(samples["off"], samples["on"], strict=True)]
        assert row["ratio"] == pytest.approx(sorted(ratios)[1])
    assert result["cost_us"] == small["cost_us"]
    share = small["cost_us"] / 1e3 / demo["off_ms"]
    assert result["share_of_demo_step"] == pytest.approx(share)
    assert 0 < result["stages_us"] < 100
    assert 0 < result["totals_us"] < 100


def test_precision(tmp_path: Path) -> None:
    result = run("bench_precision.py", tmp_path, "--quick")
    rows = {row["way"]: row for row in result["rows"]}
    # Weight in and out, gradient in; then state, its scales (4 bytes for 256) and master, twice.
    each = {
        "fp32": 12 + 2 * 8,
        "fp32, bf16 state": 12 + 2 * 4,
        "fp32, 8bit state": 12 + 2 * (2 + 8 / 256),
        "bf16, no master": 6 + 2 * 8,
        "bf16, split master": 6 + 2 * (8 + 2),
        "bf16, fp32 master": 6 + 2 * (8 + 4),
        "bf16, split master, bf16 state": 6 + 2 * (4 + 2),
        "bf16, split master, 8bit state": 6 + 2 * (2 + 8 / 256 + 2),
        "all bf16, nearest": 6 + 2 * 4,
        "all bf16, stochastic": 6 + 2 * 4,
        "fp16, fp32 master": 6 + 2 * (8 + 4),
        "torch fp32": 12 + 2 * 8,
        "torch all bf16": 6 + 2 * 4,
        "sgd fp32": 12 + 2 * 4,
        "sgd fp32, 8bit state": 12 + 2 * (1 + 4 / 256),
    }
    assert {way: row["bytes_per_element"] for way, row in rows.items()} == each
    for way, row in rows.items():
        itemsize = 4 if row["param"] == "fp32" else 2
        assert row["elements"] == 1 << 16
        # What the optimizer itself says it keeps: a way that is not what its name says is seen.
        assert row["bytes"] == 3 * itemsize * row["elements"] + 2 * row["state_bytes"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["impl"] == ("torch_fused" if way.startswith("torch") else "hift")
        assert (row["ratio_to_torch_bf16"] is None) == way.startswith("sgd")
    for way in ("fp32", "sgd fp32"):
        assert rows[way]["ratio_to_fp32"] == rows[way]["of_memory"] == 1
    assert rows["torch all bf16"]["ratio_to_torch_bf16"] == 1
    assert {target["at_most"] for target in result["targets"]} == {0.75, 1.0}
    for target in result["targets"]:
        assert target["measured"] == rows[target["way"]][target["figure"]]
        assert target["met"] is None  # memory does not bound a step on so few elements


def test_modes(tmp_path: Path) -> None:
    result = run("bench_modes.py", tmp_path, "--quick")
    rows = {row["way"]: row for row in result["rows"]}
    # Bytes of state and master for each parameter: the way reached the optimizer.
    kept = {
        "fp32": 8,
        "fp32, 8bit state": 2 + 8 / 256,
        "bf16, no master": 8,
        "bf16, stochastic": 8,
        "bf16, fp32 master": 12,
        "bf16, split master": 10,
        "bf16, split, bf16 state": 6,
        "bf16, split, 8bit state": 4 + 8 / 256,
    }
    assert set(rows) == set(kept)
    for way, row in rows.items():
        assert row["state_bytes"] == pytest.approx(kept[way] * row["parameters"], rel=1e-2)
        assert row["steps"] == len(row["losses"]) == 4  # more than a pass
        assert row["final_loss"] == pytest.approx(sum(row["losses"]) / 4)
        assert 0.3 < row["final_loss"] < 1.1  # about ln 2 before anything is learned
        assert 0 <= row["accuracy"] <= 1
        assert row["step_ms"] > 0
        assert len(set(row["losses"])) > 1
    losses = {way: row["losses"] for way, row in rows.items()}
    # A split master is the same number, to the bit.
    assert losses["bf16, split master"] == losses["bf16, fp32 master"]
    assert losses["bf16, stochastic"] != losses["bf16, no master"]
    assert losses["bf16, no master"] != losses["fp32"]
    assert losses["bf16, no master"][0] == pytest.approx(losses["fp32"][0], rel=2e-2)


@pytest.mark.parametrize("rounds", [0, 2])
def test_too_few_rounds_are_refused(rounds, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common = importlib.import_module("common")
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", f"--rounds={rounds}"])
    with pytest.raises(SystemExit):
        common.with_rounds(common.arguments("a benchmark"), 15, "samples", "small")
    assert f"--rounds must be at least 3, not {rounds}" in capsys.readouterr().err
