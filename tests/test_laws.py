# SPDX-License-Identifier: Apache-2.0
"""The laws of the house: who may include and import whom, how files look, what the linters say.

Each law is a function from a source tree to its violations, and each is shown trees that break it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP_SUFFIXES = {".h", ".inl", ".cpp", ".cu", ".cuh"}

# "bind -> engine -> paging, cpu, cuda -> core; cpu, cuda -> rules; cuda/mover -> paging"
MOVED = {f"paging/{name}.h" for name in ("mover", "host_mover", "store", "page_table")}
LAYERS: dict[str, set[str]] = {
    "bind": {"bind", "engine", "paging", "cpu", "cuda", "core"},
    "engine": {"engine", "paging", "cpu", "cuda", "core"},
    "paging": {"paging", "core/check.h", "core/intervals.h"},
    "cpu": {"cpu", "core", "rules"},
    "cuda": {"cuda", "core", "rules"},
    "cuda/mover": {"cuda", "core", "rules", *MOVED},
    "rules": {"rules"},
    "core": {"core"},
}
LEAF_HEADERS = {"rules": {"cmath", "cstdint", "cstring"}}
FREE_OF_EXTENSION = {
    "layers",
    "memory",
    "profiles",
    "replace",
    "schedule",
    "scratch",
    "shards",
    "tree",
    "triton_kernels",
    "triton_precision",
    "triton_rules",
    "triton_step",
}

PLANNERS = {"cli", "plan"}


def sources(root: Path, *folders: str) -> list[Path]:
    """Source files below `folders` of `root`, without what builds leave behind."""
    found = [path for folder in folders for path in sorted((root / folder).rglob("*"))]
    return [
        path
        for path in found
        if path.suffix in CPP_SUFFIXES | {".py", ".sh"}
        and not any(part.startswith(("build", "__")) for part in path.relative_to(root).parts[:-1])
    ]


def all_sources(root: Path) -> list[Path]:
    """Every source file of the project."""
    tops = [root / name for name in ("setup.py", ".ci/run", "csrc/CMakeLists.txt")]
    folders = ("csrc", "hift_ext", "tests", "benchmarks", "examples")
    return [path for path in tops if path.exists()] + sources(root, *folders)


def layer_of(path: Path, csrc: Path) -> str:
    """The layer a file of csrc/ belongs to."""
    place = path.relative_to(csrc)
    if place.parent.name == "cuda" and place.stem.split("_")[0] == "mover":
        return "cuda/mover"
    return place.parent.as_posix() if place.parent.name else place.stem.split("_")[0]


def include_violations(root: Path) -> list[str]:
    """Includes that the dependency law does not allow."""
    bad = []
    csrc = root / "csrc"
    for path in sources(root, "csrc"):
        layer = layer_of(path, csrc)
        for quote, name in re.findall(
            r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.M
        ):
            if quote == '"':
                owner = name.split("/")[0] if "/" in name else Path(name).stem.split("_")[0]
                allowed = {owner, name} & LAYERS.get(layer, set()) and (csrc / name).is_file()
            elif name.startswith("pybind11/"):
                allowed = layer == "bind"
            elif name.startswith(("torch", "ATen", "c10")):
                allowed = False
            elif name.startswith("cuda"):
                allowed = layer.startswith("cuda")
            elif layer in LEAF_HEADERS:
                allowed = name in LEAF_HEADERS[layer]
            elif layer == "core":
                allowed = "." not in name and "/" not in name
            else:
                allowed = True
            if not allowed:
                bad.append(f"{path.relative_to(root)}: {layer} may not include {name}")
    return bad


def own_header_violations(root: Path) -> list[str]:
    """Source files that have a header of their name and do not include it first."""
    bad = []
    for path in sources(root, "csrc"):
        header = path.with_suffix(".h")
        if path.suffix in {".cpp", ".cu"} and header.is_file():
            first = re.search(r'^#include "([^"]+)"', path.read_text(), re.M)
            if first is None or first[1] != header.relative_to(root / "csrc").as_posix():
                bad.append(f"{path.relative_to(root)}: its first include must be its own header")
    return bad


def imports_of(path: Path) -> set[str]:
    """Full names of what a Python file imports; `from package import module` counts as both."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "hift_ext" if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def modules_in(names: set[str], known: Iterable[str]) -> set[str]:
    """Which of our modules imported names are, or are in; `known` are paths below hift_ext."""
    dotted = {"hift_ext." + path.replace("/", "."): path for path in known}
    return {dotted[name] for name in names & dotted.keys()}


def import_violations(root: Path) -> list[str]:
    """Python modules that reach the extension, or the plan, and should not."""
    package = root / "hift_ext"
    imports = {
        path.relative_to(package).with_suffix("").as_posix(): imports_of(path)
        for path in package.rglob("*.py")
    }
    inner = {name: modules_in(imported, imports) for name, imported in imports.items()}
    bad = [
        f"hift_ext/{name}.py: only ops.py may import _hift_ext"
        for name, imported in imports.items()
        if "_hift_ext" in imported and name != "ops"
    ]
    for start in FREE_OF_EXTENSION & imports.keys():
        reached, todo = {start}, [start]
        while todo:
            more = inner[todo.pop()] - reached
            todo += more
            reached |= more
        if "ops" in reached:
            bad.append(f"hift_ext/{start}.py: must not reach the extension")
    bad += [
        f"hift_ext/{name}.py: only {' and '.join(sorted(PLANNERS))} may import the plan's modules"
        for name, modules in inner.items()
        if name not in PLANNERS
        and not name.startswith("planning/")
        and any(module.startswith("planning/") for module in modules)
    ]
    return bad


