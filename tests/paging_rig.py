# SPDX-License-Identifier: Apache-2.0
# A training of three groups whose state is paged in Python, on a simulated device, beside the same
# by the compiled engine; and what may go wrong on the way. The compiled loop updates in both.
"""The training that tests/test_torch_paging.py runs, and the engine with a line taken out."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import types
from pathlib import Path

import _hift_ext
import pytest
import torch
from lazy_device import LazyDevice

from hift_ext import engines, ops
from hift_ext.precision import PLAIN

GROUPS = [[700, 33, 0, 1500], [2600], [257, 256]]
STREAMS = [ops.StreamSpec("exp_avg"), ops.StreamSpec("exp_avg_sq", 0.25)]
STORED = PLAIN.stored(STREAMS)
STEPS, JOINS, SKIPPED, LOADED = 10, 2, 4, 5
PACKAGE = Path(ops.__file__).parent
SIZES = [(page, ring) for page in (2048, 4096, 1 << 15) for ring in (2, 3, 0)]
"""Bytes of a page, slots of a ring (0: for the largest group)."""


def engine_class(file: str = "", line: int = -1):
    """The engine's class, with one line of one of its files taken out."""
    modules = {}
    for name in ("torch_pages", "torch_ring", "triton_paged"):
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
    made = modules["triton_paged"].PagedTritonEngine
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
        if device is not None:
            device.kept += [self.params, self.grads, self.overflow]
        engine.add_groups(GROUPS[:2])

    def do(self, work) -> None:
        if self.device is None:
            work()
        else:
            self.device.compute_stream_does(work)

    def step(self, s: int) -> ops.Report:
        if s >= JOINS and not self.joined:
            self.engine.prefetch(0)  # it joins while pages move
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
        return self.engine.step(group, rows, hypers, found_inf, following, [])

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


def on_the_host() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """State and weights before each step and at the end, by the compiled engine."""
    engine = engines.PagedEngine(STREAMS, "ram", 1 << 20, ops.WHOLE_GROUP, torch.device("cpu"))
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


def stop(cls, seed: int, fails: int = -1, size: int | None = None) -> None:
    """An engine goes while its pages move, or after one refused call."""
    engine, device = make(cls, seed, seed if size is None else size)
    training = Training(engine, device)
    device.fails = fails
    for s in range(4 if fails < 0 else 2):
        with contextlib.suppress(RuntimeError):
            training.step(s)
    device.fails = -1
    del training, engine
    assert not device.registered
    assert not device.errors, device.errors


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


@contextlib.contextmanager
def refusing(device, name, when):
    """A device that refuses those calls of `name` for whose number and arguments `when` holds."""
    real, numbers = getattr(device, name), itertools.count()

    def call(*arguments):
        if when(next(numbers), *arguments):
            raise RuntimeError("the simulated device refuses")
        real(*arguments)

    setattr(device, name, call)
    yield
    delattr(device, name)


def midway(cls, seed: int) -> None:
    """What was queued before a refusal does not run into what its slot is given to."""
    names = cls.__init__.__globals__
    device = LazyDevice(seed)
    group = names["Group"](STORED, [8 * 256], 256)
    new_ring = names["Ring"]
    ring = new_ring(device, STORED, 2, 2048)

    def visit(number: int, value: float | None = None) -> torch.Tensor:
        """What the page holds; then it is filled with a value."""
        page, kept = group.pages[number], torch.empty(256)
        ring.plan([page])
        with ring.acquired(page, device.current()) as slot:
            part = ring.part(slot, 0, 0, 256)
            device.run(lambda: kept.copy_(part), device.current())
            if value is not None:
                device.run(lambda: part.fill_(value), device.current())
        return kept

    def second(number, *_):
        return number == 1

    visit(7, 7.0)
    ring.bring_home()
    ring.close()
    ring = new_ring(device, STORED, 2, 2048)
    seven = visit(7, 8.0)  # into memory that work already queued still uses
    ring.plan([group.pages[5]])
    ring.plan([group.pages[5], group.pages[6]])
    eight = visit(7)  # into a slot that nothing left, while it leaves the other one
    for number in (1, 2, 3):
        visit(number, float(number))
    with refusing(device, "fill", second), pytest.raises(RuntimeError, match="refuses"):
        visit(0)
    one = visit(1)
    with refusing(device, "copy", second), pytest.raises(RuntimeError, match="refuses"):
        ring.plan([group.pages[2]])
    zero = visit(4, 5.0)
    five = visit(4)
    ring.bring_home()
    device.compute.synchronize()
    assert seven.eq(7).all(), "a page came into memory that was still in use"
    assert eight.eq(8).all(), "a page came in before it had left"
    assert one.eq(1).all(), "a fill ran into the next page"
    assert zero.eq(0).all(), "a copy ran into the next page"
    assert five.eq(5).all(), "a copy ran into the next page"
    for stream in device.streams:
        stream.synchronize()


def outwards(device):
    """Copies to the host, of any number."""

    def when(_, to, *__):
        return any(device.within(to, area) for area in device.registered)

    return when


def refuse(cls, expected) -> None:
    """Refusals that last, or that come at the worst time."""
    for seed in range(30):
        midway(cls, seed)
    for call in range(90):
        stop(cls, 1, call, size=8)
    host = engines.PagedEngine(STREAMS, "ram", 1 << 20, ops.WHOLE_GROUP, torch.device("cpu"))
    changed = [Training(host), Training(*make(cls, 1, 8))]
    for training in changed:
        training.step(0)
        training.engine.tensor(0, 0, 0, GROUPS[0][0]).fill_(2)  # while its page is in the ring
        training.step(0)
    assert same(changed[1].state(), changed[0].state()), "a change from outside"
    engine, device = make(cls, 1, 0)
    training = Training(engine, device)
    training.step(0)
    with refusing(device, "copy", outwards(device)):
        with pytest.raises(RuntimeError, match=r"stopped after 2 of 11 pages .* refuses"):
            training.step(1)
        with pytest.raises(RuntimeError, match="refuses"):
            engine.flush()
    for found, old, new in zip(training.state(), expected[1][0], expected[2][0], strict=True):
        assert ((found == old) | (found == new)).all(), "neither before nor after"
    engine, device = make(cls, 1, 8)
    training = Training(engine, device)
    with refusing(device, "copy", outwards(device)):
        assert training.step(0).bytes_out == 0
    assert training.step(1).bytes_out == 8 * (2304 + 2816)  # the refused ones leave with the next
