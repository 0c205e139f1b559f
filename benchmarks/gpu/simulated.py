# SPDX-License-Identifier: Apache-2.0
# The device of a dry run: the product's CUDA sources linked with tests/cuda_sim's runtime, torch's
# CPU tensors for those of a GPU, and an account of the memory they take.
"""A device for machines that have none."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu.device import Memory

CONTEXT = 1 << 10
"""Bytes that a CUDA context is said to take."""

DEVICE = 1
"""Not the runtime's first, so that a step on the wrong device is seen."""


class Account(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and refuses those above a cap, as a GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = 0
        self.cap: int | None = None
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is not None and known() is storage:
            return

        def leave(_: Any) -> None:
            self._alive.pop(key, None)
            self.add(-size)

        self._alive[key] = weakref.ref(storage, leave)
        self.add(size)

    def add(self, size: int) -> None:
        """Takes bytes, or gives them back.

        Raises:
            torch.OutOfMemoryError: They do not fit under the cap; the taker drops them at once.
        """
        self.allocated += size
        if size > 0 and self.cap is not None and self.allocated > self.cap:
            raise torch.OutOfMemoryError(f"simulated: {self.allocated} bytes of {self.cap}")
        self.peak = max(self.peak, self.allocated)


class SimulatedDevice:
    """The runtime's second device, whose work is done in a random legal order."""

    dry = True
    index = DEVICE
    tensors = torch.device("cpu")

    def __init__(self) -> None:
        import _hift_ext

        torch.set_num_threads(1)  # a fork of a process has no other; dry runs are small

        self._sim = ctypes.CDLL(_hift_ext.__file__)
        for name in ("sim_allocate", "sim_make_stream"):
            getattr(self._sim, name).restype = ctypes.c_void_p
        for name in ("sim_operations", "sim_pageable_copies", "sim_registrations"):
            getattr(self._sim, name).restype = ctypes.c_int64
        self._sim.sim_error.restype = ctypes.c_char_p
        self._sim.sim_begin(2)
        self._stream: int = self._sim.sim_make_stream(DEVICE)
        self._on_host = False
        self._account = Account()
        self._account.__enter__()  # for the rest of the process
        self._patch()

    def _patch(self) -> None:
        """Has optimizers of CPU tensors work on this device."""
        from hift_ext import backend, layout, ops

        make_engine = backend.make_engine
        device = self

        class Ring:
            """Memory of the device, freed with its last owner."""

            def __init__(self, size: int) -> None:
                self.size, self.address = size, 0
                device._account.add(size)
                self.address = device._sim.sim_allocate(ctypes.c_size_t(size))

            def __del__(self) -> None:
                device._account.add(-self.size)
                device._sim.sim_free(ctypes.c_void_p(self.address))

            def data_ptr(self) -> int:
                return int(self.address)

        def make(streams: Any, where: torch.device, **options: Any) -> Any:
            # Resident state is in tensors, which are the CPU's here, and so is all of Triton's.
            on_cpu = device._on_host or options["store"] == "device"
            on_cpu = on_cpu or options["backend"] == "triton"
            place = where if on_cpu else torch.device("cuda", DEVICE)
            return make_engine(streams, place, **options)

        ops.cuda_memory = lambda size, _: Ring(size)  # type: ignore[assignment,return-value]
        ops.cuda_stream = lambda _: device._stream  # type: ignore[assignment]
        layout.make_engine = make  # type: ignore[assignment,attr-defined]

    def size(self, real: Any, dry: Any) -> Any:
        return dry

    def stream(self) -> int:
        return self._stream

    def synchronize(self) -> None:
        self._sim.sim_wait(ctypes.c_void_p(self._stream))

    def settle(self) -> None:
        self.synchronize()  # torch's CPU tensors know no stream that would be behind the step

    @contextmanager
    def host(self) -> Iterator[None]:
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def clock(self, run: Callable[[], object], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        self.synchronize()
        return 1e3 * (time.perf_counter() - begin) / repeats

    def beside(self, runs: Sequence[Callable[[], object]]) -> None:
        for run in runs:
            run()

    @contextmanager
    def registered(self, host: torch.Tensor) -> Iterator[torch.Tensor]:
        yield host

    def memory(self) -> Memory:
        account = self._account
        return Memory(account.allocated, account.peak, account.peak)

    def reset_peak(self) -> None:
        self._account.peak = self._account.allocated

    def empty_cache(self) -> None:
        self.synchronize()

    def context_bytes(self) -> int:
        return CONTEXT

    def cap(self, size: int) -> int:
        self._account.cap = size - CONTEXT
        return size - CONTEXT

    def info(self) -> dict[str, Any]:
        return {
            "card": "simulated CUDA runtime",
            "capability": "none",
            "sms": 0,
            "card_memory_bytes": 0,
        }

    def sanitizer(self, tool: str, kind: str) -> list[str]:
        return []  # the program itself, as it is

    def check(self) -> None:
        self.synchronize()
        error = self._sim.sim_error().decode()
        if error:
            raise RuntimeError(f"the simulated runtime saw a misuse: {error}")
        if self._sim.sim_pageable_copies():
            raise RuntimeError("the engine copied from host memory that is not registered")
