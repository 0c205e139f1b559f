# SPDX-License-Identifier: Apache-2.0
"""Which group is active now, which comes next, and the learning rates latched for the pass.

The schedule lives in a plain dict, `param_groups[0]["hift"]`, which torch's state-dict tools keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ORDERS = ("bottom2up", "top2down", "random")


def make_order(order: str | Sequence[int], count: int, seed: int) -> list[int]:
    """The order in which `count` groups take their turns.

    Args:
        order: `"bottom2up"` (the embedding first), `"top2down"`, `"random"` (shuffled once with
            `seed`), or a permutation of the group indices.
        count: Number of groups.
        seed: Seed of the shuffle.

    Raises:
        ValueError: `order` is none of these.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise ValueError(
                f"order must be one of {', '.join(ORDERS)} or a list of group indices, "
                f"not {order!r}"
            )
        if order == "random":
            generator = torch.Generator("cpu").manual_seed(seed)
            shuffled: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
            return shuffled
        return list(range(count)) if order == "bottom2up" else list(reversed(range(count)))
    indices = list(order)
    if sorted(indices) != list(range(count)):
        raise ValueError(
            f"order must hold every index 0..{count - 1} of the {count} groups once, "
            f"not {indices!r}"
        )
    return [int(index) for index in indices]


def checked_schedule(saved: Any) -> Mapping[str, Any] | None:
    """A schedule from a state_dict, its numbers as such; None where there was none.

    Beside what `Schedule.as_dict` holds there are `groups`, their number when it was saved, and
    `unvisited`, the indices of parameters that have state and had no visit.

    Raises:
        ValueError: It is none that `Schedule` can have written.
    """
    if saved is None:
        return None
    try:
        given = saved["lr"]
        latched = given is not None and not (given and all(rate is None for rate in given))
        rates = [float(rate) for rate in given] if latched else None
        passes = int(saved["pass"])
        order = [int(index) for index in saved["order"]]
        found = {
            "order": order,
            "position": int(saved["position"]),
            "pass": passes,
            "lr": rates,
            "seed": int(saved["seed"]),
            "groups": int(saved.get("groups", len(order))),
            "unvisited": [int(index) for index in saved.get("unvisited", "").split()],
        }
        good = passes >= 0 and rates != [] and all(map(math.isfinite, rates or ()))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"the loaded param_groups[0]['hift'] is no schedule: {saved!r} ({error!r}). Without "
            "the key a state_dict loads as torch's do, and the order begins anew"
        ) from error
    if not good:
        raise ValueError(
            f"the loaded param_groups[0]['hift'] has a pass below 0 or a learning rate that is no "
            f"number: {saved!r}"
        )
    return found


class Schedule:
    """A cursor over the order; every step moves it by one.

    Each change makes a new dict, so a state_dict taken earlier keeps its values.

    Attributes:
        active: Index of the group that the next step updates.
        following: Index of the group after it.
        latched: The learning rates of this pass, one a param_group; None before its first step.
    """

    def __init__(self, order: Sequence[int], seed: int) -> None:
        self._become({"order": list(order), "position": 0, "pass": 0, "lr": None, "seed": seed})
        self._added: list[int] = []

    def _become(self, now: dict[str, Any]) -> None:
        # A step asks for these several times: looked up once.
        self._now = now
        order, position = now["order"], now["position"]
        self.active: int = order[position]
        self.following: int = order[position + 1 if position + 1 < len(order) else 0]
        self.latched: list[float] | None = now["lr"]

    @property
    def as_dict(self) -> dict[str, Any]:
        """What `param_groups[0]["hift"]` holds: order, position, pass, latched lr or None, seed."""
        return self._now

    def exported(self, rates: int) -> dict[str, Any]:
        """A copy for a state_dict, with the same keys and lengths at all times.

        torch flattens state_dicts, and merges what it loads into the one that is there key by key:
        no rate is a list of None, and the number of groups tells whether an order is whole.

        Args:
            rates: Number of param_groups.
        """
        lr: list[float | None] = list(self.latched or ())
        lr += [None] * (rates - len(lr))
        return {**self._now, "order": self.order, "lr": lr, "groups": len(self.order)}

    @property
    def order(self) -> list[int]:
        """Group indices in the order of their turns."""
        return list(self._now["order"])

    @property
    def position(self) -> int:
        """Steps done in this pass."""
        position: int = self._now["position"]
        return position

    @property
    def pass_index(self) -> int:
        """Passes completed."""
        index: int = self._now["pass"]
        return index

    def latch(self, rates: Sequence[float]) -> None:
        """Fixes the learning rates of this pass."""
        self._become({**self._now, "lr": list(rates)})

    def next(self) -> dict[str, Any]:
        """What `as_dict` will be after this group's step."""
        now = self._now
        position = now["position"] + 1
        if position < len(now["order"]):
            return {**now, "position": position}
        order = now["order"] + self._added
        return {**now, "order": order, "position": 0, "pass": now["pass"] + 1, "lr": None}

    def become(self, now: dict[str, Any]) -> None:
        """Takes over a dict that `next` or `as_dict` gave."""
        if now["pass"] > self._now["pass"]:
            self._added = []  # `next` has put them into the order
        self._become(now)

    def add(self, index: int) -> None:
        """One more group, from the next pass on (at once where this pass has not begun)."""
        if self.position == 0 and self.latched is None:
            self._become({**self._now, "order": [*self._now["order"], index]})
        else:
            self._added.append(index)

    def load(self, saved: Mapping[str, Any], count: int) -> str | None:
        """Takes over a schedule that `checked_schedule` gave, of `count` groups.

        Returns:
            None, or why the saved order does not fit: then a new pass begins in its own order.
        """
        order, position, groups = saved["order"], saved["position"], saved["groups"]
        whole = groups == count and sorted(order) == list(range(count))
        if whole and 0 <= position < count:
            self._added = []
            self._become({key: saved[key] for key in self._now})
            return None
        self._become({**self._now, "position": 0, "pass": saved["pass"], "lr": None})
        return f"the saved order is of {groups} groups, this optimizer has {count}"
