# SPDX-License-Identifier: Apache-2.0
"""`optimizer.state`: torch's mapping from parameters to dicts of tensors, over state that is paged.

In host memory the tensors are views of the pages; from a file they are copies made when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hift_ext.freezing import Freezer
from hift_ext.ops import StateEngine, StreamSpec


def strides_of(p: torch.Tensor) -> tuple[int, ...]:
    """The strides that a parameter's state has, in elements: its own where those have no gaps."""
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
        numel: Elements when the state was laid out.
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
    numel: int = 0
    shape: torch.Size = torch.Size()  # noqa: RUF009 (immutable)
    strides: tuple[int, ...] = ()
    contiguous: bool = True

    def lay_out(self) -> None:
        """Takes over the parameter's shape and strides."""
        p = self.param
        strides = strides_of(p)
        self.numel, self.shape, self.strides = p.numel(), p.shape, strides
        self.contiguous = torch.empty_strided(p.shape, strides, device="meta").is_contiguous()

    def laid_out(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of `tensor` with the state's strides, on the tensor's device."""
        copy = torch.empty_strided(self.shape, self.strides, dtype=dtype, device=tensor.device)
        return copy.copy_(tensor.detach())

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's elements lie in memory in the state's order."""
        if self.contiguous:
            return tensor.is_contiguous()
        return tensor.stride() == self.strides


class Flag:
    """Whether a step found an overflow: a scalar on its way from a GPU to the host.

    Args:
        found_inf: One float32 element, non-zero for an overflow.
    """

    def __init__(self, found_inf: torch.Tensor) -> None:
        self._value = torch.empty((), dtype=torch.float32, pin_memory=True)
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
        self.entries: dict[torch.Tensor, Entry] = {}  # in the order of param_groups
        self.freezer: Freezer | None = None
        self.complete = False  # every parameter has state, visited or not
        self._unsettled: list[tuple[Flag, Sequence[Entry]]] = []

    def doubt(self, entries: Sequence[Entry], flag: Flag) -> None:
        """The entries' last visits count only if `flag` is not raised."""
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
        return made and (self._has_step or bool(entry.streams))

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
        if not self._has_step and not entry.streams:
            return {}  # as torch answers for plain SGD
        if param not in self:
            raise KeyError(param)
        values: dict[str, torch.Tensor] = {}
        if self._has_step:
            values["step"] = torch.tensor(float(entry.visits))
        for number, stream in enumerate(entry.streams):
            if self.engine is None:  # there from the start, and no step yet
                values[stream.name] = torch.full_like(param, stream.fill, dtype=torch.float32)
                continue
            flat = self.engine.tensor(entry.group, entry.item, number, entry.numel)
            values[stream.name] = flat.as_strided(entry.shape, entry.strides)
        return values

    def __repr__(self) -> str:
        return f"PagedState of {len(self)} parameters"

    def write(self, entry: Entry, values: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors of any type, device and strides into a parameter's pages."""
        assert self.engine is not None
        for number, stream in enumerate(entry.streams):
            value = entry.laid_out(values[stream.name].detach().to("cpu"), torch.float32)
            flat = value.as_strided((entry.numel,), (1,))
            self.engine.write(entry.group, entry.item, number, flat)
