# SPDX-License-Identifier: Apache-2.0
# The machine a plan is for: a card, what its bus, memory and disk really carry, and host memory.
# Every share of a nominal number that is an assumption has a name here, and a sentence in the plan.
"""What a plan takes a machine to be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hift_ext import choices, hardware, memory, probe
from hift_ext.choices import COPY_S, LAUNCH_S, LINK_SHARE
from hift_ext.planning.transfer import Link
from hift_ext.profiles import PROFILES, Profile, get
from hift_ext.rates import BusRates

MEMORY_SHARE = 0.85
"""Of a card's nominal memory bandwidth that the update's kernel reaches."""

FLOPS_SHARE = 0.5
"""Of a card's peak FLOP/s that forward and backward reach."""

FREE_SHARE = 0.03
"""Of the memory tensors can have that is left to gaps between the allocator's blocks."""

DISK_GBPS = (3.0, 2.0)
"""Reading and writing of a disk nobody has measured, GB/s."""

ZERO_COPY_SHARE = 0.6
"""Of a link's nominal bytes/s that a kernel reaches on host memory, each way at once."""

GPUS = (*PROFILES, "here")
"""What a plan can be made for."""


@dataclass(frozen=True)
class Machine:
    """A card, and what is around it.

    Attributes:
        profile: The card.
        to_device: Bytes/s from the host while as much goes back.
        to_host: Bytes/s to the host while as much comes.
        zero_copy: Bytes/s each way of a kernel that updates host memory.
        copy_s: Latency of a copy, seconds.
        disk_read: Bytes/s.
        disk_write: Bytes/s.
        host_bytes: Host memory for state; None if nobody said.
        here: Whether it is this machine's.
        notes: A sentence for each number that is assumed or measured.
    """

    profile: Profile
    to_device: float
    to_host: float
    zero_copy: float
    copy_s: float
    disk_read: float
    disk_write: float
    host_bytes: int | None
    here: bool
    notes: tuple[str, ...]

    @property
    def limit_bytes(self) -> int:
        """What tensors may take in all."""
        return int(self.profile.usable_bytes * (1 - FREE_SHARE))

    def link(self, store: str, streams: int, *, ring: bool = True) -> Link:
        """The rates of pages that rest in `store`, "ram" or "disk", through a ring or without.

        Args:
            store: Where pages rest.
            streams: Of a page, each of them a copy.
            ring: Whether there is one.
        """
        update = self.profile.bandwidth * MEMORY_SHARE / 1e9
        if not ring:
            return Link(self.zero_copy / 1e9, self.zero_copy / 1e9, update)
        reading, writing = self.to_device, self.to_host
        if store == "disk":
            reading, writing = min(reading, self.disk_read), min(writing, self.disk_write)
        page_us = 1e6 * (streams * self.copy_s + LAUNCH_S)
        return Link(reading / 1e9, writing / 1e9, update, page_us, taking_turns=store == "disk")

    def chosen(self, device_free: int) -> choices.Machine:
        """What the rules of choices.py look at.

        Args:
            device_free: Bytes of the card that are free at the peak, without a ring.
        """
        found = choices.on_card(self.profile, host_free=self.host_bytes, device_free=device_free)
        return dataclasses.replace(
            found, both_ways=min(self.to_device, self.to_host), copy_s=self.copy_s
        )

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s that matrix products of this type reach."""
        return self.profile.flops[str(dtype).removeprefix("torch.")] * FLOPS_SHARE


def machine(gpu: str, host_memory: int | None = None) -> Machine:
    """The machine of that name.

    Args:
        gpu: A key of `PROFILES`, or "here" for this machine's first GPU.
        host_memory: Bytes of host memory for state; None: what is free here, or unknown.

    Raises:
        ValueError: There is no such card.
    """
    if gpu == "here":
        return _here(host_memory)
    if gpu not in PROFILES:
        raise ValueError(f"there is no profile of a GPU {gpu!r}: offered are {', '.join(GPUS)}")
    return _with(get(gpu), None, None, host_memory, here=False)


def _here(host_memory: int | None) -> Machine:
    card = hardware.present()
    if card is None:
        raise RuntimeError(
            "a plan for the GPU that is here needs one, and torch sees none: name a card instead "
            f"({', '.join(PROFILES)})"
        )
    found = probe.cached(card.index)
    free = memory.host_free_bytes() if host_memory is None else host_memory
    disk = None if found.disk is None else (found.disk.read, found.disk.write)
    return _with(card.profile, found.bus, disk, free, here=True)


def _with(
    profile: Profile,
    bus: BusRates | None,
    disk: tuple[float, float] | None,
    host_bytes: int | None,
    *,
    here: bool,
) -> Machine:
    """A machine from what was measured, and from assumptions where it was not."""
    nominal = profile.link_bytes_per_s
    if bus is None:
        both, zero_copy = nominal * LINK_SHARE, nominal * ZERO_COPY_SHARE
        how = (
            f"assumed: {_percent(LINK_SHARE)} of PCIe {profile.pcie_generation}.0 "
            f"x{profile.pcie_lanes}"
        )
    else:
        both, zero_copy, how = bus.both_ways, bus.zero_copy_update, "measured here"
    copy_s = COPY_S if bus is None else bus.copy_latency_s
    read, write = disk or (1e9 * DISK_GBPS[0], 1e9 * DISK_GBPS[1])
    notes = (
        f"bus: {both / 1e9:.1f} GB/s each way at once ({how})",
        f"disk: {read / 1e9:.1f} GB/s reading, {write / 1e9:.1f} GB/s writing, in turns "
        f"({'measured here' if disk else 'assumed'})",
        f"memory: tensors can have {profile.usable_bytes / 2**30:.2f} GiB of the card's "
        f"{profile.memory_bytes / 2**30:.0f}, the rest is the driver's, error correction's and a "
        f"context's; {_percent(FREE_SHARE)} of that is left to gaps between the allocator's blocks",
        f"time: forward and backward at {_percent(FLOPS_SHARE)} of the card's peak FLOP/s, counted "
        f"of matrix products and attention; the update at {_percent(MEMORY_SHARE)} of "
        f"{profile.bandwidth / 1e9:.0f} GB/s",
    )
    return Machine(profile, both, both, zero_copy, copy_s, read, write, host_bytes, here, notes)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
