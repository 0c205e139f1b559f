# SPDX-License-Identifier: Apache-2.0
# The machine code of the kernels that read at run time how numbers are kept: every verdict passes,
# and each can fail.

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from hift_ext import ops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import inspect_kernels  # noqa: E402

pytestmark = pytest.mark.needs("nvcc")


def test_every_general_kernel_passes_every_verdict() -> None:
    rows = inspect_kernels.inspect_general(inspect_kernels.find_tools(), "86")
    found = Counter((row["kernel"], row["rule"]) for row in rows)
    wanted = Counter(("values", rule) for rule in ops.RULES)
    wanted.update(("codes", name) for name, rule in ops.RULES.items() if rule[3] >= 0)
    assert found == wanted
    assert [(r["kernel"], r["rule"], r["verdicts"]) for r in rows if not r["ok"]] == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of csrc/ whose list of rules holds AdamW alone, so that it compiles quickly."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / "rules" / "all.h").read_text()
    start, end = text.index("#define HIFT_RULES(X)"), text.index("namespace")
    text = f"{text[:start]}#define HIFT_RULES(X) X(AdamRule<true>)\n\n{text[end:]}"
    (csrc / "rules" / "all.h").write_text(text)
    kept = csrc / "cuda" / "kept.cu"
    kept.write_text(kept.read_text().replace("run_rule<Sgd>", "run_rule<AdamRule<true>>"))
    return csrc


@pytest.mark.parametrize(
    ("file", "old", "new", "wanted"),
    [
        ("cuda/kept_kernel.h", "int kCodeBlocksPerSm = 2", "int kCodeBlocksPerSm = 4", "spills"),
        ("cuda/kept_kernel.h", "int kWidth = 4", "int kWidth = 2", "width"),
        ("core/precision.h", "1.0f / scale", "__fdividef(1.0f, scale)", "exact"),
    ],
)
def test_faults_in_the_source_are_found(
    small: Path, file: str, old: str, new: str, wanted: str
) -> None:
    text = (small / file).read_text()
    assert text.count(old) == 1
    (small / file).write_text(text.replace(old, new))
    rows = inspect_kernels.inspect_general(inspect_kernels.find_tools(), "86", small)
    assert any(row["verdicts"][wanted] for row in rows)
