# SPDX-License-Identifier: Apache-2.0
# The arguments of `python -m hift_ext plan`: what is refused before a model is looked at, and sizes
# as people write them.

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from hift_ext import cli
from hift_ext.planning import cli as plan_cli

MIB = 1 << 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: --model"),
        (["--model", "x", "--gpu", "v100"], "invalid choice: 'v100'"),
        (["--model", "x", "--batch", "0"], "positive whole number, got '0'"),
        (["--model", "x", "--seq", "1.5"], "positive whole number, got '1.5'"),
        (["--model", "x", "--dtype", "int8"], "invalid choice: 'int8' (choose from float32"),
        (["--model", "x", "--state-dtype", "4bit"], "invalid choice: '4bit'"),
        (["--model", "x", "--host-memory", "much"], "must be bytes, as 256MiB or 64GB, got 'much'"),
        (["--model", "x", "--layers-per-group", "0"], "positive whole number, got '0'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize(
    ("text", "size"),
    [("268435456", 256 * MIB), ("256MiB", 256 * MIB), ("64GB", 64 * 10**9), ("1.5k", 1500)],
)
def test_sizes_are_read(text, size) -> None:
    assert plan_cli.size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "64iB", "GB", "1e9", "nan"])
def test_sizes_that_are_none(text) -> None:
    with pytest.raises(ArgumentTypeError, match="must be bytes"):
        plan_cli.size(text)
