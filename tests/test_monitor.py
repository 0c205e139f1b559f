# SPDX-License-Identifier: Apache-2.0
# hift_ext.monitor, as a user has it: the file, what raises, and that the training under it is the
# same to the bit.

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hf
import models
import pytest
import torch
from torch import nn

import hift_ext
from hift_ext import runlog

LINE = {
    *("kind", "step", "pass", "group", "group_index", "lr", "loss", "grad_norm"),
    *("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "update_ms", "wait_ms"),
    *("transfer_ms", "hidden_ms", "transfer_in_ms", "transfer_out_ms", "bytes_in", "bytes_out"),
    *("rss_bytes", "rss_highest_bytes"),
}


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log; each is a whole line."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(path: Path) -> list[dict[str, Any]]:
    """Those of steps."""
    return [line for line in lines(path) if line["kind"] == "step"]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


@pytest.mark.parametrize("store", ["ram", "disk", "device"])
def test_a_line_for_every_step_and_the_same_weights(store, log, tmp_path) -> None:
    data, plot = models.batches(13), tmp_path / "run.png"
    model, plain = models.tiny(), models.tiny()
    options: dict[str, Any] = {"lr": 1e-2, "store": store, "max_grad_norm": 1.0}
    if store == "disk":
        options |= {"page_bytes": 4096, "staging": 3 * 4096}
    models.train(plain, hift_ext.AdamW(plain, **options), data)
    optimizer = hift_ext.AdamW(model, **options)
    losses, norms = [], []
    with hift_ext.monitor(optimizer, log, plot=plot) as monitor:
        for tokens in data:
            loss = models.loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.tell(loss=loss, note="after the step")
            losses.append(loss.item())
            norms.append(optimizer.grad_norm.item())
    assert models.same(model, plain)

    run, *rest = lines(log)
    assert run["kind"] == "run"
    assert run["state"] == optimizer.state.engine.description
    assert run["staging_bytes"] == optimizer.stats()["staging_bytes"]
    assert run["page_bytes"] == {"ram": 4 << 20, "disk": 4096, "device": None}[store]
    assert (run["threads"], run["backend"]) == (torch.get_num_threads(), "cpu")
    assert run["groups"] == [{"name": g.name, "numel": g.numel} for g in optimizer.groups]
    assert run["store"] == store

    assert [line["step"] for line in rest] == list(range(13))
    count = len(optimizer.groups)
    for number, line in enumerate(rest):
        assert line.keys() == LINE | {"note"}
        assert (line["pass"], line["group_index"]) == divmod(number, count)
        assert line["group"] == optimizer.groups[number % count].name
        assert (line["lr"], line["loss"], line["grad_norm"]) == (
            1e-2,
            losses[number],
            norms[number],
        )
        parts = line["forward_ms"] + line["backward_ms"] + line["optimizer_ms"]
        assert 0 < parts <= line["step_ms"] + 1e-3
        assert 0 < line["update_ms"] <= line["optimizer_ms"]
        assert line["rss_highest_bytes"] >= line["rss_bytes"] > 10 << 20
    total = optimizer.summary()
    for way in ("bytes_in", "bytes_out"):
        assert sum(line[way] for line in rest) == total[way]
    if store == "disk":
        assert total["bytes_in"] > 0
        assert max(line["transfer_in_ms"] for line in rest) > 0
        assert max(line["transfer_out_ms"] for line in rest) > 0
    assert is_png(plot)
    assert os.listdir(tmp_path) == ["run.jsonl", "run.png"] or len(os.listdir(tmp_path)) == 2
    # Nothing of it is left on the model, the optimizer or the engine.
    assert optimizer._monitor is None
    assert len(model._forward_hooks) == 0
    assert len(model._forward_pre_hooks) == 1
    models.train(model, optimizer, data[:2])
    assert len(lines(log)) == 14


def test_forward_and_backward_take_the_time_they_take(log) -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.03)
            if x.requires_grad:
                x.register_hook(lambda _: time.sleep(0.06))
            return x

    model = nn.Sequential(nn.Linear(4, 4), Slow(), nn.Linear(4, 4))
    optimizer = hift_ext.SGD(model, lr=0.1, layers_per_group="all")
    with hift_ext.monitor(optimizer, log):
        for _ in range(2):  # with accumulation
            for _ in range(2):
                model(torch.ones(1, 4)).sum().backward()
            with torch.no_grad():
                model(torch.ones(1, 4))  # an evaluation is no forward of the step
            time.sleep(0.05)
            optimizer.step()
            optimizer.zero_grad()
    for line in steps(log):
        assert 60 <= line["forward_ms"] < 90
        assert 120 <= line["backward_ms"] < 170
        assert line["step_ms"] >= 60 + 120 + 30 + 50


