# SPDX-License-Identifier: Apache-2.0
# save and load of sharded parameters: every rank writes its rows, any number of ranks reads them,
# and a run goes on to the bit. Functions named `on_...` run on all ranks.
"""hift_ext.save and hift_ext.load under FSDP2 and DDP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, averaged, pair, share
from safetensors.torch import load_file
from test_resharding import train_alone
from test_sharded import GROUPS, made, plain, same, sharded, whole, whole_state
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

import hift_ext
from hift_ext import loading, manifest

END = 14
ORDER = {"order": "random", "seed": 1}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "disk": {"store": "disk", "page_bytes": 4096},
    "split": {"master": "split"},
    "8bit": {"state_dtype": "8bit"},
}


@pytest.fixture
def ranks() -> Ranks:
    """Two processes, made by the first test that asks."""
    return pair()


def model_of(way: str, how: str | None) -> Any:
    """A model, whole (`how` is None) or cut over the ranks."""
    if way != "split":
        return plain() if how is None else sharded(how)
    from torch.distributed.fsdp import fully_shard

    model = plain().to(torch.bfloat16)
    return model if how is None else fully_shard(model)


def begun(way: str, how: str | None) -> tuple[Any, Any]:
    model = model_of(way, how)
    return model, made(model, **ORDER, **WAYS[way])


def save(model: nn.Module, optimizer: Any, path: Path) -> None:
    """Saves weights by torch and the rest by hift_ext."""
    weights = {name: whole(p) for name, p in model.named_parameters()}
    hift_ext.save(optimizer, path / "optimizer")
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(weights, path / "model.pt")


def load(model: nn.Module, optimizer: Any, path: Path) -> None:
    weights = torch.load(path / "model.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, [], model_state_dict=weights, optim_state_dict={}, options=options)
    hift_ext.load(optimizer, path / "optimizer")


def on_save(way: str, how: str, stop: int, path: Path) -> Any:
    """Saves in the middle, goes on, and gives what should be there at the end."""
    model, optimizer = begun(way, how)
    models.train(model, optimizer, share(models.batches(END)[:stop]))
    save(model, optimizer, path)
    dist.barrier()
    models.train(model, optimizer, share(models.batches(END)[stop:]))
    return {name: whole(p) for name, p in model.named_parameters()}, whole_state(optimizer)


def on_resume(way: str, how: str, stop: int, steps_before: int, path: Path) -> Any:
    model, optimizer = begun(way, how)
    models.train(model, optimizer, share(models.batches(steps_before, seed=5)))
    load(model, optimizer, path)
    models.train(model, optimizer, share(models.batches(END)[stop:]))
    return {name: whole(p) for name, p in model.named_parameters()}, whole_state(optimizer)


@pytest.mark.parametrize(
    ("way", "how", "stop", "before"),
    [
        ("plain", "blocks", 3, 0),
        ("plain", "replicas", 8, 6),
        ("disk", "root", 8, 6),
        ("split", "root", 8, 0),
        ("8bit", "blocks", 8, 6),
    ],
)
@pytest.mark.needs("fsdp2_on_cpu")
def test_saved_on_two_and_resumed_on_two(way, how, stop, before, ranks, tmp_path) -> None:
    (weights, state), again = ranks.run(on_save, way, how, stop, tmp_path)
    same(again, (weights, state))
    for got, got_state in ranks.run(on_resume, way, how, stop, before, tmp_path):
        same(got, weights)
        same(got_state, state)
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "optimizer"]


@pytest.mark.parametrize(("way", "stop"), [("plain", 8), ("disk", 3), ("split", 8)])
@pytest.mark.needs("fsdp2_on_cpu")
def test_saved_on_two_and_resumed_on_one(way, stop, ranks, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "LOAD_STEP", 256)  # several pieces a parameter
    weights, state = ranks.run(on_save, way, "root", stop, tmp_path)[0]
    model, optimizer = begun(way, None)
    load(model, optimizer, tmp_path)
    train_alone(model, optimizer, models.batches(END)[stop:])
    same(models.weights(model), weights)
    same(whole_state(optimizer), state)


@pytest.mark.parametrize(("way", "before"), [("plain", 0), ("disk", 6), ("split", 6)])
@pytest.mark.needs("fsdp2_on_cpu")
def test_saved_on_one_and_resumed_on_two(way, before, ranks, tmp_path) -> None:
    model, optimizer = begun(way, None)
    train_alone(model, optimizer, models.batches(END)[:8])
    save(model, optimizer, tmp_path)
    train_alone(model, optimizer, models.batches(END)[8:])
    for got, state in ranks.run(on_resume, way, "root", 8, before, tmp_path):
        same(got, models.weights(model))
        same(state, whole_state(optimizer))


@pytest.mark.needs("fsdp2_on_cpu")
def test_each_rank_writes_its_rows(ranks, tmp_path) -> None:
    ranks.run(on_save, "plain", "blocks", 8, tmp_path)
    model, optimizer = begun("plain", None)
    load(model, optimizer, tmp_path)
    files = [
        load_file(tmp_path / "optimizer" / f"state-r0000{r}-00001.safetensors") for r in (0, 1)
    ]
    names = list(dict(model.named_parameters()))
    index = names.index("embedding.weight")
    expected = optimizer.state[model.embedding.weight]["exp_avg"]
    for rank, rows in enumerate(("0:25", "25:50")):
        assert torch.equal(files[rank][f"{index}.exp_avg[{rows}]"], expected[rank * 25 :][:25])
    scale = f"{names.index('scale')}.exp_avg"
    assert scale in files[0]  # one element, which rank 1 has no part of
    assert scale not in files[1]


@pytest.mark.parametrize("cuts", [[(0, 4)], [(0, 4), (3, 3)], [(4, 2)], [(0, 3), (4, 2)], [(0, 7)]])
def test_parts_that_do_not_make_up_a_parameter_are_not_published(cuts) -> None:
    stream = manifest.SavedStream("sum", torch.float32, 1, 1, 0.0)
    param = manifest.SavedParam(3, "w", torch.float32, (6,), (1,), 1, [stream])
    whole_one = manifest.Manifest("SGD", [], [param])
    manifest.check_tiled(whole_one)  # no values
    stream.pieces = [manifest.Piece("", "", *cut, "") for cut in ((0, 4), (4, 2))]
    manifest.check_tiled(whole_one)
    stream.pieces = [manifest.Piece("", "", *cut, "") for cut in cuts]
    with pytest.raises(RuntimeError, match=r"of sum of parameter 3 \('w'\) are not the whole"):
        manifest.check_tiled(whole_one)


# 8-bit state --------------------------------------------------------------------------------------


class Even(nn.Module):
    """Rows of 256 elements: wherever it is cut, blocks of 8-bit codes are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 256)
        self.body = nn.Linear(256, 256, bias=False)
        self.head = nn.Linear(256, 50, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


def even(cut: bool) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = fully_shard(Even()) if cut else Even()
    groups = [["embedding"], ["body"], ["head"]]
    return model, hift_ext.AdamW(model, lr=1e-2, groups=groups, state_dtype="8bit")


def on_even(path: Path | None) -> Any:
    model, optimizer = even(cut=True)
    data = share(models.batches(8))
    if path is None:
        models.train(model, optimizer, data)
    else:
        load(model, optimizer, path)
    return {name: whole(p) for name, p in model.named_parameters()}, whole_state(optimizer)


@pytest.mark.needs("fsdp2_on_cpu")
def test_8_bit_state_whose_blocks_are_not_cut_is_one_process_s(ranks, tmp_path) -> None:
    model, optimizer = even(cut=False)
    train_alone(model, optimizer, models.batches(8))
    save(model, optimizer, tmp_path)
    for path in (None, tmp_path):
        for got, state in ranks.run(on_even, path):
            same(got, models.weights(model))
            same(state, whole_state(optimizer))


def on_8bit(steps: int) -> dict[str, torch.Tensor]:
    model = sharded("root")
    optimizer = made(model, state_dtype="8bit")
    models.train(model, optimizer, share(models.batches(steps)))
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.needs("fsdp2_on_cpu")
def test_8_bit_blocks_are_counted_from_each_rank_s_first_element(ranks) -> None:
    """Two ranks are one process whose parameters are cut into as many tensors."""
    model = plain()
    parts = {
        name: [nn.Parameter(part.clone()) for part in p.detach().chunk(2)]
        for name, p in model.named_parameters()
    }
    groups = [
        [part for name in parts if name.startswith(tuple(prefixes)) for part in parts[name]]
        for prefixes in GROUPS
    ]
    pieces = [part for each in parts.values() for part in each]
    optimizer = hift_ext.AdamW(pieces, lr=1e-2, groups=groups, state_dtype="8bit")
    one = plain()
    unlike = made(one, state_dtype="8bit")
    for tokens in models.batches(11):
        averaged(model, [[tokens[:2]], [tokens[2:]]])
        for name, p in model.named_parameters():
            if p.grad is not None:
                for part, grad in zip(parts[name], p.grad.chunk(2), strict=True):
                    part.grad = grad.clone() if part.requires_grad else None
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.cat(parts[name]))
        averaged(one, [[tokens[:2]], [tokens[2:]]])
        unlike.step()
        unlike.zero_grad()
    for got in ranks.run(on_8bit, 11):
        same(got, models.weights(model))
    assert models.changed(models.weights(one), model)  # the cut does tell


