# SPDX-License-Identifier: Apache-2.0
# The monitor's clock for a GPU, on a simulated device whose work runs late and in a random order:
# asking for a time that has not come is an error there.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from lazy_device import POLICIES, LazyDevice

import hift_ext
from hift_ext import monitoring
from hift_ext.moments import CudaClock, HostClock, Memory, clock_of

SEEDS = range(8)  # each policy twice


def work(device: LazyDevice, amount: int) -> None:
    """Queues so many operations on the compute stream; each takes a tick: a millisecond."""
    for _ in range(amount):
        device.compute_stream_does(lambda: None)


def steps(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if line["kind"] == "step"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_moment_is_where_the_work_before_it_ends(seed) -> None:
    device = LazyDevice(seed)
    clock = CudaClock(device)
    work(device, 3)
    first = clock.now()
    work(device, 5)
    second = clock.now()
    if device.policy == "lazy":
        assert not clock.passed(first)
    clock.wait()
    assert clock.passed(first)
    assert clock.passed(second)
    assert clock.seconds(second) - clock.seconds(first) == pytest.approx(6e-3, abs=1e-9)
    then = clock.seconds(second)
    clock.move(first)
    assert clock.seconds(second) == pytest.approx(then, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_lines_wait_for_the_gpu_and_have_its_times(seed, tmp_path, monkeypatch) -> None:
    device, log, plot = LazyDevice(seed), tmp_path / "run.jsonl", tmp_path / "run.png"
    monkeypatch.setattr(monitoring, "clock_of", lambda _: CudaClock(device))
    model, plain, data = models.tiny(), models.tiny(), models.batches(9)
    models.train(plain, hift_ext.AdamW(plain, lr=1e-2), data)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    backwards: list[int] = []

    def gradient_comes(_: torch.Tensor) -> None:
        work(device, 3)
        backwards[-1] += 3

    model.norm.register_forward_hook(lambda *_: work(device, 7))
    for p in model.parameters():
        p.register_hook(gradient_comes)
    with hift_ext.monitor(optimizer, log, plot=plot) as monitor:
        for number, tokens in enumerate(data):
            backwards.append(0)
            loss = models.loss_of(model, tokens)
            loss.backward()
            work(device, 11)
            optimizer.step()
            optimizer.zero_grad()
            if seed >= len(POLICIES):
                monitor.tell(loss=loss)  # the line waits for that, too
            written = len(steps(log)) if log.exists() else 0
            assert written <= number
            if device.policy == "lazy":
                assert written == 0
            if device.policy == "eager":
                assert written == number
        assert not device.errors
    assert models.same(model, plain)
    lines = steps(log)
    assert [line["step"] for line in lines] == list(range(9))
    # A span ends with the record of its own end, a tick.
    assert [line["forward_ms"] for line in lines] == [8.0] * 9
    assert [line["backward_ms"] for line in lines] == [ticks + 1.0 for ticks in backwards]
    assert all(line["optimizer_ms"] == 1.0 for line in lines)
    assert all(
        line["step_ms"] >= 8 + 11 + ticks for line, ticks in zip(lines, backwards, strict=True)
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_error_waits_for_the_gpu_and_leaves_every_line(tmp_path, monkeypatch) -> None:
    device, log = LazyDevice(POLICIES.index("lazy")), tmp_path / "run.jsonl"
    monkeypatch.setattr(monitoring, "clock_of", lambda _: CudaClock(device))
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, lr=1e-2)

    def train() -> None:
        with hift_ext.monitor(optimizer, log):
            for tokens in models.batches(2):
                models.loss_of(model, tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert steps(log) == [] if log.exists() else True
            raise KeyError("in the midst of it")

    with pytest.raises(KeyError, match="in the midst"):
        train()
    assert [line["step"] for line in steps(log)] == [0, 1]


def test_which_clock_and_what_memory(monkeypatch) -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    taken = iter((70, 50, 60))
    gpu = torch.device("cuda", 1)

    def allocated(device: torch.device) -> int:
        assert device == gpu
        return next(taken)

    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 90)
    memory = Memory(gpu)
    try:
        assert (memory.look(), memory.highest) == (70, 70)
        assert (memory.look(), memory.highest) == (50, 70)
        facts = memory.facts()
    finally:
        memory.close()
    rss = facts.pop("rss_bytes")
    assert rss > 1 << 20
    assert facts == {"cuda_bytes": 60, "cuda_highest_bytes": 70, "cuda_peak_bytes": 90}
    assert memory.highest == 0
