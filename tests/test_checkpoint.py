# SPDX-License-Identifier: Apache-2.0
# save and load: between stores, page sizes and numbers of groups, and in a new process, to the bit;
# what does not fit or is damaged changes nothing.
"""hift_ext.save, hift_ext.load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hift_ext
from hift_ext import checkpoint, loading, manifest, shards

STORES = ("ram", "disk", "device")
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (hift_ext.AdamW, {"lr": 1e-2}),
    "amsgrad": (hift_ext.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "adagrad": (hift_ext.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.5}),
    "momentum": (hift_ext.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2}),
    "sgd": (hift_ext.SGD, {"lr": 1e-2}),
}


def make(rule: str = "adamw", seed: int = 0, blocks: int = 2, **options: Any):
    kind, settings = RULES[rule]
    model = models.tiny(blocks=blocks, seed=seed)
    return model, kind(model, page_bytes=4096, **{**settings, **options})


def everything(optimizer: hift_ext.HiFTOptimizer) -> dict[str, Any]:
    """A copy of all that a checkpoint must carry."""
    saved = optimizer.state_dict()
    state = {
        key: {name: value.clone() for name, value in entry.items()}
        for key, entry in saved["state"].items()
    }
    visits = [entry.visits for entry in optimizer.state.entries.values()]
    return {"state": state, "groups": saved["param_groups"], "visits": visits}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        a["groups"] == b["groups"]
        and a["visits"] == b["visits"]
        and a["state"].keys() == b["state"].keys()
        and all(
            torch.equal(value, b["state"][key][name])
            for key, entry in a["state"].items()
            for name, value in entry.items()
        )
    )


# Every store with one rule, every rule with state with one store, and what has had no step.
CASES = [
    *(("adamw", store, 3) for store in STORES),
    *((rule, "disk", 3) for rule in ("amsgrad", "adagrad", "momentum")),
    ("adamw", "ram", 0),
    ("adagrad", "ram", 0),
]


@pytest.mark.parametrize(("rule", "store", "steps"), CASES)
def test_from_every_store_to_every_other(rule, store, steps, tmp_path) -> None:
    model, optimizer = make(rule, store=store)
    models.train(model, optimizer, models.batches(steps))
    before = everything(optimizer)
    hift_ext.save(optimizer, tmp_path / "saved")
    assert same(everything(optimizer), before)
    models.train(model, optimizer, models.batches(5, seed=2))
    for other, page in (("ram", 2048), ("disk", 16384), ("device", 4096)):
        again, resumed = make(rule, seed=1, store=other, lr=0.5)
        resumed._options["page_bytes"] = page
        models.train(again, resumed, models.batches(2))  # what is there must go
        hift_ext.load(resumed, tmp_path / "saved")
        assert same(everything(resumed), before)
        start, _ = make(rule)
        models.train(start, _, models.batches(steps))
        again.load_state_dict(start.state_dict())
        models.train(again, resumed, models.batches(5, seed=2))
        assert models.same(again, model)
        resumed.close()
    optimizer.close()
    assert os.listdir(tmp_path) == ["saved"]


def resume(folder: str) -> None:
    """Runs in a new process: goes on from every checkpoint in `folder`."""
    for path in sorted(Path(folder).iterdir()):
        rule, store = path.name.split("-")
        model, optimizer = make(rule, seed=9, store=store, lr=0.5)
        model.load_state_dict(torch.load(path / "model.pt", weights_only=True))
        hift_ext.load(optimizer, path / "optimizer")
        models.train(model, optimizer, models.batches(13)[6:])
        torch.save(model.state_dict(), path / "model.pt")
        optimizer.close()


def test_resume_in_a_new_process_is_like_never_having_stopped(tmp_path) -> None:
    whole = {}
    for number, rule in enumerate(RULES):
        store = STORES[number % 3]
        folder = tmp_path / f"{rule}-{store}"
        folder.mkdir()
        model, optimizer = make(rule, store=store)
        models.train(model, optimizer, models.batches(13)[:6])  # in mid-pass
        assert optimizer.param_groups[0]["hift"]["position"] == 2
        hift_ext.save(optimizer, folder / "optimizer")
        torch.save(model.state_dict(), folder / "model.pt")
        models.train(model, optimizer, models.batches(13)[6:])
        whole[folder] = model
        optimizer.close()
    code = f"import test_checkpoint; test_checkpoint.resume({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    for folder, model in whole.items():
        there = torch.load(folder / "model.pt", weights_only=True)
        assert all(torch.equal(value, there[name]) for name, value in model.state_dict().items())


def test_shards_are_safetensors_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(shards, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(checkpoint, "_STEP", 1024)
    monkeypatch.setattr(loading, "LOAD_STEP", 700)
    model, optimizer = make()
    models.train(model, optimizer, models.batches(9))
    hift_ext.save(optimizer, tmp_path / "saved")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    state = optimizer.state_dict()["state"]
    assert len(tensors) == 2 * len(state)
    for index, entry in state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(tensors[f"{index}.{name}"], entry[name])
    _, again = make()
    hift_ext.load(again, tmp_path / "saved")
    assert same(everything(again), everything(optimizer))


def test_another_number_of_groups_begins_a_new_pass(tmp_path) -> None:
    model, optimizer = make()
    models.train(model, optimizer, models.batches(5))
    hift_ext.save(optimizer, tmp_path / "saved")
    again, fewer = make(layers_per_group="all")
    with pytest.warns(UserWarning, match="of 4 groups, this optimizer has 1"):
        hift_ext.load(fewer, tmp_path / "saved")
    assert everything(fewer)["visits"] == everything(optimizer)["visits"]
    assert fewer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    models.train(again, fewer, models.batches(2))


def test_settings_keep_their_types(tmp_path) -> None:
    model = models.tiny(blocks=1)
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "lr": 1e-3},
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() <= 1], "eps": 1e-7},
    ]
    optimizer = hift_ext.AdamW(groups, lr=torch.tensor(1e-2), betas=(0.8, 0.99))
    optimizer.param_groups[1]["note"] = {"a": [1, (2.5, None)], "b": float("inf")}
    models.train(model, optimizer, models.batches(2))
    hift_ext.save(optimizer, tmp_path / "saved")
    before = optimizer.state_dict()["param_groups"]
    optimizer.close()
    again = hift_ext.AdamW(groups, lr=1.0)
    hift_ext.load(again, tmp_path / "saved")
    assert again.state_dict()["param_groups"] == before
    assert isinstance(again.param_groups[1]["lr"], torch.Tensor)
    assert again.param_groups[1]["note"] == {"a": [1, (2.5, None)], "b": float("inf")}
    again.param_groups[0]["note"] = object()
    with pytest.raises(TypeError, match=r"\['note'\] is a object"):
        hift_ext.save(again, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["saved"]


def test_strides_shapes_and_16_bits(tmp_path) -> None:
    def build(layout):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 2)).to(torch.bfloat16)
        net.scale, net.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 0))
        net[0].to(memory_format=layout)
        return net

    def step(net, optimizer):
        for p in net.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype)
        optimizer.step()

    net = build(torch.channels_last)
    optimizer = hift_ext.AdamW(net, layers_per_group="all", store="disk")
    step(net, optimizer)
    hift_ext.save(optimizer, tmp_path / "saved")
    for layout in (torch.channels_last, torch.contiguous_format):
        other = build(layout)
        again = hift_ext.AdamW(other, layers_per_group="all")
        hift_ext.load(again, tmp_path / "saved")
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])
            assert again.state[q]["exp_avg"].dtype == torch.float32


def test_frozen_parameters_keep_their_index(tmp_path) -> None:
    model, optimizer = make()
    models.train(model, optimizer, models.batches(5))
    hift_ext.save(optimizer, tmp_path / "saved")
    other = models.tiny(blocks=2)
    other.embedding.requires_grad_(False)
    again = hift_ext.AdamW(other, page_bytes=4096)
    with (
        pytest.warns(UserWarning, match="of 1 parameters is left out"),
        pytest.warns(UserWarning, match="of 4 groups, this optimizer has 3"),
    ):
        hift_ext.load(again, tmp_path / "saved")
    theirs = again.state_dict()["state"]
    assert 0 not in theirs
    assert all(
        torch.equal(v, theirs[i][n])
        for i, e in optimizer.state_dict()["state"].items()
        for n, v in e.items()
        if i
    )


def test_wrapped_models_have_other_names_for_the_same(tmp_path) -> None:
    model, optimizer = make()
    models.train(model, optimizer, models.batches(3))
    hift_ext.save(optimizer, tmp_path / "saved")
    outer = nn.Module()
    outer.module = models.tiny(blocks=2)
    again = hift_ext.AdamW(outer)
    hift_ext.load(again, tmp_path / "saved")
    assert same(everything(again), everything(optimizer))


Damage = Callable[[Path], object]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest so that its checksum is right again."""
    body = json.loads(path.read_text())
    del body["crc32"]
    change(body)
    path.write_text(json.dumps({**body, "crc32": manifest._sum(body)}))


