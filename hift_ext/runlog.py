# SPDX-License-Identifier: Apache-2.0
"""The monitor's file: JSON lines that are there whole or not at all, and what the first one says.

A disk that is full ends the log, not the training.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ext import ops
from hift_ext._version import __version__
from hift_ext.intervals import compiled

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

log = logging.getLogger("hift_ext")


class RunLog:
    """Writes lines to a file, each by one call of the system.

    Args:
        path: The file.
        append: Whether to go on behind what it holds; otherwise it must not exist.

    Raises:
        FileExistsError: It does.
        FileNotFoundError: There is no directory for it.
    """

    def __init__(self, path: Path, append: bool) -> None:
        self.path = path
        self.is_empty = True
        """Whether nothing was written yet, by this object."""
        how = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._file = os.open(path, how if append else how | os.O_EXCL, 0o666)
        except FileExistsError:
            raise FileExistsError(
                f"the log {path} exists: pass append=True to go on behind it, or another name "
                "(each process of a training needs one of its own)"
            ) from None
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the directory {path.absolute().parent} of the log does not exist: make it first"
            ) from None
        self._failed = False
        self._mend()

    def _mend(self) -> None:
        """Ends a line that a dead process left unfinished."""
        size = os.fstat(self._file).st_size
        if size:
            with open(self.path, "rb") as file:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    os.write(self._file, b"\n")

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line. Where the system refuses, a warning says so, and the log is at its end."""
        self.is_empty = False
        if self._failed:
            return
        values = {name: _plain(value) for name, value in line.items()}
        data = (json.dumps(values, allow_nan=False) + "\n").encode()
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            self._failed = True
            log.warning("the log %s ends here, the training goes on: %s", self.path, error)
            if written:
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _plain(value: Any) -> Any:
    """As JSON has it: no tensors, and nothing that is not finite."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def facts(optimizer: HiFTOptimizer) -> dict[str, Any]:
    """The line of the run: what was chosen, and what the engine made of it."""
    engine, options = optimizer.state.engine, optimizer._options
    inner = compiled(engine)
    groups = optimizer.groups
    params = [p for group in groups for p in group.params]
    device = params[0].device
    triton = engine is not None and "Triton" in type(engine).__name__
    kept = getattr(optimizer, "_precision", None)
    return {
        "kind": "run",
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "pid": os.getpid(),
        "hift_ext": __version__,
        "torch": torch.__version__,
        "optimizer": type(optimizer).__name__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "backend": "triton" if triton else device.type,
        "isa": ops.build_info()["isa"],
        "threads": torch.get_num_threads(),
        "store": options["store"],
        "state": None if engine is None else engine.description,
        "why": getattr(engine, "why", None) or None,
        "store_bytes": None if engine is None else engine.store_bytes,
        "staging_bytes": None if engine is None else engine.staging_bytes,
        "page_bytes": None if inner is None else inner.page_bytes,
        "state_dtype": None if kept is None else str(kept.state_dtype).removeprefix("torch."),
        "master": None if kept is None else kept.master,
        "max_grad_norm": options["max_grad_norm"],
        "pass": optimizer.pass_index,
        "order": str(options["order"]),
        "groups": [{"name": group.name, "numel": group.numel} for group in groups],
    }


def union_ms(spans: Iterable[tuple[float, float]]) -> float:
    """Milliseconds in which at least one of these ran (begin and end in seconds)."""
    total, told = 0.0, -math.inf
    for begin, end in sorted(spans):
        if end > told:
            total += end - max(begin, told)
            told = end
    return 1e3 * total
