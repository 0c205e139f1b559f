# SPDX-License-Identifier: Apache-2.0
# Paging in Python on a simulated device: random legal orders, refused calls, and every wait taken
# out once. The compiled loop stands for the Triton kernel, which has its bits (test_triton.py).

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re

import pytest
import torch
from lazy_device import LazyDevice
from paging_rig import (
    PACKAGE,
    STREAMS,
    Training,
    engine_class,
    fail,
    make,
    on_the_host,
    refuse,
    run,
    stop,
)

from hift_ext import ops
from hift_ext.torch_device import CudaDevice

pytestmark = pytest.mark.needs("triton")


@pytest.fixture(scope="module")
def expected():
    return on_the_host()


@pytest.fixture(scope="module")
def whole():
    return engine_class()


def test_random_orders_give_the_bits_of_the_host(whole, expected) -> None:
    for seed in range(100):
        run(whole, seed, expected)
        stop(whole, seed)


def test_refusals_that_last_or_come_midway(whole, expected) -> None:
    refuse(whole, expected)


def test_no_refused_call_loses_a_page(whole, expected) -> None:
    raised = stopped = calls = 0
    for size in (0, 4, 2):
        for call in itertools.count(size, 53):
            reached, error, halted = fail(whole, size, call, expected)
            stop(whole, call, call % 200)
            raised, stopped, calls = raised + error, stopped + halted, calls + 1
            if not reached:
                break
    assert calls > 30
    assert 0 < stopped < raised < calls


SITES = [
    (name, number, line.strip())
    for name in ("torch_ring", "triton_paged")
    for number, line in enumerate((PACKAGE / f"{name}.py").read_text().splitlines())
    if re.match(
        r"\s+\S*\.(record|wait_event|synchronize|save|bring_home|forget|close)\(.*\)$", line
    )
]


@pytest.mark.parametrize(("file", "line", "text"), SITES, ids=[f"{f}: {t}" for f, _, t in SITES])
def test_every_wait_is_needed(file, line, text, expected) -> None:
    """Without it some order gives other bits, or memory goes while work on it is under way."""
    mutant = engine_class(file, line)
    failed = (Exception, pytest.fail.Exception)
    try:
        for seed in range(30):
            run(mutant, seed, expected)
            stop(mutant, seed)
        refuse(mutant, expected)
        for call in range(100):
            fail(mutant, (0, 4, 2)[call % 3], 2 * call, expected)
    except failed:
        return
    pytest.fail(f"{file}.py:{line + 1}: nothing misses {text}")


def test_sites_are_found() -> None:
    assert len(SITES) >= 17


def test_bytes_and_times(whole) -> None:
    engine, device = make(whole, 0, 2)
    training = Training(engine, device)
    # Elements with room for alignment: 704 + 48 + 1504, and 2600; whole runs of 256 are moved.
    first, second = 8 * 2304, 8 * 2816
    reports = [training.step(s) for s in range(2)]
    assert [r.bytes_in for r in reports] == [0, 0]  # nothing is stored before a first visit
    assert [r.bytes_out for r in reports] == [first, second]
    assert engine.touched_bytes == 8 * (704 + 48 + 1504 + 2608)
    assert engine.staging_bytes == second
    engine.flush()
    before = device.clock
    reports = [training.step(s) for s in (2, 3)]
    assert sum(r.bytes_in for r in reports) == first + second  # its own, and the next one's
    device.compute.synchronize()
    engine.flush()
    report = training.step(4)
    assert 0 < report.transfer_ms <= device.clock - before
    assert 0 < report.update_ms <= device.clock - before
    assert 0 < report.wait_ms <= device.clock - before
    assert report.step_ms > 0
    assert engine.store_bytes == first + second + 8 * 768


