# SPDX-License-Identifier: Apache-2.0
"""The typed face of the compiled module: rule numbers, type codes, engines.

Everything that reaches C++ as an address or a count is made from tensors here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hift_ext._version import __version__

try:
    import _hift_ext as _ext
except ImportError as error:
    raise ImportError(
        f"the compiled module _hift_ext cannot be imported ({error}): run `pip install .` in the "
        "clone's root"
    ) from error

if _ext.__version__ != __version__:
    raise ImportError(
        f"hift_ext {__version__} found the compiled module of version {_ext.__version__}: run "
        "`pip install .` again"
    )

ext: Any = _ext
"""The compiled module."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES: dict[str, tuple[int, int, int, int]] = _ext.rules()
"""Rule name -> its number, its state streams, its hyper-parameters, its non-negative states.

The last is a bit for each state that is never below zero; -1: its state is not kept as 8-bit codes.
"""

PAGE_BYTES = {"cpu": 4 << 20, "cuda": 16 << 20}
"""Upper bound of a page's record where the user names none, by type of device.

On a GPU a page costs a launch and some events, tens of microseconds, and the first page in and the
last one out cannot hide behind others.
"""

WHOLE_GROUP = -1
"""Staging: room for the largest group."""

Hypers = Sequence[Sequence[float]]
Row = tuple[int, int, int, int, int]
"""Item, parameter address, gradient address, kind, index into the hypers of the step."""

Draw = tuple[int, int]
"""Key of a row's random numbers, and elements of its parameter before the item's."""

Wanted = tuple[torch.Tensor, int, int, int] | tuple[torch.Tensor, int, int, int, torch.Tensor]
"""Parameter, item, elements, index into the hypers of the step; its gradient, if not in `.grad`."""

_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # older torch has none
_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


class StreamSpec(NamedTuple):
    """One stream of state.

    Attributes:
        name: In `state[p]`.
        fill: The value it starts from.
        signed: Whether it may be below zero, as the rule in csrc/rules says.
    """

    name: str
    fill: float = 0.0
    signed: bool = True


