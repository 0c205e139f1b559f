# SPDX-License-Identifier: Apache-2.0
"""What `"auto"` means: where state rests, how large the ring and its pages are, how kernels launch.

All rules are here and are plain arithmetic; `look` tells them of the machine. docs/a6000.md works
them through for one card.

Store. State rests in host memory if it fits into HOST_SHARE of what is free there: the rest is for
the data loader, the page cache, and models that are still to be loaded. Else it rests on disk. It
is never put beside the parameters unasked: what longer batches will need is not known when the
choice is made, and low peak memory is what HiFT is for; `store="device"` is the user's to say.

Ring, on a GPU. A ring for the largest group hides the transfer behind forward and backward; a
smaller one hides its share, and the rest streams inside the step at the link's speed. It may take
RING_SHARE of the memory that was still free at the peak, so that longer batches find room.

Page. Streaming G bytes at B bytes/s in pages of p bytes takes G / B, and L seconds of latency for
each of G / p pages, and 2 p / B for the first page in and the last one out, which nothing hides.
That is least at p = sqrt(G L B / 2), and flat around it: the next lower power of two is taken.

Launch. A block for every run of THREADS x ROUNDS accesses, whatever the card: see `launch`.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hift_ext import hardware, memory, ops, probe
from hift_ext.profiles import Profile, link_bytes_per_s

HOST_SHARE = 0.8
"""Part of the free host memory, and of a disk's free room, that state may take."""

RING_SHARE = 0.25
"""Part of the device memory still free at the peak that a ring may take."""

LEAST_RING = 64 << 20
"""Bytes a ring has even if that is more than RING_SHARE, up to half of what is free."""

LINK_SHARE = 0.75
"""Part of a link's nominal speed that copies both ways at once are taken to reach, each."""

COPY_S = 10e-6
"""Latency of one copy, where it was not measured."""

LAUNCH_S = 10e-6
"""What a page's launch and events take besides."""

DISK_BYTES_PER_S, DISK_S = 1e9, 100e-6
"""A disk's speed, where it was not measured, and its latency."""

ZERO_COPY_GAIN = 1.1
"""How much faster than streaming updates over the bus must be measured to be chosen."""

LEAST_PAGE, MOST_PAGE = 256 << 10, 64 << 20
"""Bytes of a page's record, at least and at most."""

THREADS, ROUNDS, BLOCKS_PER_SM = 256, 4, 4
"""Of csrc/cuda/kernel.h: threads of a block, accesses of a thread, blocks that fit on an SM."""

_DEFAULT_LINK = link_bytes_per_s(4, 16)
Wish = int | Literal["auto"]


@dataclass(frozen=True)
class Disk:
    """Where a page file goes.

    Attributes:
        folder: Of the file.
        free: Bytes that can be written there.
        bytes_per_s: Of the slower direction.
    """

    folder: str
    free: int
    bytes_per_s: float = DISK_BYTES_PER_S


@dataclass(frozen=True)
class Machine:
    """What the rules look at; None where nobody knows.

    Attributes:
        on_gpu: Whether parameters are on a GPU.
        host_free: Bytes of host memory that this process can have.
        device_free: Bytes of the GPU that were free at the peak so far.
        both_ways: Bytes/s each way of the link, both ways at once.
        copy_s: Latency of a copy, seconds.
        zero_copy: Bytes/s each way of updates over the bus, if measured.
        kernels: Whether our CUDA kernels update, which page to disk and over the bus; Triton does
            neither.
        sms: Multiprocessors.
        measured: Whether the link's numbers are.
        disk: Looks where a page file of a store (`"disk"`, `"disk:PATH"`) goes; raises OSError.
    """

    on_gpu: bool
    host_free: int | None = None
    device_free: int | None = None
    both_ways: float = LINK_SHARE * _DEFAULT_LINK
    copy_s: float = COPY_S
    zero_copy: float | None = None
    kernels: bool = True
    sms: int | None = None
    measured: bool = False
    disk: Callable[[str], Disk] | None = None


@dataclass(frozen=True)
class Choice:
    """What to use, and why, in words: only what was left to choose has a reason.

    Attributes:
        store: `"ram"`, `"disk"`, `"disk:PATH"` or `"device"`.
        staging: Bytes of the ring, or ops.WHOLE_GROUP.
        page_bytes: Upper bound of a page's record.
        why: Reasons, separated by semicolons.
    """

    store: str
    staging: int
    page_bytes: int
    why: str


