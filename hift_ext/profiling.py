# SPDX-License-Identifier: Apache-2.0
"""Names for the optimizer's stages in torch.profiler's traces and in NVTX ranges.

Where nobody listens a stage costs one question.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch._C._autograd import _profiler_enabled

log = logging.getLogger("hift_ext")

_Result = TypeVar("_Result")
_NOTHING = nullcontext()


def _nvtx_wanted() -> bool:
    """Whether HIFT_NVTX=1 asks for ranges, and this torch can make them."""
    if os.environ.get("HIFT_NVTX", "0") in ("", "0"):
        return False
    try:
        torch.cuda.nvtx.mark("hift")
    except RuntimeError as error:  # a torch without CUDA
        log.warning("HIFT_NVTX is set, and this torch makes no NVTX ranges: %s", error)
        return False
    return True


_nvtx = _nvtx_wanted()


class _Range(AbstractContextManager[None]):
    """An NVTX range, and a profiler's record where one runs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._record = torch.profiler.record_function(name) if _profiler_enabled() else None

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self._name)
        if self._record is not None:
            self._record.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._record is not None:
            self._record.__exit__(*error)
        torch.cuda.nvtx.range_pop()


def stage(name: str, detail: str | None = None) -> AbstractContextManager[object]:
    """The stage `hift::name`, or `hift::name[detail]`, inside `with`.

    It has a name in torch.profiler while that runs (and so in NVTX under
    torch.autograd.profiler.emit_nvtx), and an NVTX range with the environment's HIFT_NVTX=1.
    """
    if not _nvtx and not _profiler_enabled():
        return _NOTHING
    full = f"hift::{name}" if detail is None else f"hift::{name}[{detail}]"
    return _Range(full) if _nvtx else torch.profiler.record_function(full)


def staged(name: str, detail: str | None, call: Callable[..., _Result], *args: object) -> _Result:
    """Calls `call(*args)` as a stage; where nobody listens, in half the time of `with stage()`."""
    if not _nvtx and not _profiler_enabled():
        return call(*args)
    with stage(name, detail):
        return call(*args)