def test_a_whole_ring_keeps_what_is_in_it(whole) -> None:
    """One group that fits the ring comes in once."""
    device = LazyDevice(2)
    engine = whole(STREAMS, 2048, ops.WHOLE_GROUP, device)
    engine.add_groups([[1000, 500]])
    param, grad = torch.zeros(1000), torch.ones(1000)
    kind = ops.kind("adamw", torch.float32, torch.float32)
    rows = [(0, param.data_ptr(), grad.data_ptr(), kind, 0)]
    hypers = [(1.0, 0.99, 0.1, 0.999, 0.001, 0.01, 1.0, 1e-8)]
    reports = [engine.step(0, rows, hypers, ops.Scalars(), 0, []) for _ in range(3)]
    assert [r.bytes_in for r in reports] == [0, 0, 0]
    assert [r.bytes_out for r in reports] == [4 * 2048] * 3  # the second item's page stays
    engine.tensor(0, 0, 0, 1000)
    assert engine.step(0, rows, hypers, ops.Scalars(), 0, []).bytes_in == 4 * 2048


def test_a_ring_too_small_is_refused_and_changes_nothing(whole) -> None:
    for staging in (0, 2048):
        engine = whole(STREAMS, 2048, staging, LazyDevice())
        with pytest.raises(ValueError, match=f"staging of {staging} bytes does not hold two pages"):
            engine.add_groups([[1000]])
        assert engine.store_bytes == engine.staging_bytes == 0


def test_a_view_has_a_storage_of_its_own_and_outlives_the_engine(whole) -> None:
    engine = whole(STREAMS, 4096, ops.WHOLE_GROUP, LazyDevice())
    engine.add_groups([[3, 0, 5000]])
    view = engine.tensor(0, 2, 1, 5000)
    assert view.untyped_storage().nbytes() == 4 * 5000
    assert engine.tensor(0, 1, 0, 0).numel() == 0
    del engine
    gc.collect()
    assert torch.equal(view, torch.full((5000,), 0.25))
    view.fill_(1)


def test_a_forked_child_is_refused(whole, monkeypatch) -> None:
    engine = whole(STREAMS, 4096, ops.WHOLE_GROUP, LazyDevice())
    engine.add_groups([[3]])
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="belongs to the process"):
        engine.flush()


def test_the_cuda_device_asks_torch_rightly(monkeypatch) -> None:
    """Each call, on fakes: there is no GPU here."""
    said, refused, inside = [], set(), []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):  # noqa: N802
            said.append(("register", address, size, flags))
            return 2 if size in refused else 0

        def cudaHostUnregister(self, address):  # noqa: N802
            said.append(("unregister", address))

    def check_error(code):
        if code:
            raise RuntimeError(f"CUDA error {code}")

    @contextlib.contextmanager
    def on(what):
        inside.append(what)
        yield
        inside.pop()

    for name, value in {
        "cudart": Runtime,
        "check_error": check_error,
        "device": on,
        "stream": on,
        "Stream": lambda device: ("stream", device),
        "current_stream": lambda device: ("current", device),
        "synchronize": lambda device: said.append(("synchronize", device)),
        "Event": lambda enable_timing: ("event", enable_timing),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cpu = torch.device("cpu")
    device = CudaDevice(cpu)
    assert device.stream() == ("stream", cpu)
    assert device.current() == ("current", cpu)
    assert (device.event(), device.event(timed=True)) == (("event", False), ("event", True))
    host, other = torch.arange(8, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    device.register(host)
    refused.add(5)
    with pytest.raises(RuntimeError, match=r"cannot lock 5 bytes .*CUDA error 2.*ulimit -l"):
        device.register(other)
    memory = device.allocate(8)
    assert (memory.dtype, memory.numel(), memory.device) == (torch.uint8, 8, cpu)
    device.copy(memory, host, "in")
    assert torch.equal(memory, host)
    device.fill(memory, 3, "in")
    assert memory.eq(3).all()
    device.run(lambda: said.append(("run", list(inside))), "compute")
    device.release()
    device.release()
    device.synchronize()
    assert said == [
        ("register", host.data_ptr(), 8, 1),
        ("register", other.data_ptr(), 5, 1),
        ("run", ["compute"]),
        ("unregister", host.data_ptr()),
        ("synchronize", cpu),
    ]


def test_host_memory_has_the_size_that_was_asked_for() -> None:
    slab = torch.frombuffer(ops.host_slab((1 << 20) + 4096), dtype=torch.uint8)
    assert slab.numel() == (1 << 20) + 4096
    assert slab.data_ptr() % 4096 == 0
    assert not slab.any()
