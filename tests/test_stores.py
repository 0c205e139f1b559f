# SPDX-License-Identifier: Apache-2.0
# Where state rests must not matter: every store, page size, ring and thread count gives equal bits.
# Shapes include transfer-heavy ones, where little compute stands beside much state.
"""Stores, pages, rings and threads against each other."""

from __future__ import annotations

import os
import stat

import models
import pytest
import torch
from torch import nn

import hift_ext

RULES = [
    (hift_ext.AdamW, {"lr": 1e-2, "amsgrad": True}),
    (hift_ext.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.25}),
    (hift_ext.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2}),
    (hift_ext.SGD, {"lr": 1e-2}),
]


def run(rule, settings, **options) -> tuple[nn.Module, dict[int, dict[str, torch.Tensor]]]:
    """Trains three passes and a half; returns the model and the state by parameter index."""
    model = models.tiny(blocks=3, width=40)
    with rule(model, **settings, **options) as optimizer:
        models.train(model, optimizer, models.batches(17))
        state = {
            index: {name: value.clone() for name, value in entry.items()}
            for index, entry in optimizer.state_dict()["state"].items()
        }
    return model, state


@pytest.mark.parametrize(("rule", "settings"), RULES)
def test_stores_pages_and_rings_agree_to_the_bit(rule, settings, tmp_path) -> None:
    model, state = run(rule, settings, store="ram")
    record = 4096
    variants = [
        {"store": "device"},
        {"store": "ram", "page_bytes": 2048},
        {"store": "disk"},
        {"store": "disk", "page_bytes": record, "staging": 2 * record},
        {"store": "disk", "page_bytes": record, "staging": 3 * record},
        {"store": "disk", "page_bytes": 4 * record},
        {"store": "disk", "staging": 64 * 1024},
        {"store": f"disk:{tmp_path / 'pages'}", "page_bytes": 2 * record},
    ]
    for variant in variants:
        other, other_state = run(rule, settings, **variant)
        assert models.same(model, other), variant
        assert state.keys() == other_state.keys(), variant
        for index, entry in state.items():
            for name, value in entry.items():
                assert torch.equal(value, other_state[index][name]), (variant, index, name)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads) -> None:
    before = torch.get_num_threads()

    def result(store: str) -> torch.Tensor:
        weight = nn.Parameter(torch.linspace(-1, 1, 300_001))
        with hift_ext.AdamW([weight], lr=0.1, layers_per_group="all", store=store) as optimizer:
            for step in range(3):
                weight.grad = torch.cos(weight.detach() * (step + 1))
                optimizer.step()
        return weight.detach()

    one = result("ram")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(result("ram"), one)
        assert torch.equal(result("disk"), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("staging", ["auto", 1 << 20])
def test_transfer_heavy_shapes(staging) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 16384), nn.ReLU(), nn.Linear(16384, 64))

    results = []
    for options in ({"store": "ram"}, {"store": "disk", "staging": staging, "page_bytes": 1 << 18}):
        model = make()
        with hift_ext.AdamW(model, lr=1e-3, **options) as optimizer:
            for step in range(7):
                x = torch.linspace(-1, 1, 64).reshape(2, 32) * (step + 1)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(model)
    assert models.same(*results)


def test_shapes_without_elements_without_dimensions_and_with_strides() -> None:
    torch.manual_seed(0)
    starts = [
        torch.randn(3, 0),
        torch.randn(()),
        torch.randn(5, 7).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(6, 10)[:, ::2],  # gaps between elements
        torch.randn(1),
    ]
    gradients = [torch.randn_like(s) for s in starts]

    def train(make, **options):
        params = [nn.Parameter(s.clone(memory_format=torch.preserve_format)) for s in starts]
        params[4] = nn.Parameter(starts[4].detach().clone().as_strided((6, 5), (5, 1)))
        base = torch.zeros(6, 10)
        base[:, ::2] = starts[4]
        params[4].data = base[:, ::2]
        optimizer = make(params, lr=0.1, **options)
        for _ in range(4):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g.clone() if p.dim() != 2 else g.contiguous().clone()
            optimizer.step()
        return params, optimizer

    expected, reference = train(torch.optim.AdamW, foreach=False)
    for store in ("ram", "disk", "device"):
        params, optimizer = train(hift_ext.AdamW, layers_per_group="all", store=store)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            ours, theirs = optimizer.state[p]["exp_avg_sq"], reference.state[q]["exp_avg_sq"]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        optimizer.close()


