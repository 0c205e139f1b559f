# SPDX-License-Identifier: Apache-2.0
# Ctrl-C at every place where Python lets a signal in, and signal handlers that save. A step is done
# or not done: weights, state, visits and turn always agree.
"""Interrupts and signal handlers."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import models
import pytest
import torch
from torch import nn

import hift_ext

TESTS = Path(__file__).parent


def run(code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own."""
    path = f"{TESTS}{os.pathsep}{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Interrupt:
    """Does something at the n-th place where a signal handler could run.

    CPython runs handlers when a function is entered, and when a call, of Python or of C, has
    returned; a profile function is called at the same places, and what it raises goes the same way.
    """

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.left, self.act, self.happened = number, act, False

    def __call__(self, frame, event: str, argument) -> None:
        if event == "c_call" or frame.f_code.co_filename == __file__:
            return
        self.left -= 1
        if self.left < 0 and not self.happened:
            self.happened = True
            sys.setprofile(None)
            self.act()

    def __enter__(self) -> Interrupt:
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def make(
    kind: type[hift_ext.HiFTOptimizer], store: str, strided: bool
) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    """A model in the midst of its second pass, with gradients of the active group."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    optimizer = kind(model, lr=0.1, store=store, page_bytes=4096)
    for _ in range(3):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if strided:  # such weights are updated in a copy
        model[2].weight.data = model[2].weight.data.t().contiguous().t()
    model(torch.ones(2, 3)).square().sum().backward()
    return model, optimizer


def everything(model: nn.Module, optimizer: hift_ext.HiFTOptimizer) -> dict:
    return copy.deepcopy({"weights": models.weights(model), **optimizer.state_dict()})


def equal(a: dict, b: dict) -> bool:
    """Whether two nests of dicts, lists and tensors are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


CASES = [
    (hift_ext.AdamW, "ram", False),
    (hift_ext.AdamW, "ram", True),
    (hift_ext.AdamW, "disk", False),
    (hift_ext.Adagrad, "device", False),
    (hift_ext.SGD, "ram", False),
]


@pytest.mark.parametrize(("kind", "store", "strided"), CASES)
def test_ctrl_c_anywhere_in_a_step_leaves_all_or_nothing(kind, store, strided) -> None:
    model, optimizer = make(kind, store, strided)
    before = everything(model, optimizer)
    optimizer.step()
    after = everything(model, optimizer)
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    later = everything(model, optimizer)
    optimizer.close()
    assert not equal(before["weights"], after["weights"])

    found = {"before": 0, "after": 0}
    for number in itertools.count():
        model, optimizer = make(kind, store, strided)
        with suppress(KeyboardInterrupt), Interrupt(number, press_ctrl_c) as interrupt:
            optimizer.step()
        if not interrupt.happened:
            break
        now = everything(model, optimizer)
        done = not equal(now, before)
        assert not done or equal(now, after), f"torn at place {number}"
        found["after" if done else "before"] += 1
        if not done:
            optimizer.step()
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        assert equal(everything(model, optimizer), later), f"place {number}"
        optimizer.close()
    assert min(found.values()) >= 3, found  # both sides of the update were tried


def test_ctrl_c_anywhere_in_freezing_loses_no_parameter() -> None:
    for number in itertools.count():
        model, optimizer = make(hift_ext.AdamW, "ram", False)
        optimizer.step()
        optimizer.zero_grad()
        with suppress(KeyboardInterrupt), Interrupt(number, press_ctrl_c) as interrupt:
            model(torch.ones(2, 3))
        if not interrupt.happened:
            break
        model(torch.ones(2, 3))
        active = set(optimizer.groups[optimizer.active].names)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == active
        with suppress(KeyboardInterrupt), Interrupt(number, press_ctrl_c):
            optimizer.close()
        optimizer.close()
        assert all(p.requires_grad for p in model.parameters())
        assert not model._forward_pre_hooks
    assert number > 20


def save(model: nn.Module, optimizer: hift_ext.HiFTOptimizer, to: list[dict]) -> None:
    to.append(everything(model, optimizer))


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_a_signal_handler_may_save_at_any_moment(store) -> None:
    model, optimizer = make(hift_ext.AdamW, store, False)
    before = everything(model, optimizer)
    optimizer.step()
    after = everything(model, optimizer)
    optimizer.close()
    for number in itertools.count():
        model, optimizer = make(hift_ext.AdamW, store, False)
        saved: list[dict] = []
        with Interrupt(number, partial(save, model, optimizer, saved)):
            optimizer.step()
        if not saved:
            break
        assert equal(saved[0], before) or equal(saved[0], after), f"torn at place {number}"
        assert equal(everything(model, optimizer), after)
        optimizer.close()
    assert number > 20


def test_a_step_inside_a_step_is_refused() -> None:
    errors = []

    def step_again(optimizer) -> None:
        for call in (
            optimizer.step,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        ):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    model, optimizer = make(hift_ext.AdamW, "ram", False)
    expected = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), expected[0].parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    expected[1].step()
    with Interrupt(20, lambda: step_again(optimizer)) as interrupt:
        optimizer.step()
    assert interrupt.happened
    assert len(errors) == 3
    assert all("under way" in error and "signal handler" in error for error in errors)
    assert equal(everything(model, optimizer), everything(*expected))


def test_a_real_sigint_in_the_midst_of_training() -> None:
    printed = run(
        """
        import itertools, os, signal, threading, time, models, hift_ext
        model = models.tiny(blocks=1, width=8)
        optimizer = hift_ext.AdamW(model, lr=1e-2)
        data, steps, interrupts = models.batches(1)[0], 0, 0
        models.train(model, optimizer, [data] * 3)

        def annoy():
            while interrupts < 20:
                time.sleep(0.003)
                os.kill(os.getpid(), signal.SIGUSR1)

        inside = False  # only where it is caught: it may come while the thread is being started

        def interrupt(*_):
            global inside
            if inside:
                inside = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGUSR1, interrupt)
        for p in optimizer.groups[0].params:
            p.grad = p.detach() * 0 + 1
        thread = threading.Thread(target=annoy)
        thread.start()
        while interrupts < 20:
            try:
                inside = True
                while True:
                    for group in optimizer.groups:
                        for p in group.params:
                            p.grad = p.detach() * 0 + 1
                    optimizer.step()
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        thread.join()
        done = optimizer.pass_index * 3 + optimizer.active
        visits = sum(int(optimizer.state[g.params[0]]["step"]) for g in optimizer.groups)
        print(done == visits, done > 20)
        """
    )
    assert printed.split() == ["True", "True"]
