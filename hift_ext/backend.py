# SPDX-License-Identifier: Apache-2.0
"""Which engine keeps the state and updates the weights: the choice, and what stands in its way."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from hift_ext import choices, ops, torch_device
from hift_ext.engines import PagedEngine, ResidentEngine, StateEngine
from hift_ext.hardware import cuda_missing
from hift_ext.precision import PLAIN, Precision


def _make_triton_engine(
    streams: Sequence[ops.StreamSpec],
    device: torch.device,
    store: str,
    page: int,
    ring: int,
    kept: Precision,
    missing: str,
) -> StateEngine:
    if store not in ("ram", "device"):
        raise RuntimeError(
            f"store={store!r} is not offered with Triton, whose pages rest in host memory: pass "
            "store='ram' or 'device', or use the CUDA kernels"
            + (f" ({missing})" if missing else "")
        )
    try:
        from hift_ext import triton_engine, triton_paged
    except ImportError as error:
        raise RuntimeError(
            f"Triton cannot update parameters on {device} ({error}): `pip install 'triton>=3.6'`"
            + (f", or use the CUDA kernels: {missing}" if missing else "")
        ) from error
    if missing:
        warnings.warn(
            f"{missing}. Until then Triton updates the weights, by a launch for each parameter and "
            "page where the CUDA kernels need one a page, and torch moves the pages; there is no "
            "store='disk' and no staging=0",
            stacklevel=2,
        )
    # Without state nothing moves, nor under Triton's interpreter, where all is the host's.
    if store == "device" or not kept.stored(streams) or device.type == "cpu":
        return triton_engine.TritonEngine(streams, device, kept)
    gpu = torch_device.CudaDevice(device)
    return triton_paged.PagedTritonEngine(streams, page, ring, gpu, kept)


def make_engine(
    streams: Sequence[ops.StreamSpec],
    device: torch.device,
    *,
    store: str,
    backend: str,
    page_bytes: choices.Wish,
    staging: choices.Wish,
    kept: Precision = PLAIN,
    groups: Sequence[Sequence[int]] = (),
) -> StateEngine:
    """The engine for parameters on `device`: which backend, where state rests, how it is cut.

    `groups` are the elements of each item of the groups to come, by which "auto" is settled; the
    engine does not have them yet.

    Raises:
        RuntimeError: The wish does not fit the device or this build.
        ValueError: `staging` does not hold two pages.
        OSError: The page file cannot be made, or state fits nowhere.
    """
    if device.type not in ("cpu", "cuda") or backend not in ("auto", "triton", device.type):
        raise RuntimeError(
            f"backend={backend!r} does not update parameters on {device}: move the model to the "
            "CPU or to a CUDA device, and leave backend at 'auto'"
        )
    missing = cuda_missing() if device.type == "cuda" else ""
    if missing and backend == "cuda":
        raise RuntimeError(f"backend='cuda': {missing}")
    triton = backend == "triton" or missing != ""
    stored = kept.stored(streams)
    sizes = [sum(s.nbytes(count) for s in stored for count in group) for group in groups]
    known = choices.look(device, kernels=not triton) if groups else None
    choice = choices.choose(
        sizes,
        len(stored),
        known or choices.Machine(on_gpu=device.type == "cuda", kernels=not triton),
        store=store,
        staging=staging,
        page_bytes=page_bytes,
        element_bytes=sum(sizes) / max(sum(map(sum, groups)), 1),
    )
    place = choice.store, choice.page_bytes, choice.staging
    engine: StateEngine
    if triton:
        engine = _make_triton_engine(streams, device, *place, kept, missing)
    elif choice.store == "device":
        engine = ResidentEngine(streams, device, kept)
    else:
        engine = PagedEngine(streams, *place, device, kept)
    engine.why = choice.why
    return engine
