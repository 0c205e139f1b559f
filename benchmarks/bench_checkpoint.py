# SPDX-License-Identifier: Apache-2.0
# What a checkpoint costs beside moving as many bytes plainly: a sequential write that waits for the
# disk, and a sequential read that finds nothing in memory, on the same file system, in turns. State
# that is loaded into host memory for the first time is compared with a read into new memory. Where
# the file system shares the page file's blocks, copying it is timed as well.
"""`python benchmarks/bench_checkpoint.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, deliver, draw, machine, median_ratio
from disk import random_buffer
from torch import nn

import hift_ext
from hift_ext import reflink

BLOCK = 1 << 20
ELEMENTS = 4 << 20
"""Of a parameter: 32 MiB of AdamW's state."""


def forget(*files: Path) -> None:
    """Drops files from the page cache, so that reading them reads the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plain_write(path: Path, size: int, data: memoryview) -> None:
    """Writes a new file and waits until the disk has it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for begin in range(0, size, BLOCK):
        os.write(handle, data[: min(BLOCK, size - begin)])
    os.fsync(handle)
    os.close(handle)


def plain_read(path: Path, data: memoryview) -> None:
    """Reads a file from its beginning to its end."""
    handle = os.open(path, os.O_RDONLY)
    while os.readv(handle, [data]):
        pass
    os.close(handle)


def read_into_new_memory(path: Path, size: int) -> None:
    """Reads a file to memory that the system has yet to give."""
    memory = mmap.mmap(-1, size)
    data = memoryview(memory)
    handle = os.open(path, os.O_RDONLY)
    for begin in range(0, size, BLOCK):
        os.readv(handle, [data[begin : begin + BLOCK]])
    os.close(handle)
    data.release()
    memory.close()


def plain_copy(source: Path, target: Path, data: memoryview) -> None:
    """What saving from a page file, and loading to it, come to: reads a file, writes another."""
    incoming = os.open(source, os.O_RDONLY)
    outgoing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while count := os.readv(incoming, [data]):
        os.write(outgoing, data[:count])
    os.fsync(outgoing)
    for handle in (incoming, outgoing):
        os.close(handle)


def new_optimizer(store: str, weights: list[nn.Parameter]) -> hift_ext.AdamW:
    """An optimizer that has no state yet."""
    return hift_ext.AdamW(weights, layers_per_group="all", store=store, staging=64 << 20)


def optimizer_of(store: str, parameters: int) -> hift_ext.AdamW:
    """An optimizer that has made a step."""
    weights = [nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(parameters)]
    optimizer = new_optimizer(store, weights)
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.grad = torch.randn(ELEMENTS, generator=generator)
    optimizer.step()
    for weight in weights:
        weight.grad = None
    return optimizer


def save_copying(optimizer: hift_ext.AdamW, path: Path) -> None:
    """Saves as where blocks cannot be shared."""
    real, reflink.share = reflink.share, lambda *_: None
    try:
        hift_ext.save(optimizer, path)
    finally:
        reflink.share = real


def is_shared(path: Path) -> bool:
    """Whether a checkpoint was made of a page file's own blocks."""
    return ".flat[" in (path / "manifest.json").read_text()


def measure(folder: Path, parameters: int, rounds: int) -> list[dict[str, Any]]:
    """Times everything once a round, in a new order each round."""
    buffer = random_buffer(BLOCK)
    data = memoryview(buffer)
    places = {"ram": "ram", "disk": f"disk:{folder / 'pages'}"}  # beside the checkpoints
    stores = {store: optimizer_of(place, parameters) for store, place in places.items()}
    for store, optimizer in stores.items():
        hift_ext.save(optimizer, folder / store)
    files = {store: sorted((folder / store).glob("*.safetensors")) for store in stores}
    size = sum(file.stat().st_size for file in files["ram"])
    plain, copy = folder / "plain", folder / "copy"
    plain_write(plain, size, data)
    runs: dict[str, tuple[str | None, Callable[[], object]]] = {
        "plain write": (None, lambda: plain_write(plain, size, data)),
        "plain read": (None, lambda: plain_read(plain, data)),
        "plain copy": (None, lambda: plain_copy(plain, copy, data)),
        "read into new memory": (None, lambda: read_into_new_memory(plain, size)),
    }
    weights = [nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(parameters)]

    def resume(store: str) -> None:
        optimizer = new_optimizer("ram" if store == "ram" else f"disk:{folder / 'again'}", weights)
        hift_ext.load(optimizer, folder / store)
        optimizer.close()

    for store, optimizer in stores.items():
        path, against = folder / store, "plain write" if store == "ram" else "plain copy"
        runs[f"save from {store}"] = (against, lambda o=optimizer, p=path: hift_ext.save(o, p))
        against = "plain read" if store == "ram" else "plain copy"
        runs[f"load to {store}"] = (against, lambda o=optimizer, p=path: hift_ext.load(o, p))
        against = "read into new memory" if store == "ram" else "plain copy"
        runs[f"resume in {store}"] = (against, lambda s=store: resume(s))
    if is_shared(folder / "disk"):
        copied = stores["disk"], folder / "copied"
        runs["save copying from disk"] = ("plain copy", lambda: save_copying(*copied))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    for number in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            forget(plain, *(file for store in stores for file in (folder / store).iterdir()))
            begin = time.perf_counter()
            runs[name][1]()
            seconds[name].append(time.perf_counter() - begin)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for optimizer in stores.values():
        optimizer.close()
    return [
        {
            "name": name,
            "store": name.split()[-1] if against else None,
            "bytes": size,
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "gbps": size / statistics.median(seconds[name]) / 1e9,
            "against": against,
            "ratio": median_ratio(seconds[name], seconds[against]) if against else None,
            "samples_ms": [1e3 * second for second in seconds[name]],
        }
        for name, (against, _) in runs.items()
    ]


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draws the speeds as bars, each beside what it is compared with."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(9, 4))
    panel = figure.subplots()
    colors = ["#c8102e" if row["against"] else "#222222" for row in rows]
    bars = panel.barh([row["name"] for row in rows], [row["gbps"] for row in rows], color=colors)
    labels = [
        f"{row['ratio']:.2f} x {row['against']}'s time" if row["against"] else "" for row in rows
    ]
    panel.bar_label(bars, labels, padding=4, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.set_xlabel("GB/s")
    panel.spines[["top", "right"]].set_visible(False)
    draw(path, figure, "Saving and loading a checkpoint", result["machine"])


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = arguments("Checkpoints beside plain reads and writes of as many bytes.")
    parser.add_argument("--mebibytes", type=int, default=1024, help="of state; at least 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure (TMPDIR or /var/tmp)")
    options = parser.parse_args()
    if options.mebibytes < 32 or options.rounds < 1:
        parser.error("--mebibytes must be at least 32 and --rounds at least 1")
    where = options.folder or os.environ.get("TMPDIR", "/var/tmp")
    folder = Path(tempfile.mkdtemp(dir=where, prefix="hift-bench-"))
    try:
        rows = measure(folder, options.mebibytes // 32, options.rounds)
    finally:
        shutil.rmtree(folder)
    result = {"machine": machine(), "rows": rows}
    for row in rows:
        ratio = f"  x {row['against']} {row['ratio']:.3f}" if row["against"] else ""
        print(
            f"{row['name']:22}{row['median_ms']:10.1f} ms {row['gbps']:6.2f} GB/s{ratio}",
            file=sys.stderr,
        )
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