SHARD, MANIFEST = "state-00001.safetensors", manifest.NAME
DAMAGES: dict[str, tuple[Damage, str]] = {
    "data": (lambda d: flip(d / SHARD, -9), "state-00001.safetensors is corrupted: the checksum"),
    "first": (lambda d: flip(d / SHARD, 4096 * 2), "00001.safetensors is corrupted"),
    "header": (lambda d: flip(d / SHARD, 20), "00001.safetensors is corrupted: its header"),
    "short": (lambda d: os.truncate(d / SHARD, 5000), "00001.safetensors is truncated: 5000"),
    "empty": (lambda d: os.truncate(d / SHARD, 0), "00001.safetensors is truncated: 0 bytes"),
    "long": (lambda d: os.truncate(d / SHARD, 1 << 20), "is not the file that was saved"),
    "no shard": (lambda d: os.unlink(d / SHARD), "00001.safetensors is missing"),
    "no manifest": (lambda d: os.unlink(d / MANIFEST), "not a checkpoint: it has no manifest"),
    "half manifest": (lambda d: os.truncate(d / MANIFEST, 700), "manifest.json is corrupted"),
    "bit": (lambda d: flip(d / MANIFEST, -3), "manifest.json is corrupted"),
    "foreign": (lambda d: (d / MANIFEST).write_text("{}"), "not the manifest of a hift_ext"),
    "list": (lambda d: (d / MANIFEST).write_text("[1]"), "not the manifest of a hift_ext"),
    "version": (lambda d: edit(d / MANIFEST, lambda b: b.update(version=7)), "version 7"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_changes_nothing(damage, tmp_path) -> None:
    """Neither an optimizer with state nor a new one, which is loaded while it is verified."""
    model, optimizer = make()
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    models.train(model, optimizer, models.batches(3))
    optimizer.param_groups[0]["lr"] = 0.25
    before = everything(optimizer)
    harm, message = DAMAGES[damage]
    harm(tmp_path / "saved")
    with pytest.raises(hift_ext.CheckpointError, match=message):
        hift_ext.load(optimizer, tmp_path / "saved")
    assert same(everything(optimizer), before)
    for store in ("ram", "disk"):
        model, new = make(store=store, order="random", lr=0.5)
        before = everything(new)
        with pytest.raises(hift_ext.CheckpointError, match=message):
            hift_ext.load(new, tmp_path / "saved")
        assert new.state.engine is None
        assert same(everything(new), before)
        models.train(model, new, models.batches(1))
        new.close()


def test_what_does_not_fit_changes_nothing(tmp_path) -> None:
    model, optimizer = make()
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    named = tmp_path / "saved" / MANIFEST
    wider = models.tiny(blocks=2, width=32)
    bare = list(models.tiny(blocks=2).parameters())
    cases = [
        (make("amsgrad")[1], "saved by AdamW, and this is Adam"),
        (make(blocks=3)[1], "doesn't match the size"),
        (hift_ext.AdamW(wider), r"'embedding.weight' has the shape \(50, 32\), and \(50, 24\)"),
        (
            hift_ext.AdamW([{"params": bare[:3]}, {"params": bare[3:]}], layers_per_group="all"),
            "different number of parameter groups: 1, and the optimizer has 2",
        ),
    ]
    for other, message in cases:
        before = everything(other)
        with pytest.raises(ValueError, match=message):
            hift_ext.load(other, tmp_path / "saved")
        assert same(everything(other), before)
    before = everything(optimizer)
    for change, message in (
        (lambda b: b["params"][2].update(name="other"), "parameter 2 is 'other'"),
        (lambda b: b["params"][1]["streams"].pop(), "'blocks.0.norm.weight' lacks exp_avg_sq"),
        (lambda b: b["params"][1]["streams"][0].update(run=256), "conversion is not offered"),
    ):
        text = named.read_text()
        edit(named, change)
        with pytest.raises(ValueError, match=message):
            hift_ext.load(optimizer, tmp_path / "saved")
        named.write_text(text)
        assert same(everything(optimizer), before)
    for nothing in (tmp_path / "none", named):
        with pytest.raises(hift_ext.CheckpointError, match=r"is not a checkpoint|is a file"):
            hift_ext.load(optimizer, nothing)
    optimizer.close()
    for call in (hift_ext.load, hift_ext.save):
        with pytest.raises(RuntimeError, match="closed"):
            call(optimizer, tmp_path / "saved")


def test_what_is_not_a_checkpoint_is_not_replaced(tmp_path) -> None:
    _, optimizer = make()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("text")
    hift_ext.save(optimizer, tmp_path / "saved")
    (tmp_path / "saved" / "model.pt").write_text("weights")
    for name, message in (
        ("mine", "not empty and not a checkpoint"),
        ("file", "is not a directory"),
        ("saved", "holds 'model.pt', which is not the checkpoint's"),
    ):
        with pytest.raises(FileExistsError, match=message):
            hift_ext.save(optimizer, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="make it first"):
        hift_ext.save(optimizer, tmp_path / "none" / "saved")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "saved" / "model.pt").read_text() == "weights"
    assert len(os.listdir(tmp_path)) == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    hift_ext.save(optimizer, tmp_path / "link")  # where the link points
    assert (tmp_path / "empty" / MANIFEST).exists()
    hift_ext.load(optimizer, tmp_path / "link")
