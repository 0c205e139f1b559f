# SPDX-License-Identifier: Apache-2.0
# Plans of a small decoder for small cards: the contract of `--json`, what fits against trying every
# batch, recommended settings against the plan they make, and what is said when something cannot be.

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import models
import pytest
import torch

import hift_ext
from hift_ext import cli, plan, profiles
from hift_ext.planning import measure, transfer
from hift_ext.planning.forecast import Forecaster, Settings
from hift_ext.planning.machine import DISK_GBPS, FLOPS_SHARE, machine
from hift_ext.planning.recommend import largest_batch, longest, recommend
from hift_ext.planning.rings import best, rings
from hift_ext.planning.trace import trace

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
PARTS = ("weights", "gradients", "activations", "ring", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def made(folder: Path) -> plan.Plan:
    return hift_ext.make_plan(folder, gpu="a6000", batch=2, seq=32)


def small_card(size: int, **changes):
    """An A6000 that gives tensors so many bytes."""
    usual = machine("a6000")
    given = int(size / 0.97) + 1 + profiles.CONTEXT_BYTES
    profile = dataclasses.replace(usual.profile, driver_bytes=given)
    return dataclasses.replace(usual, profile=profile, **changes)


TRACES: tuple[dict, dict] = ({}, {})


def looking(there) -> Forecaster:
    """A forecaster that knows what others of this module have traced: one model, many cards."""
    found = Forecaster(there)
    found._whole, found._heaviest = TRACES
    return found


def test_the_contract_of_json(made) -> None:
    found = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert found["fits"] is True
    assert found["misfits"] == []
    assert [group["name"] for group in found["groups"]] == [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(2)),
        "model.norm + lm_head",
    ]
    for group in found["groups"]:
        assert group["peak_bytes"] == sum(group[part] for part in PARTS)
    assert found["peak_bytes"] == max(group["peak_bytes"] for group in found["groups"])
    assert found["full_fine_tuning"]["peak_bytes"] > found["peak_bytes"]
    for method in ("badam", "lora"):
        assert found[method]["peak_bytes"] > 0
    # A block's float32 moments, in and out.
    block = 4 * 64 * 64 + 3 * 64 * 176 + 2 * 64
    assert found["bus_bytes_per_step"] == pytest.approx(2 * 8 * block, rel=0.02)
    assert found["host_bytes"] == found["pinned_bytes"]
    assert found["host_bytes"] == pytest.approx(8 * found["parameters"], rel=0.02)
    assert found["disk_bytes"] == found["disk_bytes_written_per_1000_steps"] == 0
    assert found["gpu"]["name"] == "NVIDIA RTX A6000"
    assert len(found["assumptions"]) >= 6
    assert found["hidden_ms"] + found["exposed_ms"] == pytest.approx(found["transfer_ms"])
    assert {"batch", "seq", "layers_per_group", "store", "staging", "page_bytes", "dtype"} <= (
        found["recommended"].keys()
    )


def test_the_ring_of_the_peak_is_the_ring_of_the_transfers(made) -> None:
    streams = made.settings.stored
    for staging, page in ((256 * MIB, 16 * MIB), (65536, 32768), (100_000, 10_000)):
        asked = made.settings.but(staging=staging, page_bytes=page)
        forecaster = looking(made.machine)
        groups = [
            transfer.Group(transfer.cut(found.counts, streams, page), 0, 0.0)
            for found in forecaster.traces(asked)
        ]
        largest = max(max(group.pages) for group in groups)
        held = forecaster.forecast(asked, "ram").ring_bytes
        assert held == -(-transfer.slots_of(groups, staging) * largest // 512) * 512


def test_computing_takes_the_counted_flops(made) -> None:
    tokens = 2 * 32
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 176) + 64 * 256
    scores = 2 * 2 * 2 * 32 * tokens * 64
    rate = 38.7e12 * FLOPS_SHARE
    head = made.forecast.steps[-1]
    # Forward of all, and of backward the head's two products.
    forward = 2 * tokens * matrices + scores
    backward = 2 * 2 * tokens * 64 * 256
    assert head.compute_ms == pytest.approx(1e3 * (forward + backward) / rate, rel=0.05)
    assert made.forecast.steps[0].compute_ms > head.compute_ms


def test_what_fits_is_what_trying_finds(folder) -> None:
    asked = Settings(folder, batch=2, seq=32, store="ram")
    for size in (6 * MIB, 9 * MIB):
        forecaster = looking(small_card(size))
        found = largest_batch(forecaster, asked)
        limit = forecaster.machine.limit_bytes
        assert found >= 1
        assert forecaster.peak(asked.but(batch=found)) <= limit
        assert forecaster.peak(asked.but(batch=found + 1)) > limit


