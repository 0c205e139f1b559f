# SPDX-License-Identifier: Apache-2.0
"""What cards can do, by their vendor's papers: compute, memory, link, each with its source.

Bytes and seconds throughout; `hardware.present()` has the same of a card that is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DRIVER_SHARE = 0.02
"""Part of the nominal memory that the driver is taken to keep (cards seen: 1 to 1.9 %)."""

ECC_SHARE = 1 / 16
"""Part of the nominal memory that error correction takes on cards with GDDR memory."""

CONTEXT_BYTES = 512 << 20
"""What a CUDA context, kernels and the libraries' workspaces are taken to need."""

_LANE_BYTES = {3: 8e9 / 8, 4: 16e9 / 8, 5: 32e9 / 8, 6: 64e9 / 8}
_LINE_CODE = 128 / 130


def link_bytes_per_s(generation: int, lanes: int) -> float:
    """Bytes/s a PCIe link carries each way, at most: after its line code, before its packets.

    Raises:
        ValueError: The generation is not 1 to 6.
    """
    if generation in (1, 2):  # 2.5 and 5 GT/s, 8 bits in 10
        return lanes * generation * 2.5e9 / 10
    if generation not in _LANE_BYTES:
        raise ValueError(f"PCIe generations are 1 to 6, not {generation!r}")
    return lanes * _LANE_BYTES[generation] * _LINE_CODE


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One card.

    Attributes:
        key: What users call it: `"a6000"`.
        name: What the driver calls it.
        capability: Compute capability, (8, 6).
        sms: Streaming multiprocessors.
        memory_bytes: Nominal.
        bandwidth: Of the card's memory, bytes/s.
        l2_bytes: Second-level cache.
        pcie_generation: Of its link.
        pcie_lanes: Of its link.
        copy_engines: Copies that run at once; two or more serve both ways of the link.
        threads_per_sm: At most resident.
        registers_per_sm: 32-bit ones.
        flops: Peak FLOP/s without sparsity: `"float32"` (CUDA cores), `"tfloat32"`, `"bfloat16"`,
            `"float16"` (tensor cores that add up in float32).
        source: Where the numbers are from.
        ecc: Whether part of `memory_bytes` is taken by error correction as delivered.
        driver_bytes: What the driver gives programs; None: nominal less DRIVER_SHARE (and
            ECC_SHARE where `ecc`).
    """

    key: str
    name: str
    capability: tuple[int, int]
    sms: int
    memory_bytes: int
    bandwidth: float
    l2_bytes: int
    pcie_generation: int
    pcie_lanes: int
    copy_engines: int
    threads_per_sm: int
    registers_per_sm: int
    flops: Mapping[str, float]
    source: str
    ecc: bool = False
    driver_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """Memory that tensors can have: without the driver's, error correction's and a context."""
        given = self.driver_bytes
        if given is None:
            given = int(self.memory_bytes * (1 - self.ecc * ECC_SHARE) * (1 - DRIVER_SHARE))
        return given - CONTEXT_BYTES

    @property
    def link_bytes_per_s(self) -> float:
        """Nominal bytes/s to or from the host, each way."""
        return link_bytes_per_s(self.pcie_generation, self.pcie_lanes)


def _flops(fp32: float, tf32: float, half: float) -> Mapping[str, float]:
    """From TFLOP/s as the papers have them."""
    tera = {"float32": fp32, "tfloat32": tf32, "bfloat16": half, "float16": half}
    return MappingProxyType({name: value * 1e12 for name, value in tera.items()})


_GIB, _MIB, _GB = 1 << 30, 1 << 20, 1e9
_GUIDE = "CUDA C++ Programming Guide, Technical Specifications per Compute Capability"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2"
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper"
_ENGINES = "copy engines as the driver reports them (asyncEngineCount)"

_ALL = (
    Profile(
        key="a6000",
        name="NVIDIA RTX A6000",
        capability=(8, 6),
        sms=84,
        memory_bytes=48 * _GIB,
        bandwidth=768 * _GB,
        l2_bytes=6 * _MIB,
        pcie_generation=4,
        pcie_lanes=16,
        copy_engines=2,
        threads_per_sm=1536,
        registers_per_sm=65536,
        flops=_flops(38.7, 77.4, 154.8),
        source=f"{_GA102}, appendix C (RTX A6000); NVIDIA RTX A6000 datasheet; {_GUIDE}; "
        f"{_ENGINES}; error correction is off as delivered",
    ),
    Profile(
        key="rtx3090",
        name="NVIDIA GeForce RTX 3090",
        capability=(8, 6),
        sms=82,
        memory_bytes=24 * _GIB,
        bandwidth=936 * _GB,
        l2_bytes=6 * _MIB,
        pcie_generation=4,
        pcie_lanes=16,
        copy_engines=2,
        threads_per_sm=1536,
        registers_per_sm=65536,
        flops=_flops(35.6, 35.6, 71.0),
        source=f"{_GA102}, appendix A (GeForce RTX 3090); {_GUIDE}; {_ENGINES}",
    ),
    Profile(
        key="rtx4090",
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        sms=128,
        memory_bytes=24 * _GIB,
        bandwidth=1008 * _GB,
        l2_bytes=72 * _MIB,
        pcie_generation=4,
        pcie_lanes=16,
        copy_engines=2,
        threads_per_sm=1536,
        registers_per_sm=65536,
        flops=_flops(82.6, 82.6, 165.2),
        source=f"{_ADA}, appendix A (GeForce RTX 4090); {_GUIDE}; {_ENGINES}",
    ),
    Profile(
        key="l40s",
        name="NVIDIA L40S",
        capability=(8, 9),
        sms=142,
        memory_bytes=48 * _GIB,
        bandwidth=864 * _GB,
        l2_bytes=96 * _MIB,
        pcie_generation=4,
        pcie_lanes=16,
        copy_engines=2,
        threads_per_sm=1536,
        registers_per_sm=65536,
        flops=_flops(91.6, 183.0, 362.05),
        source=f"NVIDIA L40S datasheet; {_ADA} (AD102's L2); {_GUIDE}; {_ENGINES}",
        ecc=True,
    ),
    Profile(
        key="a100-40",
        name="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        sms=108,
        memory_bytes=40 * _GIB,
        bandwidth=1555 * _GB,
        l2_bytes=40 * _MIB,
        pcie_generation=4,
        pcie_lanes=16,
        copy_engines=3,
        threads_per_sm=2048,
        registers_per_sm=65536,
        flops=_flops(19.5, 156.0, 312.0),
        source=f"{_A100}, table 'Comparison of NVIDIA Data Center GPUs'; {_GUIDE}; {_ENGINES}",
    ),
    Profile(
        key="a100-80",
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        sms=108,
        memory_bytes=80 * _GIB,
        bandwidth=2039 * _GB,
        l2_bytes=40 * _MIB,
        pcie_generation=4,
        pcie_lanes=16,
        copy_engines=3,
        threads_per_sm=2048,
        registers_per_sm=65536,
        flops=_flops(19.5, 156.0, 312.0),
        source=f"NVIDIA A100 Tensor Core GPU datasheet (80GB SXM); {_A100}; {_GUIDE}; {_ENGINES}",
    ),
    Profile(
        key="h100",
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        sms=132,
        memory_bytes=80 * _GIB,
        bandwidth=3350 * _GB,
        l2_bytes=50 * _MIB,
        pcie_generation=5,
        pcie_lanes=16,
        copy_engines=3,
        threads_per_sm=2048,
        registers_per_sm=65536,
        flops=_flops(66.9, 494.7, 989.4),
        source=f"{_H100}, appendix A (H100 SXM5); NVIDIA H100 Tensor Core GPU datasheet (SXM); "
        f"{_GUIDE}; {_ENGINES}",
    ),
    Profile(
        key="h200",
        name="NVIDIA H200",
        capability=(9, 0),
        sms=132,
        memory_bytes=141 * _GIB,
        bandwidth=4800 * _GB,
        l2_bytes=50 * _MIB,
        pcie_generation=5,
        pcie_lanes=16,
        copy_engines=3,
        threads_per_sm=2048,
        registers_per_sm=65536,
        flops=_flops(66.9, 494.7, 989.4),
        source=f"NVIDIA H200 Tensor Core GPU datasheet (SXM); {_H100} (the same GH100: SMs, L2, "
        f"FLOP/s); {_GUIDE}; {_ENGINES}",
    ),
)

PROFILES: Mapping[str, Profile] = MappingProxyType({profile.key: profile for profile in _ALL})
"""Every known card by its key."""


def get(key: str) -> Profile:
    """The profile of a known card.

    Raises:
        ValueError: The key is unknown.
    """
    if key not in PROFILES:
        raise ValueError(f"no profile of a card {key!r}: known are {', '.join(PROFILES)}")
    return PROFILES[key]


def named(name: str) -> Profile | None:
    """The profile of the card that the driver calls `name`, if it is known."""
    return next((profile for profile in _ALL if profile.name == name), None)
