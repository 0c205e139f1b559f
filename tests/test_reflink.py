# SPDX-License-Identifier: Apache-2.0
# save from a page file, on file systems that share blocks and on those that do not: what is shared,
# what steps do to it later, how it is read, and what faults leave.
"""hift_ext.save without copying."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from filesystems import shared_bytes
from ranks import pair, share
from safetensors.torch import load_file
from test_checkpoint import SHARD, everything, flip, make, same
from test_checkpoint_faults import MEBIBYTE, Watch, big
from test_checkpoint_ways import WAYS, bf16, masters, raw
from test_sharded import made, plain, sharded, whole_state

import hift_ext
from hift_ext import loading, manifest, reflink


def said(caplog) -> list[str]:
    """What was logged of saves."""
    return [r.message.split(": ", 1)[1] for r in caplog.records if "page file" in r.message]


SHARING = "blocks of the page file are shared, not copied (a reflink)"


def body_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / manifest.NAME).read_text())


def streams_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The pieces of each stream that has some."""
    return {
        f"{param['index']}.{stream['name']}": stream["pieces"]
        for param in body_of(folder)["params"]
        for stream in param["streams"]
        if stream["pieces"]
    }


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def on_disk(steps: int) -> hift_ext.AdamW:
    model = models.tiny(blocks=0, width=8)
    optimizer = hift_ext.AdamW(model, lr=1e-2, store="disk")
    models.train(model, optimizer, models.batches(steps))
    return optimizer


@pytest.mark.parametrize("way", WAYS)
def test_blocks_are_shared_and_steps_leave_them_alone(way, disk, caplog) -> None:
    model, optimizer = bf16(way, store=f"disk:{disk / 'pages'}")
    models.train(model, optimizer, models.batches(6))
    kept, state = [value.clone() for value in raw(optimizer)], everything(optimizer)
    weights = models.weights(model)
    hift_ext.save(optimizer, disk / "saved")
    assert said(caplog) == [SHARING]
    assert sorted(os.listdir(disk / "saved")) == [manifest.NAME, SHARD]
    file = disk / "saved" / SHARD
    facts = body_of(disk / "saved")["shards"][SHARD]
    data = facts["size"] - facts["head_bytes"]
    assert sum(value.nbytes for value in kept) <= data == shared_bytes(file)
    before = digest(disk / "saved")
    models.train(model, optimizer, models.batches(5, seed=2))
    assert shared_bytes(file) < data  # steps have taken new blocks
    assert digest(disk / "saved") == before
    for store in ("ram", "disk", "device", f"disk:{disk / 'others'}"):
        again, resumed = bf16(way, seed=1, store=store)
        resumed._options["page_bytes"] = 2048 if store == "disk" else 16384
        again.load_state_dict(weights)
        hift_ext.load(resumed, disk / "saved")
        assert all(map(torch.equal, raw(resumed), kept))
        assert same(everything(resumed), state)
        models.train(again, resumed, models.batches(5, seed=2))
        assert models.same(again, model)
        resumed.close()
    optimizer.close()


