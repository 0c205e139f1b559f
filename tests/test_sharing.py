# SPDX-License-Identifier: Apache-2.0
# One optimizer, several threads or processes: threads take turns, forked children are told, and a
# pickled optimizer goes on in a spawned process.
"""Threads and processes."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import models
import pytest
import torch
from test_interrupts import run
from torch import nn

import hift_ext


@pytest.mark.parametrize("store", ["ram", "device"])
def test_a_step_from_another_thread(store) -> None:
    model = models.tiny(blocks=1)
    copied = models.twin(model)
    optimizer, reference = (hift_ext.AdamW(m, lr=1e-2, store=store) for m in (model, copied))
    data = models.batches(7)
    for tokens in data:
        thread = threading.Thread(target=models.train, args=(model, optimizer, [tokens]))
        thread.start()
        thread.join()
    models.train(copied, reference, data)
    assert models.same(model, copied)


@pytest.fixture
def eager_switches():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_threads_that_step_one_optimizer_take_turns(store, eager_switches) -> None:
    params = [(f"layer{i}.weight", nn.Parameter(torch.zeros(30, 30))) for i in range(4)]
    optimizer = hift_ext.SGD(params, lr=1.0, momentum=0.0, store=store)
    assert len(optimizer.groups) == 4
    for _, p in params:
        p.requires_grad_(True)
        p.grad = torch.ones(30, 30)
    errors = []

    def work() -> None:
        try:
            for _ in range(100):
                optimizer.step()
                optimizer.state_dict()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (optimizer.pass_index, optimizer.active) == (100, 0)
    assert all(torch.equal(p.detach(), torch.full((30, 30), -100.0)) for _, p in params)


def test_threads_that_step_two_optimizers(eager_switches) -> None:
    pairs = []
    for seed in range(2):
        model = models.tiny(blocks=1, width=8, seed=seed)
        pairs.append((model, hift_ext.AdamW(model, lr=1e-2)))
    expected = copy.deepcopy(pairs)
    data = models.batches(20)
    threads = [threading.Thread(target=models.train, args=(*pair, data)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (model, _), (other, optimizer) in zip(pairs, expected, strict=True):
        models.train(other, optimizer, data)
        assert models.same(model, other)


def test_a_child_that_steps_and_exits_leaves_the_parent_alone() -> None:
    printed = run(
        """
        import os, sys, torch, models, hift_ext
        torch.set_num_threads(1)
        for store in ("ram", "disk", "device"):
            model = models.tiny(blocks=1)
            optimizer = hift_ext.AdamW(model, lr=1e-2, store=store)
            copied = models.twin(model)
            reference = hift_ext.AdamW(copied, lr=1e-2)
            models.train(copied, reference, models.batches(7))
            models.train(model, optimizer, models.batches(7)[:4])
            child = os.fork()
            if child == 0:
                for p in optimizer.groups[optimizer.active].params:
                    p.grad = torch.ones_like(p)
                before = models.weights(model)
                try:
                    optimizer.step()  # state beside the parameters is the child's own copy
                    print("stepped", flush=True)
                except RuntimeError as error:
                    print(error, not models.changed(before, model), optimizer.active, flush=True)
                sys.exit(0)  # an ordinary exit, with every finalizer
            assert os.waitpid(child, 0)[1] == 0
            models.train(model, optimizer, models.batches(7)[4:])
            print(models.same(model, copied), flush=True)
            optimizer.close()
        """
    )
    lines = printed.splitlines()
    assert lines[4:] == ["stepped", "True"]
    for refused, went_on in (lines[:2], lines[2:4]):
        assert "forked child" in refused
        assert "make a new optimizer" in refused
        assert refused.endswith("True 1")
        assert went_on == "True"


def test_a_fork_while_another_thread_steps_does_not_hang_the_child() -> None:
    printed = run(
        """
        import os, signal, threading, torch, hift_ext
        p = torch.nn.Parameter(torch.zeros(1000))
        p.grad = torch.ones(1000)
        optimizer = hift_ext.SGD([p], lr=1.0, layers_per_group="all", momentum=0.9)
        optimizer.step()  # the state belongs to this process
        stop = threading.Event()

        def work():
            while not stop.is_set():
                optimizer.step()

        thread = threading.Thread(target=work)
        thread.start()
        ends = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a child that hangs ends by a signal
                try:
                    optimizer.step()
                except RuntimeError as error:
                    os._exit(0 if "forked child" in str(error) else 1)
                os._exit(2)
            ends.append(os.waitpid(child, 0)[1])
        stop.set()
        thread.join()
        print(set(ends))
        """
    )
    assert printed.strip() == "{0}"


def test_spawned_process_goes_on_with_a_pickled_optimizer() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2, store="disk")
    data = models.batches(8)
    models.train(model, optimizer, data[:4])
    context = torch.multiprocessing.get_context("spawn")
    weights = context.SimpleQueue()
    pair = pickle.dumps((model, optimizer))
    process = context.Process(target=go_on_elsewhere, args=(pair, data[4:], weights))
    process.start()
    found = weights.get()
    process.join()
    assert process.exitcode == 0
    models.train(model, optimizer, data[4:])
    assert all(torch.equal(p, torch.from_numpy(found[n])) for n, p in model.named_parameters())


def go_on_elsewhere(pair: bytes, data: list[torch.Tensor], weights) -> None:
    torch.set_num_threads(1)
    model, optimizer = pickle.loads(pair)
    models.train(model, optimizer, data)
    weights.put({name: p.numpy() for name, p in models.weights(model).items()})
