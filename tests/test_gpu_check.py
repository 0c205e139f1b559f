# SPDX-License-Identifier: Apache-2.0
# The check for a GPU, in a dry run: every section runs on the simulated runtime, no figure of it
# looks like a measurement, and a wrong result, a crash and a hang each fail their section alone.

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402
from gpu import bits, build, device, host, kernels, llama, module, report, rings, runner, sanitizer  # noqa: E402  # noqa: E402

SECTIONS = ["build", "bits", "engine", "sanitizer", "kernels", "bus", "rings", "triton", "llama"]
FRACTION = "set_per_process_memory_fraction"
needs_headers = pytest.mark.needs("cuda_headers")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, BENCHMARKS)))}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def dry(
    cuda_sim: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, bytes]:
    """The JSON, the output and the picture of a whole dry run."""
    folder = tmp_path_factory.mktemp("dry")
    found, picture = folder / "found.json", folder / "picture.png"
    flags = ["--dry-run", f"--sim-module={cuda_sim}", f"--json={found}", f"--plot={picture}"]
    done = run([sys.executable, str(BENCHMARKS / "gpu_check.py"), *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text()), done.stdout, picture.read_bytes()


def faulty(cuda_sim: Path, folder: Path, fault: str, *sections: str) -> tuple[int, dict[str, Any]]:
    """A dry run of `sections` in a process where the statements `fault` were run first."""
    found = folder / "found.json"
    arguments = ["--dry-run", f"--sim-module={cuda_sim}", f"--json={found}", "--only", *sections]
    # Children are forks: what is changed here is changed there.
    program = f"""
import sys, gpu_check
from gpu import module, runner
from pathlib import Path
module.get_simulated(Path({str(cuda_sim)!r}), 600)
{fault}
sys.exit(gpu_check.main({arguments!r}))
"""
    done = run([sys.executable, "-c", program])
    assert found.exists(), done.stderr
    return done.returncode, json.loads(found.read_text())["sections"]


@needs_headers
def test_every_section_passes(dry: tuple[dict[str, Any], str, bytes]) -> None:
    found, _, picture = dry
    assert found["dry_run"] is True
    assert list(found["sections"]) == SECTIONS == list(runner.SECONDS)
    for name, section in found["sections"].items():
        assert section["status"] == "ok", (name, section)
        assert section["rows"], name
        assert {row["status"] for row in section["rows"]} == {"ok"}
    assert picture.startswith(b"\x89PNG\r\n")
    rows = {name: section["rows"] for name, section in found["sections"].items()}
    assert {row["name"] for row in rows["bits"]} == set(bits.CASES)
    assert all(row["type_pairs"] == 5 and row["spans"] > 500 for row in rows["bits"])
    assert (len(rows["engine"]), len(rows["rings"])) == (7, 12)
    assert [row["name"] for row in rows["sanitizer"]] == ["memcheck", "racecheck"]
    assert {row["run"] for row in rows["sanitizer"]} == {"all equal"}
    adamw = next(row for row in rows["kernels"] if row["name"].startswith("adamw fp32"))
    assert adamw["bytes"] == 28 * adamw["elements"]
    ours, standard = rows["llama"][:2]
    assert ours["paper_peak_bytes"] == pytest.approx(55.41 * 2**30)
    assert ours["groups_visited"] == llama.DRY_SIZE.blocks + 2
    assert standard["result"].startswith("out of memory in ")


@needs_headers
def test_a_dry_run_measures_nothing(dry: tuple[dict[str, Any], str, bytes]) -> None:
    found, printed, _ = dry
    rows = [row for section in found["sections"].values() for row in section["rows"]]
    assert all(row["dry_run"] is True for row in rows)
    for name, value in (item for row in rows for item in row.items()):
        if name.endswith(("_ms", "_gbps")) or name == "peak_bytes":
            assert value == "dry", name
    assert sum(value == "dry" for row in rows for value in row.values()) > 150
    title, table = printed.strip().split("\n", 1)
    assert "DRY RUN on a simulated runtime, no measurements" in title
    assert not re.search(r"\d\s*(GB/s|ms)\b", table)


@needs_headers
@pytest.mark.parametrize("what", ["param", "state 1"])
def test_a_wrong_bit_and_an_update_that_should_not_be_fail(
    cuda_sim: Path, tmp_path: Path, dry: object, what: str
) -> None:
    index = {"param": 0, "state 1": 3}[what]
    fault = f"""
from gpu import bits
run_kernel = bits.run_kernel
def wrong(device, rows, scalars):
    run_kernel(device, rows, scalars)
    param, grad, count, _, states = rows[-1][:5]  # how numbers are kept may follow
    if count > 1000 and len(states) == 2:
        import ctypes
        ctypes.c_uint8.from_address([param, grad, *states][{index}]).value ^= 1
    if len(states) == 0 and scalars.get("found_inf", 0) != 0:
        run_kernel(device, rows, {{}})
bits.run_kernel = wrong
"""
    status, sections = faulty(cuda_sim, tmp_path, fault, "build", "bits")
    assert status == 1
    assert sections["build"]["status"] == "ok"
    assert sections["bits"]["status"] == "failed"
    failed = {row["name"]: row.get("failed") for row in sections["bits"]["rows"]}
    assert f"float32, lengths: {what}: 1 elements, first in " in failed["adamw"]
    assert "(CPU, CUDA)" in failed["adam"]
    assert "found_inf 1.0: param: " in failed["sgd"]
    assert failed["momentum"] is failed["adagrad"] is None


@needs_headers
def test_lost_state_fails(cuda_sim: Path, tmp_path: Path, dry: object) -> None:
    fault = """
import hift_ext.paged_state as paged
write = paged.PagedState.write
def lossy(self, entry, values):
    write(self, entry, {k: v * (1 + 2**-20 * (entry.item == 1)) for k, v in values.items()})
from gpu import engine
train = engine.train
def wrong(device, training, where, place):
    paged.PagedState.write = lossy if place.get("store") == "disk" else write
    return train(device, training, where, place)
engine.train = wrong
"""
    status, sections = faulty(cuda_sim, tmp_path, fault, "engine")
    assert status == 1
    failed = [row["name"] for row in sections["engine"]["rows"] if row["status"] == "failed"]
    assert failed == ["disk, ring of two pages", "disk, ring of the whole group"]


@needs_headers
def test_a_crash_and_a_hang_are_their_sections_own(
    cuda_sim: Path, tmp_path: Path, dry: object
) -> None:
    fault = """
import os, signal, time
from gpu import bits, bus, build
from gpu.report import Row
runner.DRY_SECONDS = gpu_check.DRY_SECONDS = 2
def crash(device, budget):
    yield Row("first")
    os.kill(os.getpid(), signal.SIGSEGV)
def hang(device, budget):
    yield Row("second")
    time.sleep(60)
def nan(device, budget):
    yield Row("third", {}, {"x_ms": float("nan")})
bits.run, bus.run, build.run = crash, hang, nan
"""
    status, sections = faulty(cuda_sim, tmp_path, fault, "build", "bits", "bus", "kernels")
    assert status == 1
    assert sections["bits"]["failed"] == "its process ended by SIGSEGV"
    assert [row["name"] for row in sections["bits"]["rows"]] == ["first"]
    assert sections["bus"]["failed"] == "killed after 3 s"
    assert sections["bus"]["seconds"] < 10
    assert [row["name"] for row in sections["bus"]["rows"]] == ["second"]
    assert sections["build"]["failed"] == "ValueError: third: x_ms is nan"
    assert sections["kernels"]["rows"]


@needs_headers
def test_a_model_that_does_not_fit_fails(cuda_sim: Path, tmp_path: Path, dry: object) -> None:
    fault = """
from dataclasses import replace
from gpu import llama
llama.PLANS[0] = replace(llama.PLANS[0], dry_bytes=400_000)
"""
    status, sections = faulty(cuda_sim, tmp_path, fault, "llama")
    first, *others = sections["llama"]["rows"]
    assert "OutOfMemoryError" in first["failed"]
    assert (status, [row["status"] for row in others]) == (1, ["ok", "ok"])


# What a dry run cannot reach.


def test_no_card_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "ASK_CARD", "raise SystemExit('no driver')")
    found = tmp_path / "found.json"
    assert gpu_check.main(["--only", "bus", "bits", f"--json={found}"]) == 1
    sections = json.loads(found.read_text())["sections"]
    assert list(sections) == ["bus", "bits"]
    assert all("no driver" in section["failed"] for section in sections.values())
    assert "--dry-run" in capsys.readouterr().out


