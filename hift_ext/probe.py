# SPDX-License-Identifier: Apache-2.0
"""What this machine's memory, disk and link do, measured once and kept in the user's cache.

Kept under what could change it: driver, card and torch; processor; the disk below a folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from hift_ext import hardware, memory, ops, rates
from hift_ext.hardware import cuda_missing
from hift_ext.progress import progress
from hift_ext.rates import BusRates, DiskRates, HostRates

log = logging.getLogger("hift_ext")

FORMAT = 1
"""Of the cache; another is measured anew."""

MOST_BYTES = 256 << 20
"""Of a range that is copied, and of the file."""

FREE_SHARE = 16
"""Each range is at most this part of what is free."""

_Rates = TypeVar("_Rates", HostRates, DiskRates, BusRates)


@dataclass(frozen=True)
class Probe:
    """What was measured; None where it was not.

    Attributes:
        host: Host memory.
        disk: The disk of scratch files, or of the folder that was asked for.
        bus: A GPU's link.
        notes: What could not be measured, or kept, and why.
    """

    host: HostRates | None = None
    disk: DiskRates | None = None
    bus: BusRates | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values: bytes/s and seconds."""
        return dataclasses.asdict(self) | {"notes": list(self.notes)}


def measure(
    device: int | None = None, folder: str | os.PathLike[str] | None = None, *, again: bool = False
) -> Probe:
    """Measures what the cache does not have, and keeps it.

    Args:
        device: Index of a GPU. None: the first if there is one; then what keeps it from being
            measured is a note and not an error.
        folder: On the disk to measure. None: where `store="disk"` puts its file.
        again: Measures all of it, whatever the cache has.

    Raises:
        RuntimeError: There is no such GPU, or this build has no kernels for it.
        OSError: The folder is absent, refuses a file, or has no room.
    """
    notes: list[str] = []
    place = str(folder) if folder is not None else _scratch_folder(notes)
    card = _card(device, notes)
    entries = {} if again else _read(notes)
    total = 0.0
    todo: list[Callable[[Callable[[float], None]], None]] = []
    found: dict[str, Any] = {}

    def want(name: str, key: str, kind: type[_Rates], size: int, moves: int, run: Any) -> None:
        nonlocal total
        found[name] = _entry(entries, key, kind)
        if found[name] is not None:
            return
        total += float(moves) * size

        def work(advance: Callable[[float], None]) -> None:
            found[name] = run(size, advance)
            entries[key] = dataclasses.asdict(found[name])

        todo.append(work)

    want("host", host_key(), HostRates, _host_size(), rates.ROUNDS, rates.host_rates)
    if place:
        size = _least(memory.disk_free_bytes(place))
        key = disk_key(place)
        want("disk", key, DiskRates, size, 2, lambda s, a: rates.disk_rates(place, s, a))
    if card is not None:
        gpu = torch.device("cuda", card.index)
        size = min(_host_size(), _least(memory.device_free_bytes(gpu)))
        moves = 6 * rates.ROUNDS
        want("bus", bus_key(card), BusRates, size, moves, lambda s, a: rates.bus_rates(gpu, s, a))
    if todo:
        with progress("measuring memory, disk and link", total, in_bytes=True) as bar:
            try:
                for work in todo:
                    work(bar.advance)
            finally:  # what was measured before a failure is kept
                _write(entries, notes)
    for note in notes:
        log.info("probe: %s", note)
    return Probe(**found, notes=tuple(notes))


def cached(device: int | None = None, folder: str | os.PathLike[str] | None = None) -> Probe:
    """What the cache has: of host memory, of a GPU and of a folder's disk, if they are asked for.

    Measures nothing. A GPU that is not there has nothing.
    """
    notes: list[str] = []
    entries = _read(notes)
    card = None if device is None else hardware.present(device)
    return Probe(
        _entry(entries, host_key(), HostRates),
        None if folder is None else _entry(entries, disk_key(folder), DiskRates),
        None if card is None else _entry(entries, bus_key(card), BusRates),
        tuple(notes),
    )


