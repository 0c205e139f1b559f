# SPDX-License-Identifier: Apache-2.0
# State in 16 and 8 bits, masters whole and split, stochastic rounding: from the public API.
# csrc/core/precision.h's own numbers are held by tests/cpp/test_precision.cpp.
"""`master`, `state_dtype`, `rounding`."""

from __future__ import annotations

import copy
import itertools

import models
import pytest
import torch
from torch import nn

import hift_ext

STATE_TYPES = [torch.float32, torch.bfloat16, "8bit"]
EIGHT_BIT = [
    (hift_ext.AdamW, {"lr": 1e-2}),
    (hift_ext.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    (hift_ext.SGD, {"lr": 1e-1, "momentum": 0.9}),
]
RULES = [*EIGHT_BIT, (hift_ext.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.5})]


def trained(dtype, steps=13, cls=hift_ext.AdamW, lr=1e-2, **settings):
    """A model of 6 groups after some steps, and its optimizer."""
    model = models.tiny().to(dtype)
    optimizer = cls(model, lr=lr, **settings)
    models.train(model, optimizer, models.batches(steps))
    return model, optimizer


def stepped(dtype, steps=12, cls=hift_ext.AdamW, lr=1e-2, **settings):
    """As `trained`, with gradients that depend on nothing but the parameter and the step."""
    model = models.tiny().to(dtype)
    optimizer = cls(model, lr=lr, **settings)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step // len(optimizer.groups))
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 3)
            p.grad = grad.to(dtype) if p in set(optimizer.groups[optimizer.active].params) else None
        optimizer.step()
    return model, optimizer


