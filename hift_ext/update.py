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
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hift_ext import ops
from hift_ext.booking import Step, book
from hift_ext.clipping import clip
from hift_ext.distributed import all_reduce_sum
from hift_ext.paged_state import Entry, Turn
from hift_ext.profiling import staged
from hift_ext.settings import folded
from hift_ext.sharding import first_element, is_sharded, local, place_gradient

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer


def update_group(
    optimizer: HiFTOptimizer, entries: Sequence[Entry], found_inf: torch.Tensor | None
) -> ops.Report | None:
    """Updates those of one group's parameters that have gradients, and books the step.

    Returns:
        What was moved, or None where no parameter has a gradient.

    Raises:
        RuntimeError: A gradient is sparse or elsewhere, or a parameter changed its size or device.
        TypeError: A pair of types that is not offered.
        ValueError: Settings that need state which was not laid out.
    """
    state, schedule = optimizer.state, optimizer._schedule
    state.settle(schedule.active)
    if optimizer._sharded:
        for entry in entries:
            place_gradient(entry.param)
        if optimizer._options["max_grad_norm"] is not None:
            optimizer._reduce_norm = all_reduce_sum(optimizer)
    work = _plain(optimizer, entries) or _checked(optimizer, entries)
    if not work.rows:
        return None
    hypers = [_hypers(optimizer, number, visits) for number, visits in work.settings]
    params = work.params
    scalars, tensors = _scalars(optimizer, work, found_inf)
    engine = state.engine
    assert engine is not None  # laid out, or there would be no rows
    draws: list[ops.Draw] = []
    if optimizer._precision.stochastic:
        seed = schedule.as_dict["seed"]  # which a loaded state brings along
        draws = [
            (ops.visit_key(seed, e.index, e.visits + 1), first_element(e.param))
            for e in work.updated
        ]
    # The kernel writes behind autograd's back: a backward through an older forward must raise.
    # Before the step, which pushes all of this out of the processor's caches.
    torch.autograd.graph.increment_version(params)
    if optimizer._sharded:  # autograd may have saved the part on this rank instead
        torch.autograd.graph.increment_version([local(p) for p in params if is_sharded(p)])
    known = found_inf is None or found_inf.device.type == "cpu"
    step = optimizer._under_way = Step(
        work.updated,
        [entry.visits + 1 for entry in work.updated],
        work.copies,
        schedule.next(),
        None if known else found_inf,
    )
    turn = schedule.active, work.rows, hypers, scalars, schedule.following
    report = staged("update", None, engine.step, *turn, step.done, draws)
    del tensors  # on a GPU their memory is used again in stream order, after the kernel
    book(optimizer)
    return report


@dataclass(slots=True)
class _Work:
    """What a step is to update.

    Attributes:
        rows: For the engine.
        settings: (param_group, visits so far) of each index into the step's hypers.
        updated: The entries that have a row.
        params: Their parameters.
        copies: (parameter, copy in the state's layout), to be copied back.
        held: Gradients in the state's layout, which must live until the step is done.
    """

    rows: Sequence[ops.Row]
    settings: list[tuple[int, int]]
    updated: Sequence[Entry]
    params: list[torch.Tensor]
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)


def _plain(optimizer: HiFTOptimizer, entries: Sequence[Entry]) -> _Work | None:
    """The work where every tensor is as it was laid out, row-major and on one device, else None.

    One call looks at all tensors, in a tenth of the time that asking each from Python takes.
    """
    state = optimizer.state
    if state.engine is None:
        return None
    group = optimizer._schedule.active
    turn = state.turns.get(group)
    if turn is None:
        turn = state.turns[group] = _turn(entries)
    if not turn.contiguous:
        return None
    visits = [entry.visits for entry in entries]
    if visits.count(visits[0]) == len(visits):
        wanted, settings = turn.wanted, [(number, visits[0]) for number in turn.numbers]
    else:
        wanted, settings = _unequal(turn.wanted, entries)
    rules = [optimizer.rule(optimizer.param_groups[number]) for number, _ in settings]
    if optimizer._sharded:
        wanted = [part for row in wanted for part in _parts(*row)]
    rows = ops.plain_rows(wanted, rules, optimizer._device_index, optimizer._precision.ways)
    if rows is None:
        return None
    if len(rows) == len(entries):
        return _Work(rows, settings, entries, turn.params)
    items = {row[0] for row in rows}
    updated = [entry for entry in entries if entry.item in items]
    return _Work(rows, settings, updated, [entry.param for entry in updated])


def _turn(entries: Sequence[Entry]) -> Turn:
    """What `_plain` asks for where all of a group's entries were visited equally often."""
    numbers = list(dict.fromkeys(entry.number for entry in entries))
    index_of = {number: index for index, number in enumerate(numbers)}
    return Turn(
        [entry.param for entry in entries],
        [(entry.param, entry.item, entry.numel, index_of[entry.number]) for entry in entries],
        numbers,
        all(entry.contiguous for entry in entries),
    )


