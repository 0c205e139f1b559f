# SPDX-License-Identifier: Apache-2.0
"""Parameters that are DTensors (FSDP2, tensor parallelism): this rank's part, and back to a whole.

State, pages and updates are of the local part; what a user sees has the parameter's placements.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import nn


def _dtensor() -> Any:
    """The class; `()`, which nothing is an instance of, where nobody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, _dtensor())


def gathers(module: nn.Module) -> bool:
    """Whether FSDP2 gathers a module's parameters for its forward: then they look plain there."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that is on this rank, sharing its memory; another tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients it would be a view with a history
        part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def first_element(param: torch.Tensor) -> int:
    """Elements of a whole parameter before this rank's part (of one that is cut into rows)."""
    if not is_sharded(param):
        return 0
    placed: Any = param
    return _rows_before(placed.device_mesh, placed.placements, placed.shape) * math.prod(
        placed.shape[1:]
    )


def part_of(param: torch.Tensor, who: str) -> tuple[int, int]:
    """This rank's part of a whole parameter: the first element, and how many from there on.

    Raises:
        RuntimeError: The part is not a run of elements.
    """
    if not is_sharded(param):
        return 0, param.numel()
    from torch.distributed.tensor import Replicate, Shard

    placed: Any = param
    cut = [p for p in placed.placements if type(p) is not Replicate]
    if any(type(p) is not Shard or p.dim != 0 for p in cut) or not local(param).is_contiguous():
        raise RuntimeError(
            f"{who} is placed as {placed.placements}, and hift_ext.save and load deal in rows "
            "(fully_shard's cut along dimension 0): use torch.distributed.checkpoint, with "
            "get_state_dict and set_state_dict"
        )
    return first_element(param), local(param).numel()


@functools.cache
def _rows_before(mesh: Any, placements: Any, shape: torch.Size) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return int(offsets[0]) if offsets else 0


def place_gradient(param: torch.Tensor) -> None:
    """Cuts a DTensor's gradient as the parameter is, if it is to be summed or cut otherwise.

    All ranks of the mesh do that together, so once a step: a second look finds it done.
    """
    given: Any = param
    if is_sharded(param) and is_sharded(given.grad) and given.grad.placements != given.placements:
        with torch.no_grad():
            given.grad = given.grad.redistribute(given.device_mesh, given.placements)


def like(param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part` as the local part of a tensor placed as `param` is; itself where `param` is plain."""
    if not is_sharded(param):
        return part
    cls, given = _dtensor(), param
    settings = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    place = (given.device_mesh, given.placements)  # type: ignore[attr-defined]
    if part.device.type == place[0].device_type:
        return cls.from_local(part, *place, **settings)
    # State rests in host memory beside parameters on a GPU, and from_local would move it there.
    meta = cls.from_local(part.to("meta"), *place, **settings)
    return cls(part, meta._spec, requires_grad=False)


def part_for(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What of `value` (a whole tensor or a DTensor) belongs to this rank's part of `param`.

    Where placements differ, all ranks of the value's mesh take part.
    """
    value = value.detach()
    given: Any = value
    if not is_sharded(param):
        return _whole(given) if is_sharded(value) else value
    target: Any = param
    if is_sharded(value):
        if given.device_mesh == target.device_mesh and given.placements == target.placements:
            return local(value)
        value = _whole(given)
    from torch.distributed.tensor import Replicate

    mesh = target.device_mesh
    with torch.no_grad():  # every rank has it all, so each cuts out its own: nothing is sent
        whole = _dtensor().from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return local(whole.redistribute(mesh, target.placements))


def _whole(value: Any) -> torch.Tensor:
    with torch.no_grad():
        whole: torch.Tensor = value.to(value.device_mesh.device_type).full_tensor()
    return whole
