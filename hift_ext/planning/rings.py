# SPDX-License-Identifier: Apache-2.0
# Rings from none to one for the largest group, what each costs in memory and gains in time. The
# peak is known here, so a ring may take what it leaves; the optimizer itself must be more careful.
"""Rings to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hift_ext.planning.forecast import Forecaster, Settings

_WORTH = 1.002
"""A larger ring is taken where it makes the step faster by this factor."""


@dataclass(frozen=True)
class Ring:
    """A ring to choose: what it costs and what it gains.

    Attributes:
        staging: Bytes, as the optimizer's argument; 0: pages are updated in host memory.
        ring_bytes: As it is made.
        page_bytes: Upper bound of its pages' records.
        peak_bytes: Of the step that needs most.
        exposed_ms: What the average step waits for pages.
        hidden_ms: Transfer that the average step does not notice.
        step_ms: The average step.
        fits: Whether the peak does.
    """

    staging: int
    ring_bytes: int
    page_bytes: int
    peak_bytes: int
    exposed_ms: float
    hidden_ms: float
    step_ms: float
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def rings(forecaster: Forecaster, settings: Settings, store: str) -> list[Ring]:
    """None where pages can be updated over the bus, the one asked for, and larger ones.

    Args:
        forecaster: For which machine.
        settings: What was asked for.
        store: Where state rests; beside the parameters there is no ring.
    """
    if store == "device":
        return []
    usual = forecaster.forecast(settings, store)
    whole = whole_ring(forecaster, settings, store)
    sizes = {usual.staging, *((0,) if store == "ram" else ())}
    sizes |= {size for size in (whole // 4, whole // 2, whole) if size > usual.staging}
    found = []
    for size in sorted(sizes):
        made = forecaster.forecast(settings.but(staging=size, page_bytes=usual.page_bytes), store)
        found.append(
            Ring(
                size,
                made.ring_bytes,
                made.page_bytes,
                made.peak_bytes,
                made.mean("exposed_ms"),
                made.mean("hidden_ms"),
                made.mean("step_ms"),
                made.peak_bytes <= forecaster.machine.limit_bytes,
            )
        )
    return found


def whole_ring(forecaster: Forecaster, settings: Settings, store: str) -> int:
    """Bytes of the ring that holds the largest group."""
    made = forecaster.forecast(settings, store)
    largest = max(step.bytes_out for step in made.steps)
    return -(-largest // made.page_bytes) * made.page_bytes


def best(found: list[Ring]) -> Ring | None:
    """The smallest of those that fit and are about as fast as any of them; None: none fits.

    Updates over the bus are the user's to choose: how fast they are must be measured on the card.
    """
    fitting = [ring for ring in found if ring.fits and ring.staging > 0]
    fastest = min((ring.step_ms for ring in fitting), default=0.0)
    return next((ring for ring in fitting if ring.step_ms <= _WORTH * fastest), None)
