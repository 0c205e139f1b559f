# SPDX-License-Identifier: Apache-2.0
"""The typed face of the compiled module: rule numbers, type codes, engines.

Everything that reaches C++ as an address or a count is made from tensors here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hift_ext._version import __version__
from hift_ext.scratch import Scratch

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

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES: dict[str, tuple[int, int, int]] = _ext.rules()
"""Rule name -> its number, its state streams, its hyper-parameters."""

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

Wanted = tuple[torch.Tensor, int, int, int]
"""Parameter, item, elements, index into the hypers of the step."""

_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # older torch has none
_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


class StreamSpec(NamedTuple):
    """One stream of state: its name in `state[p]` and the value it starts from.

    `dtype` is that of its stored values, each of which serves `run` elements.
    """

    name: str
    fill: float = 0.0
    dtype: torch.dtype = torch.float32
    run: int = 1


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


def kind(rule: str, param: torch.dtype, grad: torch.dtype) -> int:
    """The code of a rule with a pair of types, as rows carry it.

    Raises:
        TypeError: The pair of types is not offered.
    """
    if param not in DTYPE_CODES or grad not in (param, torch.float32):
        raise TypeError(
            f"a {param} parameter with a {grad} gradient is not offered; offered are float32, "
            "bfloat16 and float16 parameters with gradients of their own type or float32"
        )
    return RULES[rule][0] | DTYPE_CODES[param] << 8 | DTYPE_CODES[grad] << 12


def plain_rows(wanted: list[Wanted], rules: Sequence[str], device: int) -> list[Row] | None:
    """The rows of those `wanted` that have gradients.

    Args:
        wanted: Parameters of one group.
        rules: Name of the rule for each index of hypers.
        device: A CUDA device's index, or -1 for the host.

    Returns:
        None where a tensor is not dense and row-major, elsewhere, of another size, a subclass or of
        types that are not offered, and where torch has no call that tells.
    """
    if _EXCHANGE is None:
        return None
    numbers = [RULES[rule][0] for rule in rules]
    rows: list[Row] | None = _ext.plain_rows(_EXCHANGE, _PLAIN_TYPES, wanted, numbers, device)
    return rows


class Scalars(NamedTuple):
    """Addresses of float32 scalars that scale a step; 0 where absent."""

    grad_scale: int = 0
    clip: int = 0
    found_inf: int = 0


class StateEngine(Protocol):
    """What keeps the state of all groups and updates one of them."""

    @property
    def store_bytes(self) -> int:
        """Bytes reserved where state rests."""

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring in compute memory."""

    @property
    def touched_bytes(self) -> int:
        """Bytes of state that holds something."""

    @property
    def description(self) -> str:
        """Where state rests, in words."""

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; `counts[g][i]` elements for item i of group g."""

    def step(
        self, group: int, rows: list[Row], hypers: Hypers, scalars: Scalars, following: int
    ) -> Report:
        """Updates `group`; then `following` starts to move in (-1: nothing)."""

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """An item's stream, flat, float32: a view where state rests in memory, else a copy."""

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Writes a flat, contiguous float32 CPU tensor to an item's stream."""

    def parts(self, group: int, item: int, count: int) -> list[int]:
        """Elements of an item that lie in each page; best read and loaded page by page."""

    def read(self, group: int, item: int, stream: int, begin: int, out: torch.Tensor) -> None:
        """Copies stored values of a stream, from the `begin`-th on, to a contiguous CPU tensor."""

    def load(self, group: int, item: int, stream: int, begin: int, value: torch.Tensor) -> None:
        """Replaces stored values of a stream, from the `begin`-th on."""

    def prefetch(self, group: int) -> None:
        """Starts bringing `group` in."""

    def flush(self) -> None:
        """Waits until all state has reached the store."""