def test_lines_are_on_disk_before_the_next_step_whatever_happens(log) -> None:
    script = f"""
import os, signal, torch, models, hift_ext
model = models.tiny()
optimizer = hift_ext.AdamW(model)
hift_ext.monitor(optimizer, {str(log)!r}).__enter__()
for number, tokens in enumerate(models.batches(5)):
    models.loss_of(model, tokens).backward()
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
"""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == -9
    assert [line["step"] for line in steps(log)] == [0, 1, 2, 3]


def test_an_error_inside_leaves_log_and_picture(log, tmp_path) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)

    def work() -> None:
        with hift_ext.monitor(optimizer, log, plot=tmp_path / "a.png"):
            models.train(model, optimizer, models.batches(3))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work()
    assert len(steps(log)) == 3
    assert is_png(tmp_path / "a.png")
    # An error of the picture does not take the place of the training's.
    (tmp_path / "b.png").mkdir()
    with (
        pytest.raises(KeyError, match="mine"),
        hift_ext.monitor(optimizer, tmp_path / "b.jsonl", plot=tmp_path / "b.png"),
    ):
        raise KeyError("mine")
    with (
        pytest.raises(OSError, match=r"b\.png"),
        hift_ext.monitor(optimizer, tmp_path / "c.jsonl", plot=tmp_path / "b.png"),
    ):
        pass
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_raises_before_the_training(log, tmp_path, monkeypatch) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        hift_ext.monitor(optimizer, tmp_path / "no" / "run.jsonl").__enter__()
    for plot, error in (("a.pdf", ValueError), ("no/a.png", FileNotFoundError)):
        with pytest.raises(error):
            hift_ext.monitor(optimizer, log, plot=tmp_path / plot)
    with pytest.raises(ValueError, match="window"):
        hift_ext.monitor(optimizer, log, window=0)
    with pytest.raises(TypeError, match="SGD"):
        hift_ext.monitor(torch.optim.SGD(model.parameters()), log)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r'pip install "hift_ext\[bench\]"'):
            hift_ext.monitor(optimizer, log, plot=tmp_path / "a.png")
        with hift_ext.monitor(optimizer, log):  # no picture, no matplotlib
            models.train(model, optimizer, models.batches(1))
    with pytest.raises(FileExistsError, match="append=True"), hift_ext.monitor(optimizer, log):
        pass
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"), hift_ext.monitor(optimizer, tmp_path / "x"):
        pass
    assert not (tmp_path / "x").exists()


def test_one_monitor_at_a_time_each_once(log, tmp_path) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    monitor = hift_ext.monitor(optimizer, log)
    with monitor:
        models.train(model, optimizer, models.batches(2))
        with pytest.raises(RuntimeError, match="another monitor"):
            hift_ext.monitor(optimizer, tmp_path / "b").__enter__()
        assert not (tmp_path / "b").exists()
        models.train(model, optimizer, models.batches(1))
    with pytest.raises(RuntimeError, match="make a new one"):
        monitor.__enter__()
    with log.open("a") as file:
        file.write('{"kind": "st')  # a process died
    with hift_ext.monitor(optimizer, log, append=True):
        models.train(model, optimizer, models.batches(2))
    whole = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    assert [line.get("step") for line in whole] == [None, 0, 1, 2, None, 3, 4]
    assert len(log.read_text().splitlines()) == 8


