# SPDX-License-Identifier: Apache-2.0
# Proof that the tests see every ordering edge: each wait, record and synchronisation of the CUDA
# path is taken out, one at a time, and some test must fail. Writes the table in docs/edges.md.
"""`python tests/cuda_sim/mutate.py [--table docs/edges.md]`."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FILES = ("cuda/mover_ring.cpp", "cuda/mover_file.cpp", "engine_cuda.cpp", "engine.cpp")
EDGE = re.compile(
    r"\.(hold|record|wait|try_record)\(|\b(wait_in|wait_out|finish|give_up|drain|flush|stop)\(|"
    r"->(wait|await)\(|cudaStreamSynchronize\(|call\(hooks\.|\bwait\(\);"
)
NOT_A_STATEMENT = re.compile(r"^(void|bool|double)\b|::~|^return")

# Name, sanitizer, program, arguments. The later ones are slow: they run where the earlier ones see
# nothing.
TESTS = (
    ("promises", "", "test_mover", ()),
    ("schedules", "", "test_schedules", ("400",)),
    ("happens-before", "thread", "test_schedules", ("8",)),
    ("faults", "", "test_faults", ("1",)),
)
QUICK = 2


@dataclass
class Site:
    """One statement that orders something."""

    file: str
    line: int  # from 0
    text: str
    reason: str
    caught_by: list[str] = field(default_factory=list)


def sites() -> list[Site]:
    """Every ordering statement, with the comment above it."""
    found = []
    for file in FILES:
        lines = (CSRC / file).read_text().splitlines()
        for number, line in enumerate(lines):
            text = line.strip()
            if not EDGE.search(text) or text.startswith("//") or NOT_A_STATEMENT.search(text):
                continue
            above, reason = number - 1, []
            while (
                above >= 0
                and not lines[above].strip().startswith(("//", "}"))
                and number - above < 3
            ):
                above -= 1
            while above >= 0 and lines[above].strip().startswith("//"):
                reason.insert(0, lines[above].strip().lstrip("/ "))
                above -= 1
            found.append(Site(file, number, text, " ".join(reason)))
    return found


def without(source: str, line: int) -> str:
    """The source with the statement that begins in a line taken out; lines keep their numbers."""
    lines = source.splitlines(keepends=True)
    end = line
    while lines[end].count("(") and not lines[end].rstrip().split("//")[0].rstrip().endswith(
        (";", "{")
    ):
        end += 1
    taken = "".join(lines[line : end + 1])
    keep = re.match(r"\s*", lines[line])
    assert keep is not None
    value = re.match(r"\s*const double (\w+) = ", lines[line])
    rest = f"const double {value[1]} = 0;" if value else ";"
    lines[line] = f"{keep[0]}{rest}" + "\n" * taken.count("\n")
    for gone in range(line + 1, end + 1):
        lines[gone] = ""
    return "".join(lines)


class Build:
    """A build folder of the tests on the simulated runtime."""

    def __init__(self, folder: Path, csrc: Path, sanitize: str) -> None:
        self.folder = folder
        tests = csrc.parent / "tests" / HERE.name
        command = ["cmake", "-S", str(tests), "-B", str(folder), "-G", "Ninja", f"-DCSRC={csrc}"]
        subprocess.run([*command, f"-DSANITIZE={sanitize}"], check=True, stdout=subprocess.DEVNULL)
        self.make()

    def make(self) -> None:
        """Compiles what changed."""
        command = ["cmake", "--build", str(self.folder), "--", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the mutant does not compile:\n{done.stdout[-2000:]}")

    def fails(self, program: str, arguments: tuple[str, ...]) -> bool:
        """Whether a test program fails. One that hangs fails."""
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
        try:
            done = subprocess.run(
                [*fixed, str(self.folder / program), *arguments],
                capture_output=True,
                timeout=900,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        return done.returncode != 0


def table(found: list[Site]) -> str:
    """Markdown."""
    lines = [
        "# Ordering edges of the CUDA path",
        "",
        "Each of these statements was taken out of the source, one at a time, and the tests on the",
        "simulated runtime were run. *promises*: the mover's own tests; *schedules*: the engine",
        "in 400 random legal orders, bits compared. Where both saw nothing: *happens-before*,",
        "the same with ThreadSanitizer and a fiber for each stream; *faults*, every runtime call",
        "failing in turn. Written by `python tests/cuda_sim/mutate.py` on",
        f"{datetime.date.today()}.",
        "",
        "| Where | Statement | Reason | Caught by |",
        "|---|---|---|---|",
    ]
    for site in found:
        caught = ", ".join(site.caught_by) or "nothing"
        cells = (f"{site.file}:{site.line + 1}", f"`{site.text}`", site.reason, caught)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Removes every edge in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table here")
    parser.add_argument("--only", help="a pattern in a file's name or a statement")
    options = parser.parse_args()
    found = [s for s in sites() if not options.only or re.search(options.only, s.file + s.text)]
    with tempfile.TemporaryDirectory() as temporary:
        csrc = Path(temporary, "csrc")
        shutil.copytree(CSRC, csrc)
        for folder in (HERE, HERE.parent / "cpp"):  # the tree may change meanwhile
            shutil.copytree(folder, Path(temporary, "tests", folder.name))
        builds = {how: Build(Path(temporary, f"build-{how}"), csrc, how) for how in ("", "thread")}
        for name, how, program, arguments in TESTS:
            if builds[how].fails(program, arguments):
                raise RuntimeError(f"{name} fails before anything was taken out")
        for site in found:
            path = csrc / site.file
            source = path.read_text()
            path.write_text(without(source, site.line))
            for number, (name, how, program, arguments) in enumerate(TESTS):
                if number >= QUICK and site.caught_by:
                    break
                builds[how].make()
                if builds[how].fails(program, arguments):
                    site.caught_by.append(name)
            path.write_text(source)
            print(f"{site.file}:{site.line + 1}: {site.text}\n    {site.caught_by}", flush=True)
    if options.table:
        options.table.write_text(table(found))
    missed = [s for s in found if not s.caught_by]
    print(f"{len(found)} edges, {len(missed)} that no test misses")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
