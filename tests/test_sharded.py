# SPDX-License-Identifier: Apache-2.0
# Two processes under FSDP2: equal to one process, each with its part of the state only; saved on
# two and resumed on one, and the reverse. Functions named `on_...` run on both ranks.
"""fully_shard and DTensors."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, averaged, message_of, pair, share
from torch import nn

import hift_ext
from hift_ext import distributed, sharding, update

pytestmark = pytest.mark.needs("fsdp2_on_cpu")

STEPS = 11
GROUPS = [["embedding"], ["blocks.0"], ["blocks.1"], ["scale"], ["norm", "head"]]


@pytest.fixture
def ranks() -> Ranks:
    """Two processes, made by the first test that asks."""
    return pair()


class Scaled(models.Tiny):
    """`Tiny` with widths that two do not divide, and a group whose one element is on one rank."""

    def __init__(self) -> None:
        super().__init__(blocks=2, width=9, vocabulary=50)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.scale


def plain() -> Scaled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Scaled()


def sharded(how: str = "blocks") -> Scaled:
    """The same model, cut over the ranks."""
    from torch.distributed.fsdp import fully_shard

    model, options = plain(), {}
    if how == "kept":
        options["reshard_after_forward"] = False
    if how == "replicas":
        options["mesh"] = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    if how != "root":
        for block in model.blocks:
            fully_shard(block, **options)
    return fully_shard(model, **options)


def made(model: nn.Module, rule: str = "AdamW", **options: Any) -> Any:
    return getattr(hift_ext, rule)(model, lr=1e-2, groups=GROUPS, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if sharding.is_sharded(tensor) else tensor.detach().clone()


def whole_state(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    return [{k: whole(v).clone() for k, v in e.items()} for e in optimizer.state.values()]


def alone(steps: int, rule: str = "AdamW", clip: float | None = None, **options: Any) -> Any:
    """One process that averages what two ranks would."""
    model = plain()
    optimizer = made(model, rule, **options)
    for tokens in models.batches(steps):
        averaged(model, [[tokens[:2]], [tokens[2:]]])
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return models.weights(model), whole_state(optimizer)


def same(a: Any, b: Any) -> None:
    """Two dicts or lists of tensors are equal to the bit."""
    assert len(a) == len(b)
    for key in a if isinstance(a, dict) else range(len(a)):
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        else:
            same(a[key], b[key])


def on_train(how: str, rule: str, options: dict[str, Any]) -> Any:
    model = sharded(how)
    optimizer = made(model, rule, **options)
    mine = share(models.batches(STEPS))
    models.train(model, optimizer, mine[:1])
    # Looking at each tensor from Python is for what is not as it was laid out.
    slow, update._checked = update._checked, None
    try:
        models.train(model, optimizer, mine[1:])
    finally:
        update._checked = slow
    return (
        {name: whole(p) for name, p in model.named_parameters()},
        whole_state(optimizer),
        optimizer.stats()["store_bytes"],
        [
            (type(v["exp_avg"]).__name__, v["exp_avg"].placements == p.placements)
            for p, v in optimizer.state.items()
            if "exp_avg" in v
        ],
    )


@pytest.mark.needs("exchange")
@pytest.mark.parametrize(
    ("how", "rule", "options"),
    [
        ("blocks", "AdamW", {"amsgrad": True}),
        ("blocks", "SGD", {"momentum": 0.9}),
        ("blocks", "Adagrad", {"initial_accumulator_value": 0.5, "store": "device"}),
        ("root", "AdamW", {"store": "disk", "page_bytes": 4096}),
        ("kept", "AdamW", {}),
        ("replicas", "AdamW", {}),
    ],
)
def test_two_ranks_are_one_process(how, rule, options, ranks) -> None:
    weights, state = alone(STEPS, rule, **options)
    for got, got_state, _, kinds in ranks.run(on_train, how, rule, options):
        same(got, weights)
        same(got_state, state)
        assert set(kinds) <= {("DTensor", True)}


def on_bf16(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(plain().to(torch.bfloat16))
    optimizer = made(model, **options)
    models.train(model, optimizer, share(models.batches(STEPS)))
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [{"master": "split"}, {"master": "fp32"}, {"master": None, "rounding": "stochastic"}],
    ids=str,
)
def test_masters_and_random_rounding_do_not_see_the_shards(options, ranks) -> None:
    model = plain().to(torch.bfloat16)
    optimizer = made(model, **options)
    for tokens in models.batches(STEPS):
        averaged(model, [[tokens[:2]], [tokens[2:]]])
        optimizer.step()
        optimizer.zero_grad()
    for got in ranks.run(on_bf16, options):
        same(got, models.weights(model))


def on_look(width: int) -> int:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(models.tiny(width=width))
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, share(models.batches(len(optimizer.groups))))
    parts = sum(sharding.local(p).numel() for p in model.parameters())
    assert optimizer.stats()["state_bytes"] >= 8 * parts
    return optimizer.stats()["store_bytes"]


def test_each_rank_pages_its_own_part(ranks) -> None:
    model = models.tiny(width=96)
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(1))
    for store_bytes in ranks.run(on_look, 96):
        assert store_bytes < 0.55 * optimizer.stats()["store_bytes"]


def on_accumulate() -> dict[str, torch.Tensor]:
    model = sharded()
    optimizer = made(model)
    mine = share(models.batches(2 * STEPS))
    for first, second in zip(mine[::2], mine[1::2], strict=True):
        model.set_requires_gradient_sync(False)
        (models.loss_of(model, first) / 2).backward()
        model.set_requires_gradient_sync(True)
        (models.loss_of(model, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p) for name, p in model.named_parameters()}


def test_accumulation(ranks) -> None:
    model = plain()
    optimizer = made(model)
    data = models.batches(2 * STEPS)
    for first, second in zip(data[::2], data[1::2], strict=True):
        averaged(model, [[first[:2], second[:2]], [first[2:], second[2:]]])
        optimizer.step()
        optimizer.zero_grad()
    for got in ranks.run(on_accumulate):
        same(got, models.weights(model))


def on_clip(own: bool) -> dict[str, torch.Tensor]:
    model = sharded()
    optimizer = made(model, "SGD", max_grad_norm=0.05 if own else None)
    for tokens in share(models.batches(STEPS)):
        models.loss_of(model, tokens).backward()
        if not own:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("own", [True, False])
def test_clipping_is_of_the_whole_norm(own, ranks) -> None:
    """The coefficient is that of one process up to the order of additions in the norm.

    A sum of n squares in float32 has a relative error below n * eps, and so has a step, which is
    lr * 0.05 long; no group has more than 500 elements or more than three visits.
    """
    weights, _ = alone(STEPS, "SGD", clip=0.05)
    free, _ = alone(STEPS, "SGD")
    assert max((weights[name] - free[name]).abs().max() for name in weights) > 1e-4
    bound = 3 * 1e-2 * 0.05 * 500 * torch.finfo(torch.float32).eps
    for got in ranks.run(on_clip, own):
        for name, p in weights.items():
            torch.testing.assert_close(got[name], p, rtol=0, atol=bound)


def on_sums(how: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    model = sharded(how)
    optimizer = made(model)
    sums = []
    for tokens in share(models.batches(len(GROUPS))):
        models.loss_of(model, tokens).backward()
        grads = [p.grad for p in optimizer.groups[optimizer.active].params]
        total = sum(sharding.local(grad).double().square().sum() for grad in grads)
        distributed.all_reduce_sum(optimizer)(total)
        sums.append((total, sum(grad.full_tensor().double().square().sum() for grad in grads)))
        optimizer.step()
        optimizer.zero_grad()
    return sums


def on_other_sums() -> tuple[Any, str]:
    scale = sharded().scale
    mixed = nn.ParameterList([scale, nn.Parameter(torch.ones(2))])
    return (
        distributed.all_reduce_sum(hift_ext.AdamW(plain())),
        message_of(distributed.all_reduce_sum, hift_ext.AdamW(mixed, layers_per_group="all")),
    )


def test_sums_over_shards(ranks) -> None:
    for how in ("blocks", "replicas"):
        for sums in ranks.run(on_sums, how):
            for total, expected in sums:
                torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)
    for unsharded, mixed in ranks.run(on_other_sums):
        assert unsharded is None
        assert "parameter '0' and parameter '1' are not cut over the same ranks" in mixed


def on_overflow() -> Any:
    """One element of one rank's part overflows: all ranks skip, or their weights would part."""
    model = sharded()
    optimizer = made(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    changed = []
    for step, tokens in enumerate(share(models.batches(4))):
        before = {name: whole(p) for name, p in model.named_parameters()}
        active = optimizer.active
        scaler.scale(models.loss_of(model, tokens)).backward()
        if step == 1 and dist.get_rank() == 1:
            sharding.local(model.blocks[0].up.weight.grad)[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = {name: whole(p) for name, p in model.named_parameters()}
        moved = any(not torch.equal(after[name], before[name]) for name in after)
        changed.append((active, optimizer.active, moved))
    return changed


def test_an_overflow_on_one_rank_skips_on_all(ranks) -> None:
    expected = [(0, 1, True), (1, 1, False), (1, 2, True), (2, 3, True)]
    assert ranks.run(on_overflow) == [expected, expected]


def on_refusals() -> dict[str, str]:
    from torch.distributed.fsdp import fully_shard

    told, tokens = {}, models.batches(1)[0]
    model = plain()
    optimizer = made(model)
    for block in model.blocks:
        fully_shard(block)
    told["early"] = message_of(fully_shard(model), tokens)
    optimizer.close()
    model = plain()
    optimizer = made(model)
    told["early, root only"] = message_of(fully_shard(model), tokens)

    outer = nn.Sequential(plain())
    fully_shard(outer)
    optimizer = hift_ext.AdamW(outer[0], groups=GROUPS)
    told["inner"] = message_of(outer, tokens)

    model = sharded()
    order = ["bottom2up", "top2down"][dist.get_rank()]
    told["order"] = message_of(lambda: models.train(model, made(model, order=order), [tokens]))
    return told


def test_what_cannot_work_is_refused_at_start(ranks) -> None:
    for told in ranks.run(on_refusals):
        for name in ("early", "early, root only", "inner"):
            assert "are not in the sharded module" in told[name], name
            assert "call fully_shard first" in told[name]
        assert "order is [0, 1, 2, 3, 4] on rank 0, but [4, 3, 2, 1, 0] on rank 1" in told["order"]
