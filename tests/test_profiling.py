# SPDX-License-Identifier: Apache-2.0
# Names of the optimizer's stages in torch.profiler and NVTX: there when somebody listens, and
# otherwise not even made.

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import hift_ext
from hift_ext import profiling


def work(folder: Path) -> None:
    """A pass and a bit, clipped; a save and a load; a step without gradients."""
    model = models.tiny(blocks=2)
    optimizer = hift_ext.AdamW(model, max_grad_norm=1.0)
    models.train(model, optimizer, models.batches(5))
    hift_ext.save(optimizer, folder / "saved")
    hift_ext.load(optimizer, folder / "saved")
    with pytest.warns(UserWarning, match="changed nothing"):
        optimizer.step()


def test_every_stage_has_a_name_in_the_profiler(tmp_path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work(tmp_path)
    count = {e.key: e.count for e in profiled.key_averages() if e.key.startswith("hift::")}
    assert count == {
        "hift::step[embedding]": 2,
        "hift::step[blocks.0]": 2,
        "hift::step[blocks.1]": 1,
        "hift::step[norm + head]": 1,
        "hift::norm": 5,
        "hift::update": 5,
        "hift::freeze": count["hift::freeze"],
        "hift::prefetch": 1,
        "hift::save": 1,
        "hift::load": 1,
    }
    assert count["hift::freeze"] >= 5
    # Norm and update lie within their step.
    events = profiled.events()
    whole = [e.time_range for e in events if e.name.startswith("hift::step")]
    parts = [e.time_range for e in events if e.name in ("hift::norm", "hift::update")]
    assert len(parts) == 10
    for part in parts:
        assert sum(s.start <= part.start and part.end <= s.end for s in whole) == 1


def test_nothing_is_made_where_nobody_listens(tmp_path, monkeypatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a record was made")

    monkeypatch.setattr(torch.profiler, "record_function", never)
    monkeypatch.setattr(profiling, "_Range", never)
    work(tmp_path)
    assert profiling.stage("a") is profiling.stage("b", "c")


def test_nvtx_ranges_by_the_environment(tmp_path, monkeypatch) -> None:
    open_ranges: list[str] = []
    seen: list[str] = []

    def push(name: str) -> None:
        open_ranges.append(name)
        seen.append(" > ".join(open_ranges))

    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda _: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", open_ranges.pop)
    monkeypatch.setenv("HIFT_NVTX", "1")
    monkeypatch.setattr(profiling, "_nvtx", profiling._nvtx_wanted())
    work(tmp_path)
    assert open_ranges == []
    assert "hift::step[blocks.1] > hift::norm" in seen
    assert "hift::step[blocks.1] > hift::update" in seen
    assert {"hift::save", "hift::load", "hift::prefetch"} <= set(seen)
    # An error inside a stage closes its range.
    with pytest.raises(KeyError), profiling.stage("x"):
        raise KeyError
    assert open_ranges == []
    # And the profiler has the names too.
    with profile(activities=[ProfilerActivity.CPU]) as profiled, profiling.stage("both"):
        pass
    assert "hift::both" in [event.key for event in profiled.key_averages()]


@pytest.mark.parametrize("value", ["0", ""])
def test_nvtx_that_is_switched_off(value, monkeypatch) -> None:
    monkeypatch.setenv("HIFT_NVTX", value)
    assert not profiling._nvtx_wanted()


def test_nvtx_without_cuda_says_so_and_goes_on() -> None:
    script = """
import torch
def refuse(*_): raise RuntimeError("NVTX functions not installed")  # as in a torch without CUDA
torch.cuda.nvtx.mark = torch.cuda.nvtx.range_push = refuse
import hift_ext
model = torch.nn.Linear(2, 2)
optimizer = hift_ext.AdamW(model, layers_per_group="all")
model(torch.ones(2)).sum().backward()
optimizer.step()
"""
    root = Path(hift_ext.__file__).parent.parent
    paths = os.pathsep.join([str(root), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HIFT_NVTX": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "HIFT_NVTX" in done.stderr