def masters(optimizer) -> list[torch.Tensor]:
    """The whole master of each visited parameter, however it is kept."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = []
    for index, entry in optimizer.state_dict()["state"].items():
        weight = params[index].detach()
        if "master_low" in entry:
            bits = weight.view(torch.int16).int() << 16
            found.append((bits + entry["master_low"].int()).view(torch.float32))
        else:
            found.append(entry["master"].clone())
    return found


# Masters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATE_TYPES, ids=str)
@pytest.mark.parametrize(("cls", "settings"), EIGHT_BIT)
def test_split_and_whole_masters_are_the_same_numbers(cls, settings, state) -> None:
    settings = {**settings, "steps": 50, "state_dtype": state}
    whole = trained(torch.bfloat16, cls=cls, master="fp32", **settings)
    split = trained(torch.bfloat16, cls=cls, master="split", **settings)
    assert models.same(whole[0], split[0])
    pairs = list(zip(masters(whole[1]), masters(split[1]), strict=True))
    assert len(pairs) == len(list(whole[0].parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any((a != a.bfloat16()).any() for a, _ in pairs)
    if state == torch.float32:
        sizes = [optimizer.state.engine.touched_bytes for _, optimizer in (whole, split)]
        count = sizes[0] - sizes[1]
        assert count / 2 >= sum(p.numel() for p in whole[0].parameters())  # 2 bytes an element


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_trains_as_float32_does(dtype) -> None:
    """Against torch.optim on float32 copies that are rounded into the model after each step."""
    model = models.tiny(blocks=2).to(dtype)
    theirs = models.twin(model)
    wide = [nn.Parameter(p.detach().float()) for p in theirs.parameters()]
    plain = torch.optim.AdamW(wide, lr=1e-2, fused=False, foreach=False)
    with hift_ext.AdamW(model, lr=1e-2, layers_per_group="all", master="fp32") as optimizer:
        for tokens in models.batches(20):
            models.loss_of(model, tokens).backward()
            for p, q in zip(model.parameters(), wide, strict=True):
                q.grad = p.grad.float()
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
        for p, q, master in zip(model.parameters(), wide, masters(optimizer), strict=True):
            torch.testing.assert_close(master, q, rtol=0, atol=2e-7 * 20)
            assert torch.equal(p, master.to(dtype))


def test_small_steps_are_lost_without_a_master() -> None:
    def moved(**settings) -> float:
        p = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        with hift_ext.SGD([p], lr=1e-4, layers_per_group="all", **settings) as optimizer:
            for _ in range(100):
                p.grad = torch.ones_like(p)
                optimizer.step()
        return 1 - p.double().mean().item()

    assert moved(master=None) == 0
    assert moved() == moved(master="split") == moved(master="fp32") == pytest.approx(0.01, abs=2e-3)
    assert moved(master=None, rounding="stochastic") == pytest.approx(0.01, rel=0.1)
    assert moved(rounding="stochastic") == moved(master=None, rounding="stochastic")


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_a_loaded_weight_counts_more_than_its_master(master) -> None:
    model, optimizer = trained(torch.bfloat16, steps=12, master=master)  # whole passes
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.full_like(p, 0.5) + torch.arange(p.numel()).view_as(p) % 2)
    before = models.weights(model)
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    with pytest.warns(UserWarning, match="learning rate 0"):
        models.train(model, optimizer, models.batches(12))
    assert models.changed(before, model) == set()
    optimizer.close()


def test_a_float32_parameter_is_its_own_master() -> None:
    """In a model of both kinds each parameter is kept as its type asks."""
    model = models.tiny().to(torch.bfloat16)
    model.norm.float()

    class Cast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.float()).to(torch.bfloat16)

    model.norm = Cast(model.norm)
    with hift_ext.AdamW(model, lr=1e-2) as optimizer:
        models.train(model, optimizer, models.batches(12))
        assert optimizer._precision.master == "split"
        before = models.weights(model)
        again = models.twin(model)
        with hift_ext.AdamW(again, lr=1e-2) as other:
            other.load_state_dict(optimizer.state_dict())
            models.train(again, other, models.batches(6))
        models.train(model, optimizer, models.batches(6))
        assert models.same(model, again)
        assert models.changed(before, model)


# State in fewer bits ----------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "settings"), RULES)
def test_bytes_and_types(cls, settings) -> None:
    sizes = {}
    for state in STATE_TYPES:
        if state == "8bit" and cls is hift_ext.Adagrad:
            continue
        model, optimizer = trained(torch.float32, cls=cls, state_dtype=state, **settings)
        with optimizer:
            sizes[state] = optimizer.stats()["state_bytes"]
            for p in model.parameters():
                for name, value in optimizer.state[p].items():
                    kept = state if state is torch.bfloat16 and name != "step" else torch.float32
                    assert value.dtype == kept, name
                    assert value.shape == (() if name == "step" else p.shape)
    assert sizes[torch.bfloat16] == sizes[torch.float32] / 2
    if "8bit" in sizes:  # blocks are whole: small parameters fill theirs with zeros
        assert sizes["8bit"] < sizes[torch.float32] / 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state", [torch.bfloat16, "8bit"], ids=str)
@pytest.mark.parametrize(("cls", "settings"), EIGHT_BIT)
def test_the_state_is_near_the_float32_state(cls, settings, state, rounding) -> None:
    """A bound from the formats: half a step of the mantissa a visit, a whole one if at random."""
    visits = 5
    settings = {**settings, "steps": 6 * visits, "cls": cls}
    wide = stepped(torch.float32, **settings)
    near = stepped(torch.float32, state_dtype=state, rounding=rounding, **settings)
    step = 2.0**-7 if state is torch.bfloat16 else 2.0**-3
    bound = step * visits * (0.5 if rounding == "nearest" else 1)
    for a, b in zip(wide[0].parameters(), near[0].parameters(), strict=True):
        for name, value in wide[1].state[a].items():
            if name == "step":
                continue
            other = near[1].state[b][name].float()
            assert (value - other).norm() <= bound * value.norm(), name
            assert not torch.equal(value, other)


@pytest.mark.parametrize("store", ["ram", "disk", "device"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state", STATE_TYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resume_goes_on_to_the_bit(dtype, state, rounding, store) -> None:
    """8-bit state leaves as float32 and comes back as the codes it was."""
    settings = {"state_dtype": state, "rounding": rounding, "store": store, "page_bytes": 3000}
    model, optimizer = trained(dtype, **settings)
    saved, weights = copy.deepcopy(optimizer.state_dict()), models.weights(model)
    models.train(model, optimizer, models.batches(9, seed=2))
    again = models.tiny().to(dtype)
    other = hift_ext.AdamW(again, lr=1e-2, seed=7, **settings)  # the saved one counts
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    first = other.state_dict()["state"]
    for index, entry in saved["state"].items():
        assert entry.keys() == first[index].keys()
    models.train(again, other, models.batches(9, seed=2))
    assert models.same(model, again)


def test_a_saved_state_is_converted() -> None:
    """From every way of keeping it into every other: what is dropped is less than a rounding."""
    ways = list(itertools.product(STATE_TYPES, ["fp32", "split", None]))
    for (state, master), (state2, master2) in itertools.product(ways, ways):
        model, optimizer = trained(torch.bfloat16, 12, state_dtype=state, master=master)
        again = models.twin(model)
        other = hift_ext.AdamW(again, lr=1e-2, state_dtype=state2, master=master2)
        other.load_state_dict(optimizer.state_dict())
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            for name, value in optimizer.state[a].items():
                near = other.state[b][name].float()
                assert (near - value.float()).norm() <= 2.0**-4 * value.float().norm(), name
        if master and master2:
            pairs = zip(masters(optimizer), masters(other), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)
        elif master2:
            whole = [p.float() for p in again.parameters()]
            assert all(torch.equal(x, y) for x, y in zip(masters(other), whole, strict=True))


@pytest.mark.parametrize("state", STATE_TYPES, ids=str)
def test_exchange_with_torch(state) -> None:
    model, optimizer = trained(torch.float32, 12, state_dtype=state)
    plain = models.twin(model)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    models.train(plain, other, models.batches(2))
    back = models.twin(plain)
    ours = hift_ext.AdamW(back, lr=1e-2, state_dtype=state)
    ours.load_state_dict(other.state_dict())
    for p, q in zip(plain.parameters(), back.parameters(), strict=True):
        assert ours.state[q]["step"] == other.state[p]["step"] == 4


# Rounding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATE_TYPES, ids=str)
def test_stochastic_rounding_is_reproducible_and_seeded(state) -> None:
    settings = {"rounding": "stochastic", "state_dtype": state}
    base = stepped(torch.bfloat16, **settings)[0]
    threads = torch.get_num_threads()
    try:
        for count, store, page in [(1, "ram", "auto"), (3, "disk", 1500), (2, "device", "auto")]:
            torch.set_num_threads(count)
            model, optimizer = stepped(torch.bfloat16, store=store, page_bytes=page, **settings)
            assert models.same(base, model), (count, store, page)
            optimizer.close()
    finally:
        torch.set_num_threads(threads)
    assert not models.same(base, stepped(torch.bfloat16, seed=1, **settings)[0])
    # Numbers belong to a parameter, not to its group.
    part = stepped(torch.bfloat16, 1, layers_per_group=3, **settings)[0]
    whole = stepped(torch.bfloat16, 1, layers_per_group="all", **settings)[0]
    assert torch.equal(part.blocks[0].up.weight, whole.blocks[0].up.weight)


@pytest.mark.needs("grad_dtype")
def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of 102,400 roundings is within 3e-5 of the value, a part in 2^8 apart."""
    for value in (1.0 + 1 / 512, 1.0 + 1 / 1024, 1.75 - 1 / 2048):
        p = nn.Parameter(torch.ones(1024, dtype=torch.bfloat16))
        p.grad_dtype = torch.float32
        total, visits = 0.0, 100
        with hift_ext.SGD([p], lr=1.0, layers_per_group="all", rounding="stochastic") as optimizer:
            for _ in range(visits):
                with torch.no_grad():
                    p.fill_(1.0)
                p.grad = torch.full((1024,), 1.0 - value)
                optimizer.step()
                assert set(p.tolist()) <= {1.0, 1.0078125, 1.7421875, 1.75}
                total += p.double().sum().item()
        assert total / (visits * 1024) == pytest.approx(value, abs=3e-5)


