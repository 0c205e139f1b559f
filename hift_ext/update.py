# SPDX-License-Identifier: Apache-2.0
"""One step's update of one group: from parameters, gradients and settings to the engine's rows.

This is the hot path of the host: it runs once a parameter and step, so it asks little of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hift_ext import ops
from hift_ext.paged_state import Entry, Flag
from hift_ext.sharding import is_sharded, local, place_gradient

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer


def update_group(
    optimizer: HiFTOptimizer, entries: Sequence[Entry], found_inf: torch.Tensor | None
) -> ops.Report | None:
    """Updates those of one group's parameters that have gradients, and counts their visit.

    Returns:
        What was moved, or None where no parameter has a gradient.

    Raises:
        RuntimeError: A gradient is sparse or elsewhere, or a parameter changed its size or device.
        TypeError: A pair of types that is not offered.
        ValueError: Settings that need state which was not laid out.
    """
    optimizer.state.settle(optimizer._schedule.active)
    if optimizer._sharded:
        for entry in entries:
            place_gradient(entry.param)
    work = _plain(optimizer, entries) or _checked(optimizer, entries)
    if not work.rows:
        return None
    hypers = [_hypers(optimizer, number, visits) for number, visits in work.settings]
    params = [entry.param for entry in work.updated]
    scalars, tensors = _scalars(optimizer, params, found_inf)
    schedule, engine = optimizer._schedule, optimizer._engine()
    # The kernel writes behind autograd's back: a backward through an older forward must raise.
    # Before the step, which pushes all of this out of the processor's caches.
    torch.autograd.graph.increment_version(params)
    if optimizer._sharded:  # autograd may have saved the part on this rank instead
        torch.autograd.graph.increment_version([local(p) for p in params if is_sharded(p)])
    for entry in work.updated:
        entry.visits += 1
    try:
        report = engine.step(schedule.active, work.rows, hypers, scalars, schedule.following)
    except BaseException:
        for entry in work.updated:
            entry.visits -= 1
        raise
    if found_inf is not None and found_inf.device.type != "cpu":
        optimizer.state.doubt(work.updated, Flag(found_inf))
    del tensors  # on a GPU their memory is used again in stream order, after the kernel
    if work.copies:
        with torch.no_grad():
            for p, copy in work.copies:
                p.copy_(copy)
    return report


@dataclass(slots=True)
class _Work:
    """What a step is to update.

    Attributes:
        rows: For the engine.
        settings: (param_group, visits so far) of each index into the step's hypers.
        updated: The entries that have a row.
        copies: (parameter, copy in the state's layout), to be copied back.
        held: Gradients in the state's layout, which must live until the step is done.
    """

    rows: list[ops.Row]
    settings: list[tuple[int, int]]
    updated: Sequence[Entry]
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)


def _plain(optimizer: HiFTOptimizer, entries: Sequence[Entry]) -> _Work | None:
    """The work where every tensor is as it was laid out, row-major and on one device, else None.

    One call looks at all tensors, in a tenth of the time that asking each from Python takes.
    """
    if optimizer.state.engine is None:
        return None
    wanted: list[ops.Wanted] = []
    index_of: dict[tuple[int, int], int] = {}
    index = number = visits = -1
    for entry in entries:
        if entry.visits != visits or entry.number != number:
            number, visits = entry.number, entry.visits
            index = index_of.setdefault((number, visits), len(index_of))
        if not entry.contiguous:
            return None
        wanted.append((entry.param, entry.item, entry.numel, index))
    rules = [optimizer.rule(optimizer.param_groups[number]) for number, _ in index_of]
    if optimizer._sharded:
        wanted = [part for row in wanted for part in _parts(*row)]
    rows = ops.plain_rows(wanted, rules, optimizer._device_index)
    if rows is None:
        return None
    updated = entries
    if len(rows) < len(entries):
        items = {row[0] for row in rows}
        updated = [entry for entry in entries if entry.item in items]
    return _Work(rows, list(index_of), updated)


def _parts(param: torch.Tensor, item: int, numel: int, index: int) -> Iterator[ops.Wanted]:
    """The row of a DTensor's local part, with the gradient's beside it; nothing without one."""
    if param.grad is not None:
        yield local(param), item, numel, index, local(param.grad)


def _checked(optimizer: HiFTOptimizer, entries: Sequence[Entry]) -> _Work:
    """The work, looking at each tensor closely: strides are unified, and what is wrong raises."""
    updated: list[Entry] = []
    work = _Work([], [], updated)
    index_of: dict[tuple[int, int], int] = {}
    for entry in entries:
        p, grad = entry.param, entry.param.grad
        if grad is None:
            continue
        optimizer._engine()  # the first gradient has it laid out
        p, grad = local(p), local(grad)
        device = optimizer._device_index
        if (
            grad.layout is not torch.strided
            or (p.numel(), p.get_device()) != (entry.numel, device)
            or (grad.numel(), grad.get_device()) != (entry.numel, device)
        ):
            _refuse(optimizer, entry, grad)
        rule = optimizer.rule(optimizer.param_groups[entry.number])
        code = ops.kind(rule, p.dtype, grad.dtype)
        index = index_of.setdefault((entry.number, entry.visits), len(index_of))
        address = p.data_ptr()
        if not entry.fits(p):
            copy = entry.laid_out(p, p.dtype)
            work.copies.append((p, copy))
            address = copy.data_ptr()
        if not entry.fits(grad):
            grad = entry.laid_out(grad, grad.dtype)
            work.held.append(grad)
        work.rows.append((entry.item, address, grad.data_ptr(), code, index))
        updated.append(entry)
    work.settings.extend(index_of)
    return work


def quiet(step: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's wrapper around `step`, entered only where a hook or a profiler listens.

    The wrapper's profiler record costs more than the update of a small group.
    """
    full = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: HiFTOptimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return full(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # or the base class would wrap it once more
    return wrapper


def _hypers(optimizer: HiFTOptimizer, number: int, visits: int) -> tuple[float, ...]:
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
    return (-1.0 if group.get("maximize") else 1.0, *optimizer.hyper(group, lr, visits + 1))


def _refuse(optimizer: HiFTOptimizer, entry: Entry, grad: torch.Tensor) -> None:
    p, name = local(entry.param), optimizer._say(entry.param)
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients ({name} has a "
            f"{grad.layout} one): make the embedding with sparse=False"
        )
    if p.numel() != entry.numel or grad.numel() != entry.numel:
        raise RuntimeError(
            f"{name} had {entry.numel} elements when its state was laid out; now it has "
            f"{p.numel()} and its gradient {grad.numel()}: make a new optimizer"
        )
    raise RuntimeError(
        f"{name} is on {p.device} and its gradient on {grad.device}; the state was laid out for "
        f"{optimizer._device}: keep them on one device"
    )


def _scalars(
    optimizer: HiFTOptimizer, params: list[torch.Tensor], found_inf: torch.Tensor | None
) -> tuple[ops.Scalars, list[torch.Tensor]]:
    """Addresses of the scalars that enter the pass, and the tensors behind them."""
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    clip: torch.Tensor | None = None
    limit = optimizer._options["max_grad_norm"]
    if scale is found_inf is limit is None:
        return ops.Scalars(), []
    if limit is not None:
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        norm = (norm.full_tensor() if is_sharded(norm) else norm).float()  # type: ignore[attr-defined]
        if scale is not None:
            norm = norm / scale.to(norm.device)
        clip = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    tensors = [
        None if t is None else t.detach().to(optimizer._device, torch.float32)
        for t in (scale, clip, found_inf)
    ]
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    return ops.Scalars(*addresses), [t for t in tensors if t is not None]
