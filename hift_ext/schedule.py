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

    def go_back(self, before: dict[str, Any]) -> None:
        """To what `as_dict` was before a step that failed."""
        self._become(before)

    def advance(self) -> bool:
        """Moves on to the next group. Returns whether a pass ended."""
        now = self._now
        position = now["position"] + 1
        if position < len(now["order"]):
            self._become({**now, "position": position})
            return False
        order, self._added = now["order"] + self._added, []
        self._become({**now, "order": order, "position": 0, "pass": now["pass"] + 1, "lr": None})
        return True

    def add(self, index: int) -> None:
        """One more group, from the next pass on (at once where this pass has not begun)."""
        if self.position == 0 and self.latched is None:
            self._become({**self._now, "order": [*self._now["order"], index]})
        else:
            self._added.append(index)

    def load(self, saved: Mapping[str, Any], count: int) -> str | None:
        """Takes over a saved schedule of `count` groups.

        Returns:
            None, or why the saved order does not fit: then a new pass begins in its own order.
        """
        order = [int(index) for index in saved["order"]]
        position = int(saved["position"])
        if sorted(order) == list(range(count)) and 0 <= position < count:
            self._added = []
            self._become(
                {
                    "order": order,
                    "position": position,
                    "pass": int(saved["pass"]),
                    "lr": None if saved["lr"] is None else [float(rate) for rate in saved["lr"]],
                    "seed": int(saved["seed"]),
                }
            )
            return None
        self._become({**self._now, "position": 0, "pass": int(saved["pass"]), "lr": None})
        return f"the saved order is of {len(order)} groups, this optimizer has {count}"