def shape_violations(root: Path) -> list[str]:
    """Files without the SPDX line and prose at their head, or longer than 400 lines."""
    bad = []
    for path in all_sources(root):
        lines = path.read_text().splitlines()
        name = path.relative_to(root)
        if len(lines) >= 400:
            bad.append(f"{name}: {len(lines)} lines; files stay under 400")
        head = lines[1:] if lines and lines[0].startswith("#!") else lines
        if not head or not re.fullmatch(r"(//|#) SPDX-License-Identifier: Apache-2\.0", head[0]):
            bad.append(f"{name}: the first line must be the SPDX line")
        elif (
            len(head) < 3 or not re.match(r'//|#|r?"""', head[1]) or head[1].startswith("#include")
        ):
            bad.append(f"{name}: two lines of prose must follow the SPDX line")
    return bad


LAWS = [include_violations, own_header_violations, import_violations, shape_violations]
SPDX = "SPDX-License-Identifier: Apache-2.0\n"
CPP_HEAD, PY_HEAD = f"// {SPDX}// One.\n// Two.\n", f'# {SPDX}"""One.\n\nTwo.\n"""\n'


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_holds(law: Callable[[Path], list[str]]) -> None:
    assert law(ROOT) == []


def test_laws_see_the_project() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in all_sources(ROOT)}
    assert {"setup.py", "csrc/bind.cpp", "csrc/rules/adamw.h", "hift_ext/ops.py"} <= names
    assert "tests/test_laws.py" in names


@pytest.mark.parametrize(
    ("law", "place", "text"),
    [
        (include_violations, "csrc/rules/lion.h", '#include "core/span.h"'),
        (include_violations, "csrc/rules/lion.h", "#include <vector>"),
        (include_violations, "csrc/core/span.h", '#include "rules/all.h"'),
        (include_violations, "csrc/core/span.h", "#include <sys/mman.h>"),
        (include_violations, "csrc/paging/pager.cpp", '#include "rules/all.h"'),
        (include_violations, "csrc/paging/pager.cpp", '#include "core/span.h"'),
        (include_violations, "csrc/paging/pager.cpp", "#include <cuda_runtime.h>"),
        (include_violations, "csrc/cpu/step.cpp", '#include "paging/pager.h"'),
        (include_violations, "csrc/cuda/step.cu", '#include "paging/mover.h"'),
        (include_violations, "csrc/cuda/mover.cpp", '#include "paging/pager.h"'),
        (include_violations, "csrc/engine.cpp", '#include "rules/all.h"'),
        (include_violations, "csrc/engine.cpp", "#include <pybind11/pybind11.h>"),
        (include_violations, "csrc/engine.h", "#  include <torch/extension.h>"),
        (own_header_violations, "csrc/paging/mover.cpp", '#include "core/span.h"'),
        (import_violations, "hift_ext/adamw.py", "import _hift_ext"),
        (import_violations, "hift_ext/schedule.py", "from hift_ext.adamw import AdamW"),
        (import_violations, "hift_ext/layers.py", "from hift_ext import ops"),
        (import_violations, "hift_ext/planning/lora.py", "import _hift_ext"),
        (import_violations, "hift_ext/adamw.py", "from hift_ext.planning.trace import trace"),
        (import_violations, "hift_ext/sgd.py", "from hift_ext.planning import trace"),
        (shape_violations, "csrc/cpu/long.h", "int x;\n" * 400),
    ],
)
def test_law_sees_what_breaks_it(
    law: Callable[[Path], list[str]], place: str, text: str, tmp_path: Path
) -> None:
    house = ["core/span.h", "core/check.h", "rules/all.h", "paging/pager.h", "paging/mover.h"]
    tree = {f"csrc/{name}": CPP_HEAD for name in house}
    tree["csrc/cuda/mover.cpp"] = CPP_HEAD + '#include "paging/mover.h"\n#include "core/check.h"\n'
    tree["csrc/paging/pager.cpp"] = CPP_HEAD + '#include "paging/pager.h"\n#include <vector>\n'
    tree["hift_ext/ops.py"] = PY_HEAD + "import _hift_ext\n"
    tree["hift_ext/adamw.py"] = PY_HEAD + "from hift_ext import ops\n"
    tree["hift_ext/layers.py"] = PY_HEAD + "import torch\n"
    tree["hift_ext/planning/trace.py"] = PY_HEAD + "from hift_ext import ops\n"
    tree["hift_ext/plan.py"] = PY_HEAD + "from hift_ext.planning import trace\n"
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert [found for each in LAWS for found in each(tmp_path)] == []

    head = PY_HEAD if place.endswith(".py") else CPP_HEAD
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(head + text)
    found = law(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(place)


@pytest.mark.parametrize("text", ["int x;\n", f"// {SPDX}#include <x>\nint y;\n", ""])
def test_a_file_without_its_head_is_seen(text: str, tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/x.h").write_text(text)
    assert len(shape_violations(tmp_path)) == 1


def run_tool(*command: str) -> None:
    """Runs a tool of the `test` extra on the project and fails with what it says."""
    tool = Path(sysconfig.get_path("scripts")) / command[0]
    assert tool.is_file(), f"{command[0]} is missing: pip install '.[test]'"
    done = subprocess.run(
        [str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_ruff_check() -> None:
    run_tool("ruff", "check", "--no-cache", ".")


def test_ruff_format() -> None:
    run_tool("ruff", "format", "--no-cache", "--check", ".")


def test_clang_format() -> None:
    files = [str(path) for path in sources(ROOT, "csrc", "tests") if path.suffix in CPP_SUFFIXES]
    run_tool("clang-format", "--dry-run", "-Werror", *files)


def test_mypy() -> None:
    run_tool("mypy", f"--python-executable={sys.executable}", "hift_ext")
