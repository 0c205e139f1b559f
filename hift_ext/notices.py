# SPDX-License-Identifier: Apache-2.0
"""What a user should hear once: steps that changed nothing, and why.

Warnings point at the line that called `step()`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_INSIDE = (str(Path(__file__).parent), "torch/optim/", "torch/utils/_contextlib")


def stacklevel() -> int:
    """How many frames up the first one outside this package and torch's wrappers is."""
    level = 2
    frame = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _INSIDE):
        frame, level = frame.f_back, level + 1
    return level


class Notices:
    """Warns once for each kind of notice."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._unreached: list[str] = []

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, stacklevel=stacklevel())

    def zero_rate(self, pass_index: int) -> None:
        """A pass latched the learning rate 0."""
        self._once(
            "zero rate",
            f"pass {pass_index} runs at the learning rate 0.0, latched at its first step: its "
            "weights do not change. A warm-up that starts above zero avoids that",
        )

    def no_gradient(self, name: str, pass_index: int) -> None:
        """A step found no gradient in the active group."""
        if pass_index == 0:
            self._unreached.append(name)
        self._once(
            "no gradient",
            f"no parameter of the active group {name!r} has a gradient: the step changed nothing. "
            "Likely causes: the module was not used in forward, backward() was not called, "
            "reentrant gradient checkpointing below a frozen input (use_reentrant=False), or "
            "torch.compile of an old torch (2.6), which does not see that requires_grad changed",
        )

    def pass_ended(self) -> None:
        """Names the groups that the first pass could not reach."""
        if self._unreached:
            names = ", ".join(map(repr, self._unreached))
            self._unreached = []
            self._once(
                "unreached",
                f"the first pass could not reach {names}: these groups had no gradient. groups= "
                "puts their parameters where a gradient arrives",
            )
