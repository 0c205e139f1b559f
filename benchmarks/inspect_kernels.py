# SPDX-License-Identifier: Apache-2.0
# Compiles csrc/cuda/step.cu and norm.cu with the build's own compiler and flags, disassembles every
# kernel, and says which are at the memory bound with exact arithmetic. No GPU is needed.
"""`python benchmarks/inspect_kernels.py --json FILE`: the kernels, read from their machine code."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import norm_verdicts
from common import machine, write
from rich.console import Console
from rich.table import Table
from sass import parse_bounds, parse_ptx, parse_sass, parse_usage
from verdicts import (
    ARCHS,
    KERNELS,
    LATENCY_S,
    LLAMA_7B_BLOCK,
    RULES,
    TYPES,
    Cost,
    Kernel,
    judge,
    signature,
)

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
INSTALL_TOOLS = "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"

PROBE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry probe(.param .u64 p)
{
.reg .b64 %a;
.reg .f32 %x, %y;
ld.param.u64 %a, [p];
ld.global.f32 %x, [%a];
ld.global.f32 %y, [%a+4];
OPERATION
st.global.f32 [%a], %y;
ret;
}
"""
OPERATIONS = {"div": "div.rn.f32 %y, %x, %y;", "sqrt": "sqrt.rn.f32 %y, %y;"}


@cache
def build() -> ModuleType:
    """setup.py, which knows where compilers are."""
    spec = importlib.util.spec_from_file_location("hift_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Tools:
    """Paths of the compiler, the object dumper, and the disassembler that it calls."""

    nvcc: Path
    cuobjdump: Path
    nvdisasm: Path

    def version(self, tool: str) -> str:
        """Release of one of the tools."""
        text = run([getattr(self, tool), "--version"])
        found = re.search(r"V(\d+\.\d+\.\d+)", text)
        return found[1] if found else text.strip().splitlines()[-1]

    def dump(self, *what: str | Path) -> str:
        """What cuobjdump prints."""
        path = os.pathsep.join([str(self.nvdisasm.parent), os.environ.get("PATH", "")])
        return run([self.cuobjdump, *what], PATH=path)


def run(command: Sequence[str | Path], **environ: str) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"`{' '.join(map(str, command))}` failed with status {done.returncode}:\n"
            f"{done.stderr or done.stdout}"
        )
    return done.stdout


