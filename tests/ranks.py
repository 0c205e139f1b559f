# SPDX-License-Identifier: Apache-2.0
# Processes that are joined by gloo and run one task after another, together. They are made once:
# importing torch takes longer than any of the tasks.
"""Several ranks on one machine."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from torch import nn

TIMEOUT = datetime.timedelta(seconds=30)


class Ranks:
    """`count` processes; `run` calls a function of a module on all of them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
        self._pipes, self._processes = [], []
        for rank in range(self._count):
            pipe, other = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._count, rendezvous, other), daemon=True
            )
            process.start()
            other.close()  # a rank that dies is the end of its pipe
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """`task(*args)` on every rank, and what each returned; fails if one of them raised."""
        for pipe in self._pipes:
            pipe.send((task, args))
        answers = [pipe.recv() for pipe in self._pipes]
        failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if failed:  # the others' collectives are out of step now
            self.close()
            self._start()
        assert not failed, "\n".join(failed)
        return [torch.load(io.BytesIO(data), weights_only=False) for _, data in answers]

    def survivors(self, task: Callable[..., Any], *args: Any) -> dict[int, Any]:
        """What `task(*args)` returned on those ranks that did not die of it; they end, too."""
        for pipe in self._pipes:
            pipe.send((task, args))
        answers = {}
        for rank, pipe in enumerate(self._pipes):
            with contextlib.suppress(EOFError):
                text, data = pipe.recv()
                assert not text, f"rank {rank}: {text}"
                answers[rank] = torch.load(io.BytesIO(data), weights_only=False)
        for process in self._processes:  # leaving in good order would need all of them
            process.kill()
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()


@functools.cache
def pair() -> Ranks:
    """Two ranks for all tests of this process."""
    two = Ranks(2)
    atexit.register(two.close)
    return two


def _serve(rank: int, count: int, rendezvous: str, pipe: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=TIMEOUT
    )
    while True:
        try:
            task, args = pipe.recv()
        except EOFError:
            break
        text, data = "", io.BytesIO()
        try:
            torch.save(task(*args), data)
        except Exception:
            text = traceback.format_exc()
        pipe.send((text, data.getvalue()))
    dist.destroy_process_group()


# What tasks share ---------------------------------------------------------------------------------


def share(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of every batch."""
    return [batch.chunk(dist.get_world_size())[dist.get_rank()] for batch in batches]


def averaged(model: nn.Module, shares: list[list[torch.Tensor]]) -> None:
    """In one process the gradients that ranks with these micro-batches each would average."""
    total: dict[nn.Parameter, torch.Tensor] = {}
    for micro_batches in shares:
        for tokens in micro_batches:
            (models.loss_of(model, tokens) / len(micro_batches)).backward()
        for p in model.parameters():
            if p.grad is not None:
                part = p.grad / len(shares)
                total[p] = total[p] + part if p in total else part
                p.grad = None
    for p, grad in total.items():
        p.grad = grad


def message_of(call: Callable[..., Any], *args: Any) -> str:
    """The message of the RuntimeError that a call raises, or nothing."""
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return ""
