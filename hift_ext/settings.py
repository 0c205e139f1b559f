# SPDX-License-Identifier: Apache-2.0
"""What users may do to `param_groups` after construction: any setting, and nothing to the members.

A setting that cannot be used raises before anything has changed, and works again once corrected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hift_ext.paged_state import PagedState

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

_UNUSABLE = (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def rates(optimizer: HiFTOptimizer) -> list[float]:
    """The learning rate of every param_group, as numbers.

    Raises:
        ValueError: One is no finite number.
    """
    return [_rate(number, group.get("lr")) for number, group in enumerate(optimizer.param_groups)]


def latch(optimizer: HiFTOptimizer) -> None:
    """Takes the learning rates of this moment for the pass.

    Raises:
        ValueError: One is no finite number.
    """
    latched = rates(optimizer)
    optimizer._schedule.latch(latched)
    if 0.0 in latched:
        optimizer._notices.zero_rate(optimizer.pass_index)


def _rate(number: int, lr: Any) -> float:
    cause: Exception | None = None
    try:
        rate = math.nan if isinstance(lr, str) else float(lr)
    except _UNUSABLE as error:
        rate, cause = math.nan, error
    if not math.isfinite(rate):
        raise ValueError(
            f"param_groups[{number}]['lr'] is {lr!r}: a learning rate is one finite number, or a "
            "tensor of one element. This step changed nothing; correct it and repeat the step"
        ) from cause
    return rate


def folded(
    optimizer: HiFTOptimizer, number: int, group: dict[str, Any], lr: float, step: int
) -> tuple[float, ...]:
    """The rule's hyper-parameters for a param_group's `step`-th visit.

    Raises:
        ValueError: The settings give none, or some that are not finite.
    """
    cause: Exception | None = None
    try:
        values = optimizer.hyper(group, lr, step)
        if math.isfinite(sum(values)):
            return values
    except _UNUSABLE as error:
        cause = error
    settings = {name: group.get(name) for name in optimizer.defaults if name in group}
    shown = ", ".join(f"{k}={v!r}" for k, v in settings.items() if v is not None and v is not False)
    raise ValueError(
        f"{type(optimizer).__name__} cannot use the settings of param_groups[{number}]: {shown} "
        f"({cause or 'an update by them is not finite'}). This step changed nothing; correct them "
        "and repeat the step"
    ) from cause


def members(optimizer: HiFTOptimizer) -> list[frozenset[int]]:
    """Which parameters are in which param_group, to be compared with later."""
    return [frozenset(map(id, group["params"])) for group in optimizer.param_groups]


def check_unchanged(optimizer: HiFTOptimizer, *, whole: bool) -> None:
    """Refuses what was put in place of the optimizer's own books.

    Args:
        optimizer: The optimizer.
        whole: Whether to look at every parameter, or only at the number of param_groups.

    Raises:
        RuntimeError: Members of `param_groups` were added or taken out by hand, or `state` was
            replaced.
    """
    groups, known = optimizer.param_groups, optimizer._members
    if len(groups) != len(known) or (whole and members(optimizer) != known):
        raise RuntimeError(
            "the parameters in optimizer.param_groups were changed by hand after the optimizer was "
            "made: HiFT's groups and state would not follow. Put them back and use "
            "add_param_group(), or make a new optimizer and load this one's state_dict"
        )
    if type(optimizer.state) is not PagedState:
        raise RuntimeError(
            f"optimizer.state was replaced by a {type(optimizer.state).__name__}: the state lies "
            "in pages, and only load_state_dict() replaces it. Make a new optimizer to begin anew"
        )