@pytest.mark.parametrize("way", ["fp32", "8bit"])
def test_any_reader_finds_tensors_and_no_gaps(way, disk) -> None:
    model, optimizer = bf16(way, store="disk")
    models.train(model, optimizer, models.batches(9))
    hift_ext.save(optimizer, disk / "saved")
    path = disk / "saved" / SHARD
    tensors, pieces = load_file(path), streams_of(disk / "saved")
    assert any(len(each) > 2 for each in pieces.values())
    engine = optimizer.state.engine
    for entry in optimizer.state.entries.values():
        for number, stream in enumerate(engine.stored):
            keys = [piece["key"] for piece in pieces[f"{entry.index}.{stream.name}"]]
            value = torch.cat([tensors.pop(key).flatten() for key in keys])
            assert torch.equal(value, engine.tensor(entry.group, entry.item, number, entry.numel))
            assert len(keys) == len(engine.parts(entry.group, entry.item))
    assert tensors
    assert all(key.startswith("unused[") for key in tensors)
    with open(path, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
    assert begin % 4096 == 0
    sizes = {"F32": 4, "I16": 2, "BF16": 2, "U8": 1}
    for name, entry in head.items():
        if name != "__metadata__":
            assert (begin + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0
    optimizer.close()


@pytest.mark.parametrize(
    ("saved", "kept"),
    [
        ("8bit", "split"),
        ("8bit", "fp32"),
        ("split", "fp32"),
        ("fp32", "split"),
        ("bf16", "8bit"),
        ("fp32", "8bit"),
        ("bare", "fp32"),
        ("split", "bare"),
    ],
)
@pytest.mark.filterwarnings("ignore:the saved masters")
def test_state_in_many_pieces_is_converted(saved, kept, disk, monkeypatch) -> None:
    monkeypatch.setattr(loading, "LOAD_STEP", 512)
    model, optimizer = bf16(saved, store="disk")
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, disk / "saved")
    hift_ext.save(twin_of(saved, model, optimizer), disk / "copied")
    for before in (0, 2):
        (again, resumed), (other, reference) = (bf16(kept, seed=1, store="disk") for _ in range(2))
        models.train(again, resumed, models.batches(before))
        for net, loaded, path in ((again, resumed, "saved"), (other, reference, "copied")):
            net.load_state_dict(model.state_dict())
            hift_ext.load(loaded, disk / path)
        assert all(map(torch.equal, raw(resumed), raw(reference)))
        assert same(everything(resumed), everything(reference))
        if "bare" not in (saved, kept):
            theirs, ours = masters(model, optimizer), masters(again, resumed)
            assert all(torch.equal(value, ours[index]) for index, value in theirs.items())
        resumed.close()
        reference.close()
    optimizer.close()


def twin_of(way: str, model: Any, optimizer: Any) -> Any:
    """The same state in host memory."""
    twin, copied = bf16(way, store="ram")
    twin.load_state_dict(model.state_dict())
    copied.load_state_dict(optimizer.state_dict())
    return copied


def test_other_groups_and_rules(disk) -> None:
    for rule in ("amsgrad", "adagrad", "momentum"):
        model, optimizer = make(rule, store="disk")
        models.train(model, optimizer, models.batches(7))
        hift_ext.save(optimizer, disk / "saved")
        _, fewer = make(rule, seed=1, layers_per_group="all", store="disk")
        with pytest.warns(UserWarning, match="of 4 groups, this optimizer has 1"):
            hift_ext.load(fewer, disk / "saved")
        assert all(map(torch.equal, raw(fewer), raw(optimizer)))
        optimizer.close()
        fewer.close()


def test_what_has_had_no_visit_is_not_there_or_copied(disk, caplog) -> None:
    """Adagrad has state from the start: pages that were never written are copied, as they read."""
    model, optimizer = make("adamw", store="disk")
    models.train(model, optimizer, models.batches(2))
    hift_ext.save(optimizer, disk / "saved")
    seen = {f"{e.index}" for e in optimizer.state.entries.values() if e.visits}
    assert {name.split(".")[0] for name in streams_of(disk / "saved")} == seen
    optimizer.close()
    model, optimizer = make("adagrad", store="disk")
    models.train(model, optimizer, models.batches(2))
    hift_ext.save(optimizer, disk / "saved")
    shards = {piece["shard"] for each in streams_of(disk / "saved").values() for piece in each}
    assert shards == {SHARD, "state-00002.safetensors"}
    assert said(caplog) == [SHARING] * 2
    _, again = make("adagrad", seed=1)
    hift_ext.load(again, disk / "saved")
    assert same(everything(again), everything(optimizer))
    optimizer.close()


def test_strides_and_parameters_without_elements(disk) -> None:
    def build(layout: torch.memory_format) -> torch.nn.Module:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(30, 50, 3))
        net[0].to(memory_format=layout)
        net.none, net.one = (torch.nn.Parameter(torch.ones(size)) for size in ((2, 0), ()))
        return net

    def made_of(net: torch.nn.Module, store: str) -> hift_ext.AdamW:
        return hift_ext.AdamW(net, layers_per_group="all", store=store, page_bytes=4096)

    net = build(torch.channels_last)
    optimizer = made_of(net, "disk")
    for p in net.parameters():
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape)
    optimizer.step()
    hift_ext.save(optimizer, disk / "saved")
    load_file(disk / "saved" / SHARD)
    for layout in (torch.channels_last, torch.contiguous_format):
        other = build(layout)
        again = made_of(other, "ram")
        hift_ext.load(again, disk / "saved")
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])
    optimizer.close()


