# SPDX-License-Identifier: Apache-2.0
# Validates and measures the CUDA path on one GPU, in under eight minutes, with nothing to download;
# `--dry-run` runs the same on a simulated CUDA runtime, where figures mean nothing.
"""`python benchmarks/gpu_check.py --json FILE [--plot FILE.png] [--dry-run] [--only SECTION ...]`.

Exits with 1 if any section failed. Each section is a module of the folder gpu/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import module
from gpu.report import Lines, Row, line, print_table
from gpu.runner import (
    BUILD_SECONDS,
    DRY_SECONDS,
    LEAST_SECONDS,
    SECONDS,
    TOTAL_SECONDS,
    Result,
    reason,
    run_section,
)

DRY_BUILD_SECONDS = 600


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Checks and measures the CUDA path on one GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it here")
    parser.add_argument("--only", nargs="+", choices=SECONDS, metavar="SECTION", default=None)
    parser.add_argument("--dry-run", action="store_true", help="on a simulated CUDA runtime")
    parser.add_argument(
        "--sim-module",
        type=Path,
        metavar="DIR",
        help="take the dry run's compiled module from here; it is built here if there is none",
    )
    options = parser.parse_args(arguments)
    if options.sim_module and not options.dry_run:
        parser.error("--sim-module is of --dry-run")
    return options


def prepare(options: argparse.Namespace, temporary: Path) -> str:
    """Gets the compiled module; says where from.

    Raises:
        RuntimeError: It cannot be built.
    """
    if not options.dry_run:
        return module.get_real(BUILD_SECONDS)
    os.environ["TRITON_INTERPRET"] = "1"
    folder = (options.sim_module or temporary).resolve()
    return module.get_simulated(folder, DRY_BUILD_SECONDS)


def run_all(options: argparse.Namespace, temporary: Path) -> list[Result]:
    """All sections that were asked for, one after the other."""
    names = options.only or list(SECONDS)
    begin = time.monotonic()
    try:
        source = prepare(options, temporary)
    except Exception as error:
        traceback.print_exc()
        why = reason(error)
        return [Result(name, failed=f"no compiled module: {why}") for name in names]
    import torch  # noqa: F401  (once for all children; CUDA is not touched before they part)

    took = {"ready_after_s": time.monotonic() - begin}
    built = Row("source", {"module": source}, took, ["module", *took])
    results = []
    for name in names:
        print(f"gpu_check: {name}", file=sys.stderr, flush=True)
        left = max(LEAST_SECONDS, TOTAL_SECONDS - (time.monotonic() - begin))
        seconds = DRY_SECONDS if options.dry_run else min(SECONDS[name], left)
        results.append(run_section(name, options.dry_run, seconds))
        if name == "build":
            results[-1].rows.insert(0, built)
    return results


def machine() -> dict[str, Any]:
    """The host; in short where matplotlib, which common.py imports, is not installed."""
    try:
        import common
    except ImportError as error:
        now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
        return {"date": now, "incomplete": str(error)}
    return common.machine()


def as_json(results: Sequence[Result], dry: bool) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "dry_run": dry,
        "sections": {
            result.name: {
                "status": result.status,
                "failed": result.failed,
                "seconds": round(result.seconds, 1),
                "rows": [row.as_dict(dry) for row in result.rows],
            }
            for result in results
        },
    }


def lines(results: Sequence[Result], dry: bool) -> Lines:
    """The table's lines."""
    found: Lines = []
    for result in results:
        for row in result.rows:
            keys = row.shown or [*row.measured]
            found.append((result.name, row.name, line(row.as_dict(dry), keys) or row.status))
        if result.failed:
            found.append((result.name, "section", f"failed: {result.failed}"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, writes, prints the table last; gives the exit status."""
    options = parse(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(options, Path(temporary))
    seconds = time.monotonic() - begin
    failed = [result.name for result in results if result.status == "failed"]
    found = {"machine": {}, "seconds": round(seconds, 1), **as_json(results, options.dry_run)}
    unbuilt = all(result.failed.startswith("no compiled module") for result in results)
    if not unbuilt:
        found["machine"] = machine()
    if options.json:
        text = json.dumps(found, indent=1, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    status = 1 if failed else 0
    if options.plot:
        from gpu.plots import plot

        try:
            rows = {result.name: result.rows for result in results}
            plot(options.plot, rows, found["machine"], options.dry_run)
        except Exception as error:
            traceback.print_exc()
            print(f"gpu_check: no plot: {reason(error)}", file=sys.stderr)
            status = 1
    end = f"failed: {', '.join(failed)}" if failed else "all sections passed"
    what = "DRY RUN on a simulated runtime, no measurements" if options.dry_run else "one GPU"
    print_table(f"gpu_check, {what}: {end}, {seconds:.0f} s", lines(results, options.dry_run))
    return status


if __name__ == "__main__":
    sys.exit(main())
