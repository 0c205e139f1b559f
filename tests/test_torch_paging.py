# SPDX-License-Identifier: Apache-2.0
# Paging in Python on a simulated device: random legal orders, refused calls, and every wait taken
# out once. The compiled loop stands for the Triton kernel, which has its bits (test_triton.py).

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import sys
import types
from pathlib import Path

import _hift_ext
import pytest
import torch
from lazy_device import LazyDevice

from hift_ext import ops
from hift_ext.torch_device import CudaDevice

pytestmark = pytest.mark.needs("triton")

GROUPS = [[700, 33, 0, 1500], [2600], [257, 256]]
STREAMS = [ops.StreamSpec("exp_avg"), ops.StreamSpec("exp_avg_sq", 0.25)]
STEPS, JOINS, SKIPPED, LOADED = 10, 2, 4, 5
PACKAGE = Path(ops.__file__).parent
SIZES = [(page, ring) for page in (2048, 4096, 1 << 15) for ring in (2, 3, 0)]
"""Bytes of a page, slots of a ring (0: for the largest group)."""


def engine_class(file: str = "", line: int = -1):
    """The engine's class, with one line of one of its files taken out."""
    modules = {}
    for name in ("torch_pages", "torch_ring", "triton_engine"):
        lines = (PACKAGE / f"{name}.py").read_text().splitlines()
        if name == file:
            lines[line] = re.match(r"\s*", lines[line])[0] + "pass"
        modules[name] = module = types.ModuleType(f"hift_ext.{name}")
        source = "\n".join(lines)
        for other in ("torch_pages", "torch_ring"):
            source = source.replace(f"from hift_ext.{other} import", f"from {other}_here import")
        with pytest.MonkeyPatch.context() as patch:
            for other, made in modules.items():
                patch.setitem(sys.modules, f"{other}_here", made)
            patch.setitem(sys.modules, module.__name__, module)
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    made = modules["triton_engine"].PagedTritonEngine
    made._update = staticmethod(update)
    return made


def update(spans, scalars) -> None:
    """Triton's kernel, by the compiled loop."""
    rows = [
        (
            s.param.data_ptr(),
            s.grad.data_ptr(),
            s.param.numel(),
            ops.kind(s.rule, s.param.dtype, s.grad.dtype),
            [state.data_ptr() for state in s.states],
            s.hyper,
        )
        for s in spans
    ]
    _hift_ext.step_spans(rows, *(0 if t is None else t.data_ptr() for t in scalars))


