# SPDX-License-Identifier: Apache-2.0
# Two processes under DDP: equal to one process, fewer bytes sent, and what cannot work is refused.
# Functions named `on_...` run on both ranks.
"""DistributedDataParallel."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, averaged, message_of, pair, share
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hift_ext
from hift_ext import distributed

STEPS = 9  # a pass and a half


@pytest.fixture
def ranks() -> Ranks:
    """Two processes, made by the first test that asks."""
    return pair()


def wrapped(when: str, rule: str = "AdamW", **ddp: Any) -> tuple[nn.Module, Any, nn.Module]:
    """A model, its DDP and its optimizer, made in the order that `when` names."""
    model, cls = models.tiny(), getattr(hift_ext, rule)
    if when == "optimizer first":
        optimizer = cls(model, lr=1e-2)
    around = DistributedDataParallel(model, find_unused_parameters=True, **ddp)
    if when == "optimizer last":
        optimizer = cls(model, lr=1e-2)
    elif when == "optimizer of the wrapper":
        optimizer = cls(around, lr=1e-2)
    return model, optimizer, around


WAYS = [
    ("optimizer first", True, {}),
    ("optimizer last", True, {"bucket_cap_mb": 0.006}),
    ("optimizer of the wrapper", True, {"gradient_as_bucket_view": True}),
    ("optimizer first", False, {}),
]


def on_train(when: str, hook: bool, ddp: dict[str, Any], rule: str) -> Any:
    model, optimizer, around = wrapped(when, rule, **ddp)
    reduction = distributed.reduce_active(around, optimizer) if hook else None
    sent = []
    for tokens in share(models.batches(STEPS)):
        models.loss_of(around, tokens).backward()
        sent.append(reduction.stats() if reduction else None)
        optimizer.step()
        optimizer.zero_grad()
    return models.weights(model), sent


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
@pytest.mark.parametrize(("when", "hook", "ddp"), WAYS)
def test_two_ranks_are_one_process_that_averages_their_gradients(
    when, hook, ddp, rule, ranks
) -> None:
    alone = models.tiny()
    optimizer = getattr(hift_ext, rule)(alone, lr=1e-2)
    for tokens in models.batches(STEPS):
        averaged(alone, [[tokens[:2]], [tokens[2:]]])
        optimizer.step()
        optimizer.zero_grad()
    for weights, _ in ranks.run(on_train, when, hook, ddp, rule):
        for name, p in alone.named_parameters():
            assert torch.equal(weights[name], p), name  # halves of two floats add up alike


def test_two_ranks_are_one_process_on_the_joined_batch(ranks) -> None:
    """Up to the order of additions, which SGD hands on as it is.

    A gradient is a mean over 20 positions of products that went through at most 12 sums of at most
    50 terms, with partial sums below 1: at most 12 * 50 + 20 roundings of half an epsilon. A weight
    moves by lr times that, twice in these steps.
    """
    alone = models.tiny()
    optimizer = hift_ext.SGD(alone, lr=1e-2)
    models.train(alone, optimizer, models.batches(STEPS))
    eps = torch.finfo(torch.float32).eps
    bound = 2 * 1e-2 * (12 * 50 + 20) * eps / 2
    start = models.weights(models.tiny())
    for weights, _ in ranks.run(on_train, *WAYS[0], "SGD"):
        for name, p in alone.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=bound)
            assert (weights[name] - start[name]).abs().max() > 10 * bound


def test_only_the_active_group_is_sent(ranks) -> None:
    optimizer = hift_ext.AdamW(models.tiny())
    sizes = [4 * group.numel for group in optimizer.groups]
    for when, hook, ddp in WAYS[:3]:
        for _, sent in ranks.run(on_train, when, hook, ddp, "AdamW"):
            assert [each["bytes"] for each in sent] == (sizes + sizes)[:STEPS]
            assert {each["ddp_bytes"] for each in sent} == {sum(sizes)}
            assert sent[-1]["total_bytes"] == sum((sizes + sizes)[:STEPS])
            if "bucket_cap_mb" in ddp:
                assert min(each["buckets_skipped"] for each in sent) > 2
            else:  # one bucket holds all groups
                assert {each["all_reduces"] for each in sent} == {1}


def on_profile(hook: bool) -> list[int]:
    _, optimizer, around = wrapped("optimizer first")
    if hook:
        distributed.reduce_active(around, optimizer)
    tokens = share(models.batches(1))[0]
    models.loss_of(around, tokens).backward()
    optimizer.step()
    with torch.profiler.profile(record_shapes=True) as profile:
        models.loss_of(around, tokens).backward()
    events = [event for event in profile.events() if event.name == "gloo:all_reduce"]
    return sorted(torch.Size(event.input_shapes[0]).numel() for event in events)


def test_the_profiler_sees_as_many_elements(ranks) -> None:
    """The hook's own figures, seen from outside; DDP itself sends its map of used parameters."""
    sizes = [group.numel for group in hift_ext.AdamW(models.tiny()).groups]
    tensors = len(list(models.tiny().parameters()))
    assert ranks.run(on_profile, True)[0] == sorted([sizes[1], tensors])
    assert ranks.run(on_profile, False)[0] == sorted([sum(sizes), tensors])


