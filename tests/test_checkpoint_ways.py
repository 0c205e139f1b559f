# SPDX-License-Identifier: Apache-2.0
# save and load where numbers are kept in fewer bits: raw values come back to the bit, other ways
# are converted as load_state_dict does, and what cannot be converted says so.
"""hift_ext.save and hift_ext.load with `master` and `state_dtype`."""

from __future__ import annotations

import os
from typing import Any

import models
import pytest
import torch
from test_checkpoint import SHARD, STORES, everything, flip, make, same
from torch import nn

import hift_ext
from hift_ext import loading, precision

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"master": "fp32"},
    "split": {"master": "split"},
    "bf16": {"master": "split", "state_dtype": torch.bfloat16},
    "8bit": {"master": "split", "state_dtype": "8bit"},
    "bare": {"master": None},
}


def bf16(way: str, kind: Any = hift_ext.AdamW, seed: int = 0, **options: Any):
    """A bfloat16 model of tensors that are no whole number of blocks, and its optimizer."""
    model = models.tiny(blocks=2, width=25, seed=seed).to(torch.bfloat16)
    return model, kind(model, lr=1e-2, page_bytes=4096, **{**WAYS[way], **options})


def raw(optimizer: hift_ext.HiFTOptimizer) -> list[torch.Tensor]:
    """All stored values of visited parameters, as they are kept."""
    engine = optimizer.state.engine
    return [
        engine.tensor(entry.group, entry.item, number, entry.numel).cpu().clone()
        for entry in optimizer.state.entries.values()
        if entry.visits
        for number in range(len(engine.stored))
    ]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("way", WAYS)
def test_stored_values_come_back_to_the_bit(way, store, tmp_path) -> None:
    model, optimizer = bf16(way, store=store)
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    other = STORES[(STORES.index(store) + 1) % 3]
    again, resumed = bf16(way, seed=1, store=other)
    models.train(again, resumed, models.batches(2))
    again.load_state_dict(model.state_dict())
    hift_ext.load(resumed, tmp_path / "saved")
    assert all(map(torch.equal, raw(optimizer), raw(resumed)))
    assert same(everything(resumed), everything(optimizer))
    for m, o in ((model, optimizer), (again, resumed)):
        models.train(m, o, models.batches(5, seed=3))
        o.close()
    assert models.same(model, again)


def masters(model, optimizer) -> dict[int, torch.Tensor]:
    """The whole masters, whichever way they are kept."""
    params = list(model.parameters())
    return {
        index: precision.joined(params[index].detach(), entry["master_low"])
        if "master_low" in entry
        else entry["master"]
        for index, entry in optimizer.state_dict()["state"].items()
    }


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("saved", "kept"),
    [("8bit", "split"), ("split", "fp32"), ("fp32", "split"), ("bf16", "8bit"), ("bare", "fp32")],
)
def test_state_is_converted(saved, kept, store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "LOAD_STEP", 512)  # several pieces a parameter
    model, optimizer = bf16(saved)
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    again, resumed = bf16(kept, seed=1, store=store)
    models.train(again, resumed, models.batches(2))
    again.load_state_dict(model.state_dict())
    hift_ext.load(resumed, tmp_path / "saved")
    # load_state_dict, which goes another way, makes the same of it.
    twin, reference = bf16(kept, seed=1)
    twin.load_state_dict(model.state_dict())
    reference.load_state_dict(optimizer.state_dict())
    assert same(everything(resumed), everything(reference))
    before, after = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    if "8bit" not in (saved, kept):
        assert all(torch.equal(e["exp_avg"], after[i]["exp_avg"]) for i, e in before.items())
    if saved != "bare":
        theirs, ours = masters(model, optimizer), masters(again, resumed)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(value, ours[index]) for index, value in theirs.items())
        assert any((value != value.bfloat16()).any() for value in theirs.values())
    resumed.close()


def test_codes_in_another_order_of_elements(tmp_path) -> None:
    """Blocks hold other elements where strides differ: by way of float32, a little off."""

    def made(layout: torch.memory_format):
        net = nn.Conv2d(16, 8, 3).to(memory_format=layout)
        return net, hift_ext.AdamW(net, layers_per_group="all", state_dtype="8bit")

    net, optimizer = made(torch.channels_last)
    for p in net.parameters():
        p.grad = torch.linspace(0.5, 1, p.numel()).reshape(p.shape)
    optimizer.step()
    hift_ext.save(optimizer, tmp_path / "saved")
    for layout in (torch.channels_last, torch.contiguous_format):
        other, again = made(layout)
        hift_ext.load(again, tmp_path / "saved")
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            near = 0.0 if layout == torch.channels_last else 0.07
            for name in ("exp_avg", "exp_avg_sq"):
                theirs, ours = optimizer.state[p][name], again.state[q][name]
                torch.testing.assert_close(ours, theirs, rtol=near, atol=0)


