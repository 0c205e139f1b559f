# SPDX-License-Identifier: Apache-2.0
# A save that shares a page file's blocks, killed or refused at any call: the last good checkpoint
# is there, whole, as it is where saving copies.
"""Faults under hift_ext.save without copying."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import everything, same
from test_checkpoint_faults import die, stopped, visits
from test_reflink import on_disk

import hift_ext


def kill_at_every_call(folder: str) -> None:
    """Runs in a process of its own: children replace copies of a checkpoint and are killed."""
    on_disk(1).close()
    survived, number = False, 0
    while not survived:
        target = Path(folder) / f"{number}" / "saved"
        shutil.copytree(Path(folder) / "good", target)
        child = os.fork()
        if child == 0:
            try:
                optimizer = on_disk(7)
                with stopped(number, die):
                    hift_ext.save(optimizer, target)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        survived = status == 0
        number += 1


def test_killed_at_every_call_the_last_checkpoint_is_there(disk) -> None:
    old, new = on_disk(4), on_disk(7)
    hift_ext.save(old, disk / "good")
    code = f"import test_reflink_faults as t; t.kill_at_every_call({str(disk)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
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
    old, new, at, texts = on_disk(4), on_disk(7), 0, []
    while True:
        target = disk / f"{at}" / "saved"
        target.parent.mkdir()
        hift_ext.save(old, target)

        def refuse(name: str) -> None:
            raise kind(errno.EIO, f"no {name} today")

        with stopped(at, refuse) as seen:
            try:
                hift_ext.save(new, target)
            except kind as error:
                texts.append(f"{error} {error.__cause__}")
        if len(seen) <= at:
            break
        again = on_disk(0)
        hift_ext.load(again, target)
        assert visits(again) in (visits(old), visits(new))
        hift_ext.save(new, target)
        hift_ext.load(again, target)
        assert visits(again) == visits(new)
        assert os.listdir(target.parent) == ["saved"]
        again.close()
        at += 1
    assert at > 10
    assert len(texts) > 5
    assert all("today" in text for text in texts)
    old.close()
    new.close()
