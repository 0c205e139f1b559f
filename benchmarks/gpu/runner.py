# SPDX-License-Identifier: Apache-2.0
# Runs each section in a process of its own: a fault on the device spoils the process that met it,
# and a section that hangs can be ended. This process never calls CUDA, so that it may fork.
"""Sections, their time budgets, and the processes they run in."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from gpu.report import Row

SECONDS = {
    "build": 10,
    "bits": 40,
    "engine": 30,
    "sanitizer": 80,
    "kernels": 25,
    "bus": 15,
    "rings": 40,
    "triton": 35,
    "llama": 100,
}
"""Each section's budget."""

BUILD_SECONDS = 240
"""What compiling may take where no module is installed."""

TOTAL_SECONDS = 470
"""Of it all. What compiling took beyond what the budgets leave is taken from the last sections."""

LEAST_SECONDS = 10
"""A section's budget where nothing is left."""

DRY_SECONDS = 60
"""A section's budget where the device is simulated."""


class Budget:
    """The time a section has.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, none if negative."""
        return self._end - time.monotonic()

    def part(self, share: float) -> Budget:
        """A share of what is left."""
        return Budget(share * self.left())


@dataclass
class Result:
    """What a section found.

    Attributes:
        name: The section's.
        rows: As far as it came.
        failed: Why it ended early; empty if it did not.
        seconds: It ran.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    failed: str = ""
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """`failed` if any of it failed."""
        return "failed" if self.failed or any(row.failed for row in self.rows) else "ok"


def reason(error: BaseException) -> str:
    """An exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def rows_of(name: str, dry: bool, seconds: float) -> Iterator[Row]:
    """Runs a section in this process."""
    from gpu.device import open_device

    section = importlib.import_module(f"gpu.{name}")
    device = open_device(dry)
    yield from section.run(device, Budget(seconds))
    device.check()


def _child(name: str, dry: bool, seconds: float, pipe: Connection) -> None:
    try:
        for row in rows_of(name, dry, seconds):
            row.as_dict(dry)  # what cannot be written fails here
            pipe.send(row)
        pipe.send("")
    except BaseException as error:
        traceback.print_exc()
        pipe.send(reason(error))


def run_section(name: str, dry: bool, seconds: float) -> Result:
    """Runs a section in a child; what it yields is kept, whatever becomes of it.

    Args:
        name: A key of SECONDS.
        dry: On the simulated device.
        seconds: After which a section should end; it is killed when it took half as long again.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, dry, seconds, send))
    result, begin = Result(name), time.monotonic()
    child.start()
    send.close()
    limit = begin + 1.5 * seconds
    try:
        while True:
            if not receive.poll(max(0.0, limit - time.monotonic())):
                result.failed = f"killed after {1.5 * seconds:.0f} s"
                child.kill()
                break
            item = receive.recv()
            if isinstance(item, str):
                result.failed = item
                break
            result.rows.append(item)
    except EOFError:
        child.join()
        result.failed = f"its process ended by {ending(child.exitcode)}"
    child.join(10)
    if child.is_alive():  # it hangs in the driver, after its last row
        child.kill()
        child.join()
        result.failed = result.failed or "its process did not end"
    result.seconds = time.monotonic() - begin
    return result


def ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
