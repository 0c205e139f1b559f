# SPDX-License-Identifier: Apache-2.0
"""A progress bar for what may take long: on stderr, after two seconds, and gone when it is done.

What is over sooner, or not watched by a terminal, starts no thread and writes nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Display
    from rich.progress import TaskID

DELAY_S = 2.0
"""A bar appears after so long (seconds)."""


class Progress:
    """What `progress` gives: how much is done. Every method may be called from any thread."""

    def __init__(self, what: str, total: float | None, in_bytes: bool, forced: bool) -> None:
        self._what, self._total, self._in_bytes, self._forced = what, total, in_bytes, forced
        self._done = 0.0
        self._lock = threading.Lock()
        self._over = False
        self._display: Display | None = None
        self._task: TaskID | None = None

    def advance(self, amount: float = 1) -> None:
        """So much more is done (bytes, or whatever `total` counts)."""
        with self._lock:
            self._done += amount
            self._update()

    def say(self, what: str) -> None:
        """Changes the words beside the bar."""
        with self._lock:
            self._what = what
            self._update()

    def _update(self) -> None:
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=self._done, description=self._what)

    def _appear(self) -> None:
        from rich import progress as parts
        from rich.console import Console

        columns: list[parts.ProgressColumn] = [
            parts.TextColumn("{task.description}", markup=False),
            parts.BarColumn(),
            parts.DownloadColumn() if self._in_bytes else parts.MofNCompleteColumn(),
        ]
        if self._in_bytes:
            columns.append(parts.TransferSpeedColumn())
        columns.append(parts.TimeRemainingColumn())
        with self._lock:
            if self._over:
                return
            # stdout may carry JSON for another program: it is left alone.
            self._display = parts.Progress(
                *columns,
                console=Console(stderr=True, force_terminal=self._forced or None),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._display.add_task(self._what, total=self._total)
            self._update()
            self._display.start()

    def _close(self) -> None:
        with self._lock:
            self._over = True
            display, self._display = self._display, None
        if display is not None:
            display.stop()


@contextmanager
def progress(
    what: str, total: float | None = None, *, in_bytes: bool = False, show: bool | None = None
) -> Iterator[Progress]:
    """Shows how far the work inside `with` is, if it takes more than two seconds.

    Args:
        what: A few words, as "saving run.ckpt".
        total: What `advance` will add up to; None if nobody knows.
        in_bytes: Whether that is bytes.
        show: Whether to show it at all. None: where stderr is a terminal, in the first process of
            a machine (by torchrun's LOCAL_RANK).
    """
    bar = Progress(what, total, in_bytes, forced=show is True)
    if not (_watched() if show is None else show):
        yield bar
        return
    timer = threading.Timer(DELAY_S, bar._appear)
    timer.daemon = True
    timer.start()
    try:
        yield bar
    finally:
        timer.cancel()
        bar._close()


def _watched() -> bool:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False
