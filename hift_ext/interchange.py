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
from hift_ext.paged_state import PagedState
from hift_ext.schedule import checked_schedule
from hift_ext.settings import members
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
    groups = _merged_groups(optimizer, state_dict["param_groups"])
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = [p for group in groups for p in group["params"]]
    param_of = dict(zip(saved_ids, members, strict=True))
    group_of = {p: group for group in groups for p in group["params"]}
    values, visits = _checked_state(optimizer, state_dict["state"], param_of, group_of)
    saved_schedule = checked_schedule(groups[0].get("hift"))

    # Nothing has changed so far; from here on only the page file can fail.
    state = optimizer.state
    state.settle()
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

    if saved_schedule is not None:
        problem = optimizer._schedule.load(saved_schedule, len(optimizer._groups))
        if problem is not None:
            warnings.warn(f"{problem}: a new pass begins in its own order", stacklevel=4)
    groups[0]["hift"] = optimizer._schedule.as_dict
    if state.engine is not None:
        state.engine.prefetch(optimizer.active)
    if optimizer._model is None:
        optimizer.freeze_inactive()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


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
    fits = isinstance(value, torch.Tensor) and value.shape == p.shape and p.numel() == numel
    if fits and value.layout is torch.strided and not (value.is_complex() or value.is_meta):
        return
    where = f"the loaded {name} of {optimizer._say(p)}"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is {say(value)}, not a tensor")
    if tuple(value.shape) != tuple(p.shape):
        raise ValueError(f"{where} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
    if p.numel() != numel:
        raise ValueError(
            f"{where} fits the parameter's {p.numel()} elements, and pages were laid out for "
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


def _merged_groups(optimizer: HiFTOptimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
        known = optimizer.state.entries[p].numel if optimizer.state.engine else p.numel()
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
    optimizer._freezer = Freezer()
    optimizer._hook = None
    optimizer._turnstile, optimizer._under_way = Turnstile(), None
    optimizer._members = members(optimizer)
    optimizer._frozen_for = -1
    for p in frozen:
        p.requires_grad_(True)
    optimizer.state = PagedState(  # type: ignore[assignment]
        has_step=optimizer.has_step, from_start=optimizer.state_from_start
    )
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