def test_plain_sgd_keeps_its_masters(tmp_path) -> None:
    model, optimizer = bf16("split", hift_ext.SGD)
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    for load in (
        lambda o: hift_ext.load(o, tmp_path / "saved"),
        lambda o: o.load_state_dict(optimizer.state_dict()),
    ):
        again, resumed = bf16("split", hift_ext.SGD)
        again.load_state_dict(model.state_dict())
        load(resumed)
        assert any(value.any() for value in raw(resumed))
        assert all(map(torch.equal, raw(optimizer), raw(resumed)))


def test_what_cannot_be_converted_says_so(tmp_path) -> None:
    model, optimizer = bf16("split")
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    for dtype, options in ((torch.bfloat16, WAYS["bare"]), (torch.float16, {}), (None, {})):
        other = models.tiny(blocks=2, width=25).to(dtype or torch.float32)
        again = hift_ext.AdamW(other, **options)
        with pytest.warns(UserWarning, match="masters of 17 parameters are left out"):
            hift_ext.load(again, tmp_path / "saved")
        before, after = optimizer.state_dict()["state"], again.state_dict()["state"]
        assert all(torch.equal(e["exp_avg"], after[i]["exp_avg"]) for i, e in before.items())
        if dtype == torch.float16:  # made from the weights
            weights = list(other.parameters())
            assert all(torch.equal(e["master"], weights[i].float()) for i, e in after.items())
    # 8-bit state is not offered for every setting that a checkpoint may bring.
    other = models.tiny(blocks=2)
    adagrad = hift_ext.Adagrad(other, state_dtype=torch.bfloat16)
    models.train(other, adagrad, models.batches(2))
    hift_ext.save(adagrad, tmp_path / "adagrad")
    coded = hift_ext.Adagrad(models.tiny(blocks=2), state_dtype="8bit")
    with pytest.raises(ValueError, match="'8bit' is not offered for adagrad"):
        hift_ext.load(coded, tmp_path / "adagrad")
    assert coded.state.engine is None


# How it is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "times"), [(0, 1), (2, 2)])
def test_a_new_optimizer_reads_every_byte_once(steps, times, tmp_path, monkeypatch) -> None:
    model, optimizer = make()
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    again, resumed = make(seed=1)
    models.train(again, resumed, models.batches(steps))
    real, sizes = os.preadv, []

    def preadv(*args: Any) -> int:
        sizes.append(real(*args))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    hift_ext.load(resumed, tmp_path / "saved")
    shard = (tmp_path / "saved" / SHARD).read_bytes()
    head = 8 + int.from_bytes(shard[:8], "little")
    assert sum(sizes) == head + times * (len(shard) - head)
    assert same(everything(resumed), everything(optimizer))


def test_a_shard_that_changes_while_it_is_read(tmp_path, monkeypatch) -> None:
    """It is verified, and changed before it is read once more."""
    model, optimizer = make()
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    real = loading.Loading.verify

    def verify(*args: Any) -> None:
        real(*args)
        flip(tmp_path / "saved" / SHARD, -9)

    monkeypatch.setattr(loading.Loading, "verify", verify)
    with pytest.raises(RuntimeError, match=r"partly replaced: load again .*is corrupted"):
        hift_ext.load(optimizer, tmp_path / "saved")


def test_another_process_recovers_at_the_same_time(tmp_path, monkeypatch) -> None:
    model, optimizer = make()
    models.train(model, optimizer, models.batches(3))
    target = tmp_path / "saved"
    hift_ext.save(optimizer, target)
    os.rename(target, tmp_path / "saved.tmp-1-0123abcd.old")
    real = os.rename

    def rename(*names: Any) -> None:
        monkeypatch.undo()
        real(*names)  # the other one's
        real(*names)

    monkeypatch.setattr(os, "rename", rename)
    _, resumed = make(seed=1)
    hift_ext.load(resumed, target)
    assert same(everything(resumed), everything(optimizer))
