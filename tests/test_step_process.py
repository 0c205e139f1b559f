# SPDX-License-Identifier: Apache-2.0
# The step as part of a process: its threads, their floating-point mode, forks, several callers, the
# environment. Mostly in processes of their own, since the pool of threads never shrinks.

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from spans import PAIRS, Buffers

from hift_ext import ops

COUNT = 200_000  # enough for seven threads


def run_python(code: str, **environ: str) -> str:
    """What a new interpreter prints; fails with its errors."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    return done.stdout


WORKERS = """
import pathlib
def workers():
    names = [p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
    return names.count("hift-step")
"""

FORK = (
    WORKERS
    + f"""
import ctypes, os, signal, threading
import _hift_ext as c
count = {COUNT}
def fresh():
    return (ctypes.c_float * count)(), (ctypes.c_float * count)(*range(count))
def step(buffers):
    addresses = [ctypes.addressof(b) for b in buffers]
    c.step_spans([(*addresses, count, c.rules()["sgd"][0], [], (1.0, 0.0, -1.0))], threads=2)
def right(buffers):
    return bytes(buffers[0]) == bytes(buffers[1])
def forked(buffers):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that hangs ends with a signal
        try:
            before = workers()
            step(buffers)
            os._exit(0 if right(buffers) and (before, workers()) == (0, 1) else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
)


@pytest.mark.needs("proc")
def test_threads_are_torchs_number():
    code = (
        WORKERS
        + f"""
import torch, hift_ext
weights = torch.nn.Parameter(torch.zeros({COUNT}))
weights.grad = torch.ones({COUNT})
optimizer = hift_ext.SGD([weights], lr=1.0, layers_per_group="all")
for threads in (1, 3, 2, 5):
    torch.set_num_threads(threads)
    optimizer.step()
    print(workers())
assert torch.equal(weights.detach(), torch.full(({COUNT},), -4.0))
"""
    )
    # The pool grows to the largest number asked for, less the caller; workers beyond it sleep.
    assert run_python(code).split() == ["0", "2", "2", "4"]


@pytest.mark.needs("proc")
def test_few_elements_wake_nobody():
    code = (
        WORKERS + FORK + "\ncount = 1000\nb = fresh()\nstep(b)\nassert right(b)\nprint(workers())"
    )
    assert run_python(code).strip() == "0"


@pytest.mark.needs("proc")
def test_fork_after_a_step():
    code = FORK + "\nstep(fresh())\nassert workers() == 1\nprint(forked(fresh()), workers())"
    assert run_python(code).split() == ["0", "1"]


@pytest.mark.needs("proc")
def test_fork_while_another_thread_steps():
    code = (
        FORK
        + """
stop, mine = threading.Event(), fresh()
def steps():
    while not stop.is_set():
        step(mine)
thread = threading.Thread(target=steps)
thread.start()
print([forked(fresh()) for _ in range(10)])
stop.set()
thread.join()
"""
    )
    assert run_python(code).strip() == str([0] * 10)


@pytest.mark.needs("flush_denormal")
@pytest.mark.parametrize("threads", [1, 4])
def test_flush_denormal_reaches_every_thread(threads):
    def step() -> torch.Tensor:
        buffers = Buffers("sgd", torch.zeros(COUNT), torch.full((COUNT,), 2.0**-100), [])
        return buffers.step(hyper=(1.0, 0.0, -(2.0**-30)), threads=threads).param

    def kept(weights: torch.Tensor) -> int:
        return int((weights.view(torch.int32) == 1 << 19).sum())  # 2^-130, below float's 2^-126

    assert kept(step()) == COUNT
    torch.set_flush_denormal(True)
    try:
        weights = step()
    finally:
        torch.set_flush_denormal(False)
    assert int((weights.view(torch.int32) == 0).sum()) == COUNT
    assert kept(step()) == COUNT


def test_several_callers_at_once():
    before = [Buffers.random("adamw", PAIRS[0], COUNT, seed) for seed in range(3)]
    expected = [b.clone() for b in before]
    for b in expected:
        for _ in range(5):
            b.step()

    def steps(b: Buffers) -> None:
        for _ in range(5):
            b.step(threads=3)

    callers = [threading.Thread(target=steps, args=(b,)) for b in before]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for got, wanted in zip(before, expected, strict=True):
        got.assert_equal(wanted)


def test_instruction_set_from_the_environment():
    code = "import _hift_ext as c; print(c.build_info()['isa'])"
    for isa in ops.build_info()["isas"]:
        assert run_python(code, HIFT_ISA=isa).strip() == isa
    with pytest.raises(AssertionError, match="instruction set 'mmx' is not offered"):
        run_python(code, HIFT_ISA="mmx")
