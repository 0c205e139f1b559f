# SPDX-License-Identifier: Apache-2.0
# The bar of what takes long, in a process whose stderr is a terminal (a pty) or is not.
# It comes late, goes without a trace, and leaves stdout to others.

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from hift_ext import progress

# The module by its path: the package would import torch, six times.
SLOW = """
import importlib.util, time
spec = importlib.util.spec_from_file_location("progress", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.DELAY_S = {delay}
with module.progress("saving [run].ckpt", 3000, in_bytes=True, show={show}) as bar:
    for _ in range(3):
        bar.advance(1000)
        time.sleep({pause})
    bar.say("nearly there")
    time.sleep({pause})
print("{{}}")
"""


def shown(
    show: object = None,
    *,
    terminal: bool = True,
    delay: float = 0.0,
    pause: float = 0.3,
    rank: str = "",
) -> tuple[str, str]:
    """What the process wrote to stdout and to stderr."""
    ours, theirs = os.openpty() if terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("LOCAL_RANK", None)
    if rank:
        environment["LOCAL_RANK"] = rank
    script = SLOW.format(path=progress.__file__, show=show, delay=delay, pause=pause)
    pieces: list[bytes] = []

    def collect() -> None:
        try:
            while piece := os.read(ours, 4096):
                pieces.append(piece)
        except OSError:  # a terminal nobody writes to any more
            pass

    result = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    reader = threading.Thread(target=collect)
    reader.start()
    out, _ = result.communicate(timeout=60)
    reader.join(timeout=10)
    os.close(ours)
    assert result.returncode == 0
    return out.decode(), b"".join(pieces).decode()


def test_a_bar_on_a_terminal():
    out, err = shown()
    assert out == "{}\n"
    assert "saving [run].ckpt" in err
    assert "3.0/3.0 kB" in err
    assert "nearly there" in err
    assert "\x1b[2K" in err  # it is wiped away at the end


@pytest.mark.parametrize(
    "how",
    [{"delay": 30.0}, {"show": False}, {"rank": "1"}],
    ids=["over before it appears", "not wanted", "another rank"],
)
def test_no_bar_on_a_terminal(how):
    assert shown(pause=0.1, **how) == ("{}\n", "")


def test_no_bar_elsewhere_unless_asked():
    assert shown(terminal=False, pause=0.1) == ("{}\n", "")
    out, err = shown(True, terminal=False)
    assert out == "{}\n"
    assert "saving [run].ckpt" in err


def test_nothing_is_left_behind(monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    before = threading.active_count()

    def work() -> None:
        with progress.progress("counting", 10, show=True) as bar:
            time.sleep(0.3)
            bar.advance()
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        work()
    deadline = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