def cuda_memory(size: int, device: torch.device) -> torch.Tensor:
    """Bytes from torch's allocator, so that its figures and caps include them."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def cuda_stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


class PagedEngine:
    """State in pages, in host memory or in a file.

    Args:
        streams: The state of an element.
        store: `"ram"`, `"disk"` or `"disk:PATH"`.
        page_bytes: Upper bound of a page's record.
        staging: Bytes of the ring, or WHOLE_GROUP. With 0 a GPU updates pages in host memory over
            the bus; the CPU always updates them where they are.
        device: Of the parameters.
    """

    def __init__(
        self,
        streams: Sequence[StreamSpec],
        store: str,
        page_bytes: int,
        staging: int,
        device: torch.device,
    ) -> None:
        self._cuda = device if device.type == "cuda" else None
        ring: list[torch.Tensor] = []  # owned by the callback, and so by the engine

        def allocate(size: int) -> int:
            ring[:] = []
            ring.append(cuda_memory(size, device))
            return ring[0].data_ptr()

        self._engine = _ext.Engine(
            [(4, stream.fill) for stream in streams],
            store,
            page_bytes,
            staging,
            readers=2,
            writers=2,
            device=-1 if self._cuda is None else self._cuda.index,
            allocate=None if self._cuda is None else allocate,
        )
        folder = self._engine.folder
        self._scratch = Scratch(folder) if folder else None

    @property
    def store_bytes(self) -> int:
        """Bytes reserved where pages rest."""
        return int(self._engine.store_bytes)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring in compute memory (0: pages are updated in place)."""
        return int(self._engine.staging_bytes)

    @property
    def touched_bytes(self) -> int:
        """Bytes of pages that hold something."""
        return int(self._engine.touched_bytes)

    @property
    def description(self) -> str:
        """Where the pages rest, with what could not be had."""
        return str(self._engine.description)

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; all or nothing."""
        self._engine.add_groups(counts)

    def step(
        self, group: int, rows: list[Row], hypers: Hypers, scalars: Scalars, following: int
    ) -> Report:
        """Updates `group` on torch's number of threads, or behind its current stream's work."""
        threads = torch.get_num_threads()
        stream = 0 if self._cuda is None else cuda_stream(self._cuda)
        return Report(*self._engine.step(group, rows, hypers, *scalars, threads, following, stream))

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """A view with a storage of its own for host memory, else a copy that can be paged out."""
        if count == 0:
            return torch.empty(0)
        if self._scratch is None:
            return torch.frombuffer(
                self._engine.view(group, item, stream, count), dtype=torch.float32
            )
        copy = self._scratch.take(count)
        self._engine.read(group, item, stream, 0, count, copy.data_ptr())
        return copy

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Writes through the pages the item lies in."""
        self._engine.write(group, item, stream, 0, value.numel(), value.data_ptr())

    def parts(self, group: int, item: int, count: int) -> list[int]:
        """In host memory pages lie behind each other: one part."""
        return [count] if self._scratch is None else self._engine.parts(group, item)

    def read(self, group: int, item: int, stream: int, begin: int, out: torch.Tensor) -> None:
        """Reads from the pages, wherever they are."""
        self._engine.read(group, item, stream, begin, out.numel(), out.data_ptr())

    def load(self, group: int, item: int, stream: int, begin: int, value: torch.Tensor) -> None:
        """Writes through the pages."""
        self._engine.write(group, item, stream, begin, value.numel(), value.data_ptr())

    def prefetch(self, group: int) -> None:
        """Starts bringing `group` in."""
        self._engine.prefetch(group)

    def flush(self) -> None:
        """Waits for the write-backs."""
        self._engine.flush()


class ResidentEngine:
    """State in tensors on the parameters' own device; nothing moves."""

    def __init__(self, streams: Sequence[StreamSpec], device: torch.device) -> None:
        self._streams = list(streams)
        self._device = device
        self._items: list[list[list[torch.Tensor] | None]] = []
        self._counts: list[list[int]] = []

    @property
    def description(self) -> str:
        """Where state rests, in words."""
        return f"device memory of {self._device}"

    @property
    def staging_bytes(self) -> int:
        """Nothing moves: 0."""
        return 0

    @property
    def store_bytes(self) -> int:
        """Bytes of all state, made or not."""
        return 4 * len(self._streams) * sum(map(sum, self._counts))

    @property
    def touched_bytes(self) -> int:
        """Bytes of state that has been made."""
        made = (state for group in self._items for state in group if state is not None)
        return 4 * sum(tensor.numel() for state in made for tensor in state)

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; their state is made at the first visit."""
        self._counts += [list(group) for group in counts]
        self._items += [[None] * len(group) for group in counts]

    def _state(self, group: int, item: int) -> list[torch.Tensor]:
        state = self._items[group][item]
        if state is None:
            count = self._counts[group][item]
            state = [
                torch.full((count,), stream.fill, dtype=torch.float32, device=self._device)
                for stream in self._streams
            ]
            self._items[group][item] = state
        return state

    def step(
        self, group: int, rows: list[Row], hypers: Hypers, scalars: Scalars, following: int
    ) -> Report:
        """Updates `group` by one call over all its parameters."""
        states_of = {number: states for number, states, _ in RULES.values()}
        start = time.perf_counter()
        spans = []
        for item, param, grad, code, hyper in rows:
            states = self._state(group, item)[: states_of[code & 0xFF]]
            addresses = [state.data_ptr() for state in states]
            count = self._counts[group][item]
            spans.append((param, grad, count, code, addresses, hypers[hyper]))
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
            _ext.cuda_step_spans(spans, *scalars, self._device.index, stream)
        else:
            _ext.step_spans(spans, *scalars, torch.get_num_threads())
        elapsed = 1e3 * (time.perf_counter() - start)
        return Report(update_ms=elapsed, step_ms=elapsed)

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """The stream itself."""
        return self._state(group, item)[stream]

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Copies `value` to the stream."""
        self._state(group, item)[stream].copy_(value)

    def parts(self, group: int, item: int, count: int) -> list[int]:
        """There are no pages: one part."""
        return [count]

    def read(self, group: int, item: int, stream: int, begin: int, out: torch.Tensor) -> None:
        """Copies a slice; state that was never made is its fill value."""
        state = self._items[group][item]
        if state is None:
            out.fill_(self._streams[stream].fill)
        else:
            out.copy_(state[stream][begin : begin + out.numel()])

    def load(self, group: int, item: int, stream: int, begin: int, value: torch.Tensor) -> None:
        """Copies into a slice."""
        self._state(group, item)[stream][begin : begin + value.numel()].copy_(value)

    def prefetch(self, group: int) -> None:
        """Nothing moves."""

    def flush(self) -> None:
        """Nothing is under way."""
