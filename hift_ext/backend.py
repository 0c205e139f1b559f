# SPDX-License-Identifier: Apache-2.0
"""Which engine keeps the state and updates the weights: the choice, and what stands in its way."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from hift_ext import ops
from hift_ext.engines import PagedEngine, ResidentEngine, StateEngine
from hift_ext.precision import PLAIN, Precision


def cuda_missing() -> str:
    """What keeps this build's CUDA kernels from running here, with the cure; or nothing."""
    if not ops.build_info()["cuda_built"]:
        return (
            "this build has no CUDA kernels: `pip install nvidia-cuda-nvcc`, then "
            "HIFT_CUDA=1 pip install . again"
        )
    found = ops.cuda_info()
    if found["devices"] > 0:
        return ""
    return (
        f"the CUDA {found['runtime'] // 1000} kernels of this build do not run here "
        f"({found['error']}; the driver knows CUDA {found['driver'] // 1000}): update the driver, "
        "or build with an nvcc of its version"
    )


def _make_triton_engine(
    streams: Sequence[ops.StreamSpec],
    kept: Precision,
    device: torch.device,
    store: str,
    missing: str,
) -> StateEngine:
    if store not in ("auto", "device"):
        raise RuntimeError(
            f"store={store!r} is not offered with Triton, which keeps all state on the device: "
            "pass store='device', or use the CUDA kernels" + (f" ({missing})" if missing else "")
        )
    try:
        from hift_ext.triton_engine import TritonEngine
    except ImportError as error:
        raise RuntimeError(
            f"Triton cannot update parameters on {device} ({error}): `pip install 'triton>=3.6'`"
            + (f", or use the CUDA kernels: {missing}" if missing else "")
        ) from error
    if missing:
        warnings.warn(
            f"{missing}. Until then Triton updates the weights, and all state stays on {device}",
            stacklevel=2,
        )
    return TritonEngine(streams, device, kept)


def make_engine(
    streams: Sequence[ops.StreamSpec],
    device: torch.device,
    *,
    store: str,
    backend: str,
    page_bytes: int | str,
    staging: int | str,
    kept: Precision = PLAIN,
) -> StateEngine:
    """The engine for parameters on `device`: which backend, where state rests, how it is cut.

    Raises:
        RuntimeError: The wish does not fit the device or this build.
        ValueError: `staging` does not hold two pages.
        OSError: The page file cannot be made.
    """
    if device.type not in ("cpu", "cuda") or backend not in ("auto", "triton", device.type):
        raise RuntimeError(
            f"backend={backend!r} does not update parameters on {device}: move the model to the "
            "CPU or to a CUDA device, and leave backend at 'auto'"
        )
    missing = cuda_missing() if device.type == "cuda" else ""
    if missing and backend == "cuda":
        raise RuntimeError(f"backend='cuda': {missing}")
    if backend == "triton" or missing:
        return _make_triton_engine(streams, kept, device, store, missing)
    if store == "device":
        return ResidentEngine(streams, device, kept)
    ring = ops.WHOLE_GROUP if staging == "auto" else int(staging)
    page = ops.PAGE_BYTES[device.type] if page_bytes == "auto" else int(page_bytes)
    if page_bytes == "auto" and ring > 0:
        page = min(page, ring // 2)
    return PagedEngine(streams, "ram" if store == "auto" else store, page, ring, device, kept)