# What is not offered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "dtype", "settings", "words"),
    [
        (hift_ext.Adagrad, torch.float32, {"state_dtype": "8bit"}, "offered for adamw"),
        (hift_ext.AdamW, torch.float16, {"master": "split"}, "pass master='fp32'"),
        (hift_ext.AdamW, torch.float16, {"master": None, "rounding": "stochastic"}, "float16"),
    ],
)
def test_what_is_not_offered_says_what_is(cls, dtype, settings, words) -> None:
    model = models.tiny().to(dtype)
    before = models.weights(model)
    optimizer = cls(model, lr=1e-2, **settings)
    states = len(optimizer.state)
    models.loss_of(model, models.batches(1)[0]).backward()
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert models.changed(before, model) == set()
    assert (optimizer.active, optimizer.pass_index, len(optimizer.state)) == (0, 0, states)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"state_dtype": torch.float16}, "8bit"),
        ({"state_dtype": "4bit"}, "8bit"),
        ({"master": "fp16"}, "split"),
        ({"rounding": "up"}, "stochastic"),
    ],
)
def test_unknown_values_raise_at_construction(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        hift_ext.AdamW(models.tiny(), **settings)


def test_weights_of_another_type_than_was_laid_out_for() -> None:
    model, optimizer = trained(torch.bfloat16, master="split")
    model.to(torch.float16)
    models.loss_of(model, models.batches(1)[0]).backward()
    before = models.weights(model)
    with pytest.raises(TypeError, match="make a new optimizer"):
        optimizer.step()
    assert models.changed(before, model) == set()
