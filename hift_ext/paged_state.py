# SPDX-License-Identifier: Apache-2.0
"""`optimizer.state`: torch's mapping from parameters to dicts of tensors, over state that is paged.

In host memory the tensors are views of the pages; from a file they are copies made when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from hift_ext.ops import StateEngine, StreamSpec


class Place(NamedTuple):
    """Where a parameter's state is, and the strides its elements are laid out in."""

    group: int
    item: int
    numel: int
    shape: torch.Size
    strides: tuple[int, ...]
    contiguous: bool


def place_of(param: torch.Tensor, group: int, item: int) -> Place:
    """Lays state out as `param` is, if that has no gaps and no overlaps; else contiguously."""
    # empty_like keeps the strides of dense tensors only.
    strides = torch.empty_like(param, device="meta", requires_grad=False).stride()
    if param.stride() != strides:
        strides = torch.empty(param.shape, device="meta").stride()
    contiguous = torch.empty_strided(param.shape, strides, device="meta").is_contiguous()
    return Place(group, item, param.numel(), param.shape, tuple(strides), contiguous)


def laid_out(tensor: torch.Tensor, place: Place, dtype: torch.dtype) -> torch.Tensor:
    """A copy of `tensor` with the place's strides, on the tensor's device."""
    copy = torch.empty_strided(place.shape, place.strides, dtype=dtype, device=tensor.device)
    return copy.copy_(tensor.detach())


class PagedState(Mapping[torch.Tensor, dict[str, torch.Tensor]]):
    """Reads through to the pages. Holds what is not in pages: the visits of each parameter.

    Args:
        has_step: Whether torch keeps a `step` for this kind of optimizer.
        from_start: Whether torch makes the state when the optimizer is made, not at the first step.
    """

    def __init__(self, *, has_step: bool, from_start: bool) -> None:
        self._has_step = has_step
        self._from_start = from_start
        self.engine: StateEngine | None = None
        self.places: dict[torch.Tensor, Place] = {}
        self.visits: dict[torch.Tensor, int] = {}
        self.streams: dict[torch.Tensor, list[StreamSpec]] = {}  # in the order of param_groups

    def __contains__(self, param: object) -> bool:
        if not isinstance(param, torch.Tensor) or param not in self.streams:
            return False
        exists = self._from_start or param in self.visits
        return exists and (self._has_step or bool(self.streams[param]))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (param for param in self.streams if param in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        if param not in self:
            raise KeyError(param)
        values: dict[str, torch.Tensor] = {}
        if self._has_step:
            values["step"] = torch.tensor(float(self.visits.get(param, 0)))
        for number, stream in enumerate(self.streams[param]):
            if self.engine is None:  # from the start, and no step yet
                values[stream.name] = torch.full_like(param, stream.fill, dtype=torch.float32)
                continue
            place = self.places[param]
            flat = self.engine.tensor(place.group, place.item, number, place.numel)
            values[stream.name] = flat.as_strided(place.shape, place.strides)
        return values

    def __repr__(self) -> str:
        return f"PagedState of {len(self)} parameters"

    def write(self, param: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors of any type, device and strides into the parameter's pages."""
        assert self.engine is not None
        place = self.places[param]
        for number, stream in enumerate(self.streams[param]):
            value = values[stream.name].detach().to("cpu")
            flat = laid_out(value, place, torch.float32).as_strided((place.numel,), (1,))
            self.engine.write(place.group, place.item, number, flat)
