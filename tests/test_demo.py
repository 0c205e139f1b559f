# SPDX-License-Identifier: Apache-2.0
# The demo on the pretrained model and the real reviews, for a few steps: its figures, not its fame.
# What it learns in a full epoch is measured, not tested: see README.md.

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import hift, one_object

from hift_ext import demo

KEYS = {
    "accuracy",
    "step_ms",
    "state_bytes",
    "resident_state_bytes",
    "wait_ms",
    "hidden_ms",
    "store",
    "optimizer",
    "order",
    "groups",
    "steps",
    "loss",
}
WEIGHTS = 22_713_986  # MiniLM with its pooler and a two-way classifier


def check(report: dict) -> None:
    assert report.keys() >= KEYS
    assert 0 <= report["accuracy"] <= 1
    assert report["step_ms"] > 0
    assert report["wait_ms"] >= 0
    assert report["hidden_ms"] >= 0
    assert math.isfinite(report["loss"])
    assert 0 < report["resident_state_bytes"] <= report["state_bytes"]


def test_disk_from_the_command_line():
    """Ten steps: two of them bring pages back that the first two sent out."""
    result = hift(
        "demo", "--steps", "10", "--batch", "4", "--max-length", "16", "--store", "disk", "--json"
    )
    report = one_object(result)
    check(report)
    assert (report["store"], report["optimizer"], report["order"]) == ("disk", "adamw", "bottom2up")
    assert (report["groups"], report["steps"]) == (8, 10)
    # Two float32 moments of every weight, in whole pages on disk.
    assert 8 * WEIGHTS <= report["state_bytes"] < 8.1 * WEIGHTS
    assert report["resident_state_bytes"] < 0.6 * report["state_bytes"]
    assert report["hidden_ms"] + report["wait_ms"] > 0
    assert "full" not in report
    assert "step 10/10" in result.stderr
    assert "bert.encoder.layer.0" in result.stderr
    assert "held-out accuracy" in result.stderr
    assert "newly initialized" not in result.stderr


@pytest.fixture
def small(monkeypatch):
    """The real model and data, with fewer held-out reviews to label at the end."""
    monkeypatch.setattr(demo, "HELD_OUT", 50)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=120)


def test_ram_beside_full_fine_tuning(small, console):
    options = demo.Options(
        store="ram",
        order="top2down",
        layers_per_group=3,
        steps=4,
        batch=4,
        max_length=16,
        compare=True,
    )
    report = demo.run(options, console)
    full = report.pop("full")
    for side in (report, full):
        check(side)
        assert side["steps"] == 4
        # In host memory all state is resident, ours as torch's: only a disk store is paged out.
        assert side["resident_state_bytes"] == side["state_bytes"]
    assert (report["groups"], full["groups"]) == (3, 1)
    assert full["state_bytes"] == 8 * WEIGHTS
    assert 8 * WEIGHTS <= report["state_bytes"] < 8.1 * WEIGHTS
    assert report["wait_ms"] == report["hidden_ms"] == full["wait_ms"] == 0
    printed = console.export_text()
    assert "HiFT adamw, 3 groups" in printed
    assert "full torch.optim adamw" in printed


@pytest.mark.parametrize(("optimizer", "streams"), [("adam", 2), ("adagrad", 1), ("sgd", 1)])
def test_other_optimizers_learn_one_batch(small, monkeypatch, console, optimizer, streams):
    """The same few reviews again and again, at the recipe's learning rate: the loss falls."""

    def same(data, _):
        while True:
            yield [column[:8] for column in data.tensors]

    monkeypatch.setattr(demo, "_batches", same)
    losses = []
    for steps in (1, 24):
        options = demo.Options(optimizer=optimizer, store="ram", steps=steps, max_length=16)
        report = demo.run(options, console)
        check(report)
        losses.append(report["loss"])
    assert losses[1] < losses[0] - 0.1
    assert streams * 4 * WEIGHTS <= report["state_bytes"] < streams * 4.1 * WEIGHTS


def test_same_seed_same_figures(small, console):
    options = demo.Options(store="ram", steps=2, batch=4, max_length=16, seed=3)
    first, second = (demo.run(options, console) for _ in range(2))
    assert first["loss"] == second["loss"]
    assert first["accuracy"] == second["accuracy"]


def test_batch_larger_than_the_data(small, console):
    with pytest.raises(ValueError, match="--batch 9000 is more than the 8480 training reviews"):
        demo.run(demo.Options(batch=9000, max_length=16), console)


def test_reviews():
    data = demo.load_reviews(128)
    assert (len(data.training), len(data.held_out)) == (7530, 1000)
    ids, mask, labels = data.held_out.tensors
    assert 0.45 < labels.float().mean() < 0.55
    lengths = mask.sum(1)
    assert bool((lengths[1:] >= lengths[:-1]).all())
    training = {tuple(row) for row in data.training.tensors[0].tolist()}
    assert not training & {tuple(row) for row in ids.tolist()}


def test_example():
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, root / "examples" / "finetune.py", "--steps", "2", "--held-out", "50"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr
    assert "step 0: loss 0." in result.stdout
    assert "trained bert.embeddings" in result.stdout
    assert re.search(r"held-out accuracy \d\d\.\d%", result.stdout)
