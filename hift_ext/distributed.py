# SPDX-License-Identifier: Apache-2.0
"""Several GPUs on torch.distributed: what DDP and FSDP2 must know, and what is checked at start.

Ranks that train different groups would wait for each other for ever, so they are compared once.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hift_ext.sharding import gathers, is_sharded

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

Plan = dict[str, Any]
"""What every rank must agree on, by name."""


# DDP ----------------------------------------------------------------------------------------------


class ActiveReduction:
    """A DDP communication hook that averages the gradients of the active group only.

    All other gradients do not exist; DDP itself would send zeros in their place.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._last = {"bytes": 0, "ddp_bytes": 0, "all_reduces": 0, "buckets_skipped": 0}
        self._total = 0
        # Of the backward under way, on the CPU: what is sent, and the future of its bucket.
        self._sent: list[tuple[list[Any], torch.futures.Future[torch.Tensor], torch.Tensor]] = []
        # Of the last backward. Python lets go of what it sent after gloo's threads have: the last
        # to do so must be able to take Python's lock, which aborts the process when it is ending.
        self._parts: list[torch.Tensor] = []

    def stats(self) -> dict[str, int]:
        """What the last synchronised backward handed to all-reduce, and what DDP would have.

        Returns:
            `bytes` and `ddp_bytes` of gradients on this rank, the number of `all_reduces`, of
            buckets that needed none (`buckets_skipped`), and `total_bytes` since the start.
        """
        return {**self._last, "total_bytes": self._total}

    def reduce(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Averages a bucket's active gradients in place; called by DDP as the bucket fills.

        Returns:
            A future of the whole bucket; on the CPU it is done when the last bucket's is.
        """
        buffer = bucket.buffer()
        if bucket.index() == 0:  # DDP goes through them in order
            self._last = dict.fromkeys(self._last, 0)
            self._sent.clear()  # of a backward that failed
            self._parts.clear()
        self._last["ddp_bytes"] += buffer.numel() * buffer.element_size()
        world = self._group.size()
        works = []
        for begin, end in _active_runs(bucket):
            part = buffer[begin:end].div_(world)
            self._parts.append(part)
            works.append(dist.all_reduce(part, group=self._group, async_op=True))
            sent = part.numel() * part.element_size()
            self._last["bytes"] += sent
            self._last["all_reduces"] += 1
            self._total += sent
        if not works:
            self._last["buckets_skipped"] += 1
        if buffer.is_cuda:
            reduced = torch.futures.collect_all([work.get_future() for work in works])
            return reduced.then(lambda _: buffer)
        # gloo would call such a function on a thread of its own, which may be about to let go of it
        # when the interpreter ends, and then aborts the process. DDP looks at no result before the
        # last bucket is on its way, so it is early enough to wait there, on this thread.
        whole: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._sent.append((works, whole, buffer))
        if bucket.is_last():
            for works, whole_of, buffer_of in self._sent:
                for work in works:
                    work.wait()
                whole_of.set_result(buffer_of)
            self._sent.clear()
        return whole


def _active_runs(bucket: Any) -> list[tuple[int, int]]:
    """Spans of a bucket's buffer (elements) whose parameters have gradients now, joined."""
    start = bucket.buffer().storage_offset()
    runs: list[tuple[int, int]] = []
    for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        if not param.requires_grad or not grad.numel():
            continue
        begin = grad.storage_offset() - start
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], begin + grad.numel())
        else:
            runs.append((begin, begin + grad.numel()))
    return runs


def reduce_active(ddp: DistributedDataParallel, optimizer: HiFTOptimizer) -> ActiveReduction:
    """Has DDP send the active group's gradients only.

    Call it once on every rank, after making both. Buckets may mix groups: of each only the active
    group's part is sent, so `bucket_cap_mb` does not matter for the bytes.

    Args:
        ddp: Made with `find_unused_parameters=True`, around the module that the optimizer trains.
        optimizer: Its order, groups and seed are compared across the ranks.

    Returns:
        The hook; its `stats()` has the bytes sent.

    Raises:
        RuntimeError: DDP's settings do not allow frozen groups, DDP does not know all trained
            parameters, the ranks differ, or DDP has a communication hook already.
    """
    check_replica(optimizer, ddp)
    reduction = ActiveReduction(ddp.process_group)
    ddp.register_comm_hook(reduction, lambda state, bucket: state.reduce(bucket))
    return reduction


