# SPDX-License-Identifier: Apache-2.0
# Saves that are stopped at a call: killed, or refused by the system; and what must be there then.
"""For tests of faults under hift_ext.save."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hift_ext
from hift_ext import replace

CALLS = ("mkdir", "open", "pwrite", "write", "fsync", "rename", "close", "rmdir", "unlink")
"""Of the os module: what saving changes the disk with."""


Make = Callable[[int], hift_ext.HiFTOptimizer]
"""An optimizer after so many steps."""


def visits(optimizer: hift_ext.HiFTOptimizer) -> list[int]:
    return [entry.visits for entry in optimizer.state.entries.values()]


@contextmanager
def stopped(at: int, stop: Callable[[str], None]) -> Iterator[list[str]]:
    """Calls `stop` instead of the `at`-th system call of saving; yields the calls so far."""
    real = {name: getattr(os, name) for name in CALLS}
    real_exchange, seen = replace._exchange, []

    def wrapped(name: str) -> Callable:
        def call(*args, **kwargs):
            # From the thread that writes shards, too; not from imports.
            seen.append(name)
            if len(seen) == at + 1:
                if name in ("pwrite", "write") and len(args[1]) > 1:
                    real[name](args[0], args[1][: len(args[1]) // 2], *args[2:])
                stop(name)
            return (real_exchange if name == "exchange" else real[name])(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    replace._exchange = wrapped("exchange")
    try:
        yield seen
    finally:
        replace._exchange = real_exchange
        for name, call in real.items():
            setattr(os, name, call)


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed(make: Make, folder: Path, number: int, at: int) -> bool:
    """A child replaces a copy of `folder`'s checkpoint, and dies at a call; False: it did not."""
    target = folder / f"{number}" / "saved"
    shutil.copytree(folder / "good", target)
    child = os.fork()
    if child == 0:
        try:
            optimizer = make(7)
            with stopped(at, die):
                hift_ext.save(optimizer, target)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def alone(module: str, call: str) -> None:
    """Runs a function of a module of tests in a process of its own, whose threads are few."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = f"import {module} as t; t.{call}"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def refused_at_every_call(make: Make, folder: Path, kind: type[BaseException] = OSError) -> None:
    """Saves over a checkpoint while a call fails, each in turn: it stays, or the new one is there.

    The error says what failed, and the next save goes on as if nothing had been.
    """
    old, new, at, said = make(4), make(7), 0, []
    while True:
        target = folder / f"{at}" / "saved"
        target.parent.mkdir(parents=True)
        hift_ext.save(old, target)

        def refuse(name: str) -> None:
            raise kind(errno.EIO, f"no {name} today")

        with stopped(at, refuse) as seen:
            try:
                hift_ext.save(new, target)
            except kind as error:
                said.append(f"{error} {error.__cause__}")
        if len(seen) <= at:
            break
        again = make(0)
        hift_ext.load(again, target)
        assert visits(again) in (visits(old), visits(new))
        hift_ext.save(new, target)
        hift_ext.load(again, target)
        assert visits(again) == visits(new)
        assert os.listdir(target.parent) == ["saved"]
        again.close()
        at += 1
    assert at > 10
    assert len(said) > 5
    assert all("today" in text for text in said)
    old.close()
    new.close()
