# SPDX-License-Identifier: Apache-2.0
# Who updates the weights: the choice by device, build and driver, and what is said where it cannot
# be as the user wished. Devices are named only; nothing is put on them.

from __future__ import annotations

import re

import pytest
import torch

from hift_ext import backend, doctor, engines, ops

STREAMS = [ops.StreamSpec("exp_avg"), ops.StreamSpec("exp_avg_sq")]
CUDA = torch.device("cuda", 0)


def make(device, **options):
    chosen = {"store": "auto", "backend": "auto", "page_bytes": "auto", "staging": "auto"}
    return backend.make_engine(STREAMS, torch.device(device), **{**chosen, **options})


@pytest.fixture
def machine(monkeypatch):
    """Pretends a build and a machine."""

    def pretend(*, built=True, devices=1, driver=13000, error=""):
        build = {**ops.build_info(), "cuda_built": built}
        found = {"devices": devices, "driver": driver, "runtime": 13000, "error": error}
        monkeypatch.setattr(ops, "build_info", lambda: build)
        monkeypatch.setattr(ops, "cuda_info", lambda: found)

    return pretend


def test_the_cpu_pages_to_ram() -> None:
    engine = make("cpu")
    assert isinstance(engine, engines.PagedEngine)
    assert engine.description == "ram"


@pytest.mark.parametrize(
    ("device", "wish"), [("cpu", "cuda"), ("cuda", "cpu"), ("meta", "auto"), ("mps", "auto")]
)
def test_a_backend_of_another_device_is_refused(device, wish) -> None:
    with pytest.raises(RuntimeError, match=f"backend='{wish}' does not update .* on {device}"):
        make(device, backend=wish)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"built": False}, "has no CUDA kernels.*HIFT_CUDA=1"),
        (
            {"devices": 0, "driver": 12080, "error": "too old"},
            "CUDA 13 .*too old.* CUDA 12",
        ),
    ],
)
def test_missing_kernels_are_told_with_the_cure(setting, words, machine) -> None:
    machine(**setting)
    with pytest.raises(RuntimeError, match=words):
        make(CUDA, backend="cuda")


def test_nothing_is_missing_where_all_is_there(machine) -> None:
    machine()
    assert backend.cuda_missing() == ""


@pytest.mark.needs("triton", "triton_compiler")
def test_without_kernels_triton_steps_in_and_says_so(machine) -> None:
    from hift_ext.triton_engine import TritonEngine

    machine(built=False)
    with pytest.warns(UserWarning, match="pip install nvidia-cuda-nvcc.*Until then Triton"):
        engine = make(CUDA)
    assert isinstance(engine, TritonEngine)
    assert engine.description == "device memory of cuda:0"


@pytest.mark.needs("triton", "triton_compiler")
def test_triton_by_choice_warns_of_nothing(machine, recwarn) -> None:
    machine()
    make(CUDA, backend="triton")
    assert not recwarn.list


def test_triton_pages_nothing(machine) -> None:
    machine()
    with pytest.raises(RuntimeError, match=re.escape("store='ram' is not offered with Triton")):
        make(CUDA, backend="triton", store="ram")


def test_doctor_names_who_would_update(machine, monkeypatch) -> None:
    machine(built=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.backend() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.backend() == "triton"
    machine()
    assert doctor.backend() == "cuda"