def numbers(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


class Training:
    """Ten steps of three groups in turn, the third one joining late.

    Args:
        engine: For STREAMS, without groups.
        device: Where the engine works; None for the host.
        by_view: Writes to state from outside go through a view.
    """

    def __init__(self, engine, device=None, *, by_view=False) -> None:
        self.engine, self.device, self.by_view = engine, device, by_view
        self.params = [
            [numbers(10 * g + i, n) for i, n in enumerate(group)] for g, group in enumerate(GROUPS)
        ]
        self.grads = [[torch.zeros(n) for n in group] for group in GROUPS]
        self.overflow = torch.zeros(1)
        self.joined = self.loaded = False
        self.computed = -1
        engine.add_groups(GROUPS[:2])

    def do(self, work) -> None:
        if self.device is None:
            work()
        else:
            self.device.compute_stream_does(work)

    def step(self, s: int) -> ops.Report:
        if s >= JOINS and not self.joined:
            self.engine.add_groups(GROUPS[2:])
            self.joined = True
        if s >= LOADED and not self.loaded:
            values = numbers(99, GROUPS[0][3])
            if self.by_view:
                self.engine.tensor(0, 3, 0, len(values)).copy_(values)
            else:
                self.engine.write(0, 3, 0, values)
            self.loaded = True
        group = s % 3
        if self.computed < s:  # forward and backward
            for i, grad in enumerate(self.grads[group]):
                self.do(lambda i=i, grad=grad: grad.copy_(numbers(1000 + 10 * s + i, len(grad))))
            overflow = self.overflow  # what is queued must not keep the engine
            self.do(lambda: overflow.fill_(float(s == SKIPPED)))
            self.computed = s
        kind = ops.kind("adamw", torch.float32, torch.float32)
        pairs = zip(self.params[group], self.grads[group], strict=True)
        rows = [(i, p.data_ptr(), g.data_ptr(), kind, 0) for i, (p, g) in enumerate(pairs)]
        if s == 7:
            rows = rows[:1]  # a parameter without a gradient
        hypers = [(1.0, 0.99, 0.1, 0.999, 0.001, 0.01, 1 / (1 + s), 1e-8)]
        following = (s + 1) % 3 if self.joined or (s + 1) % 3 < 2 else -1
        found_inf = ops.Scalars(0, 0, self.overflow.data_ptr())
        return self.engine.step(group, rows, hypers, found_inf, following)

    def state(self) -> list[torch.Tensor]:
        """Copies of all state; of a group that has not joined, what it will start with."""
        return [
            self.engine.tensor(g, i, s, n).clone()
            if g < 2 or self.joined
            else torch.full((n,), stream.fill)
            for g, group in enumerate(GROUPS)
            for i, n in enumerate(group)
            for s, stream in enumerate(STREAMS)
        ]

    def weights(self) -> list[torch.Tensor]:
        if self.device is not None:
            self.device.fails = -1
            self.device.compute.synchronize()
        return [p.clone() for group in self.params for p in group]


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """State and weights before each step and at the end, by the compiled engine."""
    engine = ops.PagedEngine(STREAMS, "ram", 1 << 20, ops.WHOLE_GROUP, torch.device("cpu"))
    training, found = Training(engine), []
    for s in range(STEPS):
        found.append((training.state(), training.weights()))
        training.step(s)
    return [*found, (training.state(), training.weights())]


def make(cls, seed: int, size: int):
    page, ring = SIZES[size % len(SIZES)]
    device = LazyDevice(seed)
    staging = ring * page if ring else ops.WHOLE_GROUP
    return cls(STREAMS, page, staging, device), device


def same(found, wanted) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def run(cls, seed: int, expected) -> None:
    """One training in one order; fails where anything is not as on the host."""
    engine, device = make(cls, seed, seed)
    training = Training(engine, device, by_view=seed % 2 == 1)
    for s in range(STEPS - 1):
        training.step(s)
        if s == 3 and seed % 3 == 0:
            assert same(training.state(), expected[s + 1][0]), "state in the middle"
    view = engine.tensor(0, 3, 0, GROUPS[0][3])
    training.step(STEPS - 1)
    engine.flush()
    assert torch.equal(view, expected[-1][0][6]), "a view from before the last step, after a flush"
    assert same(training.state(), expected[-1][0]), "state"
    assert same(training.weights(), expected[-1][1]), "weights"
    assert not device.errors, device.errors


def stop(cls, seed: int, fails: int = -1) -> None:
    """An engine goes while its pages move, or after one refused call."""
    engine, device = make(cls, seed, seed)
    training = Training(engine, device)
    device.fails = fails
    for s in range(4 if fails < 0 else 2):
        with contextlib.suppress(RuntimeError):
            training.step(s)
    device.fails = -1
    kept = training.params, training.grads, training.overflow  # torch frees behind what is queued
    del training, engine
    assert not device.registered
    assert not device.errors, device.errors
    device.compute.synchronize()
    del kept


def fail(cls, size: int, call: int, expected) -> tuple[bool, bool, bool]:
    """A training with one refused call: whether it was reached, raised, ended the training."""
    engine, device = make(cls, call, size)
    training = Training(engine, device)
    device.calls, device.fails = 0, call
    s, stopped, errors = 0, False, 0
    while s < STEPS and not stopped:
        try:
            training.step(s)
            s += 1
        except RuntimeError as error:
            errors += 1
            words = str(error)
            stopped = "only from a checkpoint" in words
            if errors > 1 or "refuses" not in words:
                raise
    reached = device.calls > call
    try:
        state = training.state()
    except RuntimeError:
        errors += 1
        state = training.state()
    assert errors <= 1, "one refused call, two errors"
    weights = training.weights()
    if not stopped:
        assert same(state, expected[-1][0]), "state"
        assert same(weights, expected[-1][1]), "weights"
    else:
        old, new = ([*values, *theirs] for values, theirs in (expected[s], expected[s + 1]))
        for found, before, after in zip([*state, *weights], old, new, strict=True):
            assert ((found == before) | (found == after)).all(), "neither before nor after"
    assert not device.errors, device.errors
    return reached, errors > 0, stopped


@pytest.fixture(scope="module")
def whole():
    return engine_class()


def test_random_orders_give_the_bits_of_the_host(whole, expected) -> None:
    for seed in range(100):
        run(whole, seed, expected)
        stop(whole, seed)


def test_no_refused_call_loses_a_page(whole, expected) -> None:
    raised = stopped = calls = 0
    for size in (0, 4, 2):
        for call in itertools.count(size, 5):
            reached, error, halted = fail(whole, size, call, expected)
            stop(whole, call, call % 200)
            raised, stopped, calls = raised + error, stopped + halted, calls + 1
            if not reached:
                break
    assert calls > 100
    assert 0 < stopped < raised < calls


SITES = [
    (name, number, line.strip())
    for name in ("torch_ring", "triton_engine")
    for number, line in enumerate((PACKAGE / f"{name}.py").read_text().splitlines())
    if re.match(
        r"\s+\S*\.(record|wait_event|synchronize|save|bring_home|forget|close)\(.*\)$", line
    )
]


@pytest.mark.parametrize(("file", "line", "text"), SITES, ids=[f"{f}: {t}" for f, _, t in SITES])
def test_every_wait_is_needed(file, line, text, expected) -> None:
    """Without it some order gives other bits, or memory goes while work on it is under way."""
    mutant = engine_class(file, line)
    for seed in range(80):
        try:
            run(mutant, seed, expected)
            stop(mutant, seed)
        except Exception:
            return
    for call in range(400):
        try:
            fail(mutant, (0, 4, 2)[call % 3], call, expected)
            stop(mutant, call, call % 200)
        except Exception:
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
    reports = [engine.step(0, rows, hypers, ops.Scalars(), 0) for _ in range(3)]
    assert [r.bytes_in for r in reports] == [0, 0, 0]
    assert [r.bytes_out for r in reports] == [4 * 2048] * 3  # the second item's page stays
    engine.tensor(0, 0, 0, 1000)
    assert engine.step(0, rows, hypers, ops.Scalars(), 0).bytes_in == 6 * 2048


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
    assert said == [
        ("register", host.data_ptr(), 8, 1),
        ("register", other.data_ptr(), 5, 1),
        ("run", ["compute"]),
        ("unregister", host.data_ptr()),
    ]


def test_host_memory_has_the_size_that_was_asked_for() -> None:
    slab = torch.frombuffer(ops.host_slab((1 << 20) + 4096), dtype=torch.uint8)
    assert slab.numel() == (1 << 20) + 4096
    assert slab.data_ptr() % 4096 == 0
    assert not slab.any()
