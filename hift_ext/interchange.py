# SPDX-License-Identifier: Apache-2.0
"""State in and out of an optimizer: torch's state_dict in both directions, copies and pickles.

A tensor at a time, so that loading never holds all state twice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from hift_ext.booking import Turnstile
from hift_ext.freezing import FreezeHook, Freezer
from hift_ext.layout import order_entries
from hift_ext.notices import stacklevel
from hift_ext.paged_state import PagedState
from hift_ext.schedule import checked_schedule
from hift_ext.settings import members
from hift_ext.sharding import local
from hift_ext.totals import Totals
from hift_ext.tree import say

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer


MASTERS = ("master", "master_low")
"""What a state_dict holds beside torch's keys: see `HiFTOptions.master`."""


def load(optimizer: HiFTOptimizer, state_dict: dict[str, Any]) -> None:
    """Implements `HiFTOptimizer.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state_dict is a dict, not a {type(state_dict).__name__}")
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed

    _check_shape(state_dict)
    groups = merged_groups(optimizer, state_dict["param_groups"])
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = [p for group in groups for p in group["params"]]
    param_of = dict(zip(saved_ids, members, strict=True))
    group_of = {p: group for group in groups for p in group["params"]}
    values, visits = _checked_state(optimizer, state_dict["state"], param_of, group_of)
    schedule = checked_schedule(groups[0].get("hift"))
    for p in _unvisited(schedule, members):
        visits.pop(p, None)

    # Nothing has changed so far; from here on only the page file can fail.
    state = optimizer.state
    adopt_settings(optimizer, groups)
    if values or visits:
        optimizer._engine()
    for p, entry in state.entries.items():
        if p in values:
            state.write(entry, values[p])
        elif entry.visits and entry.streams:
            state.write(
                entry,
                {
                    s.name: torch.full(
                        (entry.numel,), s.fill, dtype=torch.float32, device="cpu"
                    ).view(entry.shape)
                    for s in entry.streams
                },
            )
        entry.visits = visits.get(p, 0)

    adopt_schedule(optimizer, schedule)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _unvisited(
    schedule: Mapping[str, Any] | None, members: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Parameters whose state was made and had no visit, where nothing else tells."""
    indices = [] if schedule is None else schedule["unvisited"]
    wrong = [index for index in indices if not 0 <= index < len(members)]
    if wrong:
        raise ValueError(
            f"the loaded param_groups[0]['hift'] names parameter {wrong[0]} of {len(members)}"
        )
    return [members[index] for index in indices]


