# SPDX-License-Identifier: Apache-2.0
"""Which parameter's state is where: entries for every trained parameter, and the engine for them.

Nothing is laid out before the first step or load, when the parameters' device is known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hift_ext import precision
from hift_ext.backend import make_engine
from hift_ext.engines import StateEngine
from hift_ext.freezing import OTHER_OPEN, other_keeper
from hift_ext.layers import Group
from hift_ext.paged_state import Entry
from hift_ext.sharding import is_sharded, local

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

log = logging.getLogger("hift_ext")


def enter(optimizer: HiFTOptimizer, added: Sequence[Sequence[torch.Tensor]]) -> None:
    """Opens the books for more groups of parameters."""
    groups = optimizer.param_groups
    number_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
    for params in added:
        index = len(optimizer._entries)
        optimizer._entries.append(
            [
                Entry(p, index, item, number_of[p], optimizer.streams(groups[number_of[p]]))
                for item, p in enumerate(params)
            ]
        )
    order_entries(optimizer)


def order_entries(optimizer: HiFTOptimizer) -> None:
    """Puts the mapping in the order of param_groups, as torch's state_dict has it."""
    entry_of = {entry.param: entry for group in optimizer._entries for entry in group}
    members = (p for group in optimizer.param_groups for p in group["params"])
    optimizer.state.entries = {p: entry_of[p] for p in members if p in entry_of}
    optimizer._sharded = any(map(is_sharded, entry_of))
    for index, entry in enumerate(optimizer.state.entries.values()):
        entry.index = index


def lay_out(optimizer: HiFTOptimizer) -> StateEngine:
    """Makes the engine with room for every group.

    Raises:
        RuntimeError: The parameters are on several devices, or on one that is not offered.
        OSError: The page file cannot be made.
    """
    parts = [[local(p) for p in group.params] for group in optimizer._groups]
    params = [p for group in parts for p in group]
    devices = {p.device for p in params}
    if len(devices) > 1:
        raise RuntimeError(
            f"the parameters are on several devices ({', '.join(sorted(map(str, devices)))}): HiFT "
            "pages to one; move them to one device, or use one optimizer a device"
        )
    device = params[0].device
    streams = max((optimizer.streams(group) for group in optimizer.param_groups), key=len)
    options = optimizer._options
    kept = precision.chosen(options, {p.dtype for p in params})
    for group in optimizer.param_groups:
        precision.check_rule(kept, optimizer.rule(group), optimizer.streams(group))
    counts = [[p.numel() for p in group] for group in parts]
    engine = make_engine(
        streams,
        device,
        store=options["store"],
        backend=options["backend"],
        page_bytes=options["page_bytes"],
        staging=options["staging"],
        kept=kept,
        groups=counts,
    )
    engine.add_groups(counts)
    for entry in optimizer.state.entries.values():
        entry.lay_out()
    optimizer.state.turns.clear()
    optimizer.state.fitting.clear()
    optimizer.state.engine = engine
    optimizer._precision = optimizer.state.precision = kept
    optimizer._device, optimizer._device_index = device, params[0].get_device()
    optimizer._stream_count = len(streams)
    log.info(
        "%s: %d groups on %s, state in %s (%.1f MB), ring %.1f MB, %s, master %s%s",
        type(optimizer).__name__,
        len(optimizer._groups),
        device,
        engine.description,
        engine.store_bytes / 1e6,
        engine.staging_bytes / 1e6,
        kept.state_dtype,
        kept.master,
        engine.why and f"; {engine.why}",
    )
    return engine


def join(optimizer: HiFTOptimizer, param_group: dict[str, Any]) -> None:
    """Makes the trainable parameters of a new param_group one more group.

    Raises:
        RuntimeError: Another open optimizer drives one of them.
        ValueError: They need state that was not laid out.
    """
    trainable = [p for p in param_group["params"] if p.requires_grad]
    if any(other_keeper(p, optimizer._freezer) for p in trainable):
        raise RuntimeError(OTHER_OPEN)
    if not trainable:
        return
    engine, index = optimizer.state.engine, len(optimizer._groups)
    if engine is not None:
        streams = optimizer.streams(param_group)
        if len(streams) > optimizer._stream_count:
            raise ValueError(
                f"the new param_group needs the state {', '.join(s.name for s in streams)}, and "
                f"pages were laid out for {optimizer._stream_count} streams"
            )
        engine.add_groups([[local(p).numel() for p in trainable]])
    known = optimizer._names()
    names = tuple(known.get(p, "") for p in trainable)
    number = len(optimizer.param_groups) - 1
    optimizer._groups.append(Group(f"added {number}: {names[0]}", tuple(trainable), names))
    enter(optimizer, [trainable])
    if engine is not None:
        for entry in optimizer._entries[index]:
            entry.lay_out()
    optimizer._schedule.add(index)
    optimizer.param_groups[0]["hift"] = optimizer._schedule.as_dict
    if optimizer._frozen_for >= 0:
        optimizer._freezer.claim(trainable)
        if optimizer.active != index:
            optimizer._freezer.freeze(index, trainable)
