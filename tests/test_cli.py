# SPDX-License-Identifier: Apache-2.0
# The command line as a user runs it: in a process of its own, from a folder of their own.
# With --json, stdout is one line; wrong arguments exit with 2 and a sentence, failures with 1.

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from hift_ext import cli, demo, doctor, ops


def hift(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hift_ext", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )


def one_object(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stdout.endswith("\n")
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def test_doctor_json():
    result = hift("doctor", "--json")
    report = one_object(result)
    build = ops.build_info()
    assert report["isa"] == build["isa"]
    assert report["isa"] in report["isas"]
    assert report["cuda_built"] is build["cuda_built"]
    assert bool(report["cuda_archs"]) is report["cuda_built"]
    assert isinstance(report["o_direct"], bool)
    assert (report["gpu"] is not None) is torch.cuda.is_available()
    assert report["backend"] == doctor.backend()
    assert report["free_bytes"] > 0
    assert all(lack["what"] and lack["command"] for lack in report["missing"])
    assert "instruction sets" in result.stderr


def test_doctor_table():
    result = hift("doctor")
    assert result.returncode == 0
    assert ops.build_info()["isa"] in result.stdout
    assert "O_DIRECT" in result.stdout
    assert result.stderr == ""


def test_doctor_looks_where_the_store_does(tmp_path):
    report = one_object(hift("doctor", "--json", TMPDIR=str(tmp_path / "not there")))
    assert report["scratch"] in ("/var/tmp", "/tmp", os.getcwd())
    report = one_object(hift("doctor", "--json", TMPDIR=str(tmp_path)))
    # pytest's folder may be in memory, where the store makes no page file.
    assert report["scratch"] in (str(tmp_path), "/var/tmp")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def report():
    return doctor.examine()


@pytest.mark.parametrize(
    ("change", "what", "command"),
    [
        ({"cuda_built": False}, "CUDA kernels", "HIFT_CUDA=1 pip install ."),
        ({"huge_pages": "never"}, "huge pages", "tee /sys/kernel/mm/transparent_hugepage"),
        ({"o_direct": False, "o_direct_error": "it is nfs"}, "it is nfs", "TMPDIR="),
        ({"scratch_error": "no folder"}, "no folder", "disk:PATH"),
        ({"extras": {"demo": False}}, "extra `demo`", 'pip install "hift_ext[demo]"'),
        ({"gpu": "A6000", "memlock_bytes": 8 << 20}, "RLIMIT_MEMLOCK is 8 MiB", "ulimit -l"),
        (
            {"gpu": "A6000", "cuda_built": True, "cuda_runtime": "13.0", "cuda_error": "too old"},
            "driver for CUDA 13.0: too old",
            "newer NVIDIA driver",
        ),
    ],
)
def test_doctor_names_the_command_for_what_is_missing(report, change, what, command):
    good = {
        "cuda_built": True,
        "cuda_error": None,
        "gpu": None,
        "memlock_bytes": None,
        "huge_pages": "madvise",
        "o_direct": True,
        "scratch_error": None,
        "extras": {"demo": True},
    }
    assert doctor._missing({**report, **good}) == []
    (lack,) = doctor._missing({**report, **good, **change})
    assert what in lack["what"]
    assert command in lack["command"]


def test_doctor_without_a_place_for_page_files(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no folder for a scratch page file")

    monkeypatch.setattr(doctor, "PagedEngine", refuse)
    console = Console(record=True, width=100)
    report = doctor.run(console)
    assert report["scratch"] is None
    assert report["o_direct"] is False
    assert "no folder for a scratch page file" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--optimizer", "lion"], "invalid choice: 'lion'"),
        (["demo", "--order", "up"], "invalid choice: 'up'"),
        (["demo", "--store", "tape"], "invalid choice: 'tape'"),
        (["demo", "--layers-per-group", "0"], "positive whole number, got '0'"),
        (["demo", "--layers-per-group", "some"], "positive whole number, got 'some'"),
        (["demo", "--steps", "-3"], "positive whole number, got '-3'"),
        (["demo", "--epochs", "1.5"], "positive whole number, got '1.5'"),
        (["demo", "--batch", "0"], "positive whole number, got '0'"),
        (["demo", "--max-length", "513"], "3 to 512 tokens (the model's limit), got '513'"),
        (["demo", "--lr", "0"], "positive number, got '0'"),
        (["demo", "--lr", "nan"], "positive number, got 'nan'"),
        (["demo", "--lr", "fast"], "positive number, got 'fast'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_missing_packages_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_NEEDED", ("torch", "no_such_package"))
    assert cli.main(["demo", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no-such-package" in captured.err
    assert 'pip install "hift_ext[demo]"' in captured.err
    assert 'pip install ".[demo]"' in captured.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError("the page file is full"), 1, "the page file is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_a_sentence_and_a_code(monkeypatch, capsys, error, code, words):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor", "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_help_explains_exit_codes(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--help"])
    assert exit_.value.code == 0
    assert "130 interrupted" in capsys.readouterr().out