def _unequal(
    wanted: Sequence[ops.Wanted], entries: Sequence[Entry]
) -> tuple[list[ops.Wanted], list[tuple[int, int]]]:
    """The same with hypers for each number of visits, and these (param_group, visits)."""
    index_of: dict[tuple[int, int], int] = {}
    rows: list[ops.Wanted] = [
        (*row[:3], index_of.setdefault((entry.number, entry.visits), len(index_of)))
        for row, entry in zip(wanted, entries, strict=True)
    ]
    return rows, list(index_of)


def _parts(param: torch.Tensor, item: int, numel: int, index: int) -> Iterator[ops.Wanted]:
    """The row of a DTensor's local part, with the gradient's beside it; nothing without one."""
    if param.grad is not None:
        yield local(param), item, numel, index, local(param.grad)


def _checked(optimizer: HiFTOptimizer, entries: Sequence[Entry]) -> _Work:
    """The work, looking at each tensor closely: strides are unified, and what is wrong raises."""
    rows: list[ops.Row] = []
    updated: list[Entry] = []
    work = _Work(rows, [], updated, [])
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
            or (p.shape != entry.shape and not (entry.fits(p) and entry.contiguous))
            or (entry.numel > 0 and (p.data_ptr() == 0 or grad.data_ptr() == 0))
        ):
            _refuse(optimizer, entry, grad)
        entry.follow()
        rule = optimizer.rule(optimizer.param_groups[entry.number])
        code = ops.kind(rule, p.dtype, grad.dtype, optimizer._precision.ways)
        index = index_of.setdefault((entry.number, entry.visits), len(index_of))
        address = p.data_ptr()
        if not entry.fits(p):
            copy = entry.laid_out(p, p.dtype)
            work.copies.append((p, copy))
            address = copy.data_ptr()
        if not entry.fits(grad):
            grad = entry.laid_out(grad, grad.dtype)
            work.held.append(grad)
        rows.append((entry.item, address, grad.data_ptr(), code, index))
        updated.append(entry)
        work.params.append(entry.param)
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
    rule = optimizer.rule(group)
    if rule not in optimizer.state.fitting:
        _check_fits(optimizer, number)
        optimizer.state.fitting.add(rule)
    latched = optimizer._schedule.latched
    assert latched is not None
    # A param_group added in the middle of a pass has no latched rate before the next.
    lr = latched[number] if number < len(latched) else float(group["lr"])
    return (
        -1.0 if group.get("maximize") else 1.0,
        *folded(optimizer, number, group, lr, visits + 1),
    )


def _check_fits(optimizer: HiFTOptimizer, number: int) -> None:
    streams = optimizer.streams(optimizer.param_groups[number])
    if len(streams) > optimizer._stream_count:
        raise ValueError(
            f"param_group {number} now needs the state {', '.join(s.name for s in streams)}, and "
            f"pages were laid out for {optimizer._stream_count} streams: make a new optimizer with "
            "these settings and load this one's state_dict into it"
        )


def _refuse(optimizer: HiFTOptimizer, entry: Entry, grad: torch.Tensor) -> None:
    p, name = local(entry.param), optimizer._say(entry.param)
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients ({name} has a "
            f"{grad.layout} one): make the embedding with sparse=False"
        )
    if (p.get_device(), grad.get_device()) == (optimizer._device_index,) * 2 and (
        p.shape == entry.shape and p.numel() == grad.numel()
    ):
        what = "gradient" if grad.data_ptr() == 0 else "memory"
        raise RuntimeError(
            f"the {what} of {name} is not there (its storage was set to size 0, or it is a "
            "symbolic zero): bring it back before step()"
        )
    if p.shape != entry.shape and p.numel() == entry.numel == grad.numel():
        raise RuntimeError(
            f"{name} had the shape {tuple(entry.shape)} when its state was laid out; now it has "
            f"{tuple(p.shape)} and strides {p.stride()}: make it contiguous, or a new optimizer"
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
    optimizer: HiFTOptimizer, work: _Work, found_inf: torch.Tensor | None
) -> tuple[ops.Scalars, list[torch.Tensor]]:
    """Addresses of the scalars that enter the pass, and the tensors behind them.

    Raises:
        RuntimeError: The gradients' norm is not finite, and that is to be an error.
    """
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is found_inf is optimizer._options["max_grad_norm"] is None:
        return ops.Scalars(), []
    scale, found_inf = (
        None if t is None else t.detach().to(optimizer._device, torch.float32)
        for t in (scale, found_inf)
    )
    counts = [entry.numel for entry in work.updated]
    tensors = scale, clip(optimizer, work.rows, counts, scale, found_inf), found_inf
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    return ops.Scalars(*addresses), [t for t in tensors if t is not None]