def find_tools() -> Tools:
    """The compiler that setup.py would take, and the tools beside it, on PATH or from pip."""
    toolkit, sites = Path("/usr/local/cuda"), build().site_folders(os.environ)
    nvcc = build().find_nvcc(os.environ, toolkit, sites)
    if nvcc is None:
        raise SystemExit(f"there is no nvcc: {build().INSTALL_NVCC}")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [nvcc.parent, *(Path(home, "bin") for home in homes), toolkit / "bin"]
    for site in sites:
        folders += sorted(site.glob("nvidia/cu*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        raise SystemExit(f"there is no {' and no '.join(missing)}: {INSTALL_TOOLS}")
    return Tools(nvcc, *(Path(str(place)) for place in found.values()))


def device_flags() -> list[str]:
    """The flags of csrc/CMakeLists.txt that decide the kernels' bits, in a release build."""
    found = re.search(r"set\(device ([^)]*)\)", (CSRC / "CMakeLists.txt").read_text())
    if found is None:
        raise SystemExit("csrc/CMakeLists.txt has no `set(device ...)` with nvcc's flags any more")
    return ["-O3", "-DNDEBUG", "-std=c++17", *found[1].split()]


def compile_cubin(
    tools: Tools, source: Path, arch: str, flags: Sequence[str], folder: Path
) -> Path:
    """Compiles one source file for one architecture; the PTX in between stays beside the result."""
    cubin = folder / f"{source.stem}.cubin"
    keep = ["--keep", "--keep-dir", str(folder)]
    run([tools.nvcc, *flags, f"-arch=sm_{arch}", "-cubin", *keep, "-o", cubin, source])
    return cubin


def exact_cost(tools: Tools, arch: str, folder: Path) -> Cost:
    """What this compiler makes of one exact division, and of one exact root."""
    cost = {}
    for name, operation in OPERATIONS.items():
        source = folder / f"probe_{name}.ptx"
        source.write_text(PROBE.replace("OPERATION", operation))
        cubin = folder / f"probe_{name}.cubin"
        run([tools.nvcc, f"-arch=sm_{arch}", "-cubin", "-o", cubin, source])
        cost[name] = signature(parse_sass(tools.dump("-sass", cubin))["probe"])
    return cost


def identify(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Rule, parameter type and gradient type, as C++ writes them, by mangled name."""
    names = list(names)
    plain = run(["c++filt", *names]).splitlines()
    kinds = {}
    for name, text in zip(names, plain, strict=True):
        found = re.search(
            r"Work<hift::\w+::(\w+(?:<\w+>)?), (?:hift::\w+::)?(\w+), (?:hift::\w+::)?(\w+)>", text
        )
        if found is None:
            raise SystemExit(f"{text} is not a kernel of ours: teach `identify` its name")
        kinds[name] = (found[1], found[2], found[3])
    return kinds


def kernels_of(tools: Tools, cubin: Path) -> list[Kernel]:
    """Every kernel of a compiled file, from its SASS, its PTX and its use of resources."""
    ptx_text = cubin.with_suffix(".ptx").read_text()
    ptx, bounds = parse_ptx(ptx_text), parse_bounds(ptx_text)
    sass = parse_sass(tools.dump("-sass", cubin))
    usage = parse_usage(tools.dump("-res-usage", cubin))
    made = []
    for name, (rule, param, grad) in identify(sass).items():
        if rule not in RULES:
            raise SystemExit(f"rule {rule} is new: add a line to RULES in benchmarks/verdicts.py")
        types = TYPES[param][0], TYPES[grad][0]
        made.append(Kernel(RULES[rule], *types, ptx[name], sass[name], usage[name], *bounds[name]))
    return sorted(
        made, key=lambda kernel: KERNELS.index((kernel.rule.name, kernel.param, kernel.grad))
    )


def inspect(
    tools: Tools, arch: str, csrc: Path = CSRC, more_flags: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Compiles, and judges every kernel for a card of architecture `arch`; one row for each."""
    source, flags = csrc / "cuda" / "step.cu", [*device_flags(), f"-I{csrc}", *more_flags]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cost = exact_cost(tools, arch, folder)
        kernels = kernels_of(tools, compile_cubin(tools, source, arch, flags, folder))
    kind = {"arch": f"sm_{arch}", "card": ARCHS[arch].card}
    return [{**kind, **judge(kernel, ARCHS[arch], cost)} for kernel in kernels]


def norm_kernels(tools: Tools, cubin: Path) -> list[norm_verdicts.NormKernel]:
    """Every kernel of the compiled norm.cu."""
    sass = parse_sass(tools.dump("-sass", cubin))
    usage = parse_usage(tools.dump("-res-usage", cubin))
    bounds = parse_bounds(cubin.with_suffix(".ptx").read_text())
    plain = run(["c++filt", *sass]).splitlines()
    made = []
    for name, text in zip(sass, plain, strict=True):
        kind = norm_verdicts.identify(text)
        threads = bounds.get(name, (norm_verdicts.LANES, 1))
        made.append(norm_verdicts.NormKernel(*kind, sass[name], usage[name], *threads))
    return made


def inspect_norm(
    tools: Tools, arch: str, csrc: Path = CSRC, more_flags: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Compiles norm.cu, and judges its kernels for a card of architecture `arch`."""
    source, flags = csrc / "cuda" / "norm.cu", [*device_flags(), f"-I{csrc}", *more_flags]
    with tempfile.TemporaryDirectory() as place:
        kernels = norm_kernels(tools, compile_cubin(tools, source, arch, flags, Path(place)))
    seen = sorted(str((kernel.name, kernel.grad)) for kernel in kernels)
    if seen != sorted(map(str, norm_verdicts.KERNELS)):
        raise SystemExit(f"norm.cu has the kernels {seen}, not {norm_verdicts.KERNELS}")
    kind = {"arch": f"sm_{arch}", "card": ARCHS[arch].card}
    judged = (norm_verdicts.judge_norm(kernel, ARCHS[arch], arch) for kernel in kernels)
    return [{**kind, **row} for row in judged]


def norm_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The norm's kernels on all architectures, for reading."""
    made = Table(title="the norm of a LLaMA-7B block's gradients")
    for name in ("arch", "kernel", "grad", "regs", "loads", "memory ms", "fp64 ms", "verdict"):
        made.add_column(name)
    for row in rows:
        made.add_row(
            row["arch"],
            row["kernel"],
            row["grad"] or "",
            str(row["registers"]),
            widths(row.get("load_bits", {})),
            f"{row['memory_ms']:.2f}" if "memory_ms" in row else "",
            f"{row.get('fp64_ms', row.get('latency_ms', 0)):.2f}",
            "ok" if row["ok"] else ", ".join(name for name, why in row["verdicts"].items() if why),
        )
    return made


def widths(counts: dict[str, int]) -> str:
    """Accesses of a loop, such as `4x128`."""
    return " ".join(
        f"{count}x{bits}" for bits, count in sorted(counts.items(), key=lambda x: -int(x[0]))
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One architecture's kernels, for reading."""
    first = rows[0]
    made = Table(
        title=f"{first['arch']}, {first['card']}: time for a LLaMA-7B block of {LLAMA_7B_BLOCK:,}"
    )
    for name in ("rule", "param", "grad"):
        made.add_column(name)
    for name in ("regs", "blocks", "occ.", "loads", "stores", "B/param", "FLOP/B", "x latency"):
        made.add_column(name, justify="right")
    for name in ("memory ms", "arith. ms"):
        made.add_column(name, justify="right")
    made.add_column("verdict")
    for row in rows:
        made.add_row(
            row["rule"],
            row["param"],
            row["grad"],
            str(row["registers"]),
            str(row["blocks_per_sm"]),
            f"{row['occupancy']:.0%}",
            widths(row["load_bits"]),
            widths(row["store_bits"]),
            f"{row['bytes_per_param']:g}",
            f"{row['flops_per_byte']:.2f}",
            f"{row['in_flight_bytes_per_sm'] / row['needed_bytes_per_sm']:.1f}",
            f"{row['memory_ms']:.2f}",
            f"{row['compute_ms']:.2f}",
            "ok" if row["ok"] else ", ".join(name for name, why in row["verdicts"].items() if why),
        )
    return made


def main() -> None:
    """Compiles, judges, writes what was asked for; status 1 if any verdict fails."""
    parser = argparse.ArgumentParser(description="The CUDA kernels, read from their machine code.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["80", "86", "90"])
    options = parser.parse_args()
    tools = find_tools()
    versions = {name: tools.version(name) for name in ("nvcc", "cuobjdump", "nvdisasm")}
    result: dict[str, Any] = {
        "machine": {**machine(), **versions},
        "flags": device_flags(),
        "block_parameters": LLAMA_7B_BLOCK,
        "latency_s": LATENCY_S,
        "cards": {f"sm_{arch}": asdict(ARCHS[arch]) for arch in options.arch},
        "rows": [],
        "norm_rows": [],
    }
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 150
    for arch in options.arch:
        begin = time.perf_counter()
        result["rows"] += inspect(tools, arch)
        result["norm_rows"] += inspect_norm(tools, arch)
        console.print(f"sm_{arch}: {time.perf_counter() - begin:.1f} s")
    seen = Counter((row["rule"], row["param"], row["grad"]) for row in result["rows"])
    missing = [kernel for kernel in KERNELS if seen[kernel] != len(options.arch)]
    if missing:
        raise SystemExit(f"step.cu has no kernel, or several, for {missing}")
    if options.json:
        write(options.json, result)
    judged = [*result["rows"], *result["norm_rows"]]
    failed = [row for row in judged if not row["ok"]]
    for arch in options.arch:
        console.print(table([row for row in result["rows"] if row["arch"] == f"sm_{arch}"]))
    console.print(norm_table(result["norm_rows"]))
    for row in failed:
        for name, reasons in row["verdicts"].items():
            for reason in reasons:
                what = row.get("kernel") or f"{row['rule']} {row['param']}"
                print(f"{row['arch']} {what}/{row['grad']}: {name}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(judged)} kernels fail a verdict")


if __name__ == "__main__":
    main()