def test_the_module_is_built_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(module, "ASK_CARD", "print('86')")
    monkeypatch.setattr(module, "works", lambda folder: False)
    monkeypatch.setattr(module, "use", called.append)
    monkeypatch.setattr(module, "run", lambda *arguments: called.append(arguments))
    monkeypatch.delenv("HIFT_CUDA_ARCHS", raising=False)
    assert module.get_real(1).startswith("built in ")
    (command, environ, _), used = called
    assert command[1:4] == ["setup.py", "-q", "build_ext"]
    assert environ == {"HIFT_CUDA": "1", "HIFT_CUDA_ARCHS": "86"}
    assert used == module.BUILT


def test_a_build_that_fails_or_takes_too_long_ends() -> None:
    with pytest.raises(RuntimeError, match="why it failed"):
        module.run([sys.executable, "-c", "print('why it failed'); exit(3)"], {}, 60)
    with pytest.raises(subprocess.TimeoutExpired):
        module.run(["sleep", "60"], {}, 0.1)


def test_a_driver_that_is_too_old_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"driver": 12080, "runtime": 13000, "devices": 1, "error": ""}
    monkeypatch.setattr(build.ops, "cuda_info", lambda: seen)
    card: Any = SimpleNamespace(info=lambda: {"card": "a card"})
    first, second = build.run(card, runner.Budget(1))
    assert "is CUDA 13.0 and the driver is of CUDA 12.8" in first.failed
    assert second.facts["card"] == "a card"