def check_replica(optimizer: HiFTOptimizer, ddp: DistributedDataParallel) -> None:
    """Refuses a DDP that cannot train group after group, and ranks that differ.

    Raises:
        RuntimeError: See `reduce_active`.
    """
    groups = optimizer.groups
    if len(groups) > 1 and (ddp.static_graph or not ddp.find_unused_parameters):
        setting = "static_graph=True" if ddp.static_graph else "find_unused_parameters=False"
        raise RuntimeError(
            f"DistributedDataParallel was made with {setting}, and the parameters that have "
            "gradients change from step to step under HiFT: make it with "
            "find_unused_parameters=True and static_graph=False, and call "
            "hift_ext.distributed.reduce_active(ddp, optimizer) to send only the active group"
        )
    if ddp._join_config.enable:
        raise RuntimeError(
            "DistributedDataParallel.join is not offered under HiFT: a rank that has joined takes "
            "no steps, so its active group falls behind. Give every rank as many batches "
            "(drop_last=True)"
        )
    frozen = optimizer._freezer.frozen()
    ignored = ddp.parameters_to_ignore
    could = {
        id(p): name
        for name, p in ddp.module.named_parameters()
        if (p.requires_grad or id(p) in frozen) and name not in ignored
    }
    missing = [
        name or f"of shape {tuple(p.shape)}"
        for group in groups
        for name, p in zip(group.names, group.params, strict=True)
        if id(p) not in could
    ]
    if missing:
        raise RuntimeError(
            f"DistributedDataParallel does not hold {len(missing)} parameters that HiFT trains "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): wrap the module "
            "that the optimizer was made for"
        )
    registered = int(ddp._get_ddp_logging_data().get("num_parameter_tensors", len(could)))
    if registered < len(could):
        raise RuntimeError(
            f"DistributedDataParallel registered {registered} parameters and HiFT trains "
            f"{len(could)} in turn: wrap the model before its first forward under the optimizer, "
            "while all require gradients"
        )
    check_ranks(optimizer, [ddp.process_group])


# Ranks --------------------------------------------------------------------------------------------


def plan(optimizer: HiFTOptimizer) -> Plan:
    """What decides which group a rank trains when, small enough to be sent around."""
    schedule, groups = optimizer._schedule, optimizer.groups
    told = [(group.name, group.names, [tuple(p.shape) for p in group.params]) for group in groups]
    return {
        "class": type(optimizer).__name__,
        "groups": f"{len(groups)}, {hashlib.sha256(repr(told).encode()).hexdigest()[:12]}",
        "order": schedule.order,
        "seed": schedule.as_dict["seed"],
        "pass": schedule.pass_index,
        "position": schedule.position,
    }


def check_ranks(optimizer: HiFTOptimizer, groups: Iterable[dist.ProcessGroup]) -> None:
    """Compares the optimizer with those of the other ranks: one small exchange a process group.

    Args:
        optimizer: This rank's.
        groups: The process groups; one for each dimension of a mesh.

    Raises:
        RuntimeError: They differ; on every rank, and naming what differs where.
    """
    known: dict[int, Plan] = {dist.get_rank(): plan(optimizer)}
    for group in groups:
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, known, group=group)
        known = {rank: each for part in gathered for rank, each in part.items()}
    problem = difference(known)
    if problem:
        raise RuntimeError(
            f"the ranks would not train the same group: {problem}. Make the optimizer with the "
            "same arguments on every rank, and load the same checkpoint"
        )