def test_damage_of_every_piece_is_seen_and_named(disk) -> None:
    model, optimizer = make(store="disk")
    models.train(model, optimizer, models.batches(3))
    hift_ext.save(optimizer, disk / "saved")
    optimizer.close()
    path = disk / "saved" / SHARD
    with open(path, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
    assert {"__metadata__"} < head.keys()
    for number, (key, entry) in enumerate(head.items()):
        if key == "__metadata__" or (number % 5 > 1 and not key.startswith("unused")):
            continue
        first, end = (begin + at for at in entry["data_offsets"])
        at = first if number % 2 else end - 1
        flip(path, at)
        _, again = make(seed=1)
        if key.startswith("unused"):
            hift_ext.load(again, disk / "saved")  # nobody's bytes
        else:
            with pytest.raises(hift_ext.CheckpointError, match=f"{SHARD} is corrupted") as caught:
                hift_ext.load(again, disk / "saved")
            assert repr(key) in str(caught.value)
            assert again.state.engine is None
        flip(path, at)
    flip(path, 20)
    with pytest.raises(hift_ext.CheckpointError, match="its header"):
        hift_ext.load(again, disk / "saved")


def test_memory_is_below_two_pages(disk) -> None:
    _, optimizer = big("disk")
    _, small = make(store="disk")
    hift_ext.save(small, disk / "warm")
    hift_ext.load(small, disk / "warm")
    with Watch() as saving:
        hift_ext.save(optimizer, disk / "saved")
    assert saving.peak < 8 * MEBIBYTE
    assert shared_bytes(disk / "saved" / SHARD) >= 48 * MEBIBYTE
    with Watch() as filling:
        hift_ext.load(optimizer, disk / "saved")
    assert filling.peak < 8 * MEBIBYTE
    optimizer.close()
    small.close()


# Ranks --------------------------------------------------------------------------------------------


EIGHT = {"state_dtype": "8bit", "page_bytes": 4096}


def save_both_ways(optimizer: Any, folder: Path) -> None:
    """Shares blocks in `saved`, and copies in `copied`."""
    hift_ext.save(optimizer, folder / "saved")
    real, reflink.share = reflink.share, lambda *_: None
    try:
        hift_ext.save(optimizer, folder / "copied")
    finally:
        reflink.share = real


def on_save(folder: Path) -> Any:
    """Each rank has a page file of its own."""
    store = f"disk:{folder / 'pages'}{dist.get_rank()}"
    optimizer = made(model := sharded("root"), store=store, **EIGHT)
    models.train(model, optimizer, share(models.batches(8)))
    save_both_ways(optimizer, folder)
    mine = folder / "saved" / f"state-r{dist.get_rank():05d}-00001.safetensors"
    state, shared = whole_state(optimizer), shared_bytes(mine)
    optimizer.close()
    return state, shared


def on_load(folder: Path, name: str) -> Any:
    optimizer = made(sharded("root"), store="disk", state_dtype="8bit", page_bytes=2048)
    hift_ext.load(optimizer, folder / name)
    state = whole_state(optimizer)
    optimizer.close()
    return state


def equal(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        torch.equal(value, ours[name]) for theirs, ours in pairs for name, value in theirs.items()
    )


@pytest.mark.needs("fsdp2_on_cpu")
def test_every_rank_shares_its_page_file(disk) -> None:
    (state, shared), (_, others) = pair().run(on_save, disk)
    assert min(shared, others) > 4096
    files = sorted(p for p in (disk / "saved").iterdir() if p.name != manifest.NAME)
    assert [p.name for p in files] == [f"state-r0000{r}-00001.safetensors" for r in range(2)]
    assert all(equal(state, again) for again in pair().run(on_load, disk, "saved"))
    alone = {}
    for name in ("saved", "copied"):  # other blocks of codes
        alone[name] = made(plain(), **EIGHT)
        hift_ext.load(alone[name], disk / name)
    assert all(map(torch.equal, raw(alone["saved"]), raw(alone["copied"])))
    assert not equal(state, whole_state(alone["saved"]))


def test_saved_on_one_and_loaded_on_two(disk) -> None:
    optimizer = made(model := plain(), store="disk", **EIGHT)
    models.train(model, optimizer, models.batches(8))
    save_both_ways(optimizer, disk)
    optimizer.close()
    loaded = {name: pair().run(on_load, disk, name) for name in ("saved", "copied")}
    assert all(map(equal, loaded["saved"], loaded["copied"]))
