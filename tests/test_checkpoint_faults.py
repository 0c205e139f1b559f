# SPDX-License-Identifier: Apache-2.0
# A save that is killed, refused or starved at any call leaves the last good checkpoint, whole; and
# neither saving nor a state_dict of what is on disk takes the memory of the state.
"""Faults under hift_ext.save and hift_ext.load."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import models
import pytest
import torch
from checkpoint_rig import alone, killed, refused_at_every_call, visits
from torch import nn

import hift_ext
from hift_ext import replace


def make(steps: int) -> hift_ext.AdamW:
    model = models.tiny(blocks=0, width=8)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(steps))
    return optimizer


def kill_at_many_calls(folder: str) -> None:
    """Runs in a process of its own."""
    make(1).close()  # what torch imports at the first optimizer, once for all children
    number, exchange = 0, replace._exchange
    for renames in (False, True):
        number = 1000 + max(number - 16, 0) if renames else 0  # the same calls up to there
        replace._exchange = (lambda a, b: False) if renames else exchange
        while killed(make, Path(folder), number, number % 1000):
            number += 1 if renames else 2  # an error of every call is tried below


def test_killed_at_many_calls_the_last_checkpoint_is_there(tmp_path) -> None:
    old, new = make(4), make(7)
    hift_ext.save(old, tmp_path / "good")
    alone("test_checkpoint_faults", f"kill_at_many_calls({str(tmp_path)!r})")
    found, recovered = {4: 0, 7: 0}, 0
    runs = [run for run in tmp_path.iterdir() if run.name != "good"]
    for run in runs:
        recovered += not (run / "saved").exists()
        again = make(0)
        hift_ext.load(again, run / "saved")
        expected = {4: old, 7: new}
        steps = next(n for n, o in expected.items() if visits(o) == visits(again))
        found[steps] += 1
        theirs, ours = expected[steps].state_dict()["state"], again.state_dict()["state"]
        assert all(torch.equal(v, ours[i][n]) for i, e in theirs.items() for n, v in e.items())
        if int(run.name) % 4 == 0:
            hift_ext.save(again, run / "saved")  # removes what the dead process left
            assert os.listdir(run) == ["saved"]
    assert len(runs) > 20
    assert min(found.values()) >= 2
    assert recovered >= 1  # between two renames


@pytest.mark.parametrize("renames", [False, True])
def test_an_error_of_any_call_leaves_the_last_checkpoint(renames, tmp_path, monkeypatch) -> None:
    if renames:
        monkeypatch.setattr(replace, "_exchange", lambda a, b: False)
    refused_at_every_call(make, tmp_path)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Stands in for a full disk: the system refuses to make a file longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_large(store: str) -> tuple[nn.Parameter, hift_ext.AdamW]:
    """A parameter with two states of 1,200,000 bytes, after a step."""
    w = nn.Parameter(torch.zeros(300_000))
    optimizer = hift_ext.AdamW([w], layers_per_group="all", store=store)
    w.grad = torch.ones_like(w)
    optimizer.step()
    return w, optimizer


def test_full_disk(tmp_path) -> None:
    w, optimizer = one_large("ram")
    path = tmp_path / "saved"
    hift_ext.save(optimizer, path)
    optimizer.step()
    with files_up_to(1_500_000):
        for _ in range(2):
            with pytest.raises(OSError, match="are free there: make room") as caught:
                hift_ext.save(optimizer, path)
            assert caught.value.errno == errno.EFBIG
            assert "state-00001.safetensors of 24" in str(caught.value)
    assert os.listdir(tmp_path) == ["saved"]
    hift_ext.load(optimizer, path)
    assert int(optimizer.state[w]["step"]) == 1
    hift_ext.save(optimizer, path)


def test_no_room_for_copies_is_an_error_and_no_signal() -> None:
    _, optimizer = one_large("disk")
    with files_up_to(1_000_000), pytest.raises(OSError, match="reserve 1200000 bytes in") as caught:
        optimizer.state_dict()
    assert caught.value.errno == errno.EFBIG
    assert optimizer.state_dict()["state"][0]["exp_avg"].all()


def test_work_of_the_living_is_left_alone(tmp_path) -> None:
    optimizer, target = make(3), tmp_path / "saved"
    with replace.Replacement(target) as living:
        (living.folder / "half").write_text("work")
        dead = tmp_path / "saved.tmp-1-0123abcd"
        strangers = [tmp_path / "saved.tmp-mine", tmp_path / "other.tmp-1-0123abcd"]
        for folder in (dead, *strangers):
            folder.mkdir()
        hift_ext.save(optimizer, target)
        assert (living.folder / "half").read_text() == "work"
        assert not dead.exists()
        assert all(folder.exists() for folder in strangers)
    assert not living.folder.exists()


def test_a_sweep_right_after_the_folder_was_made(tmp_path, monkeypatch) -> None:
    """Another saver may take a folder that is not locked yet for a dead process's."""
    real, swept = os.mkdir, []

    def mkdir(path, *args) -> None:
        real(path, *args)
        if not swept:
            replace.sweep(tmp_path / "saved")
            swept.append(not os.path.exists(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    hift_ext.save(make(3), tmp_path / "saved")
    assert swept == [True]
    assert os.listdir(tmp_path) == ["saved"]


def test_two_threads_save_to_one_place(tmp_path) -> None:
    optimizers = [make(3), make(5)]
    errors = []

    def work(optimizer) -> None:
        try:
            for _ in range(5):
                hift_ext.save(optimizer, tmp_path / "saved")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(o,)) for o in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    again = make(0)
    hift_ext.load(again, tmp_path / "saved")
    assert visits(again) in [visits(o) for o in optimizers]
    assert os.listdir(tmp_path) == ["saved"]


def test_a_loader_waits_for_a_living_replacement(tmp_path, monkeypatch) -> None:
    hift_ext.save(make(3), tmp_path / "saved")
    old = tmp_path / "saved.tmp-1-0123abcd.old"
    os.rename(tmp_path / "saved", old)
    work = tmp_path / "saved.tmp-1-0123abcd"
    work.mkdir()
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(replace, "_PATIENCE_S", 0.1)
    with pytest.raises(TimeoutError, match="has been replacing"):
        hift_ext.load(make(0), tmp_path / "saved")
    os.close(handle)
    again = make(0)
    hift_ext.load(again, tmp_path / "saved")
    assert visits(again) == visits(make(3))


def test_a_store_that_fails_while_loading_says_so(tmp_path, monkeypatch) -> None:
    optimizer = make(4)
    hift_ext.save(optimizer, tmp_path / "saved")
    calls = []

    def load(*args) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.EIO, "the page file is gone")

    monkeypatch.setattr(type(optimizer.state.engine), "load", load)
    with pytest.raises(RuntimeError, match=r"partly replaced: load again .* page file is gone"):
        hift_ext.load(optimizer, tmp_path / "saved")
    monkeypatch.undo()
    hift_ext.load(optimizer, tmp_path / "saved")
    assert visits(optimizer) == visits(make(4))


