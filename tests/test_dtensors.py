# SPDX-License-Identifier: Apache-2.0
# DTensors without FSDP2: gradients that are placed otherwise, stale graphs, other devices.
# Functions named `on_...` run on both ranks.
"""DTensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, message_of, pair
from torch import nn

import hift_ext
from hift_ext import sharding


@pytest.fixture
def ranks() -> Ranks:
    """Two processes, made by the first test that asks."""
    return pair()


def on_placements() -> Any:
    """Gradients that are still to be summed, or cut otherwise than their parameter."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, rank = dist.init_device_mesh("cpu", (2,)), dist.get_rank()
    start, grad = torch.arange(12.0).view(4, 3), torch.linspace(-1, 1, 12).view(4, 3)
    results = []
    for placement in (Shard(0), Shard(1), Replicate()):
        for given in (Partial(), Shard(0), Replicate()):
            p = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
            optimizer = hift_ext.AdamW([p], lr=1e-2, layers_per_group="all")
            for _ in range(2):
                if given.is_partial():
                    part = grad * (0.25, 0.75)[rank]
                    p.grad = DTensor.from_local(part, mesh, [given])
                else:
                    p.grad = distribute_tensor(grad, mesh, [given])
                optimizer.step()
            results.append(p.full_tensor())
    return results


def test_gradients_are_brought_into_the_parameters_placements(ranks) -> None:
    p = nn.Parameter(torch.arange(12.0).view(4, 3))
    optimizer = hift_ext.AdamW([p], lr=1e-2, layers_per_group="all")
    for _ in range(2):
        p.grad = torch.linspace(-1, 1, 12).view(4, 3)
        optimizer.step()
    for results in ranks.run(on_placements):
        assert len(results) == 9
        for result in results:
            torch.testing.assert_close(result, p.detach(), rtol=1e-7, atol=0)


def on_stale_backward() -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    told = []
    for look in (lambda p: p, lambda p: p.to_local()):
        p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        optimizer = hift_ext.AdamW([p], lr=1e-2, layers_per_group="all")
        p.grad = torch.ones_like(p)
        loss = (look(p) * look(p)).sum()
        optimizer.step()
        told.append(message_of(loss.backward))
    return told


def test_a_backward_through_an_older_forward_raises(ranks) -> None:
    for told in ranks.run(on_stale_backward):
        assert "modified by an inplace operation" in told[0]
        assert "modified inplace" in told[1]


def on_other_device() -> Any:
    """State in host memory beside parameters of a device mesh elsewhere stays where it is."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = dist.DeviceMesh("meta", torch.arange(2))
    part = torch.ones(2, 3)
    p = DTensor.from_local(part.to("meta"), mesh, [Shard(0)], shape=(3, 3), stride=(3, 1))
    state = sharding.like(p, part)
    return (
        state.shape,
        state.device.type,
        state.placements == p.placements,
        (sharding.local(state).data_ptr() == part.data_ptr()),
    )


def test_state_is_not_moved_to_the_mesh_s_device(ranks) -> None:
    assert ranks.run(on_other_device) == [((3, 3), "cpu", True, True)] * 2