def with_schedule(optimizer: HiFTOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with a schedule of its own, which loading into it may overwrite."""
    if optimizer._model is None:
        optimizer.freeze_inactive()  # torch's tools had it lifted: see PagedState.__bool__
    group = state_dict["param_groups"][0] if state_dict.get("param_groups") else {}
    if "hift" in group:
        group["hift"] = optimizer._schedule.exported(len(optimizer.param_groups))
        if not optimizer.has_step:  # nothing else tells whose first visit is to come
            members = (p for group in optimizer.param_groups for p in group["params"])
            entries, state = optimizer.state.entries, optimizer.state
            group["hift"]["unvisited"] = " ".join(
                str(i) for i, p in enumerate(members) if p in state and not entries[p].visits
            )
    return state_dict


def asks_for_state(optimizer: HiFTOptimizer) -> bool:
    """Whether this `step()` is not one, but wants state to be made; then it is made.

    `torch.distributed.checkpoint.state_dict` calls it so where there is no state: with every rate 0
    and a gradient of zeros for every parameter. A step of a warm-up at rate 0 has gradients for the
    active group only, and some that are not zero.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if isinstance(rate, torch.Tensor) and (rate.device.type != "cpu" or rate.numel() != 1):
            return False
        if rate != 0:
            return False
    if type(optimizer.state) is not PagedState or len(optimizer.state):
        return False
    for p in optimizer.state.entries:
        grad = None if p.grad is None else local(p.grad)
        if grad is None or grad.layout is not torch.strided or grad.count_nonzero():
            return False
    optimizer._engine()
    optimizer.state.complete = True
    return True


def adopt_settings(optimizer: HiFTOptimizer, groups: list[dict[str, Any]]) -> None:
    """Takes over param_groups whose state is about to replace all there is."""
    state = optimizer.state
    state.settle()
    group_of = {p: group for group in groups for p in group["params"]}
    for p, entry in state.entries.items():
        entry.streams = optimizer.streams(group_of[p])
    optimizer.param_groups[:] = groups
    streams = max(len(entry.streams) for entry in state.entries.values())
    if state.engine is not None and streams > optimizer._stream_count:
        # Laid out for fewer streams, and all state is replaced anyway. Nothing else may hold the
        # engine: a named file is free for the next one only when it is gone.
        state.engine = None
        for entry in state.entries.values():
            entry.visits = 0


def adopt_schedule(optimizer: HiFTOptimizer, saved: Mapping[str, Any] | None) -> None:
    """Goes on where a schedule stands that `checked_schedule` gave, if there is one."""
    if saved is not None:
        problem = optimizer._schedule.load(saved, len(optimizer._groups))
        if problem is not None:
            text = f"{problem}: a new pass begins in its own order"
            warnings.warn(text, stacklevel=stacklevel())
    optimizer.param_groups[0]["hift"] = optimizer._schedule.as_dict
    engine = optimizer.state.engine
    if engine is not None:
        engine.prefetch(optimizer.active)
    if optimizer._model is None:
        optimizer.freeze_inactive()


def _check_shape(state_dict: Mapping[str, Any]) -> None:
    """Refuses what is no optimizer's state_dict."""
    for name, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(name), kind):
            raise TypeError(
                f"an optimizer's state_dict has 'state' (a dict) and 'param_groups' (a list); here "
                f"{name!r} is {say(state_dict.get(name))}, among {', '.join(map(str, state_dict))}"
            )
    for number, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"param_groups[{number}] of the loaded state_dict has no 'params'")
    for key, entry in state_dict["state"].items():
        if not isinstance(entry, Mapping):
            raise TypeError(f"state[{key!r}] of the loaded state_dict is {say(entry)}, not a dict")