# Memory -----------------------------------------------------------------------------------------

MEBIBYTE = 1 << 20


class Watch:
    """The most anonymous memory above what there was (bytes), sampled by a thread."""

    def __enter__(self) -> Watch:
        self._on, self.peak, self._base = True, 0, self._now()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    @staticmethod
    def _now() -> int:
        text = Path("/proc/self/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def _look(self) -> None:
        while self._on:
            self.peak = max(self.peak, self._now() - self._base)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self._now() - self._base)
        self._on = False
        self._thread.join()


def big(store: str) -> tuple[nn.Module, hift_ext.AdamW]:
    """48 MiB of state in pages of 4 MiB."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))
    optimizer = hift_ext.AdamW(model, store=store, page_bytes=4 * MEBIBYTE)
    for _ in range(6):
        model(torch.ones(1, 1024)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.needs("proc")
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_memory_of_saving_and_loading_is_below_two_pages(store, tmp_path) -> None:
    _, optimizer = big(store)
    small = make(3)
    hift_ext.save(small, tmp_path / "warm")  # threads, allocator arenas
    hift_ext.load(small, tmp_path / "warm")
    with Watch() as saving:
        hift_ext.save(optimizer, tmp_path / "saved")
    assert saving.peak < 8 * MEBIBYTE
    with Watch() as loading:
        hift_ext.load(optimizer, tmp_path / "saved")
    assert loading.peak < 8 * MEBIBYTE
    assert sum(f.stat().st_size for f in (tmp_path / "saved").iterdir()) > 48 * MEBIBYTE
    optimizer.close()


@pytest.mark.needs("proc")
def test_a_state_dict_of_what_is_on_disk_is_not_in_anonymous_memory(tmp_path) -> None:
    model, optimizer = big("disk")
    optimizer.state[model[0].weight]  # the pager's buffer
    before = unlinked_files()
    with Watch() as taking:
        saved = optimizer.state_dict()
        torch.save(saved, tmp_path / "state.pt")
    assert taking.peak < 8 * MEBIBYTE
    for entry in saved["state"].values():
        assert entry["exp_avg"].untyped_storage().nbytes() == 4 * MEBIBYTE
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(
        torch.equal(value, loaded["state"][i][name])
        for i, entry in saved["state"].items()
        for name, value in entry.items()
    )
    assert unlinked_files() > before
    del entry, saved
    gc.collect()  # torch 2.6's save() leaves a cycle
    assert unlinked_files() == before
    optimizer.close()


def unlinked_files() -> int:
    """Open files of this process that have no name."""
    count = 0
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += "(deleted)" in os.readlink(handle)
    return count
