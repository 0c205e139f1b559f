# SPDX-License-Identifier: Apache-2.0
"""One step is booked as a whole: weights, state, visits and turn agree, whatever interrupts it.

Signal handlers, Ctrl-C among them, run between any two calls of Python; here that does no harm.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hift_ext.paged_state import Entry, Flag

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

BUSY = (
    "a step of this optimizer is under way further up on this thread's stack (this call comes from "
    "a signal handler, or from a hook inside the step): make it after step() has returned"
)


@dataclass(slots=True)
class Step:
    """A step under way.

    Attributes:
        updated: The entries that are updated.
        visits: How often each will have been.
        copies: (parameter, copy that the engine updates), where strides differ.
        after: The schedule once the step is done.
        found_inf: A GPU's flag that the step was to change nothing.
        done: The engine puts something in together with the update, in one call from Python.
        flag: Once `found_inf` is on its way to the host.
    """

    updated: Sequence[Entry]
    visits: Sequence[int]
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]
    after: dict[str, Any]
    found_inf: torch.Tensor | None
    done: list[bool] = field(default_factory=list)
    flag: Flag | None = None


def book(optimizer: HiFTOptimizer) -> None:
    """Books the step under way if the engine has done it; else nothing.

    It sets values and adds to none, so that it may be interrupted and called again.
    """
    step = optimizer._under_way
    if step is None or not step.done:
        return
    for p, copy in step.copies:
        p.detach().copy_(copy)  # an interrupt in the midst of no_grad() would leave it on
    for entry, visits in zip(step.updated, step.visits, strict=True):
        entry.visits = visits
    if step.found_inf is not None:
        if step.flag is None:
            step.flag = Flag(step.found_inf)
        optimizer.state.doubt(step.updated, step.flag)
    pass_on(optimizer, step.after)
    optimizer._under_way = None


def pass_on(optimizer: HiFTOptimizer, after: dict[str, Any]) -> None:
    """Gives the turn to the next group."""
    optimizer._schedule.become(after)
    optimizer.param_groups[0]["hift"] = after


def all_or_nothing(optimizer: HiFTOptimizer, found_inf: torch.Tensor | None) -> None:
    """Takes the optimizer's turn, one thread at a time; what interrupts it finds it whole.

    Raises:
        RuntimeError: This thread is in the midst of a step.
    """
    turnstile = optimizer._turnstile
    with turnstile.lock:
        turnstile.enter()
        before = optimizer._schedule.as_dict
        try:
            turnstile.stepping = True
            optimizer._take_turn(found_inf)
        except BaseException:
            _interrupted(optimizer, before)
            raise
        finally:
            turnstile.stepping = False


def _interrupted(optimizer: HiFTOptimizer, before: dict[str, Any]) -> None:
    """Makes of a step that raised either a whole one or none.

    Args:
        optimizer: The optimizer.
        before: Its schedule before the step.
    """
    book(optimizer)
    optimizer._under_way = None
    now = optimizer._schedule.as_dict
    if (now["pass"], now["position"]) == (before["pass"], before["position"]):
        optimizer._schedule.become(before)  # without the rates that were latched


class Turnstile:
    """Lets one thread at a time at an optimizer's books."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stepping = False
        _all.add(self)

    def enter(self) -> None:
        """To be called under the lock.

        Raises:
            RuntimeError: This thread is in the midst of a step.
        """
        if self.stepping:
            raise RuntimeError(BUSY)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for another thread's step.

        Raises:
            RuntimeError: This thread is in the midst of one itself.
        """
        with self.lock:
            self.enter()
            yield

    def renew(self) -> None:
        """For a forked child: the thread that held the lock is not here."""
        self.lock = threading.RLock()
        self.stepping = False


_all: weakref.WeakSet[Turnstile] = weakref.WeakSet()


def _renew() -> None:
    for turnstile in _all:
        turnstile.renew()


os.register_at_fork(after_in_child=_renew)
