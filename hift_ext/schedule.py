# SPDX-License-Identifier: Apache-2.0
"""Which group is active now, which comes next, and the learning rates latched for the pass.

The schedule lives in a plain dict, `param_groups[0]["hift"]`, which torch's state-dict tools keep.
"""

from __future__ import annotations

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
            generator = torch.Generator().manual_seed(seed)
            shuffled: list[int] = torch.randperm(count, generator=generator).tolist()
            return shuffled
        return list(range(count)) if order == "bottom2up" else list(reversed(range(count)))
    indices = list(order)
    if sorted(indices) != list(range(count)):
        raise ValueError(
            f"order must hold every index 0..{count - 1} of the {count} groups once, "
            f"not {indices!r}"
        )
    return [int(index) for index in indices]


class Schedule:
    """A cursor over the order; every step moves it by one.

    Each change makes a new dict, so a state_dict taken earlier keeps its values.
    """

    def __init__(self, order: Sequence[int], seed: int) -> None:
        self._now: dict[str, Any] = {
            "order": list(order),
            "position": 0,
            "pass": 0,
            "lr": None,
            "seed": seed,
        }
        self._added: list[int] = []

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
        lr = list(self.latched or ())
        lr += [None] * (rates - len(lr))  # type: ignore[list-item]
        return {**self._now, "order": self.order, "lr": lr, "groups": len(self.order)}

    @property
    def order(self) -> list[int]:
        """Group indices in the order of their turns."""
        return list(self._now["order"])

    @property
    def active(self) -> int:
        """Index of the group that the next step updates."""
        index: int = self._now["order"][self._now["position"]]
        return index

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

    @property
    def latched(self) -> list[float] | None:
        """The learning rates of this pass, one a param_group; None before its first step."""
        rates: list[float] | None = self._now["lr"]
        return rates

    def latch(self, rates: Sequence[float]) -> None:
        """Fixes the learning rates of this pass."""
        self._now = {**self._now, "lr": list(rates)}

    @property
    def following(self) -> int:
        """Index of the group after the active one."""
        order = self._now["order"]
        if self._now["position"] + 1 < len(order):
            return int(order[self._now["position"] + 1])
        return int(order[0])

    def advance(self) -> bool:
        """Moves on to the next group. Returns whether a pass ended."""
        now = dict(self._now)
        now["position"] += 1
        ended: bool = now["position"] == len(now["order"])
        if ended:
            now.update(position=0, lr=None, order=now["order"] + self._added)
            now["pass"] += 1
            self._added = []
        self._now = now
        return ended

    def add(self, index: int) -> None:
        """One more group, from the next pass on (at once where this pass has not begun)."""
        if self.position == 0 and self.latched is None:
            self._now = {**self._now, "order": [*self._now["order"], index]}
        else:
            self._added.append(index)

    def load(self, saved: Mapping[str, Any], count: int) -> str | None:
        """Takes over a saved schedule of `count` groups.

        Returns:
            None, or why the saved order does not fit: then a new pass begins in its own order.
        """
        order = [int(index) for index in saved["order"]]
        position = int(saved["position"])
        groups = int(saved.get("groups", len(order)))
        rates = [float(rate) for rate in saved["lr"] or () if rate is not None]
        if groups == count and sorted(order) == list(range(count)) and 0 <= position < count:
            self._added = []
            self._now = {
                "order": order,
                "position": position,
                "pass": int(saved["pass"]),
                "lr": rates or None,
                "seed": int(saved["seed"]),
            }
            return None
        self._now = {**self._now, "position": 0, "pass": int(saved["pass"]), "lr": None}
        return f"the saved order is of {groups} groups, this optimizer has {count}"