def test_where_no_batch_fits_a_shorter_sequence_does(folder) -> None:
    asked = Settings(folder, batch=1, seq=128, grad_checkpointing=True, dtype="bfloat16")
    at = looking(machine("a6000"))
    size = (at.peak(asked.but(seq=64)) + at.peak(asked.but(seq=128))) // 2
    forecaster = looking(small_card(size))
    length = longest(forecaster, asked, most=128)
    assert 64 <= length < 128
    assert forecaster.peak(asked.but(seq=length)) <= forecaster.machine.limit_bytes
    assert forecaster.peak(asked.but(seq=length + 16)) > forecaster.machine.limit_bytes
    found = recommend(forecaster, asked, "ram")
    assert (found.batch, found.seq) == (1, length)
    assert "no batch of 128 tokens fits; one sequence of" in found.why[0]


def test_recommended_settings_come_to_what_they_say(folder) -> None:
    forecaster = looking(small_card(9 * MIB))
    found = recommend(forecaster, Settings(folder, batch=4, seq=32), "ram")
    again = Settings(
        folder,
        batch=found.batch,
        seq=found.seq,
        dtype=found.dtype,
        layers_per_group=found.layers_per_group,
        store=found.store,
        staging=found.staging,
        page_bytes=found.page_bytes,
        grad_checkpointing=found.grad_checkpointing,
    )
    made = looking(small_card(9 * MIB)).forecast(again, found.store)
    assert made.peak_bytes == found.peak_bytes <= forecaster.machine.limit_bytes
    assert made.mean("step_ms") == pytest.approx(found.step_ms)
    assert found.tokens_per_s == pytest.approx(1e3 * found.batch * found.seq / found.step_ms)
    # The line is Python, and the optimizer takes it.
    names = {"hift_ext": hift_ext, "torch": torch, "lr": 1e-3, "model": models.tiny()}
    eval(found.call, names).close()