@dataclass(frozen=True)
class Launch:
    """How a kernel covers its elements.

    Attributes:
        threads: Of a block.
        run: Elements of a block.
        blocks: Of the grid.
        resident: Blocks the card holds at once.
        waves: blocks / resident.
    """

    threads: int
    run: int
    blocks: int
    resident: int
    waves: float


def launch(elements: int, sms: int, width: int = 4, blocks_per_sm: int = BLOCKS_PER_SM) -> Launch:
    """The grid for so many elements. The kernel has no other shape on any card.

    A block's threads keep 16 bytes of every stream in flight each; BLOCKS_PER_SM blocks on each SM
    are several times what latency x bandwidth asks for, and so the last wave, partly empty, still
    saturates memory. A grid as large as its work needs no number of SMs, no loop over blocks, and
    no tuning to a card; a resident grid would save launching blocks, which costs nothing measurable
    beside memory.

    Args:
        elements: Of one span, or of a page.
        sms: Multiprocessors.
        width: Elements of an access: 16 bytes of the widest type.
        blocks_per_sm: As registers allow.
    """
    run = THREADS * ROUNDS * width
    blocks = -(-elements // run)
    resident = sms * blocks_per_sm
    return Launch(THREADS, run, blocks, resident, blocks / resident)


def choose(
    groups: Sequence[int],
    streams: int,
    machine: Machine,
    *,
    store: str = "auto",
    staging: Wish = "auto",
    page_bytes: Wish = "auto",
    element_bytes: float = 8,
) -> Choice:
    """Settles what is `"auto"`; the rest stays as it was asked for.

    Args:
        groups: Bytes of state of each group; none if unknown, and then the usual is taken.
        streams: Of a page: copies that move it, each way.
        machine: What there is.
        store: As the optimizer's argument.
        staging: As the optimizer's argument.
        page_bytes: As the optimizer's argument.
        element_bytes: Of an element's state: 8 for AdamW in float32.

    Raises:
        OSError: State fits neither host memory nor the disk.
    """
    why: list[str] = []
    disk = None
    if store == "auto":
        store, disk = _store(sum(groups), machine, why)
    if store.startswith("disk") and disk is None and machine.disk is not None and machine.on_gpu:
        disk = machine.disk(store)
    if not machine.on_gpu or store == "device":
        usual = ops.PAGE_BYTES["cuda" if machine.on_gpu else "cpu"]
        ring = ops.WHOLE_GROUP if staging == "auto" else staging
        page = usual if page_bytes == "auto" else page_bytes
        if page_bytes == "auto" and ring > 0:
            page = min(page, ring // 2)
        return Choice(store, ring, page, "; ".join(why))

    largest = max(groups, default=0)
    page = _page(largest, streams, machine, disk, why) if page_bytes == "auto" else page_bytes
    if staging != "auto":
        ring = staging
        if page_bytes == "auto" and ring > 0:
            page = min(page, ring // 2)
    else:
        ring, page = _ring(largest, page, page_bytes == "auto", store, machine, why)
    if machine.sms and largest:
        shape = launch(int(min(page, largest) / element_bytes), machine.sms)
        why.append(
            f"launches of {shape.threads} threads and {shape.blocks} blocks a page, "
            f"{shape.waves:.1f} times what {machine.sms} SMs hold"
        )
    return Choice(store, ring, page, "; ".join(why))


def _store(total: int, machine: Machine, why: list[str]) -> tuple[str, Disk | None]:
    """Where state rests, and the disk if it was looked at."""
    free = machine.host_free
    if free is None or total <= HOST_SHARE * free:
        known = "" if free is None else f" of {_gb(total)} fits {_gb(free)} of free host memory"
        why.append(f"store ram: state{known or ', free host memory is unknown'}")
        return "ram", None
    large = (
        f"state of {_gb(total)} is more than {HOST_SHARE:.0%} of {_gb(free)} of free host memory"
    )
    cure = (
        "free some, name another disk with store='disk:PATH', have fewer bytes with "
        "state_dtype='8bit', or insist with store='ram'"
    )
    if machine.disk is None or not machine.kernels:
        raise OSError(
            errno.ENOMEM, f"{large}, and without CUDA kernels there is no disk store: {cure}"
        )
    try:
        disk = machine.disk("disk")
    except OSError as error:
        raise OSError(errno.ENOSPC, f"{large}, and no disk takes it ({error}): {cure}") from error
    if total > HOST_SHARE * disk.free:
        raise OSError(
            errno.ENOSPC, f"{large} and of {_gb(disk.free)} free in {disk.folder}: {cure}"
        )
    why.append(f"store disk: {large}; {disk.folder} has {_gb(disk.free)}")
    return "disk", disk


def _page(largest: int, streams: int, machine: Machine, disk: Disk | None, why: list[str]) -> int:
    """Bytes of a page for the largest group."""
    if largest == 0:
        return ops.PAGE_BYTES["cuda"]
    speed, latency = machine.both_ways, streams * machine.copy_s + LAUNCH_S
    if disk is not None and disk.bytes_per_s < speed:
        speed, latency = disk.bytes_per_s, DISK_S
    least = math.sqrt(largest * latency * speed / 2)
    page = min(max(1 << int(math.log2(max(least, 1))), LEAST_PAGE), MOST_PAGE)
    how = "measured" if machine.measured else "assumed"
    why.append(
        f"pages of {_mb(page)}: {latency * 1e6:.0f} us of latency a page and {_gb(speed)}/s {how}"
    )
    return page


def _ring(
    largest: int, page: int, page_is_free: bool, store: str, machine: Machine, why: list[str]
) -> tuple[int, int]:
    """Bytes of the ring, and of the page that goes with it."""
    free = machine.device_free
    whole = -(-largest // page) * page
    if free is None or largest == 0 or whole <= RING_SHARE * free:
        known = "" if free is None else f" ({_mb(whole)} of {_mb(free)} free at the peak)"
        why.append(f"ring of the largest group{known}: transfer hides behind forward and backward")
        return ops.WHOLE_GROUP, page
    ring = int(max(RING_SHARE * free, min(LEAST_RING, free / 2)))
    if page_is_free:  # two pages move, one is updated, one is ready
        page = max(min(page, 1 << int(math.log2(max(ring // 4, 1)))), LEAST_PAGE)
    hidden = min(ring / whole, 1.0)
    can_update_there = store == "ram" and machine.kernels
    zero_copy = machine.zero_copy or 0.0
    faster = zero_copy * (1 - hidden) > ZERO_COPY_GAIN * machine.both_ways
    if can_update_there and (faster or ring < 2 * page):
        reason = f"{_gb(zero_copy)}/s measured" if faster else f"{_mb(free)} free at the peak"
        why.append(f"no ring: pages are updated over the bus ({reason})")
        return 0, page
    ring = max(ring // page, 2) * page
    why.append(
        f"ring of {_mb(ring)}, {min(ring / whole, 1.0):.0%} of the largest group: {_mb(free)} were "
        "free at the peak; what it does not hold streams inside the step"
    )
    return ring, page


def on_card(profile: Profile, *, host_free: int | None, device_free: int) -> Machine:
    """A machine with a known card, for forecasts.

    Args:
        profile: The card.
        host_free: Bytes of host memory for state; None: enough.
        device_free: Bytes of the card that weights, gradients and activations leave at their peak.
    """
    return Machine(
        on_gpu=True,
        host_free=host_free,
        device_free=device_free,
        both_ways=LINK_SHARE * profile.link_bytes_per_s,
        sms=profile.sms,
        disk=lambda _: Disk("a disk", 1 << 60),
    )


def look(device: torch.device, *, kernels: bool = True) -> Machine:
    """This machine, by the cache of measurements where it has them, else by the card's profile.

    Args:
        device: Of the parameters.
        kernels: Whether our CUDA kernels update.
    """
    share = memory.local_processes()
    host_free = memory.host_free_bytes()

    def disk(store: str) -> Disk:
        folder = os.path.dirname(store[5:]) or "." if store[5:] else ops.scratch_folder()
        known = probe.cached(folder=folder).disk
        speed = min(known.read, known.write) if known else DISK_BYTES_PER_S
        return Disk(folder, memory.disk_free_bytes(folder) // share, speed)

    machine = Machine(
        on_gpu=device.type == "cuda",
        host_free=None if host_free is None else host_free // share,
        kernels=kernels,
        disk=disk,
    )
    card = hardware.present(device.index or 0) if machine.on_gpu else None
    if card is None:
        return machine
    bus = probe.cached(card.index).bus
    return Machine(
        on_gpu=True,
        host_free=machine.host_free,
        device_free=memory.device_free_bytes(device),
        both_ways=bus.both_ways if bus else LINK_SHARE * card.profile.link_bytes_per_s,
        copy_s=bus.copy_latency_s if bus else COPY_S,
        zero_copy=bus.zero_copy_update if bus else None,
        kernels=kernels,
        sms=card.profile.sms,
        measured=bus is not None,
        disk=disk,
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _mb(size: float) -> str:
    return f"{size / (1 << 20):.4g} MiB"
