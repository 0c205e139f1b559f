# SPDX-License-Identifier: Apache-2.0
"""`optimizer.state`: torch's mapping from parameters to dicts of tensors, over state that is paged.

In host memory the tensors are views of the pages; from a file they are copies made when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch

from hift_ext import precision
from hift_ext.engines import StateEngine
from hift_ext.freezing import Freezer
from hift_ext.ops import StreamSpec, Wanted
from hift_ext.precision import Precision
from hift_ext.sharding import like, local, part_for


def strides_of(p: torch.Tensor) -> tuple[int, ...]:
    """The strides that a tensor's state has, in elements: its own where those have no gaps."""
    # empty_like keeps the strides of dense tensors only.
    strides = torch.empty_like(p, device="meta", requires_grad=False).stride()
    if p.stride() != strides:
        strides = torch.empty(p.shape, device="meta").stride()
    return tuple(strides)


@dataclass(eq=False, slots=True)
class Entry:
    """A trained parameter: whose turn it shares, where its state is, how often it was visited.

    Attributes:
        param: The parameter.
        group: Index of its HiFT group.
        item: Its place in that group.
        number: Index of its param_group.
        streams: Its state, in the rule's order.
        visits: Steps that updated it.
        index: Its place among the trained parameters, in the order of param_groups.
        numel: Elements when the state was laid out: of this rank's part, where it is sharded.
        shape: Shape then.
        strides: Strides of the state, in elements: the parameter's own where those have no gaps.
        contiguous: Whether these are row-major.
    """

    param: torch.Tensor
    group: int
    item: int
    number: int
    streams: list[StreamSpec]
    visits: int = 0
    index: int = 0
    numel: int = 0
    shape: torch.Size = torch.Size()  # noqa: RUF009 (immutable)
    strides: tuple[int, ...] = ()
    contiguous: bool = True

    def lay_out(self) -> None:
        """Takes over the parameter's shape and strides."""
        p = local(self.param)
        self.numel, self.shape, self.strides = p.numel(), p.shape, strides_of(p)
        self.contiguous = torch.empty_strided(p.shape, self.strides, device="meta").is_contiguous()

    def follow(self) -> None:
        """Takes over another shape of as many elements, where both are row-major."""
        p = self.param
        if p.shape != self.shape and self.contiguous and p.numel() == self.numel:
            self.shape, self.strides = p.shape, torch.empty(p.shape, device="meta").stride()

    def laid_out(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of `tensor` with the state's strides, on the tensor's device."""
        copy = torch.empty_strided(self.shape, self.strides, dtype=dtype, device=tensor.device)
        return copy.copy_(tensor.detach())

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's elements lie in memory in the state's order."""
        if tensor.is_neg():
            return False
        if self.contiguous:
            return tensor.is_contiguous()
        return tensor.stride() == self.strides


@dataclass(slots=True)
class Turn:
    """What one group's steps have in common since the state was laid out.

    Attributes:
        params: The group's parameters.
        wanted: A row for each, with the place of its param_group in `numbers`.
        numbers: The param_groups they are in.
        contiguous: Whether the state of all of them is row-major.
    """

    params: list[torch.Tensor]
    wanted: list[Wanted]
    numbers: list[int]
    contiguous: bool


class Flag:
    """Whether a step found an overflow: a scalar on its way from a GPU to the host.

    Args:
        found_inf: One float32 element, non-zero for an overflow.
    """

    def __init__(self, found_inf: torch.Tensor) -> None:
        self._value = torch.empty((), dtype=torch.float32, device="cpu", pin_memory=True)
        self._value.copy_(found_inf.reshape(()), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(found_inf.device))

    def known(self) -> bool:
        """Whether `raised` answers at once."""
        return self._arrived.query()

    def raised(self) -> bool:
        """Waits for the scalar."""
        self._arrived.synchronize()
        return bool(self._value.item() != 0)


class PagedState(Mapping[torch.Tensor, dict[str, torch.Tensor]]):
    """Reads through to the pages.

    Args:
        has_step: Whether torch keeps a `step` for this kind of optimizer.
        from_start: Whether torch makes the state when the optimizer is made, not at the first step.
    """

    def __init__(self, *, has_step: bool, from_start: bool) -> None:
        self._has_step = has_step
        self._from_start = from_start
        self.engine: StateEngine | None = None
        self.precision = Precision()  # known when the state is laid out
        self._with_masters = False
        self.entries: dict[torch.Tensor, Entry] = {}  # in the order of param_groups
        self.freezer: Freezer | None = None
        self.complete = False  # every parameter has state, visited or not
        # Known for the engine that there is: `lay_out` forgets them.
        self.turns: dict[int, Turn] = {}  # by group
        self.fitting: set[str] = set()  # rules whose state was laid out
        self._unsettled: list[tuple[Flag, Sequence[Entry]]] = []

    @contextmanager
    def masters(self) -> Iterator[None]:
        """What is read holds masters too, of which torch knows nothing."""
        self._with_masters = True
        try:
            yield
        finally:
            self._with_masters = False

    def doubt(self, entries: Sequence[Entry], flag: Flag) -> None:
        """The entries' last visits count only if `flag` is not raised."""
        if all(flag is not known for known, _ in self._unsettled):
            self._unsettled.append((flag, entries))

    def settle(self, group: int | None = None) -> None:
        """Takes back visits that were none: of one group and what is known of others, or of all."""
        if not self._unsettled:
            return
        doubts, self._unsettled = self._unsettled, []
        for flag, entries in doubts:
            if group is not None and entries[0].group != group and not flag.known():
                self._unsettled.append((flag, entries))
            elif flag.raised():
                for entry in entries:
                    entry.visits -= 1

    def _exists(self, entry: Entry) -> bool:
        made = self._from_start or self.complete or entry.visits > 0
        masters = self._with_masters and self.precision.master is not None
        return made and (self._has_step or bool(entry.streams) or masters)

    def __contains__(self, param: object) -> bool:
        if not isinstance(param, torch.Tensor):
            return False
        self.settle()
        entry = self.entries.get(param)
        return entry is not None and self._exists(entry)

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.settle()
        return (entry.param for entry in self.entries.values() if self._exists(entry))

    def __len__(self) -> int:
        self.settle()
        return sum(self._exists(entry) for entry in self.entries.values())

    def __bool__(self) -> bool:
        """Whether any parameter has state; and then all have, and require gradients.

        torch's checkpoint tools ask this first. They deal in parameters that require gradients, and
        drop the rest, so that what HiFT has frozen must be thawed, until the next forward. And they
        want the same keys when they save and when they load: parameters that had no visit yet have
        the state they start from.
        """
        if self.freezer is not None:
            self.freezer.lift()
        some = len(self) > 0
        self.complete = self.complete or some
        return some

    def __getitem__(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        entry = self.entries[param]
        if param not in self:
            if not self._has_step and not entry.streams:
                return {}  # as torch answers for plain SGD
            raise KeyError(param)
        values: dict[str, torch.Tensor] = {}
        if self._has_step:
            values["step"] = torch.tensor(float(entry.visits), dtype=torch.float32, device="cpu")
        for number, stream in enumerate(entry.streams):
            if self.engine is None:  # there from the start, and no step yet
                values[stream.name] = torch.full_like(param, stream.fill, dtype=torch.float32)
                continue
            entry.follow()
            flat = self._read(entry, number)
            values[stream.name] = like(param, flat.as_strided(entry.shape, entry.strides))
        if self._with_masters and self.engine is not None and self.precision.master is not None:
            number = self._master
            flat = self.engine.tensor(entry.group, entry.item, number, entry.numel)
            name = self.engine.stored[number].name
            values[name] = like(param, flat.as_strided(entry.shape, entry.strides))
        return values

    @property
    def _master(self) -> int:
        """Number of the engine's stream of masters."""
        assert self.engine is not None
        stored = self.engine.stored
        return next(n for n, s in enumerate(stored) if s.name in ("master", "master_low"))

    def _scale(self, number: int) -> int:
        """Number of the engine's stream of a state's scales."""
        assert self.engine is not None
        return len(self.engine.stored) - self._states + number

    @property
    def _states(self) -> int:
        assert self.engine is not None
        return sum(s.width > 1 for s in self.engine.stored)

    def _read(self, entry: Entry, number: int) -> torch.Tensor:
        """An item's state, flat: as it is stored, or floats made of codes."""
        assert self.engine is not None
        flat = self.engine.tensor(entry.group, entry.item, number, entry.numel)
        if self.precision.state_dtype != "8bit":
            return flat
        scales = self.engine.tensor(entry.group, entry.item, self._scale(number), entry.numel)
        to = self.engine.room(entry.numel, torch.float32)
        return precision.decoded(flat, scales, to, entry.streams[number].signed)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "optimizer.state shows state that lies in pages: entries cannot be set or removed. "
            "Change their tensors in place (optimizer.state[p]['exp_avg'].zero_(); not with "
            "store='disk', which shows copies), or use load_state_dict()"
        )

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = _refuse

    def __repr__(self) -> str:
        return f"PagedState of {len(self)} parameters"

    def write(self, entry: Entry, values: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors of any type, device and strides into a parameter's pages."""
        assert self.engine is not None
        entry.follow()
        for number, stream in enumerate(entry.streams):
            flat = _flat(entry, values[stream.name], self.precision)
            place = entry.group, entry.item
            if self.precision.state_dtype == "8bit":
                flat, scales = precision.encoded(flat, stream.signed)
                self.engine.write(*place, self._scale(number), scales)
            self.engine.write(*place, number, flat)
        if self.precision.master is not None:
            self.engine.write(entry.group, entry.item, self._master, self._masters(entry, values))

    def _masters(self, entry: Entry, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What is stored of the masters that were saved; else of the weights as they are."""
        weights = _flat(entry, entry.param)
        saved = values.get("master")
        if saved is None and "master_low" in values and weights.dtype == torch.bfloat16:
            low = _flat(entry, values["master_low"])
            if self.precision.master == "split":
                return low
            return precision.joined(weights, low)
        whole = weights.float() if saved is None else _flat(entry, saved).float()
        if self.precision.master == "fp32":
            return whole
        if weights.dtype != torch.bfloat16:  # a float32 weight is its own master
            return torch.zeros(entry.numel, dtype=torch.int16, device="cpu")
        return precision.low_of(whole, weights)


def _flat(entry: Entry, tensor: torch.Tensor, kept: Precision | None = None) -> torch.Tensor:
    """This rank's elements of a tensor, in the state's order, on the CPU, as they are kept."""
    dtype = tensor.dtype
    if kept is not None:
        dtype = torch.bfloat16 if kept.state_dtype == torch.bfloat16 else torch.float32
    value = entry.laid_out(part_for(entry.param, tensor).to("cpu"), dtype)
    return value.as_strided((entry.numel,), (1,))