def _check_tensor(
    optimizer: HiFTOptimizer, name: str, value: Any, p: torch.Tensor, numel: int
) -> None:
    """Refuses what cannot be copied into a parameter's pages."""
    there = local(p).numel()
    fits = isinstance(value, torch.Tensor) and value.shape == p.shape and there == numel
    if fits and value.layout is torch.strided and not (value.is_complex() or value.is_meta):
        return
    where = f"the loaded {name} of {optimizer._say(p)}"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is {say(value)}, not a tensor")
    if tuple(value.shape) != tuple(p.shape):
        raise ValueError(f"{where} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
    if there != numel:
        raise ValueError(
            f"{where} fits the parameter's {there} elements, and pages were laid out for "
            f"{numel}: make a new optimizer"
        )
    raise TypeError(
        f"{where} is a {value.layout} tensor of {value.dtype} on {value.device}: state is dense, "
        "real and not on 'meta'"
    )


def _count(optimizer: HiFTOptimizer, p: torch.Tensor, value: Any) -> int:
    """A `step` as a number of visits."""
    try:
        count = float(value)
        if count >= 0 and count.is_integer():
            return int(count)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(
        f"the loaded step of {optimizer._say(p)} is {value!r}: a step is a whole number, 0 or more"
    )


def merged_groups(optimizer: HiFTOptimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved param_groups with this optimizer's parameters in them."""
    ours = optimizer.param_groups
    if len(ours) != len(saved):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved)}, and the optimizer has {len(ours)}"
        )
    for number, (group, other) in enumerate(zip(ours, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {number} has {len(other['params'])} parameters, and the "
                f"optimizer's {len(group['params'])}"
            )
    merged = []
    for group, other in zip(ours, saved, strict=True):
        settings = copy.deepcopy({k: v for k, v in other.items() if k != "params"})
        ours_only = {k: v for k, v in group.items() if k != "hift"}
        merged.append({**ours_only, **settings, "params": group["params"]})
    return merged


def _checked_state(
    optimizer: HiFTOptimizer,
    saved: dict[Any, dict[str, Any]],
    param_of: dict[Any, torch.Tensor],
    group_of: dict[torch.Tensor, dict[str, Any]],
) -> tuple[dict[torch.Tensor, dict[str, torch.Tensor]], dict[torch.Tensor, int]]:
    """The tensors to write and the visits to set, per parameter."""
    values: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    visits: dict[torch.Tensor, int] = {}
    left_out = 0
    for key, entry in saved.items():
        p = param_of.get(key)
        if p is None or p not in optimizer.state.entries:
            left_out += 1
            continue
        wanted = [stream.name for stream in optimizer.streams(group_of[p])]
        masters = [name for name in MASTERS if name in entry]
        found = {n: entry[n] for n in (*wanted, *masters) if entry.get(n) is not None}
        absent = [name for name in wanted if name not in found]
        if wanted and len(absent) == len(wanted) and not optimizer.has_step:
            continue  # torch.optim.SGD saves None before a parameter's first step
        if absent:
            raise ValueError(
                f"the loaded state of {optimizer._say(p)} lacks {', '.join(absent)}; it has "
                f"{', '.join(map(str, entry)) or 'nothing'}: was it saved by another optimizer?"
            )
        laid_out = optimizer.state.engine is not None
        known = optimizer.state.entries[p].numel if laid_out else local(p).numel()
        for name, value in found.items():
            _check_tensor(optimizer, name, value, p, known)
        count = 1
        if optimizer.has_step:
            count = _count(optimizer, p, entry.get("step"))
        values[p] = found
        if count > 0:
            visits[p] = count
    if left_out:
        warnings.warn(
            f"the loaded state of {left_out} parameters is left out: they are not trained here",
            stacklevel=5,
        )
    return values, visits


def get_state(optimizer: HiFTOptimizer) -> dict[str, Any]:
    """What a copy or pickle of the optimizer holds: the state itself, and no engine."""
    optimizer._check_open()
    # A scheduler puts a `step` of its own on the optimizer; in a copy it would step the original.
    hidden = {"state", "step", "_freezer", "_hook", "_turnstile", "_under_way", "_members"}
    hidden |= {"_monitor", "_totals"}
    kept = {k: v for k, v in optimizer.__dict__.items() if k not in hidden}
    with optimizer.state.masters():
        kept["saved_values"] = [
            (p, {k: v.clone() for k, v in entry.items() if k != "step"})
            for p, entry in optimizer.state.items()
        ]
    frozen = optimizer._freezer.frozen()
    members = (p for group in optimizer._groups for p in group.params)
    kept["saved_frozen"] = [p for p in members if id(p) in frozen]
    return kept


def set_state(optimizer: HiFTOptimizer, kept: dict[str, Any]) -> None:
    """Makes a whole optimizer of what `get_state` gave."""
    kept = dict(kept)
    values, frozen = kept.pop("saved_values"), kept.pop("saved_frozen")
    torch.optim.Optimizer.__setstate__(optimizer, kept)
    optimizer._hook = None
    optimizer._turnstile, optimizer._under_way = Turnstile(), None
    optimizer._totals = Totals()
    optimizer._members = members(optimizer)
    optimizer._frozen_for = -1
    for p in frozen:
        p.requires_grad_(True)
    optimizer.state = PagedState(  # type: ignore[assignment]
        has_step=optimizer.has_step, from_start=optimizer.state_from_start
    )
    optimizer._freezer = optimizer.state.freezer = Freezer()
    order_entries(optimizer)
    optimizer._attach()
    if values:
        optimizer._engine()
        for p, tensors in values:
            optimizer.state.write(optimizer.state.entries[p], tensors)


def drop_dead_hooks(model: torch.nn.Module) -> None:
    """Removes hooks that came with a copy of a model and have no optimizer."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, FreezeHook) and hook.is_dead():
            del model._forward_pre_hooks[key]
