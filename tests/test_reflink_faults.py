# SPDX-License-Identifier: Apache-2.0
# A save that shares a page file's blocks, killed or refused at any call: the last good checkpoint
# is there, whole, as it is where saving copies.
"""Faults under hift_ext.save without copying."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_rig import alone, killed, refused_at_every_call, visits
from test_checkpoint import everything, same
from test_reflink import on_disk

import hift_ext


def kill_at_every_call(folder: str) -> None:
    """Runs in a process of its own."""
    on_disk(1).close()
    number = 0
    while killed(on_disk, Path(folder), number, number):
        number += 1


def test_killed_at_every_call_the_last_checkpoint_is_there(disk) -> None:
    old, new = on_disk(4), on_disk(7)
    hift_ext.save(old, disk / "good")
    alone("test_reflink_faults", f"kill_at_every_call({str(disk)!r})")
    found = []
    for run in (run for run in disk.iterdir() if run.name != "good"):
        again = on_disk(0)
        hift_ext.load(again, run / "saved")
        found.append(visits(again))
        expected = old if found[-1] == visits(old) else new
        assert same(everything(again), everything(expected))
        again.close()
    assert all(each in (visits(old), visits(new)) for each in found)
    assert len(found) > 10
    assert min(found.count(visits(o)) for o in (old, new)) >= 2
    old.close()
    new.close()


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_an_error_of_any_call_leaves_the_last_checkpoint(kind, disk) -> None:
    refused_at_every_call(on_disk, disk, kind)
