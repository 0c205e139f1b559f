# SPDX-License-Identifier: Apache-2.0
# optimizer.summary() and the monitor's picture: both are compared with what was seen step by step.
# Pictures are drawn; how they look is for the eye.

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest

import hift_ext
from hift_ext import timeline, totals
from hift_ext.recent import Ran, Recent


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("at_once", [4, 1024])
def test_the_summary_is_the_sum_of_all_stats(at_once, monkeypatch) -> None:
    monkeypatch.setattr(totals, "_AT_ONCE", at_once)
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, store="disk", page_bytes=4096, staging=3 * 4096)
    assert optimizer.summary()["steps"] == 0
    seen: dict[int, list[dict[str, float]]] = {}
    for tokens in models.batches(14):
        models.loss_of(model, tokens).backward()
        active = optimizer.active
        optimizer.step()
        optimizer.zero_grad()
        seen.setdefault(active, []).append(optimizer.stats())
    total = optimizer.summary()
    assert json.loads(json.dumps(total)) == total
    assert (total["steps"], total["passes"]) == (14, optimizer.pass_index)
    every = [stats for group in seen.values() for stats in group]
    parts = [(total, every), *((total["groups"][g], part) for g, part in seen.items())]
    for found, stats in parts:
        assert found["steps"] == len(stats)
        for way in ("bytes_in", "bytes_out"):
            assert found[way] == sum(s[way] for s in stats)
        for name in ("transfer_ms", "hidden_ms", "wait_ms", "update_ms", "step_ms"):
            values = [s[name] for s in stats]
            assert found["mean"][name] == pytest.approx(sum(values) / len(values))
            assert found["worst"][name] == max(values)
    assert [g["name"] for g in total["groups"]] == [g.name for g in optimizer.groups]
    assert total["bytes_in"] > 0


def test_the_picture_shows_what_ran(tmp_path, monkeypatch) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, store="disk", page_bytes=4096, staging=3 * 4096)
    shown: list[timeline.Picture] = []
    monkeypatch.setattr(timeline, "draw", lambda path, picture: shown.append(picture))
    with hift_ext.monitor(optimizer, tmp_path / "a", plot=tmp_path / "a.png", window=4):
        models.train(model, optimizer, models.batches(14))
    (picture,) = shown
    assert [name for *_, name in picture.steps] == [
        optimizer.groups[n % len(optimizer.groups)].name for n in range(10, 14)
    ]
    for (_, end, _), (begin, _, _) in zip(picture.steps, picture.steps[1:], strict=False):
        assert begin == end
    first, last = picture.steps[0][0], picture.steps[-1][1]
    assert len(picture.lanes["forward"]) == len(picture.lanes["backward"]) == 4
    for lane in ("update", "copy in", "copy out"):
        inside = [s for s in picture.lanes[lane] if first <= s[0] <= s[1] <= last]
        assert inside, lane
    for number, (_, end, _) in enumerate(picture.steps):
        forward, backward = (picture.lanes[lane][number] for lane in ("forward", "backward"))
        assert forward[0] <= forward[1] <= backward[0] <= backward[1] <= end
    assert len(picture.memory) == 14
    assert picture.lanes["optimizer"] == []


def test_the_memory_curve_stays_short_and_keeps_its_peaks() -> None:
    recent = Recent(3)
    for n in range(100_000):
        recent.ran(Ran("g", (n, n + 1), (n, n + 1), [], []), 5, 900 if n == 60_001 else 7)
    curve = recent.picture("", "").memory
    assert 1000 <= len(curve) <= 4000
    assert max(highest for _, _, highest in curve) == 900
    assert curve[0][0] == 1
    assert curve[-1][0] > 99_000 - 100


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_pictures_of_any_length_are_drawn(steps, tmp_path) -> None:
    ran = [(n * 0.1, n * 0.1 + 0.1, f"model.layers.{n}.a_long_name") for n in range(steps)]
    lanes = {
        "forward": [(n * 0.1, n * 0.1 + 0.05) for n in range(steps)],
        "read file": [(0.0, 1.0)],
    }
    picture = timeline.Picture(
        "a title", ran, lanes, [(b, n, n) for n, (_, b, _) in enumerate(ran)]
    )
    timeline.draw(tmp_path / "a.png", picture)
    assert is_png(tmp_path / "a.png")