def cache_file() -> Path:
    """$XDG_CACHE_HOME/hift_ext/probe.json, by default below ~/.cache.

    Raises:
        RuntimeError: The user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path is to be ignored, by XDG's rules.
    return (named if named.is_absolute() else Path.home() / ".cache") / "hift_ext" / "probe.json"


def host_key() -> str:
    """Under what host memory's rates are kept."""
    return f"host: {hardware.cpu_name()}, {torch.get_num_threads()} threads"


def disk_key(folder: str | os.PathLike[str]) -> str:
    """Under what a disk's rates are kept: the processor, and the device below the folder.

    Raises:
        OSError: There is no such folder.
    """
    device = os.stat(folder).st_dev
    return f"disk: {hardware.cpu_name()}, device {os.major(device)}:{os.minor(device)}"


def bus_key(card: hardware.Present) -> str:
    """Under what a link's rates are kept: card, link, driver and torch."""
    profile, driver = card.profile, card.driver or ops.cuda_info()["driver"]
    link = f"PCIe {profile.pcie_generation} x{profile.pcie_lanes}" if card.link else "some link"
    return f"bus: {profile.name}, {link}, driver {driver}, torch {torch.__version__}"


def _card(device: int | None, notes: list[str]) -> hardware.Present | None:
    """The GPU to measure. What stands in the way raises if it was asked for, else is noted."""
    card = hardware.present(device or 0)
    missing = "torch sees no GPU" if card is None else cuda_missing()
    if not missing:
        return card
    if device is not None:
        raise RuntimeError(f"the link of GPU {device} cannot be measured: {missing}")
    notes.append(f"no link to a GPU was measured: {missing}")
    return None


def _scratch_folder(notes: list[str]) -> str:
    try:
        return ops.scratch_folder()
    except OSError as error:
        notes.append(f"no disk was measured: {error}")
        return ""


def _host_size() -> int:
    return _least(memory.host_free_bytes())


def _least(free: int | None) -> int:
    """Bytes to move where so many are free: whole pages of the system, at least one block.

    Raises:
        OSError: There is no room even for that.
    """
    if free is None:
        return MOST_BYTES
    if free < 2 * rates.BLOCK_BYTES:
        raise OSError(f"{free} bytes are free, too few to measure with: free some, and ask again")
    return max(min(MOST_BYTES, free // FREE_SHARE) // 4096 * 4096, rates.BLOCK_BYTES)


def _entry(entries: dict[str, Any], key: str, kind: type[_Rates]) -> _Rates | None:
    """What is kept, if it is what it should be."""
    kept = entries.get(key)
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(kept, dict) or sorted(kept) != sorted(names):
        return None
    for name, value in kept.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < (name != "direct") * 1e-12:
            return None
    return kind(**{name: float(value) for name, value in kept.items()})


def _read(notes: list[str]) -> dict[str, Any]:
    """The cache's entries; none, with a note, where it cannot be read as one."""
    try:
        text = cache_file().read_text()
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        notes.append(f"the cache of measurements cannot be read ({error})")
        return {}
    try:
        kept = json.loads(text)
        if kept["format"] == FORMAT and isinstance(kept["entries"], dict):
            return dict(kept["entries"])
        why = f"format {kept['format']!r}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    notes.append(f"{cache_file()} is not a cache of this version ({why}): its rates are not used")
    return {}


def _write(entries: dict[str, Any], notes: list[str]) -> None:
    """Replaces the cache whole; what cannot be kept is noted."""
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have measured other things meanwhile.
        kept = _read([]) | entries
        handle, name = tempfile.mkstemp(prefix=".probe-", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"format": FORMAT, "entries": kept}, file, indent=1, sort_keys=True)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, RuntimeError) as error:
        notes.append(f"the measurements could not be kept ({error})")