@pytest.mark.needs("fsdp2_on_cpu")
def test_8_bit_state_cut_elsewhere_goes_by_way_of_float32(ranks, tmp_path, monkeypatch) -> None:
    """As load_state_dict, which goes another way, makes of it."""
    monkeypatch.setattr(loading, "LOAD_STEP", 256)
    weights, _ = ranks.run(on_save, "8bit", "root", END, tmp_path)[0]
    (_, state), _ = ranks.run(on_resume, "8bit", "root", END, 0, tmp_path)
    model, optimizer = begun("8bit", None)
    load(model, optimizer, tmp_path)
    same(models.weights(model), weights)
    reference = made(plain(), **ORDER, **WAYS["8bit"])
    saved = optimizer.state_dict()
    saved["state"] = dict(enumerate(state))
    reference.load_state_dict(saved)
    same(whole_state(optimizer), whole_state(reference))
    changed = [
        not torch.equal(a["exp_avg"], b["exp_avg"])
        for a, b in zip(whole_state(optimizer), state, strict=True)
    ]
    assert any(changed)  # blocks with other elements
    for ours, theirs in zip(whole_state(optimizer), state, strict=True):
        largest = theirs["exp_avg"].abs().max()
        # Half of a step of 3 mantissa bits; below the least share, zero.
        bound = theirs["exp_avg"].abs() / 16 + largest * 2**-14
        assert ((ours["exp_avg"] - theirs["exp_avg"]).abs() <= bound).all()


# DDP ----------------------------------------------------------------------------------------------


def on_ddp(path: Path, all_save: bool) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = plain()
    optimizer = made(model, **ORDER)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    models.train(wrapped, optimizer, share(models.batches(6)))
    if all_save or dist.get_rank() == 0:
        hift_ext.save(optimizer, path)
    dist.barrier()
    again = made(plain(), **ORDER)
    hift_ext.load(again, path)
    same(whole_state(again), whole_state(optimizer))
    return os.listdir(path.parent)


@pytest.mark.parametrize("all_save", [False, True])
def test_whole_parameters_are_saved_by_one_rank_or_by_all(all_save, ranks, tmp_path) -> None:
    ranks.run(on_ddp, tmp_path / "saved", all_save)
    assert os.listdir(tmp_path) == ["saved"]