def difference(plans: dict[int, Plan]) -> str:
    """What differs between ranks in words; the most frequent value first. Nothing if all agree."""
    told = []
    for name in next(iter(plans.values())):
        ranks: defaultdict[str, list[int]] = defaultdict(list)
        for rank in sorted(plans):
            ranks[str(plans[rank][name])].append(rank)
        if len(ranks) > 1:
            parts = sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))
            told.append(f"{name} is " + ", but ".join(f"{v} on {_say(r)}" for v, r in parts))
    return "; ".join(told)


def _say(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    listed = ", ".join(map(str, ranks[:8]))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}{more}"


class Watch:
    """Looks at how a model is distributed, whenever that is new: part of the forward pre-hook."""

    def __init__(self) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._sharded_seen = False

    def __call__(self, optimizer: HiFTOptimizer, module: nn.Module) -> None:
        """Called before `module`'s forward.

        Raises:
            RuntimeError: What `check_replica` and `check_shards` refuse.
        """
        ddp: Any = DistributedDataParallel._active_ddp_module
        if isinstance(module, DistributedDataParallel):
            ddp = module
        if ddp is not None and (self._ddp is None or self._ddp() is not ddp):
            check_replica(optimizer, ddp)
            self._ddp = weakref.ref(ddp)
        if not self._sharded_seen:
            check_shards(optimizer, module)
            self._sharded_seen = True


# Shards -------------------------------------------------------------------------------------------


def check_shards(optimizer: HiFTOptimizer, module: nn.Module) -> None:
    """Refuses an optimizer whose parameters a sharded module no longer has, and ranks that differ.

    Raises:
        RuntimeError: The optimizer was made before `fully_shard`, or for a part of the module that
            is gathered as one with what lies around it; or see `check_ranks`.
    """
    trained = [p for group in optimizer.groups for p in group.params]
    there = list(module.parameters())
    sharded: list[Any] = [p for p in trained if is_sharded(p)]
    if not (sharded or any(map(is_sharded, there)) or gathers(module)):
        return
    ids = set(map(id, there))
    missing = [optimizer._say(p) for p in trained if id(p) not in ids]
    if missing:
        raise RuntimeError(
            f"{len(missing)} parameters of the optimizer are not in the sharded module it was made "
            f"for ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): call "
            "fully_shard first, on the module that the optimizer gets as its model last, and make "
            "the optimizer after that"
        )
    if sharded:
        mesh: Any = max((p.device_mesh for p in sharded), key=lambda mesh: mesh.size())
        check_ranks(optimizer, [mesh.get_group(dim) for dim in range(mesh.ndim)])


def all_reduce_sum(optimizer: HiFTOptimizer) -> Callable[[torch.Tensor], None] | None:
    """What makes a sum over the active group's local parts one over whole parameters.

    Returns:
        A function that adds up a tensor over the ranks in place, to be called by all of them; None
        where every rank holds whole parameters.

    Raises:
        RuntimeError: The group's parameters are not all cut over the same ranks, so one sum cannot
            be added up.
    """
    found: dict[Any, list[torch.Tensor]] = {}
    for p in optimizer.groups[optimizer.active].params:
        cut = None
        if is_sharded(p):
            placed: Any = p
            dims = tuple(i for i, each in enumerate(placed.placements) if not each.is_replicate())
            cut = (placed.device_mesh, dims) if dims else None
        found.setdefault(cut, []).append(p)
    if len(found) > 1:
        one, other = (optimizer._say(params[0]) for params in list(found.values())[:2])
        raise RuntimeError(
            f"max_grad_norm: {one} and {other} are not cut over the same ranks, so their norms "
            "cannot be added up together. Leave max_grad_norm at None and call "
            "torch.nn.utils.clip_grad_norm_ before step()"
        )
    ((cut, _),) = found.items()
    if cut is None:
        return None
    groups = [cut[0].get_group(dim) for dim in cut[1]]

    def reduce(total: torch.Tensor) -> None:
        for group in groups:
            dist.all_reduce(total, group=group)

    return reduce
