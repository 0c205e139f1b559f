# SPDX-License-Identifier: Apache-2.0
"""One step's update of one group: from parameters, gradients and settings to the engine's rows.

This is the hot path of the host: it runs once a parameter and step, so it asks little of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hift_ext import ops
from hift_ext.paged_state import Place, laid_out

if TYPE_CHECKING:
    from hift_ext.layers import Group
    from hift_ext.optimizer import HiFTOptimizer


def update_group(
    optimizer: HiFTOptimizer, group: Group, found_inf: torch.Tensor | None
) -> ops.Report:
    """Updates the parameters of `group` that have gradients, and counts their visit.

    Raises:
        RuntimeError: A gradient is sparse or elsewhere, or a parameter changed its size or device.
        TypeError: A pair of types that is not offered.
        ValueError: Settings that need state which was not laid out.
    """
    engine = optimizer._engine()
    places, visits = optimizer.state.places, optimizer.state.visits
    number_of, device = optimizer._param_group_of, optimizer._device
    rows: list[ops.Row] = []
    hypers: list[tuple[float, ...]] = []
    hyper_of: dict[tuple[int, int], int] = {}
    code_of: dict[tuple[int, torch.dtype, torch.dtype], int] = {}
    updated: list[torch.Tensor] = []
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (parameter, copy in the state's layout)
    held: list[torch.Tensor] = []  # what must live until the step is done
    for item, p in enumerate(group.params):
        grad = p.grad
        if grad is None:
            continue
        place = places[p]
        if (
            grad.layout is not torch.strided
            or p.numel() != place.numel
            or grad.numel() != place.numel
            or p.device != device
            or grad.device != device
        ):
            _refuse(optimizer, p, grad, place)
        number = number_of[p]
        visit = visits.get(p, 0) + 1
        hyper = hyper_of.get((number, visit))
        if hyper is None:
            hyper = hyper_of[number, visit] = len(hypers)
            hypers.append(_hypers(optimizer, number, visit))
        dtypes = (number, p.dtype, grad.dtype)
        code = code_of.get(dtypes)
        if code is None:
            rule = optimizer.rule(optimizer.param_groups[number])
            code = code_of[dtypes] = ops.kind(rule, p.dtype, grad.dtype)
        target: torch.Tensor = p
        if place.contiguous:
            fits, grad_fits = p.is_contiguous(), grad.is_contiguous()
        else:
            fits, grad_fits = p.stride() == place.strides, grad.stride() == place.strides
        if not fits:
            target = laid_out(p, place, p.dtype)
            copies.append((p, target))
        if not grad_fits:
            grad = laid_out(grad, place, grad.dtype)
            held.append(grad)
        rows.append((item, target.data_ptr(), grad.data_ptr(), code, hyper))
        updated.append(p)

    scalars, tensors = _scalars(optimizer, updated, found_inf)
    held += tensors
    schedule = optimizer._schedule
    report = engine.step(schedule.active, rows, hypers, scalars, schedule.following)
    for p, target in copies:
        p.copy_(target)
    # The kernel wrote behind autograd's back: a backward through an older forward must raise.
    torch.autograd.graph.increment_version(updated)
    for p in updated:
        visits[p] = visits.get(p, 0) + 1
    return report


def _hypers(optimizer: HiFTOptimizer, number: int, visit: int) -> tuple[float, ...]:
    group: dict[str, Any] = optimizer.param_groups[number]
    streams = optimizer.streams(group)
    if len(streams) > optimizer._stream_count:
        raise ValueError(
            f"param_group {number} now needs the state {', '.join(s.name for s in streams)}, and "
            f"pages were laid out for {optimizer._stream_count} streams: make a new optimizer with "
            "these settings and load this one's state_dict into it"
        )
    latched = optimizer._schedule.latched
    assert latched is not None
    # A param_group added in the middle of a pass has no latched rate before the next.
    lr = latched[number] if number < len(latched) else float(group["lr"])
    return (-1.0 if group["maximize"] else 1.0, *optimizer.hyper(group, lr, visit))


def _refuse(optimizer: HiFTOptimizer, p: torch.Tensor, grad: torch.Tensor, place: Place) -> None:
    name = optimizer._say(p)
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients ({name} has a "
            f"{grad.layout} one): make the embedding with sparse=False"
        )
    if p.numel() != place.numel or grad.numel() != place.numel:
        raise RuntimeError(
            f"{name} had {place.numel} elements when its state was laid out; now it has "
            f"{p.numel()} and its gradient {grad.numel()}: make a new optimizer"
        )
    raise RuntimeError(
        f"{name} is on {p.device} and its gradient on {grad.device}; the state was laid out for "
        f"{optimizer._device}: keep them on one device"
    )


def _scalars(
    optimizer: HiFTOptimizer, updated: list[torch.Tensor], found_inf: torch.Tensor | None
) -> tuple[ops.Scalars, list[torch.Tensor]]:
    """Addresses of the scalars that enter the pass, and the tensors behind them."""
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    clip: torch.Tensor | None = None
    limit = optimizer._options["max_grad_norm"]
    if limit is not None:
        norm = nn.utils.get_total_norm([p.grad for p in updated if p.grad is not None]).float()
        if scale is not None:
            norm = norm / scale.to(norm.device)
        clip = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    tensors = [
        None if t is None else t.detach().to(optimizer._device, torch.float32)
        for t in (scale, clip, found_inf)
    ]
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    return ops.Scalars(*addresses), [t for t in tensors if t is not None]