class FakeCuda:
    """torch.cuda's functions for a card of 1,000 MiB, written down as they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.register_error = 0
        properties = SimpleNamespace(
            name="a card", major=8, minor=6, multi_processor_count=84, total_memory=1000 << 20
        )
        fakes = {
            "memory_allocated": lambda _: 1,
            "max_memory_allocated": lambda _: 2,
            "max_memory_reserved": lambda _: 3,
            "memory_reserved": lambda _: 100 << 20,
            "mem_get_info": lambda _: (700 << 20, 1000 << 20),
            "get_device_properties": lambda _: properties,
            "current_stream": lambda _: self.queue("now"),
            "Stream": lambda _: self.queue("own"),
            "Event": lambda enable_timing: self.event(enable_timing),
            "stream": lambda stream: nullcontext(self.calls.append(("on", stream.name))),
            "cudart": lambda: SimpleNamespace(
                cudaHostRegister=lambda *a: self.calls.append(a[1:]) or self.register_error,
                cudaHostUnregister=self.note("unregister"),
            ),
        }
        noted = ("init", "synchronize", "empty_cache", "reset_peak_memory_stats", FRACTION)
        fakes |= {name: self.note(name) for name in noted}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)  # raises for a name torch does not have

    def note(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def queue(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            cuda_stream=7,
            synchronize=self.note(f"synchronize {name}"),
            wait_stream=lambda other: self.calls.append(f"{name} waits for {other.name}"),
        )

    def event(self, timing: bool) -> Any:
        assert timing
        return SimpleNamespace(
            record=self.note("record"), synchronize=self.note("wait"), elapsed_time=lambda end: 12.0
        )


def test_the_cuda_device_on_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it calls what torch has, and its sums; a card alone can tell more."""
    source = (BENCHMARKS / "gpu" / "device.py").read_text()
    assert all(hasattr(torch.cuda, name) for name in re.findall(r"torch\.cuda\.(\w+)", source))
    fake = FakeCuda(monkeypatch)
    card: Any = device.open_device(False)
    assert card.info()["capability"] == "sm_86"
    assert card.size("real", "dry") == "real"
    assert card.stream() == 7
    assert card.context_bytes() == 200 << 20
    share = card.cap(900 << 20)
    assert share == (900 - 200 << 20) - device.CONTEXT_GROWTH
    assert fake.calls[-1] == (FRACTION, share / (1000 << 20), torch.device("cuda", 0))
    assert card.cap(5000 << 20) == (1000 - 200 << 20) - device.CONTEXT_GROWTH
    assert card.memory() == (1, 2, 3)
    ran: list[int] = []
    assert (card.clock(lambda: ran.append(1), 4), len(ran)) == (3.0, 4)
    fake.calls.clear()
    card.beside([lambda: ran.append(2), lambda: ran.append(3)])
    assert ran[4:] == [2, 3]
    assert fake.calls == ["own waits for now", ("on", "own")] * 2 + ["now waits for own"] * 2
    for name in ("synchronize", "settle", "reset_peak", "empty_cache", "check"):
        getattr(card, name)()
    fake.register_error = 2
    with pytest.raises(RuntimeError, match="16 bytes: CUDA error 2"):
        card.registered(torch.zeros(4)).__enter__()
    assert fake.calls[-1] == (16, device.REGISTER_PORTABLE_AND_MAPPED)


