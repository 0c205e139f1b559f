# SPDX-License-Identifier: Apache-2.0
# What goes wrong on real machines: full disks, files cut under us, killed processes, bad gradients.
# Each gives a clear error or the right result; nothing else is lost.
"""Errors and hostile surroundings."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import models
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hift_ext

TESTS = Path(__file__).parent


def run(code: str, *arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, with the tests and the package on its path."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
        **settings.pop("env", {}),
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        **settings,
    )


def test_full_disk_is_told_before_anything_changes() -> None:
    done = run(
        """
        import errno, resource, signal, models, hift_ext
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = models.tiny()
        optimizer = hift_ext.AdamW(model, lr=1e-2, store="disk")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        before = models.weights(model)
        try:
            models.train(model, optimizer, models.batches(1))
        except OSError as error:
            assert error.errno in (errno.EFBIG, errno.ENOSPC), error
            print(error)
        assert optimizer.active == 0 and len(optimizer.state) == 0
        assert all((p == before[name]).all() for name, p in model.named_parameters())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        optimizer.zero_grad()
        models.train(model, optimizer, models.batches(7))  # there is room now: it goes on
        assert optimizer.pass_index == 1
        """
    )
    assert done.returncode == 0, done.stderr
    assert "bytes" in done.stdout


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("missing/pages", errno.ENOENT),
        ("folder", None),
        ("link", None),
        ("foreign", None),
    ],
)
def test_paths_that_cannot_be_used(path, number, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "foreign").write_bytes(b"somebody's work" * 1000)
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, store=f"disk:{tmp_path / path}")
    models.loss_of(model, models.batches(1)[0]).backward()
    with pytest.raises((OSError, RuntimeError, ValueError), match=path) as caught:
        optimizer.step()
    if number is not None:
        assert caught.value.errno == number
    assert (tmp_path / "foreign").read_bytes() == b"somebody's work" * 1000
    assert (tmp_path / "target").read_bytes() == b""


def test_a_file_truncated_under_us(tmp_path) -> None:
    path = tmp_path / "pages"
    model = models.tiny(width=64)
    options = {"store": f"disk:{path}", "page_bytes": 4096, "staging": 16384}
    optimizer = hift_ext.AdamW(model, lr=1e-2, **options)
    models.train(model, optimizer, models.batches(5))
    optimizer.state.engine.flush()
    os.truncate(path, 8192)
    with pytest.raises((OSError, RuntimeError), match="truncated"):
        models.train(model, optimizer, models.batches(6))
    before, active = models.weights(model), optimizer.active
    optimizer.zero_grad()
    with pytest.raises((OSError, RuntimeError)):  # not once and then silently wrong
        models.train(model, optimizer, models.batches(1))
    assert optimizer.active == active
    assert before.keys() == models.weights(model).keys()


@pytest.mark.parametrize("named", [False, True])
def test_a_killed_process_leaves_no_file_but_a_named_one(named, tmp_path) -> None:
    store = f"disk:{tmp_path / 'pages'}" if named else "disk"
    code = """
        import os, signal, sys, models, hift_ext
        model = models.tiny(width=128)
        optimizer = hift_ext.AdamW(model, store=sys.argv[1])
        models.train(model, optimizer, models.batches(8))
        print(optimizer.state.engine.description, flush=True)
        models.loss_of(model, models.batches(1)[0]).backward()
        pid = os.getpid()
        if os.fork() == 0:
            os.kill(pid, signal.SIGKILL)
            os._exit(0)
        while True:
            optimizer.step()
    """
    done = run(code, store, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "disk" in done.stdout
    files = [entry.name for entry in tmp_path.iterdir() if entry.is_file()]
    assert files == (["pages"] if named else [])
    if named:  # the leftover is taken over by the next process
        assert "disk" in run(code, store).stdout


def test_scratch_goes_where_tmpdir_says_and_is_invisible(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model = models.tiny()
    with hift_ext.AdamW(model, store="disk") as optimizer:
        models.train(model, optimizer, models.batches(2))
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        links += [os.readlink(e) for e in Path("/proc/self/fd").iterdir() if e.is_symlink()]
        assert any(link.startswith(str(tmp_path)) for link in links)
        assert not list(tmp_path.iterdir())


def test_sparse_gradient() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = hift_ext.AdamW(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter 'weight'.*sparse=False"):
        optimizer.step()


def test_types_that_are_not_offered() -> None:
    for dtype in (torch.float64, torch.complex64):
        model = nn.Linear(3, 3, dtype=dtype)
        optimizer = hift_ext.AdamW(model)
        model(torch.ones(2, 3, dtype=dtype)).sum().abs().backward()
        with pytest.raises(TypeError, match=f"{dtype} parameter.*offered are float32"):
            optimizer.step()
        assert len(optimizer.state) == 0


def test_parameters_moved_resized_or_spread() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, layers_per_group="all")
    models.train(model, optimizer, models.batches(1))
    model.head.bias.grad = None
    model.head.bias.data = torch.zeros(7)
    model.head.bias.grad = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"'head.bias' had 50 elements .* now it has 7"):
        optimizer.step()

    moved = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(moved, layers_per_group="all")
    models.train(moved, optimizer, models.batches(1))
    optimizer._device, optimizer._device_index = torch.device("cuda", 1), 1  # as if laid out there
    models.loss_of(moved, models.batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"is on cpu .* laid out for cuda:1"):
        optimizer.step()

    spread = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    optimizer = hift_ext.AdamW(spread, layers_per_group="all")
    spread[0].weight.grad = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"several devices \(cpu, meta\)"):
        optimizer.step()


def test_retyped_parameters_go_on() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(3))
    model.to(torch.bfloat16)
    models.train(model, optimizer, models.batches(3))
    assert optimizer.state[model.head.weight]["step"] == 2
    assert optimizer.state[model.head.weight]["exp_avg"].dtype == torch.float32


def test_grad_scaler_skips_without_losing_the_turn() -> None:
    model = models.tiny(blocks=1)
    plain = models.twin(model)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    reference = hift_ext.AdamW(plain, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, tokens in enumerate(models.batches(8)):
        scaler.scale(models.loss_of(model, tokens)).backward()
        active, before = optimizer.active, models.weights(model)
        overflow = step in (2, 5)
        if overflow:
            optimizer.groups[active].params[0].grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update(1024.0)
        optimizer.zero_grad()
        if overflow:
            assert optimizer.active == active
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
            continue
        models.train(plain, reference, [tokens])
    # 1024 is a power of two: scaling and unscaling are exact where nothing underflows.
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_clipping_inside_the_step_is_torch_s() -> None:
    model = models.tiny(blocks=1)
    plain = models.twin(model)
    clipped = hift_ext.SGD(model, lr=0.5, max_grad_norm=0.05)
    reference = hift_ext.SGD(plain, lr=0.5)
    for tokens in models.batches(6):
        models.loss_of(model, tokens).backward()
        untouched = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        clipped.step()
        now = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(untouched, now, strict=True))
        clipped.zero_grad()
        models.loss_of(plain, tokens).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm > 0.05
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="max_grad_norm"):
        hift_ext.SGD(plain, max_grad_norm=-1.0)


def test_nan_gradients_go_where_torch_s_go() -> None:
    results = []
    for make in (
        lambda p: hift_ext.AdamW([p], lr=0.1, layers_per_group="all"),
        lambda p: torch.optim.AdamW([p], lr=0.1, foreach=False),
    ):
        p = nn.Parameter(torch.ones(100))
        optimizer = make(p)
        for value in (1.0, float("nan"), 1.0, float("inf")):
            p.grad = torch.ones(100)
            p.grad[::7] = value
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0].isnan(), results[1].isnan())
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-6, atol=1e-7)


def test_a_fork_may_not_step_and_says_so() -> None:
    done = run(
        """
        import os, sys, models, hift_ext
        model = models.tiny()
        optimizer = hift_ext.AdamW(model, store="disk")
        models.train(model, optimizer, models.batches(3))
        models.loss_of(model, models.batches(1)[0]).backward()
        child = os.fork()
        if child == 0:
            try:
                optimizer.step()
            except RuntimeError as error:
                print(error, flush=True)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        models.train(model, optimizer, models.batches(4))
        """
    )
    assert done.returncode == 0, done.stderr
    assert "process" in done.stdout


def test_ddp_made_after_freezing_is_refused(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        model = models.tiny(blocks=1)
        optimizer = hift_ext.AdamW(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        models.train(wrapped, optimizer, models.batches(4))  # construction froze nothing
        optimizer.close()
        del wrapped

        first = hift_ext.AdamW(model)
        models.loss_of(model, models.batches(1)[0])  # freezes
        late = DistributedDataParallel(model, find_unused_parameters=True)
        first.close()
        hift_ext.AdamW(model)
        second = hift_ext.AdamW(model)
        with pytest.raises(RuntimeError, match=r"registered 1 parameters and HiFT trains \d+"):
            models.train(late, second, models.batches(1))
    finally:
        torch.distributed.destroy_process_group()


def test_version_handshake(tmp_path) -> None:
    (tmp_path / "_hift_ext.py").write_text("__version__ = '0.0.0'\n")
    done = run(
        "import sys; sys.path.insert(0, sys.argv[1]); import hift_ext", str(tmp_path), check=False
    )
    assert done.returncode != 0
    assert "pip install ." in done.stderr
    assert "0.0.0" in done.stderr
