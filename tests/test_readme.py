# SPDX-License-Identifier: Apache-2.0
# What the README shows is run: the ten-line example, and the walk through Lion.
# Its two commands are run by CI; here only that they are there and say what they should.
"""The README's code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import models
import pytest
import torch
from torch import nn

import hift_ext
from hift_ext.ops import StreamSpec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


class Scorer(nn.Module):
    """Returns an object with a loss, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.tiny(blocks=2)

    def forward(self, tokens: torch.Tensor):
        return type("Output", (), {"loss": models.loss_of(self.body, tokens)})


def test_the_example_trains() -> None:
    model = Scorer()
    before = models.weights(model)
    loader = [{"tokens": tokens} for tokens in models.batches(8)]
    example = blocks("python")[0]
    first, rest = example.split("for batch", 1)
    names = {"model": model, "loader": loader}
    exec(first, names)
    names["scheduler"] = torch.optim.lr_scheduler.LinearLR(names["optimizer"], 1.0, 0.1, 8)
    exec("for batch" + rest, names)
    assert models.changed(before, model) == set(before)
    assert names["optimizer"].pass_index == 2


def test_lion_s_class_and_header_are_whole(tmp_path) -> None:
    names = {"HiFTOptimizer": hift_ext.HiFTOptimizer, "StreamSpec": StreamSpec}
    exec(next(block for block in blocks("python") if "class Lion" in block), names)
    lion = names["Lion"]([nn.Parameter(torch.ones(3))], layers_per_group="all")
    group = lion.param_groups[0]
    hyper = lion.hyper(group, 0.1, 1)
    header = next(block for block in blocks("cpp") if "struct Lion" in block)
    fields = re.search(r"struct Hyper \{(.*?)\n  \};", header, re.S)
    assert fields is not None
    assert len(hyper) == fields[1].count("float ")
    assert len(lion.streams(group)) == int(re.search(r"states = (\d)", header)[1])

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.fail("the tests need a C++ compiler, as the installation does")
    (tmp_path / "lion.cpp").write_text(
        header.replace("#pragma once", "")
        + "float f(float p, float g, float& m, const hift::generic::Lion::Hyper& h)"
        + "{ hift::generic::Lion::update(p, g, m, h); return p; }\n"
    )
    flags = ["-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(tmp_path / "lion.cpp")], check=True)


def test_the_two_commands_are_there() -> None:
    commands = dict(re.findall(r"<!-- command: (\w+) -->\n```\n(.*?)\n```", README, re.S))
    assert commands.keys() == {"demo", "test"}
    assert commands["demo"].startswith('pip install ".[demo]"')
    assert commands["test"].startswith('pip install ".[test]"')


def test_every_argument_is_in_the_table() -> None:
    for name in ("model", "layers_per_group", "order", "groups", "store", "staging", "page_bytes"):
        assert f"| `{name}` |" in README