def test_what_is_told_goes_to_the_step_it_is_about(log) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    with hift_ext.monitor(optimizer, log) as monitor:
        with pytest.raises(RuntimeError, match="no forward"):
            monitor.tell(loss=1)
        for number, tokens in enumerate(models.batches(4)):
            loss = models.loss_of(model, tokens)
            if number % 2:
                monitor.tell(loss=number, before=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % 2 == 0:
                value = torch.tensor([float(number)])
                monitor.tell(loss=value, best=math.nan)
                value.fill_(-1)  # what was told stays
        for wrong in (torch.ones(2), [1], None if number < 0 else object()):
            with pytest.raises(TypeError, match="loss"):
                monitor.tell(loss=wrong)
        with pytest.raises(ValueError, match="wait_ms"):
            monitor.tell(wait_ms=1)
    with pytest.raises(RuntimeError, match="inside"):
        monitor.tell(loss=1)
    found = steps(log)
    assert [line["loss"] for line in found] == [0, 1, 2, 3]
    assert [line.get("before") for line in found] == [None, True, None, True]
    assert "best" in found[0]
    assert found[0]["best"] is None


def test_without_a_module_forward_and_backward_are_unknown(log) -> None:
    model = models.tiny()
    optimizer = hift_ext.SGD(model.parameters(), lr=0.1, layers_per_group="all")
    with hift_ext.monitor(optimizer, log) as monitor:
        for number, tokens in enumerate(models.batches(3)):
            models.loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.tell(loss=number)
    found = steps(log)
    assert [line["loss"] for line in found] == [0, 1, 2]
    assert all(line["forward_ms"] is None and line["backward_ms"] is None for line in found)
    assert all(line["step_ms"] > 0 for line in found)


def test_skipped_and_empty_steps(log) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    with hift_ext.monitor(optimizer, log):
        models.loss_of(model, models.batches(1)[0]).backward()
        optimizer.found_inf = torch.ones(())
        optimizer.step()  # skipped: the group keeps its turn
        del optimizer.found_inf
        optimizer.step()
        optimizer.zero_grad()
        with pytest.warns(UserWarning, match="changed nothing"):
            optimizer.step()
    found = steps(log)
    assert [(line["step"], line["update_ms"] > 0) for line in found] == [(0, True), (1, False)]


def test_copies_of_model_and_optimizer_are_not_watched(log) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    with hift_ext.monitor(optimizer, log):
        models.train(model, optimizer, models.batches(2))
        twin, other = copy.deepcopy((model, optimizer))
        pickle.loads(pickle.dumps(model))
        models.train(twin, other, models.batches(3))
        assert other.summary()["steps"] == 3
        assert other._monitor is None
    assert len(steps(log)) == 2
    assert optimizer.summary()["steps"] == 2


def test_a_compiled_model(log) -> None:
    model = models.tiny(blocks=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = hift_ext.AdamW(compiled)
    with hift_ext.monitor(optimizer, log):
        for tokens in models.batches(3):
            models.loss_of(compiled, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(line["forward_ms"] > 0 and line["backward_ms"] > 0 for line in steps(log))


def test_threads_step_in_turn_under_a_monitor(log) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model.parameters(), model=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with hift_ext.monitor(optimizer, log):

        def many() -> None:
            for _ in range(50):
                optimizer.step()

        threads = [threading.Thread(target=many) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [line["step"] for line in steps(log)] == list(range(150))
    assert optimizer.summary()["steps"] == 150


def test_a_full_disk_ends_the_log_and_not_the_training(log, monkeypatch, caplog) -> None:
    real, model = os.write, models.tiny()
    optimizer = hift_ext.AdamW(model)

    def write(file: int, data: bytes) -> int:
        if b'"step": 2' in data:
            if data.startswith(b"{"):
                return real(file, data[:10])
            raise OSError(28, "No space left on device")
        return real(file, data)

    with hift_ext.monitor(optimizer, log):
        monkeypatch.setattr(runlog.os, "write", write)
        models.train(model, optimizer, models.batches(5))
    assert [line["step"] for line in steps(log)] == [0, 1]
    assert optimizer.summary()["steps"] == 5
    assert sum("ends here" in record.message for record in caplog.records) == 1


def test_the_trainer_writes_the_log(tmp_path) -> None:
    from hift_ext.integrations import MonitorCallback

    model = hf.make("bert")
    optimizer = hift_ext.AdamW(model, lr=1e-3)
    log, plot = tmp_path / "run.jsonl", tmp_path / "run.png"
    args = hf.arguments(tmp_path / "out", logging_steps=2, max_steps=6)
    callback = MonitorCallback(log, plot)
    trainer = hf.trainer(model, args, optimizers=(optimizer, None), callbacks=[callback])
    trainer.train()
    found = steps(log)
    assert [line["step"] for line in found] == list(range(6))
    logged = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert {n + 1: line["loss"] for n, line in enumerate(found) if line["loss"]} == logged
    assert all(line["forward_ms"] > 0 and line["backward_ms"] > 0 for line in found)
    assert is_png(plot)
    assert optimizer._monitor is None
