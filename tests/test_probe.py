# SPDX-License-Identifier: Apache-2.0
# Rates are measured once, kept whole or not at all, and measured anew where what is kept is spoilt.
# The GPU's part runs on the simulated CUDA runtime.

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hift_ext import hardware, probe, rates

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, and little to measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "MOST_BYTES", 4 << 20)
    monkeypatch.setattr(hardware, "present", lambda index=0: None)
    return tmp_path / "cache" / "hift_ext" / "probe.json"


@pytest.fixture
def folder() -> str:
    """On a disk, which pytest's own may not be."""
    return "/var/tmp"


def refuse(monkeypatch) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("it was measured")

    for name in ("host_rates", "disk_rates", "bus_rates"):
        monkeypatch.setattr(rates, name, measured)


def test_rates_are_measured_once(cache, folder, monkeypatch) -> None:
    first = probe.measure(folder=folder)
    assert 1e6 < first.host.copy < 1e13
    assert 1e4 < first.disk.read < 1e13
    assert 1e4 < first.disk.write < 1e13
    assert first.bus is None
    assert first.notes == ("no link to a GPU was measured: torch sees no GPU",)
    assert [p.name for p in cache.parent.iterdir()] == ["probe.json"]
    refuse(monkeypatch)
    assert probe.measure(folder=folder) == first
    assert probe.cached(folder=folder) == probe.Probe(first.host, first.disk)
    assert probe.cached() == probe.Probe(first.host)
    with pytest.raises(AssertionError, match="it was measured"):
        probe.measure(folder=folder, again=True)
    torch.set_num_threads(2)  # another key
    with pytest.raises(AssertionError, match="it was measured"):
        probe.measure(folder=folder)


def test_measuring_again_replaces_and_keeps_the_rest(cache, folder) -> None:
    probe.measure(folder=folder)
    kept = json.loads(cache.read_text())
    kept["entries"]["bus: another machine"] = {"to_device": 1.0}
    kept["entries"][probe.host_key()] = {"copy": 1.0}
    cache.write_text(json.dumps(kept))
    assert probe.cached().host.copy == 1.0
    found = probe.measure(folder=folder, again=True)
    assert found.host.copy > 1.0
    assert probe.cached().host == found.host
    assert "bus: another machine" in json.loads(cache.read_text())["entries"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[1]",
        "7",
        '{"format": 1}',
        '{"format": 9, "entries": {}}',
        "\x00",
        "[" * 99999,
    ],
)
def test_a_spoilt_cache_is_told_and_measured_anew(text, cache, folder) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert len(probe.cached().notes) == 1
    found = probe.measure(folder=folder)
    assert found.host is not None
    assert any("is not a cache of this version" in note for note in found.notes)
    assert probe.cached(folder=folder) == probe.Probe(found.host, found.disk)


@pytest.mark.parametrize(
    "rate", [{}, {"copy": -1}, {"copy": 0}, {"copy": "9"}, {"copy": True}, {"copy": None}, 5]
)
def test_spoilt_rates_are_measured_anew(rate, cache, folder) -> None:
    found = probe.measure(folder=folder)
    kept = json.loads(cache.read_text())
    for value in (rate, {"copy": float("nan")}, {"copy": 1e9, "more": 1}):
        kept["entries"][probe.host_key()] = value
        cache.write_text(json.dumps(kept))
        assert probe.cached().host is None
    again = probe.measure(folder=folder)
    assert again.host is not None
    assert again.disk == found.disk


def test_a_cache_that_cannot_be_kept_is_told(cache, folder, monkeypatch) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    found = probe.measure(folder=folder)
    assert found.host is not None
    assert any("could not be kept" in note for note in found.notes)


def test_a_cache_is_replaced_whole_or_not_at_all(cache, folder, monkeypatch) -> None:
    probe.measure(folder=folder)
    before = cache.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        found = probe.measure(folder=folder, again=True)
    assert any("could not be kept" in note and "no space" in note for note in found.notes)
    assert cache.read_text() == before
    assert [p.name for p in cache.parent.iterdir()] == ["probe.json"]


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert probe.cache_file() == tmp_path / ".cache/hift_ext/probe.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert probe.cache_file() == tmp_path / ".cache/hift_ext/probe.json"


def test_what_cannot_be_measured_raises(folder, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="link of GPU 0 cannot be measured: torch sees no GPU"):
        probe.measure(0)
    with pytest.raises(OSError, match="No such file"):
        probe.measure(folder=tmp_path / "absent")


def test_a_disk_without_room(folder, monkeypatch, cache) -> None:
    monkeypatch.setattr(probe.memory, "disk_free_bytes", lambda folder: 1000)
    with pytest.raises(OSError, match="1000 bytes are free, too few"):
        probe.measure(folder=folder)
    assert not cache.exists()


def test_what_was_measured_before_a_failure_is_not_lost(folder, monkeypatch, cache) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rates, "disk_rates", full)
        with pytest.raises(OSError, match="no space"):
            probe.measure(folder=folder)
    assert probe.cached().host is not None


def test_sizes_leave_room() -> None:
    assert probe._least(1 << 40) == probe.MOST_BYTES
    assert probe._least(None) == probe.MOST_BYTES
    assert probe._least(16 << 20) == rates.BLOCK_BYTES


def test_no_place_for_page_files_is_a_note(monkeypatch) -> None:
    def nowhere() -> str:
        raise OSError("no folder for a scratch page file")

    monkeypatch.setattr(probe.ops, "scratch_folder", nowhere)
    found = probe.measure()
    assert found.disk is None
    assert any("no folder for a scratch page file" in note for note in found.notes)


def test_the_bar_ends_where_it_should(folder, monkeypatch) -> None:
    bars = []

    @contextmanager
    def recorded(what, total, in_bytes):
        told = []
        yield type("Bar", (), {"advance": staticmethod(told.append)})
        bars.append((total, sum(told)))

    monkeypatch.setattr(probe, "progress", recorded)
    probe.measure(folder=folder)
    ((total, told),) = bars
    assert total == told == (5 + 2) * (4 << 20)


def test_disks_without_direct_access(folder, monkeypatch) -> None:
    direct = rates.disk_rates(folder, 8 << 20, lambda _: None)
    opened, open_ = [], os.open

    def no_direct(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct access")
        opened.append(str(path))
        return open_(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_direct)
        buffered = rates.disk_rates(folder, 8 << 20, lambda _: None)
    assert buffered.direct == 0.0
    assert buffered.read > 0
    assert direct.direct in (0.0, 1.0)
    assert opened
    assert not any(Path(path).exists() for path in opened)


def test_a_disk_that_moves_less_is_an_error(folder, monkeypatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda handle, buffers, offset: 10)
    with pytest.raises(OSError, match=r"10 of \d+ bytes of /var/tmp were moved"):
        rates.disk_rates(folder, 1, lambda _: None)


@pytest.mark.needs("cuda_headers")
@pytest.mark.parametrize("part", ["", "measure"])
def test_a_link_on_the_simulated_runtime(part, cuda_sim, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/cuda_sim/probing.py"), *part.split()],
        env={
            **os.environ,
            "PYTHONPATH": f"{cuda_sim}{os.pathsep}{ROOT}",
            "XDG_CACHE_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split()[0] in ("60", "measured")