def on_accumulate(steps: int) -> dict[str, torch.Tensor]:
    model, optimizer, around = wrapped("optimizer first")
    reduction = distributed.reduce_active(around, optimizer)
    mine = share(models.batches(2 * steps))
    for first, second in zip(mine[::2], mine[1::2], strict=True):
        before = reduction.stats()["total_bytes"]
        with around.no_sync():
            (models.loss_of(around, first) / 2).backward()
        assert reduction.stats()["total_bytes"] == before
        (models.loss_of(around, second) / 2).backward()
        active = optimizer.groups[optimizer.active]
        assert reduction.stats()["total_bytes"] == before + 4 * active.numel
        optimizer.step()
        optimizer.zero_grad()
    return models.weights(model)


def test_accumulation_with_no_sync(ranks) -> None:
    alone = models.tiny()
    optimizer = hift_ext.AdamW(alone, lr=1e-2)
    data = models.batches(2 * STEPS)
    for first, second in zip(data[::2], data[1::2], strict=True):
        averaged(alone, [[first[:2], second[:2]], [first[2:], second[2:]]])
        optimizer.step()
        optimizer.zero_grad()
    for weights in ranks.run(on_accumulate, STEPS):
        for name, p in alone.named_parameters():
            assert torch.equal(weights[name], p), name