def test_saves_memory_by_checkpoints_before_it_gives_up(folder) -> None:
    asked = Settings(folder, batch=1, seq=128, attention="eager")
    at = looking(machine("a6000"))
    plain, saved = at.peak(asked), at.peak(asked.but(grad_checkpointing=True))
    assert saved < plain
    found = recommend(looking(small_card((plain + saved) // 2)), asked, "ram")
    assert found.grad_checkpointing
    assert found.batch == 1
    assert "gradient checkpointing" in found.why[0]


def test_where_the_weights_do_not_fit_nothing_does(folder) -> None:
    found = recommend(looking(small_card(MIB // 8)), Settings(folder, seq=32), "ram")
    assert found.batch == found.seq == 0
    assert "nothing fits: the weights alone take" in found.why[0]


def test_state_that_host_memory_cannot_hold_goes_to_disk(folder) -> None:
    found = hift_ext.make_plan(folder, seq=32, host_memory=MIB).as_dict()
    assert found["store"] == "disk"
    assert found["fits"]
    assert found["disk_bytes"] == pytest.approx(8 * found["parameters"], rel=0.1)
    written = found["disk_bytes_written_per_1000_steps"]
    assert written == pytest.approx(1000 * found["mean_bus_bytes_per_step"] / 2)
    assert found["pinned_bytes"] == found["ring_bytes"]
    assert 'store="disk"' in found["recommended"]["call"]
    assert any(f"disk: {DISK_GBPS[0]:.1f} GB/s" in line for line in found["assumptions"])


def test_insisting_on_host_memory_that_is_not_there_does_not_fit(made) -> None:
    there = dataclasses.replace(made.machine, host_bytes=MIB)
    (said,) = plan._misfits(made.forecast, there, made.host_bytes)
    assert "state in host memory takes" in said


def test_a_card_that_is_too_small_says_by_how_much(made) -> None:
    small = small_card(MIB)
    (said,) = plan._misfits(made.forecast, small, made.host_bytes)
    assert f"{made.peak_bytes / 2**30:.2f} GiB is above the 0.00 GiB" in said
    assert not dataclasses.replace(made, misfits=(said,)).fits


def test_beside_the_parameters_nothing_travels(made) -> None:
    forecaster = looking(made.machine)
    found = forecaster.forecast(made.settings, "device")
    assert found.mean("bytes_out") == found.mean("transfer_ms") == 0
    assert plan._resting(found) == (0, 0, 0)
    assert rings(forecaster, made.settings, "device") == []
    more = found.peak_bytes - made.peak_bytes
    assert more == pytest.approx(8 * made.parameters - made.forecast.ring_bytes, rel=0.05)


def test_a_larger_ring_costs_what_it_holds_and_gains_time(made) -> None:
    wide = dataclasses.replace(machine("a6000"), to_device=1e9, to_host=1e9)
    asked = Settings(made.settings.model, batch=2, seq=32, page_bytes=32768, staging=65536)
    found = rings(looking(wide), asked, "ram")
    assert [ring.staging for ring in found] == sorted(ring.staging for ring in found)
    assert found[0].staging == found[0].ring_bytes == 0
    through = [ring for ring in found if ring.staging > 0]
    assert len(through) >= 3
    for small, large in itertools.pairwise(through):
        assert large.peak_bytes - small.peak_bytes == large.ring_bytes - small.ring_bytes > 0
        assert large.step_ms <= small.step_ms
    assert through[-1].step_ms < through[0].step_ms
    chosen = best(found)
    assert chosen is not None
    assert chosen.step_ms == pytest.approx(min(ring.step_ms for ring in through), rel=3e-3)
    assert best([dataclasses.replace(ring, fits=False) for ring in found]) is None


def test_the_command_writes_one_object_and_a_picture(folder, tmp_path, capsys) -> None:
    picture = tmp_path / "plan.png"
    arguments = ["--model", str(folder), "--gpu", "rtx4090", "--seq", "16", "--dtype", "bf16"]
    code = cli.main(["plan", *arguments, "--optimizer", "sgdm", "--json", "--plot", str(picture)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert found["settings"]["dtype"] == "bfloat16"
    for words in ("NVIDIA GeForce RTX 4090: fits", "Peak memory by method", "Recommended"):
        assert words in captured.err
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 20_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama9"], "'llama9' is neither a preset (llama-7b"),
        (["--seq", "129"], "seq=129 is beyond the model's 128 positions"),
        (["--staging", "4KiB", "--page-bytes", "4KiB"], "does not hold two pages"),
        (["--plot", "plan.jpg"], "'plan.jpg' must end in .png"),
        (["--plot", "nowhere/plan.png"], "there is no folder"),
        (["--optimizer", "adagrad", "--state-dtype", "8bit"], "not offered for adagrad"),
        (["--dtype", "fp16", "--master", "split"], "master='split' is for bfloat16"),
    ],
)
def test_failures_are_a_sentence(folder, arguments, words, capsys) -> None:
    model = [] if "--model" in arguments else ["--model", str(folder), "--batch", "1"]
    seq = [] if "--seq" in arguments else ["--seq", "16"]
    assert cli.main(["plan", "--json", *model, *seq, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in " ".join(captured.err.split())
    assert "Traceback" not in captured.err


def test_a_configuration_that_says_no_model(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "architectures": None}))
    assert cli.main(["plan", "--model", str(path)]) == 1
    assert "does not say which model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", [["--gpu", "here"], ["--measure"]])
def test_without_a_gpu_what_needs_one_says_so(folder, option, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["plan", "--model", str(folder), *option]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "torch sees none" in said
    assert "name a card instead" in said or "leave it out" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "v100"}, "gpu='v100' is not offered; offered: a6000"),
        ({"batch": 0}, "batch must be a whole number from 1 on, not 0"),
        ({"seq": True}, "seq must be a whole number from 1 on, not True"),
        ({"staging": -1}, "staging must be a whole number from 0 on, not -1"),
        ({"dtype": "int8"}, "dtype='int8' is not offered"),
        ({"store": "tape"}, "store='tape' is not offered"),
    ],
)
def test_wrong_settings_say_what_is_offered(folder, changes, words) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        hift_ext.make_plan(folder, **changes)


def test_an_unknown_setting_says_what_there_is(folder) -> None:
    with pytest.raises(TypeError, match="no setting 'length'; there are model, gpu, batch, seq"):
        hift_ext.make_plan(folder, length=3)


class HostMeter:
    """Counts its calls; what a process has in memory says nothing of a card."""

    def __init__(self) -> None:
        self.settled = self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def peak_bytes(self) -> int:
        return 1000 + self.resets

    def settle(self) -> None:
        self.settled += 1


def test_measuring_trains_every_group_twice(made) -> None:
    """On the CPU: the loop is run, memory and times of a card are not."""
    meter = HostMeter()
    found = measure.measure(made, torch.device("cpu"), meter)
    assert [group["name"] for group in found.groups] == [g.name for g in made.forecast.footprints]
    assert meter.resets == 2 * len(found.groups)
    assert meter.settled == 2 * meter.resets
    # Of the second pass.
    assert [g["peak_bytes"] for g in found.groups] == [1005, 1006, 1007, 1008]
    assert found.peak_bytes == 1008
    assert found.as_dict()["step_ms"] == found.step_ms > 0


def test_a_cell_of_the_headline() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import headline
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    card = headline.CARDS[0]
    row = re.search(
        rf"^\| {re.escape(card.title)} \| (\d+) x 512 \| ([\d.]+) \| ([\d.]+) \|",
        headline.PAGE.read_text(),
        re.M,
    )
    assert row is not None
    forecaster = Forecaster(machine("a6000"))
    limit = forecaster.machine.limit_bytes / 2**30
    for batch, said in ((int(row[1]), row[2]), (int(row[1]) + 1, row[3])):
        settings = card.settings.but(batch=batch)
        (block,) = trace(settings.workload, positions=[1])
        held = 256 * MIB
        assert f"{(block.peak.total + held) / 2**30:.2f}" == said
    assert float(row[2]) <= limit < float(row[3])