def test_state_in_ram_is_a_view_with_a_storage_of_its_own() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(2))
    weight = model.embedding.weight
    view = optimizer.state[weight]["exp_avg"]
    assert view.untyped_storage().nbytes() == 4 * weight.numel()
    view.fill_(0.5)
    assert torch.equal(optimizer.state[weight]["exp_avg"], torch.full_like(weight, 0.5))


def test_stats_count_bytes() -> None:
    model = models.tiny(blocks=2, width=64)
    with hift_ext.AdamW(model, store="disk", page_bytes=4096) as optimizer:
        models.train(model, optimizer, models.batches(3))
        assert optimizer.stats()["bytes_in"] == 0  # nothing is stored before a first visit
        models.train(model, optimizer, models.batches(5))
        stats = optimizer.stats()
        records = -(-optimizer.groups[3].numel * 8 // 4096) * 4096
        assert stats["bytes_out"] >= records
        assert 0 < stats["bytes_in"] <= stats["bytes_out"]
        assert stats["wait_ms"] >= 0
        assert stats["update_ms"] > 0
        assert stats["store_bytes"] >= 8 * sum(group.numel for group in optimizer.groups)
        largest = max(group.numel for group in optimizer.groups)
        assert 8 * largest <= stats["staging_bytes"] < stats["store_bytes"]
    with hift_ext.AdamW(models.tiny(), store="ram") as optimizer:
        models.train(optimizer._model, optimizer, models.batches(1))
        stats = optimizer.stats()
        assert stats["staging_bytes"] == stats["bytes_in"] == stats["bytes_out"] == 0


def test_ram_slab_has_the_exact_size() -> None:
    model = models.tiny(blocks=2, width=128)
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(1))
    needed = 8 * sum(p.numel() for p in model.parameters())
    # At most 16 elements a parameter, 256 a group and a system page a stream on top.
    assert needed <= optimizer.stats()["store_bytes"] <= needed + 8 * 16 * 30 + 4 * 2 * 5120


def test_named_file_is_private_and_stays(tmp_path) -> None:
    path = tmp_path / "state.pages"
    old = os.umask(0)
    try:
        model = models.tiny()
        with hift_ext.AdamW(model, store=f"disk:{path}") as optimizer:
            models.train(model, optimizer, models.batches(2))
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            other = models.tiny()
            second = hift_ext.AdamW(other, store=f"disk:{path}")
            with pytest.raises(OSError, match="in use"):
                models.train(other, second, models.batches(1))
    finally:
        os.umask(old)
    assert path.exists()
    model = models.tiny()
    with hift_ext.AdamW(model, store=f"disk:{path}") as optimizer:  # a leftover is replaced
        models.train(model, optimizer, models.batches(2))


def test_bad_stores(tmp_path) -> None:
    for store in ("tape", "disk:", 7):
        with pytest.raises(ValueError, match="store must be one of"):
            hift_ext.AdamW(models.tiny(), store=store)
    for option, least in (("staging", 0), ("page_bytes", 1)):
        for value in (least - 1, 1.5, True, "much"):
            with pytest.raises(ValueError, match=f"{option} must be"):
                hift_ext.AdamW(models.tiny(), **{option: value})
    for staging in (0, 4096):  # without a ring a file's pages have nowhere to be updated
        model = models.tiny()
        optimizer = hift_ext.AdamW(model, store="disk", staging=staging, page_bytes=4096)
        with pytest.raises(ValueError, match=f"staging of {staging} .* does not hold two pages"):
            models.train(model, optimizer, models.batches(1))
        optimizer.close()