class Stored(NamedTuple):
    """One stream of a page: how its values are kept.

    Attributes:
        name: Of the state it belongs to.
        dtype: Of its values.
        run: Elements that share `width` values, counted from a parameter's first: 1 or 256.
        width: Values of a run.
        fill: The values where no step has been.
    """

    name: str
    dtype: torch.dtype
    run: int = 1
    width: int = 1
    fill: float = 0.0

    def numel(self, elements: int) -> int:
        """Values of so many elements."""
        return -(-elements // self.run) * self.width

    def nbytes(self, elements: int) -> int:
        """Bytes of so many elements."""
        return self.numel(elements) * self.dtype.itemsize

    @property
    def pattern(self) -> int:
        """The bits of `fill`."""
        value = torch.tensor([self.fill], device="cpu").to(self.dtype).view(torch.uint8).tolist()
        return int.from_bytes(bytes(value), "little")


class Kept(Protocol):
    """What an engine must know of how numbers are kept: see `hift_ext.precision.Precision`."""

    @property
    def state_code(self) -> int:
        """csrc/core/span.h's StateType."""

    @property
    def master(self) -> str | None:
        """Whether pages hold masters."""

    @property
    def stochastic(self) -> bool:
        """Whether state is rounded at random."""

    def stored(self, streams: Sequence[StreamSpec]) -> list[Stored]:
        """The streams of a page."""


class Report(NamedTuple):
    """What one step moved and how long it took (bytes, milliseconds)."""

    bytes_in: int = 0
    bytes_out: int = 0
    wait_ms: float = 0.0
    transfer_ms: float = 0.0
    update_ms: float = 0.0
    step_ms: float = 0.0


def build_info() -> dict[str, Any]:
    """Version, compiler, CUDA architectures and instruction sets of the compiled module."""
    info: dict[str, Any] = _ext.build_info()
    return info


def cuda_info() -> dict[str, Any]:
    """CUDA driver and runtime versions, number of devices, and the error where there are none."""
    info: dict[str, Any] = _ext.cuda_info()
    return info


def cuda_device(index: int) -> dict[str, Any]:
    """What the driver tells of a device and torch does not; empty without our CUDA part.

    `pci` (0000:65:00.0), `copy_engines`, `clock_hz`, `memory_hz` (it moves bits twice a period),
    `bus_bits`.

    Raises:
        RuntimeError: There is no such device.
    """
    if not build_info()["cuda_built"]:
        return {}
    facts: dict[str, Any] = _ext.cuda_device(index)
    return facts


def kind(
    rule: str, param: torch.dtype, grad: torch.dtype, ways: tuple[int, int, int] = (0, 0, 0)
) -> int:
    """The code of a rule with a pair of types, as rows carry it.

    Args:
        rule: A name in RULES.
        param: Type of the weights.
        grad: Type of the gradients.
        ways: How weights of each type are kept; see `hift_ext.precision.Precision.ways`.

    Raises:
        TypeError: The pair of types is not offered.
    """
    if param not in DTYPE_CODES or grad not in (param, torch.float32):
        raise TypeError(
            f"a {param} parameter with a {grad} gradient is not offered; offered are float32, "
            "bfloat16 and float16 parameters with gradients of their own type or float32"
        )
    way = ways[DTYPE_CODES[param]]
    if way < 0:
        raise TypeError(
            f"{param} parameters do not go with the master weights and rounding that were chosen "
            "when the state was laid out, for parameters of other types: make a new optimizer"
        )
    return RULES[rule][0] | DTYPE_CODES[param] << 8 | DTYPE_CODES[grad] << 12 | way << 16


def visit_key(seed: int, param: int, visit: int) -> int:
    """The key of the random numbers of a parameter's visit."""
    return int(_ext.visit_key(seed & (1 << 64) - 1, param, visit))


def decode(codes: torch.Tensor, scales: torch.Tensor, signed: bool, to: torch.Tensor) -> None:
    """Writes the floats (CPU, flat) of 8-bit codes and their scales."""
    _ext.decode(codes.data_ptr(), scales.data_ptr(), to.numel(), signed, to.data_ptr())


def encode(values: torch.Tensor, signed: bool, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Writes the codes and scales of floats (CPU, flat, contiguous), rounded to nearest."""
    _ext.encode(values.data_ptr(), values.numel(), signed, codes.data_ptr(), scales.data_ptr())


def plain_rows(
    wanted: list[Wanted],
    rules: Sequence[str],
    device: int,
    ways: tuple[int, int, int] = (0, 0, 0),
) -> Sequence[Row] | None:
    """The rows of those `wanted` that have gradients.

    Args:
        wanted: Parameters of one group; of a DTensor the local part, with the gradient's.
        rules: Name of the rule for each index of hypers.
        device: A CUDA device's index, or -1 for the host.
        ways: How weights of each type are kept; see `hift_ext.precision.Precision.ways`.

    Returns:
        None where a tensor is not dense and row-major, elsewhere, of another size, a subclass or of
        types that are not offered, and where torch has no call that tells.
    """
    if _EXCHANGE is None:
        return None
    numbers = [RULES[rule][0] for rule in rules]
    rows: Sequence[Row] | None = _ext.plain_rows(
        _EXCHANGE, _PLAIN_TYPES, wanted, numbers, ways, device
    )
    return rows


class Scalars(NamedTuple):
    """Addresses of float32 scalars that scale a step; 0 where absent."""

    grad_scale: int = 0
    clip: int = 0
    found_inf: int = 0


def cuda_memory(size: int, device: torch.device) -> torch.Tensor:
    """Bytes from torch's allocator, so that its figures and caps include them."""
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    # Pages come in on a stream of their own, and queued work may use the memory for what it was.
    torch.cuda.current_stream(device).synchronize()
    return memory


def host_slab(size: int) -> Any:
    """A buffer of host memory, zero, of this size and not rounded up to a power of two.

    Nothing is committed before it is touched; forked children do not inherit it. It is freed with
    its last view.

    Raises:
        OSError: There is no room.
    """
    kept = {"states": 1, "state_type": 0, "master": False, "staging": 0}
    words = -(-size // 4)
    page = max(size, 1)
    engine = _ext.Engine([(4, 0, 1)], **kept, store="ram", page_bytes=page, readers=1, writers=1)
    engine.add_groups([[words]])
    return engine.view(0, 0, 0, words)


def scratch_folder() -> str:
    """The folder that `store="disk"` puts its unlinked file in.

    Raises:
        OSError: No folder is on a disk and takes a file.
    """
    kept = {"states": 1, "state_type": 0, "master": False, "staging": 0}
    engine = _ext.Engine([(4, 0, 1)], **kept, store="disk", page_bytes=1, readers=1, writers=1)
    return str(engine.folder)


def cuda_stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)