def test_sanitizer_is_found_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / sanitizer.TOOL
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'ERROR SUMMARY: 1 error'\nexit 99\n")
    tool.chmod(0o755)
    assert sanitizer.find_tool({"CUDA_HOME": str(tmp_path)}) == str(tool)
    real: Any = object.__new__(device.CudaDevice)
    row = sanitizer.check(real, str(tool), "memcheck", 30)
    assert row.failed == "status 99: ERROR SUMMARY: 1 error"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    row = sanitizer.check(real, str(tool), "racecheck", 1)
    assert row.status == "absent"
    assert row.note == "not finished in 1 s"
    monkeypatch.setattr(sanitizer, "find_tool", lambda environ: None)
    rows = list(sanitizer.run(real, runner.Budget(1)))
    assert [row.status for row in rows] == ["absent", "absent"]


def test_host_memory_decides_sizes() -> None:
    assert host.available_bytes() > 0
    optimizer: Any = SimpleNamespace(groups=[SimpleNamespace(numel=n) for n in (100, 200, 50)])
    assert [llama.visitable(optimizer, n) for n in (799, 800, 2400, 2799, 2800)] == [0, 1, 2, 2, 3]
    large, small = rings.SIZES
    need = rings.WAYS * 8 * rings.parameters(large)
    assert rings.choose(need, rings.SIZES, False) == (large, "")
    smaller = f"{(need - 1) / 1e9:.0f} GB of host memory: a smaller model"
    assert rings.choose(need - 1, rings.SIZES, False) == (small, smaller)


def test_largest_batch() -> None:
    def training(base: int, each: int, limit: int) -> Any:
        def backward(batch: int) -> dict[str, int]:
            if base + each * batch > limit:
                raise torch.OutOfMemoryError
            return {"peak": base + each * batch}

        return SimpleNamespace(backward=backward, drop=lambda: None)

    assert llama.largest_batch(training(100, 10, 999), 165) == 6
    assert llama.largest_batch(training(100, 1, 999), 999) == llama.MOST_BATCH
    assert llama.largest_batch(training(100, 40, 150), 150) == 1
    with pytest.raises(torch.OutOfMemoryError):
        llama.largest_batch(training(100, 60, 150), 150)


@pytest.mark.parametrize(("peak", "gradients", "other"), [(200, 30, 20), (165, 15, 0), (150, 0, 0)])
def test_categories_sum_to_the_peak(peak: int, gradients: int, other: int) -> None:
    parts = llama.split({"peak": peak, "activations": 40, "gradients": 30}, 100, 10)
    assert parts == dict(zip(llama.CATEGORIES, (100, gradients, 40, 10, other), strict=True))
    assert sum(parts.values()) == peak


def test_llama_7b_is_the_papers() -> None:
    assert rings.parameters(llama.LLAMA_7B) == 6_738_415_616
    block = sum(torch.Size(shape).numel() for shape in kernels.LLAMA_7B_BLOCK)
    assert round(block / 1e4) == 20238


def test_torchs_fastest_is_taken() -> None:
    def refuses(params: Any, fused: bool = False, foreach: bool = False) -> torch.optim.SGD:
        if fused:
            raise RuntimeError("not on this device")
        return torch.optim.SGD(params, 0.1, foreach=foreach)

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    name, step = kernels.torchs(kernels.Contest("sgd", refuses, {}, 0), [p])
    step()
    assert name == "torch_foreach"
    assert p[0].item() == pytest.approx(0.8)


def test_plain_table(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    row = report.Row("copy", {"count": 1200, "ok": True}, {"to_gbps": 25.0, "peak_bytes": 2.5e9})
    text = report.line(row.as_dict(False), ["count", "ok", "to_gbps", "peak_bytes"])
    assert text == "count 1,200; ok True; to 25 GB/s; peak 2.5 GB"
    report.print_table("title", [("bus", "copy", text), ("bits", "a", "failed: b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["title", f"bus   copy  {text}", "bits  a     failed: b"]