def on_one_rank_unused(steps: int) -> tuple[list[bool], dict[str, torch.Tensor]]:
    """Rank 1 does not use the norms, which are some of each block's group."""
    model, optimizer, around = wrapped("optimizer first")
    distributed.reduce_active(around, optimizer)
    if dist.get_rank() == 1:
        for block in model.blocks:
            block.norm.forward = lambda x: x
    had = []
    for tokens in share(models.batches(steps)):
        models.loss_of(around, tokens).backward()
        had.append(optimizer.groups[optimizer.active].params[0].grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return had, models.weights(model)


def test_what_one_rank_does_not_use_is_averaged_all_the_same(ranks) -> None:
    (had, one), (_, other) = ranks.run(on_one_rank_unused, STEPS)
    assert all(had)
    assert all(torch.equal(one[name], other[name]) for name in one)


# What cannot work ---------------------------------------------------------------------------------


def on_refusals() -> dict[str, str]:
    told: dict[str, str] = {}
    tokens = models.batches(1)[0]

    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    settings = {
        "no search": {"find_unused_parameters": False},
        "static": {"static_graph": True},
    }
    for name, ddp in settings.items():
        around = DistributedDataParallel(model, **ddp)
        told[name] = message_of(distributed.reduce_active, around, optimizer)
        told[f"{name}, forward"] = message_of(around, tokens)

    stranger = DistributedDataParallel(models.tiny(), find_unused_parameters=True)
    told["stranger"] = message_of(distributed.reduce_active, stranger, optimizer)
    first = DistributedDataParallel(model, find_unused_parameters=True)
    models.train(first, optimizer, [tokens])
    late = DistributedDataParallel(model, find_unused_parameters=True)
    told["late"] = message_of(distributed.reduce_active, late, optimizer)
    told["late, forward"] = message_of(late, tokens)
    optimizer.close()

    around = DistributedDataParallel(model)
    optimizer = hift_ext.AdamW(around)
    told["wrapper"] = message_of(around, tokens)
    optimizer.close()

    optimizer = hift_ext.AdamW(model.named_parameters())  # freezes at once: it has no module
    late = DistributedDataParallel(model, find_unused_parameters=True)
    told["names"] = message_of(distributed.reduce_active, late, optimizer)
    optimizer.close()

    around = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = hift_ext.AdamW(model)
    distributed.reduce_active(around, optimizer)
    told["twice"] = message_of(distributed.reduce_active, around, optimizer)
    with around.join():
        told["join"] = message_of(distributed.reduce_active, around, optimizer)
    return told


def test_settings_that_cannot_work_are_refused_at_start(ranks) -> None:
    for told in ranks.run(on_refusals):
        for part in ("", ", forward"):
            assert "find_unused_parameters=False" in told[f"no search{part}"]
            assert "static_graph=True" in told[f"static{part}"]
            assert "find_unused_parameters=False" in told["wrapper"]
            assert "registered 1 parameters and HiFT trains 29 in turn" in told[f"late{part}"]
        assert "registered 1 parameters" in told["names"]
        assert "does not hold 29 parameters that HiFT trains (embedding.weight" in told["stranger"]
        assert "drop_last=True" in told["join"]
        assert "register_comm_hook" in told["twice"]


def on_one_group() -> dict[str, torch.Tensor]:
    """One group freezes nothing, so any DDP will do."""
    model = models.tiny()
    around = DistributedDataParallel(model, static_graph=True)
    optimizer = hift_ext.AdamW(model, lr=1e-2, layers_per_group="all")
    reduction = distributed.reduce_active(around, optimizer)
    models.train(around, optimizer, share(models.batches(4)))
    stats = reduction.stats()
    assert stats["bytes"] == stats["ddp_bytes"] == 4 * optimizer.groups[0].numel
    return models.weights(model)


def test_one_group_takes_any_ddp(ranks) -> None:
    one, other = ranks.run(on_one_group)
    assert all(torch.equal(one[name], other[name]) for name in one)


def on_held() -> list[bool]:
    _, optimizer, around = wrapped("optimizer last")
    reduction = distributed.reduce_active(around, optimizer)
    whole, sent = dist.all_reduce, []

    def all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        sent.append(tensor)
        return whole(tensor, **options)

    told = []
    distributed.dist.all_reduce = all_reduce
    try:
        for tokens in share(models.batches(3)):
            sent.clear()
            models.loss_of(around, tokens).backward()
            held = reduction._parts
            told.append(len(sent) > 0 and list(map(id, held)) == list(map(id, sent)))
            optimizer.step()
            optimizer.zero_grad()
    finally:
        distributed.dist.all_reduce = whole
    return told


def test_what_was_sent_outlives_the_threads_that_sent_it(ranks) -> None:
    """Else one of gloo's threads deletes a Python object, which aborts a process at its end."""
    assert ranks.run(on_held) == [[True] * 3] * 2


def on_different(hook: bool, **options: list[Any]) -> str:
    model, rank = models.tiny(), dist.get_rank()
    mine = {name: values[rank] for name, values in options.items()}
    optimizer = hift_ext.AdamW(model, **mine)
    around = DistributedDataParallel(model, find_unused_parameters=True)
    if hook:
        return message_of(distributed.reduce_active, around, optimizer)
    return message_of(around, models.batches(1)[0])


@pytest.mark.parametrize("hook", [True, False])
def test_ranks_that_differ_are_named_on_every_rank(hook, ranks) -> None:
    up, down = list(range(6)), list(reversed(range(6)))
    for told in ranks.run(different, hook, {"order": ["bottom2up", "top2down"]}):
        assert f"order is {up} on rank 0, but {down} on rank 1" in told
        assert "groups" not in told
    for told in ranks.run(different, hook, {"seed": [3, 4]}):
        assert "seed is 3 on rank 0, but 4 on rank 1" in told
    for told in ranks.run(different, hook, {"layers_per_group": [1, 2]}):
        assert "groups is 6, " in told
        assert "but 3, " in told


def different(hook: bool, options: dict[str, list[Any]]) -> str:
    return on_different(hook, **options)


def on_other_cursor() -> str:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    if dist.get_rank() == 1:
        models.train(model, optimizer, models.batches(2))
        saved = optimizer.state_dict()
        optimizer.close()
        optimizer = hift_ext.AdamW(model)
        optimizer.load_state_dict(saved)
    around = DistributedDataParallel(model, find_unused_parameters=True)
    return message_of(distributed.reduce_active, around, optimizer)


def test_a_checkpoint_loaded_on_one_rank_only_is_noticed(ranks) -> None:
    for told in ranks.run(on_other_cursor):
        assert "position is 0 on rank 0, but 2 on rank 1" in told


def test_the_odd_ranks_are_named_among_many() -> None:
    plans = {rank: {"seed": 1, "order": [0, 1]} for rank in range(32)}
    assert distributed.difference(plans) == ""
    plans[5] = {"seed": 2, "order": [0, 1]}
    plans[30] = {"seed": 2, "order": [1, 0]}
    told = distributed.difference(plans)
    assert "seed is 1 on ranks 0, 1, 2, 3, 4, 6, 7, 8 and 22 more, but 2 on ranks 5, 30" in told
    assert told.endswith("but [1, 0] on rank 30")


def test_the_same_on_both_of_two_dimensions(ranks) -> None:
    """Where no process group holds all ranks, each still hears of every other."""
    assert ranks.run(on_dimensions) == [[0, 1], [0, 1]]


def on_dimensions() -> list[int]:
    optimizer = hift_ext.AdamW(models.tiny())
    rank = dist.get_rank()
    alone = [dist.new_group([r], timeout=datetime.timedelta(seconds=30)) for r in range(2)]
    seen: list[int] = []

    def remember(plans: dict[int, Any]) -> str:
        seen.extend(plans)
        return ""

    before, distributed.difference = distributed.difference, remember
    try:
        distributed.check_ranks(optimizer, [alone[rank], dist.group.WORLD])
    finally:
        distributed.difference = before
    return seen


def test_the_example() -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(example)],
        cwd=example.parents[1],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 11: layers.3, loss " in done.stdout
    assert "sent 34176 of 136704 bytes" in done.stdout
