# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: what was saved, where it is, and whether it fits an optimizer.

One small JSON file with a checksum of its own; everything is keyed by index in param_groups order.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ext.paged_state import Entry, strides_of
from hift_ext.sharding import is_sharded
from hift_ext.shards import DTYPE_NAMES, CheckpointError, TensorSpec

if TYPE_CHECKING:
    from hift_ext.ops import Stored
    from hift_ext.optimizer import HiFTOptimizer

NAME = "manifest.json"
FORMAT, VERSION = "hift_ext checkpoint", 2
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass
class Piece:
    """Stored values of a run of a parameter's elements, all of one shard's tensor.

    Attributes:
        shard: The file.
        key: The tensor in it.
        begin: The first element; blocks of 8-bit codes are counted from it.
        count: Elements.
        xxh3: Checksum of the tensor's bytes (XXH3, 64 bits, in hexadecimal digits).
    """

    shard: str
    key: str
    begin: int
    count: int
    xxh3: str


@dataclass
class SavedStream:
    """One stream of a parameter.

    Attributes:
        name: As in `state[p]`.
        dtype: Of the stored values.
        run: Elements that share `width` values: 1; 256 for 8-bit codes (csrc/core/precision.h) and
            for their scales.
        width: Values of a run.
        fill: The value where nothing was stored.
        pieces: Where its values are, in order and without gaps; none: all are `fill`.
    """

    name: str
    dtype: torch.dtype
    run: int
    width: int
    fill: float
    pieces: list[Piece] = field(default_factory=list)

    def nbytes(self, elements: int) -> int:
        """Bytes of the stored values of so many elements."""
        return -(-elements // self.run) * self.width * self.dtype.itemsize


@dataclass
class SavedParam:
    """A trained parameter, with the layout that its stored values have."""

    index: int
    name: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    visits: int
    streams: list[SavedStream]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def row_major(self) -> bool:
        """Whether its stored values are in the order of its elements."""
        return torch.empty_strided(self.shape, self.strides, device="meta").is_contiguous()

    def spec(self, stream: SavedStream, begin: int, count: int) -> TensorSpec:
        """The tensor of some rows, or of all: shaped as they are where that is their order."""
        key, shape = f"{self.index}.{stream.name}", self.shape
        if count != self.numel:
            row = math.prod(self.shape[1:])
            first, rows = begin // row, count // row
            key, shape = f"{key}[{first}:{first + rows}]", (rows, *self.shape[1:])
        if stream.run != 1 or not self.row_major:
            shape = (stream.nbytes(count) // stream.dtype.itemsize,)
        return TensorSpec(key, stream.dtype, shape)


@dataclass
class Manifest:
    """What a checkpoint holds.

    Attributes:
        optimizer: Name of the class.
        param_groups: Settings, with indices for parameters; the schedule is the first's `hift`.
        params: The trained parameters.
        shards: By file name: `size`, `head_bytes`, `head_crc32`.
        crc32: Its checksum, where it was read.
    """

    optimizer: str
    param_groups: list[dict[str, Any]]
    params: list[SavedParam]
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    crc32: int = 0

    def write(self, folder: Path) -> None:
        """Writes it, to the disk."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "optimizer": self.optimizer,
            "param_groups": [encoded(group) for group in self.param_groups],
            "params": [_param_out(param) for param in self.params],
            "shards": self.shards,
        }
        data = memoryview(json.dumps({**body, "crc32": _sum(body)}).encode())
        file = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        finally:
            os.close(file)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks it.

        Raises:
            CheckpointError: There is none, or it is damaged or not ours.
        """
        path = folder / NAME
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            why = "has no manifest.json" if folder.is_dir() else "does not exist"
            raise CheckpointError(f"{folder} is not a checkpoint: it {why}") from None
        except NotADirectoryError:
            raise CheckpointError(f"{folder} is a file, not a checkpoint's directory") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is corrupted: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not the manifest of a hift_ext checkpoint")
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format version {body.get('version')!r}; this hift_ext reads {VERSION}"
            )
        expected = body.pop("crc32", None)
        if _sum(body) != expected:
            raise CheckpointError(f"{path} is corrupted: its checksum fails")
        return cls(
            body["optimizer"],
            [decoded(group) for group in body["param_groups"]],
            [_param_in(param) for param in body["params"]],
            body["shards"],
            expected,
        )


def _sum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def saved_param(
    entry: Entry, index: int, name: str | None, streams: Iterable[Stored], laid_out: bool
) -> SavedParam:
    """A parameter as it is now, its streams without values."""
    p = entry.param
    shape, strides = entry.shape, entry.strides
    if is_sharded(p):
        shape, strides = p.shape, torch.empty(p.shape, device="meta").stride()
    elif not laid_out:
        shape, strides = p.shape, strides_of(p)
    saved = [SavedStream(s.name, s.dtype, s.run, s.width, float(s.fill)) for s in streams]
    return SavedParam(index, name, p.dtype, tuple(shape), strides, entry.visits, saved)


def _param_out(param: SavedParam) -> dict[str, Any]:
    streams = [
        {**vars(s), "dtype": DTYPE_NAMES[s.dtype], "pieces": [vars(piece) for piece in s.pieces]}
        for s in param.streams
    ]
    return {**vars(param), "dtype": DTYPE_NAMES[param.dtype], "streams": streams}


def _param_in(saved: dict[str, Any]) -> SavedParam:
    streams = [
        SavedStream(
            **{
                **stream,
                "dtype": _DTYPES[stream["dtype"]],
                "pieces": [Piece(**piece) for piece in stream["pieces"]],
            }
        )
        for stream in saved["streams"]
    ]
    fields = {name: tuple(saved[name]) for name in ("shape", "strides")}
    dtype = _DTYPES[saved["dtype"]]
    return SavedParam(**{**saved, **fields, "dtype": dtype, "streams": streams})


def check_tiled(manifest: Manifest) -> None:
    """Whether the pieces of every stream make it up, each element once.

    Raises:
        RuntimeError: They do not.
    """
    for param in manifest.params:
        for stream in param.streams:
            end = 0
            for piece in stream.pieces:
                if piece.begin != end:
                    break
                end += piece.count
            else:
                if end == (param.numel if stream.pieces else 0):
                    continue
            raise RuntimeError(
                f"the ranks' parts of {stream.name} of parameter {param.index} ({param.name!r}) "
                f"are not the whole of its {param.numel} elements, each once: from element {end} "
                "on they have a gap or overlap"
            )


# Settings ---------------------------------------------------------------------------------------


def encoded(value: Any, where: str = "param_groups") -> Any:
    """A setting in JSON's terms; tuples and scalar tensors are marked.

    Raises:
        TypeError: A value that JSON cannot hold.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encoded(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [encoded(item, where) for item in value]}
    if isinstance(value, list):
        return [encoded(item, where) for item in value]
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype in _SCALARS:
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a manifest cannot hold: keep numbers, "
        "strings, lists and dicts there, or use state_dict() with torch.save"
    )


_SCALARS = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)


def decoded(value: Any) -> Any:
    """Undoes `encoded`."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(decoded(item) for item in value["tuple"])
    if value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return {key: decoded(item) for key, item in value.items()}


# Whether it fits --------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """A parameter's name without what wrappers of a model put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_class(optimizer: HiFTOptimizer, saved: Manifest, folder: Path) -> None:
    """Refuses a checkpoint of another kind of optimizer.

    Raises:
        ValueError: It is one.
    """
    kind = type(optimizer).__name__
    if saved.optimizer != kind:
        raise ValueError(
            f"{folder} was saved by {saved.optimizer}, and this is {kind}: load it into "
            f"{saved.optimizer}, whose state_dict() can be loaded into another class"
        )


def check_fit(
    optimizer: HiFTOptimizer, members: list[torch.Tensor], saved: Manifest, folder: Path
) -> None:
    """Compares names and shapes of as many parameters.

    Raises:
        ValueError: They differ, and how.
    """
    names = optimizer._names()
    for param in saved.params:
        p = members[param.index]
        name = names.get(p)
        if name and param.name and _plain(name) != _plain(param.name):
            raise ValueError(
                f"parameter {param.index} is {param.name!r} in {folder} and {name!r} here: the "
                "models, or the order of their parameters, differ"
            )
        if tuple(p.shape) != param.shape:
            raise ValueError(
                f"{optimizer._say(p)} has the shape {tuple(p.shape)}, and {param.shape} in {folder}"
            )


def _names_in(folder: Path) -> set[str]:
    """Names of the files of a directory that may be replaced and removed meanwhile."""
    while True:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return set()
        try:
            names = set(os.listdir(handle))
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return names
        except FileNotFoundError:
            return set()
        finally:
            os.close(handle)


def check_files(folder: Path) -> None:
    """Refuses to replace what is not a checkpoint, or holds files that are not its own.

    Raises:
        FileExistsError: With what is there.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is not a directory: save elsewhere, or remove it")
    there = _names_in(folder)
    if not there:
        return
    if NAME not in there:
        raise FileExistsError(
            f"{folder} is not empty and not a checkpoint (no {NAME}): save elsewhere, or remove it"
        )
    foreign = sorted(name for name in there - {NAME} if not _SHARD.fullmatch(name))
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0]!r}, which is not the checkpoint's and would be lost with "
            "the old one: move it out"
        )


_SHARD = re.compile(r"state-(r\d{5}-)?\d{5}\.safetensors")


def shard_name(number: int, rank: int | None) -> str:
    """Name of a shard: its number, from 1, and the rank that writes it if there are several."""
    return f"state-{'' if rank is None else f'r{rank:05d}-'}{number:05d}.safetensors"
