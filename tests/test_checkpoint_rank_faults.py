# SPDX-License-Identifier: Apache-2.0
# A rank that fails or dies while ranks save or load together: all raise, none waits for ever, and
# the last good checkpoint is there. Functions named `on_...` run on all ranks.
"""Faults under hift_ext.save and hift_ext.load of sharded parameters."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from checkpoint_rig import stopped
from ranks import Ranks, message_of, pair, share
from test_checkpoint_ranks import begun, load, save
from test_sharded import made, same, sharded, whole_state
from torch import nn

import hift_ext
from hift_ext import sharding, shards


@pytest.fixture
def ranks() -> Ranks:
    """Two processes, made by the first test that asks."""
    return pair()


def trained(steps: int, **options: Any) -> Any:
    model = sharded("root")
    optimizer = made(model, **options)
    models.train(model, optimizer, share(models.batches(steps)))
    return optimizer


def refuse(name: str) -> None:
    raise OSError(errno.EIO, f"no {name} today")


def equal(a: Any, b: Any) -> bool:
    try:
        same(a, b)
    except AssertionError:
        return False
    return True


def on_errors(path: Path, failing: int) -> list[str]:
    """An error of every third call of one rank: both raise, and either checkpoint is whole."""
    old, new = trained(3), trained(8)
    states = [whole_state(old), whole_state(new)]
    again = made(sharded("root"))
    said: list[str] = []
    for at in range(0, 1000, 3):
        hift_ext.save(old, path)
        error = None
        with stopped(at if dist.get_rank() == failing else 1000, refuse) as calls:
            try:
                hift_ext.save(new, path)
            except OSError as raised:
                error = str(raised)
        told: list[Any] = [None, None]
        dist.all_gather_object(told, (error, len(calls) > at))
        hift_ext.load(again, path)
        found = [equal(whole_state(again), state) for state in states]
        assert any(found)
        if not told[failing][1]:  # there are no more calls
            assert found == [False, True]
            return said
        assert (told[0][0] is None) == (told[1][0] is None), told
        if error is not None:
            said.append(error)
    raise AssertionError("saving never ends")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_is_an_error_of_all(failing, ranks, tmp_path) -> None:
    said = ranks.run(on_errors, tmp_path / "saved", failing)
    for text in said[1 - failing]:
        assert f"rank {failing} failed, and so all ranks stop. OSError: " in text
    assert len(said[failing]) > 2
    assert len(said[0]) == len(said[1])
    assert any("today" in text for text in said[0])
    assert os.listdir(tmp_path) == ["saved"]


def on_damage(path: Path, fresh: bool) -> Any:
    """A damaged shard, of which one rank needs nothing: all raise, and nothing has changed."""
    optimizer = made(sharded("root"), order="random") if fresh else trained(6)
    before, settings = whole_state(optimizer), optimizer.state_dict()["param_groups"]
    told = message_of(hift_ext.load, optimizer, path)
    same(whole_state(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == settings
    assert (optimizer.state.engine is None) == fresh
    return told


@pytest.mark.parametrize("fresh", [False, True])
def test_a_damaged_shard_stops_all_ranks(fresh, ranks, tmp_path) -> None:
    ranks.run(on_trained_save, tmp_path / "saved")
    shard = tmp_path / "saved" / "state-r00001-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    for told in ranks.run(on_damage, tmp_path / "saved", fresh):
        assert "state-r00001-00001.safetensors is corrupted" in told


def on_trained_save(path: Path) -> None:
    hift_ext.save(trained(8), path)


def on_refusals(path: Path) -> dict[str, str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    told, rank = {}, dist.get_rank()
    optimizer = trained(3)
    hift_ext.save(optimizer, path / "saved")
    told["path"] = message_of(hift_ext.save, optimizer, path / f"{rank}")
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = rate * (1 + rank)
    told["settings"] = message_of(hift_ext.save, optimizer, path / "saved")
    optimizer.param_groups[0]["lr"] = rate
    if rank:
        optimizer.close()
    told["closed"] = message_of(hift_ext.save, optimizer, path / "saved")
    told["closed load"] = message_of(hift_ext.load, optimizer, path / "saved")
    mesh = dist.init_device_mesh("cpu", (2,))
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    optimizer = hift_ext.AdamW([columns], layers_per_group="all")
    told["columns"] = message_of(hift_ext.save, optimizer, path / "saved")
    other = nn.Parameter(
        distribute_tensor(torch.ones(4), dist.DeviceMesh("cpu", [1, 0]), [Shard(0)])
    )
    optimizer = hift_ext.AdamW([columns, other], layers_per_group="all")
    told["meshes"] = message_of(hift_ext.save, optimizer, path / "saved")
    return told


def test_what_cannot_be_saved_together_says_so(ranks, tmp_path) -> None:
    for told in ranks.run(on_refusals, tmp_path):
        assert f"path is {tmp_path / '0'} on rank 0, but {tmp_path / '1'} on rank 1" in told["path"]
        assert "settings is " in told["settings"]
        assert "this optimizer is closed" in told["closed"]
        assert "this optimizer is closed" in told["closed load"]
        assert "use torch.distributed.checkpoint" in told["columns"]
        assert "are on different device meshes" in told["meshes"]
    assert os.listdir(tmp_path) == ["saved"]


# Three ranks, of which some die ------------------------------------------------------------------


def on_three_save(path: Path) -> Any:
    """Cuts that two ranks do not have: 50 rows are 17, 17 and 16."""
    model, optimizer = begun("plain", "root")
    for tokens in models.batches(8):
        models.loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, optimizer, path)
    dist.barrier()
    return whole_state(optimizer), [sharding.local(p).shape[0] for p in model.parameters()]


def on_death(path: Path, dying: int) -> Any:
    """One rank is killed in the middle of its shard."""
    _, optimizer = begun("plain", "root")
    models.train(_, optimizer, [models.batches(1)[0]])
    real = shards.ShardWriter.write

    def write(*args: Any) -> None:
        real(*args)
        if dist.get_rank() == dying:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.ShardWriter.write = write
    begin = time.monotonic()
    told = message_of(hift_ext.save, optimizer, path / "optimizer")
    return told, time.monotonic() - begin


def on_two_state(path: Path) -> Any:
    model, optimizer = begun("plain", "root")
    load(model, optimizer, path)
    return whole_state(optimizer)


def test_saved_on_three_of_which_one_dies_in_the_next_save(ranks, tmp_path) -> None:
    three = Ranks(3)
    try:
        state, sizes = three.run(on_three_save, tmp_path)[0]
        assert sizes[1] == 17
        answers = three.survivors(on_death, tmp_path, 1)
        assert sorted(answers) == [0, 2]
        for told, seconds in answers.values():
            assert "another rank has ended or did not answer" in told
            assert seconds < 20
    finally:
        three.close()
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "optimizer"]  # rank 0 took its work back
    for got in ranks.run(on_two_state, tmp_path):
        same(got, state)
    model, optimizer = begun("plain", None)
    load(model, optimizer, tmp_path)
    same(whole_state(optimizer), state)
