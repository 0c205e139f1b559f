# SPDX-License-Identifier: Apache-2.0
"""How much memory and disk can still be had: by the kernel, by control groups, by torch.

Processes of one job on one machine share what is free; each counts on its part only.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

ROOT = Path("/")


def host_free_bytes(root: Path = ROOT) -> int | None:
    """Bytes of host memory that can be had without swapping; None where nobody tells.

    The least of what the kernel calls available and what each control group around this process
    leaves, its file cache counted as free.

    Args:
        root: Where /proc and /sys are.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.M)
    limits = [1024 * int(found[1])] if found else []
    limits += [free for folder in _groups(root) if (free := _group_free(folder)) is not None]
    return max(min(limits), 0) if limits else None


def _groups(root: Path) -> list[Path]:
    """Folders of the control groups around this process, of version 2 and of version 1.

    In a container the path is often that of the host and the group itself is at the top.
    """
    tops = {"": root / "sys/fs/cgroup", "memory": root / "sys/fs/cgroup/memory"}
    found: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            if name in tops:
                inner = tops[name] / path.lstrip("/")
                found += [inner, *(p for p in inner.parents if p.is_relative_to(tops[name]))]
    return found or list(tops.values())


def _group_free(folder: Path) -> int | None:
    """What a group has left, or None where it sets no limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        texts = [_read(folder / name).strip() for name in (limit, used)]
        if all(text.isdecimal() for text in texts):
            most, taken = map(int, texts)
            kept = re.search(rf"^{cache} (\d+)", _read(folder / "memory.stat"), re.M)
            return most - taken + (int(kept[1]) if kept else 0)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def disk_free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that this user can still write below `folder`.

    Raises:
        OSError: There is no such folder.
    """
    return shutil.disk_usage(folder).free


def device_free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that torch has not needed at its peak so far; None where torch sees no GPU.

    Before a first backward pass the peak is not known, and what is allocated now counts.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # torch gives from what it has reserved first.
    reserved = torch.cuda.memory_reserved(device)
    return max(free + reserved - torch.cuda.max_memory_allocated(device), 0)


def local_processes() -> int:
    """Processes of this job on this machine, as launchers tell (torchrun's LOCAL_WORLD_SIZE)."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(text), 1) if text.isdecimal() else 1
