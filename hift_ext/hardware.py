# SPDX-License-Identifier: Apache-2.0
"""The cards: profiles of known ones, and the one that is here as driver and bus tell of it.

`present()` is what the doctor prints, what the planner takes for `--gpu here`, and what the rules
in choices.py start from.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hift_ext import ops
from hift_ext.profiles import PROFILES, Profile, get, link_bytes_per_s, named

__all__ = [
    "PROFILES",
    "Link",
    "Present",
    "Profile",
    "cuda_missing",
    "get",
    "link_bytes_per_s",
    "present",
]

SYS = Path("/sys/bus/pci/devices")

_GENERATION = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""PCIe generation by GT/s, as the kernel writes the speed of a link."""

_SLOWEST_LINK = (3, 16)
"""Of an unknown card whose link nobody tells."""

_SLOWEST_MEMORY = 300e9
"""Bytes/s, of an unknown card whose memory nobody tells."""


@dataclass(frozen=True)
class Link:
    """A PCIe link.

    Attributes:
        generation: It runs at now; idle cards slow their link down, so this may be the idle one.
        lanes: Connected.
        best_generation: Card and slot can run at.
        best_lanes: Card and slot could connect.
    """

    generation: int
    lanes: int
    best_generation: int
    best_lanes: int

    @property
    def bytes_per_s(self) -> float:
        """Nominal bytes/s each way under load: the best speed over the connected lanes."""
        return link_bytes_per_s(self.best_generation, self.lanes)


@dataclass(frozen=True)
class Present:
    """A GPU of this machine.

    Attributes:
        index: As torch counts.
        profile: Of the known card of this name or, of any other, made from what the driver tells;
            memory, multiprocessors and link are always the driver's and the bus's.
        known: Whether the name has a profile.
        link: None where the kernel does not tell.
        pci: Its address, 0000:65:00.0; empty where nobody tells.
        driver: Version of the driver, and "" where the kernel does not tell.
    """

    index: int
    profile: Profile
    known: bool
    link: Link | None
    pci: str
    driver: str


def present(index: int = 0) -> Present | None:
    """A GPU of this machine, or None where torch sees none.

    Raises:
        ValueError: There is a GPU, and none of this index.
    """
    if not torch.cuda.is_available():
        return None
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(
            f"there is no GPU {index}: torch sees {torch.cuda.device_count()}, counted from 0"
        )
    properties = torch.cuda.get_device_properties(index)
    facts: dict[str, Any] = {}
    if ops.cuda_info()["devices"] > index:
        facts = ops.cuda_device(index)
    pci = facts.get("pci") or _address(properties)
    link = read_link(pci)
    return Present(
        index,
        from_properties(properties, facts, link),
        named(properties.name) is not None,
        link,
        pci.lower(),
        driver_version(),
    )


def from_properties(properties: Any, facts: dict[str, Any], link: Link | None) -> Profile:
    """The profile of a card by its name, set right by what is told; made from that if unknown.

    Args:
        properties: torch's of the device.
        facts: See `ops.cuda_device`; may be empty.
        link: Its link, if known.
    """
    told: dict[str, Any] = {
        "sms": properties.multi_processor_count,
        "driver_bytes": properties.total_memory,
    }
    if getattr(properties, "L2_cache_size", 0):
        told["l2_bytes"] = properties.L2_cache_size
    if facts.get("copy_engines"):
        told["copy_engines"] = facts["copy_engines"]
    if link is not None:
        told |= {"pcie_generation": link.best_generation, "pcie_lanes": link.lanes}
    known = named(properties.name)
    if known is not None:
        return dataclasses.replace(known, **told)

    capability = (properties.major, properties.minor)
    memory_hz = float(
        facts.get("memory_hz", 0) or 1e3 * getattr(properties, "memory_clock_rate", 0)
    )
    bus_bits = int(facts.get("bus_bits", 0) or getattr(properties, "memory_bus_width", 0))
    clock_hz = float(
        facts.get("clock_hz", 0) or 1e3 * getattr(properties, "clock_rate", 0) or 1.4e9
    )
    # Of the tensor cores nobody tells: what the CUDA cores do is a lower bound.
    fp32 = 2.0 * properties.multi_processor_count * _lanes(capability) * clock_hz
    types = ("float32", "tfloat32", "bfloat16", "float16")
    made = {
        "key": "here",
        "name": properties.name,
        "capability": capability,
        "memory_bytes": properties.total_memory,
        "bandwidth": 2.0 * memory_hz * bus_bits / 8 or _SLOWEST_MEMORY,
        "l2_bytes": 0,
        "pcie_generation": _SLOWEST_LINK[0],
        "pcie_lanes": _SLOWEST_LINK[1],
        "copy_engines": 1,
        "threads_per_sm": getattr(properties, "max_threads_per_multi_processor", 1536),
        "registers_per_sm": getattr(properties, "regs_per_multiprocessor", 65536),
        "flops": MappingProxyType(dict.fromkeys(types, fp32)),
        "source": "the driver of this machine; FLOP/s of the CUDA cores for every type",
    }
    return Profile(**{**made, **told})


def _lanes(capability: tuple[int, int]) -> int:
    """float32 lanes of a multiprocessor (CUDA C++ Programming Guide, arithmetic instructions)."""
    return 64 if capability in ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0)) else 128


def _address(properties: Any) -> str:
    """The PCI address by torch's properties; empty where this torch has none."""
    parts = [getattr(properties, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    if any(part is None for part in parts):
        return ""
    domain, bus, device = map(int, parts)  # type: ignore[arg-type]
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def read_link(pci: str, folder: Path | None = None) -> Link | None:
    """The link of a PCI device as the kernel tells; None where it does not.

    Args:
        pci: 0000:65:00.0, in either case.
        folder: Of devices; None: SYS.
    """
    device = (folder or SYS) / pci.lower()
    now, best = _speed(device, "current"), _speed(device, "max")
    if not pci or now is None or best is None or now[1] < 1:  # no lanes: not connected
        return None
    # The device tells its own best; in a slot of an older generation that is never reached.
    slot = _speed(device.resolve().parent, "max") or best
    return Link(*now, min(best[0], slot[0]), min(best[1], slot[1]))


def _speed(device: Path, which: str) -> tuple[int, int] | None:
    """Generation and lanes; None where the kernel does not tell."""
    try:
        speed = (device / f"{which}_link_speed").read_text()
        lanes = (device / f"{which}_link_width").read_text().strip()
    except OSError:
        return None
    found = re.match(r"([\d.]+) GT/s", speed)
    if found is None or float(found[1]) not in _GENERATION or not lanes.isdecimal():
        return None
    return _GENERATION[float(found[1])], int(lanes)


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's kernel module, "" where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself, or its architecture."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cuda_missing() -> str:
    """What keeps this build's CUDA kernels from running here, with the cure; or nothing."""
    if not ops.build_info()["cuda_built"]:
        return (
            "this build has no CUDA kernels: `pip install nvidia-cuda-nvcc`, then "
            "HIFT_CUDA=1 pip install . again"
        )
    found = ops.cuda_info()
    if found["devices"] > 0:
        return ""
    return (
        f"the CUDA {found['runtime'] // 1000} kernels of this build do not run here "
        f"({found['error']}; the driver knows CUDA {found['driver'] // 1000}): update the driver, "
        "or build with an nvcc of its version"
    )
