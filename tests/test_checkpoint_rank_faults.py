# SPDX-License-Identifier: Apache-2.0
# A rank that fails or dies while ranks save or load together: all raise, none waits for ever, and
# the last good checkpoint is there. Functions named `on_...` run on all ranks.
"""Faults under hift_ext.save and hift_ext.load of sharded parameters."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, message_of, pair, share
from test_checkpoint_faults import stopped
from test_checkpoint_ranks import begun, load, save
from test_sharded import made, plain, same, sharded, whole_state
from torch import nn

import hift_ext
from hift_ext import shards, sharding


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


def on_errors(path: Path, failing: int) -> list[str]:
    """An error of every third call of one rank: both raise, and the checkpoint is one of the two."""
    old, new = trained(3), trained(8)
    states = [whole_state(old), whole_state(new)]
    said: list[str] = []
    at = 0
    while True:
        hift_ext.save(old, path)
        calls: list[str] = []
        error = None
        with stopped(at if dist.get_rank() == failing else 1 << 30, refuse) as calls:
            try:
                hift_ext.save(new, path)
            except OSError as raised:
                error = raised
        told: list[Any] = [None, None]
        dist.all_gather_object(told, (None if error is None else str(error), len(calls)))
        again = made(sharded("root"))
        hift_ext.load(again, path)
        found = whole_state(again)
        same(found, states[len(found[0]["exp_avg"]) and found[-1]["step"] == states[1][-1]["step"]])
        if told[failing][1] <= at:
            return said
        if told[failing][0] is not None:
            assert told[1 - failing][0] is not None, (at, told)
            assert f"rank {failing} failed" in told[1 - failing][0]
            said.append(told[failing][0])
        at += 3


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_is_an_error_of_all(failing, ranks, tmp_path) -> None:
    for said in ranks.run(on_errors, tmp_path / "saved", failing):
        assert len(said) > 2
        assert any("today" in text for text in said)
    assert os.listdir(tmp_path) == ["saved"]
