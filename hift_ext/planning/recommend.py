# SPDX-License-Identifier: Apache-2.0
# Settings that make the most of a card: the largest batch first, then layers a group, then the
# ring, each from what the one before leaves. What is recommended was traced, not extrapolated.
"""Recommended settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hift_ext import choices
from hift_ext.planning.forecast import Forecaster, Settings
from hift_ext.planning.rings import best, rings
from hift_ext.planning.search import largest

MOST_BATCH = 4096
"""Larger batches are not looked for."""

SEQ_UNIT = 16
"""Lengths are looked for in such steps."""

_CLASSES = {"adamw": "AdamW", "adam": "Adam", "adagrad": "Adagrad", "sgdm": "SGD", "sgd": "SGD"}


@dataclass(frozen=True)
class Recommendation:
    """Settings, and what they come to.

    Attributes:
        batch: Sequences a step; 0: nothing fits.
        seq: Tokens a sequence.
        dtype: Of weights.
        master: As in `HiFTOptions`.
        state_dtype: Of state.
        grad_checkpointing: Whether blocks are checkpointed.
        layers_per_group: As in `HiFTOptions`.
        store: As in `HiFTOptions`.
        staging: As in `HiFTOptions`, bytes.
        page_bytes: As in `HiFTOptions`.
        peak_bytes: Of the step that needs most.
        step_ms: The average step.
        exposed_ms: Of it waiting for pages.
        tokens_per_s: At that.
        call: A line of Python.
        why: A sentence for each choice.
    """

    batch: int
    seq: int
    dtype: str
    master: str | None
    state_dtype: str
    grad_checkpointing: bool
    layers_per_group: int | Literal["all"]
    store: str
    staging: int
    page_bytes: int
    peak_bytes: int
    step_ms: float
    exposed_ms: float
    tokens_per_s: float
    call: str
    why: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "why": list(self.why)}


def recommend(forecaster: Forecaster, asked: Settings, store: str) -> Recommendation:
    """The largest batch at the asked length, or what has to change for one to fit.

    Args:
        forecaster: For which machine.
        asked: What was asked for.
        store: Where state rests.
    """
    asked = asked.but(store=store)
    why: list[str] = []
    settings, batch = asked, 0
    for settings, change in _ways(asked):
        batch = largest_batch(forecaster, settings)
        if batch:
            if change:
                why.append(f"no batch of {asked.seq} tokens fits as asked for: {change}")
            break
    if not batch:
        length = longest(forecaster, asked, most=asked.seq)
        if not length:
            return _nothing(forecaster, asked)
        why.append(f"no batch of {asked.seq} tokens fits; one sequence of {length} does")
        settings, batch = asked.but(seq=length), 1
    why.append(
        f"{batch + 1} x {settings.seq} tokens would not fit"
        if batch < MOST_BATCH
        else f"more than {MOST_BATCH} sequences were not looked for"
    )
    found = _more_layers(forecaster, settings, batch, why)
    if found is None:
        found = settings.but(batch=batch)
        # Groups that need most may be others than with the batch that was asked for.
        while forecaster.peak(found) > forecaster.machine.limit_bytes and found.batch > 1:
            found = found.but(batch=found.batch - 1)
    return _with_ring(forecaster, found, why)


def largest_batch(forecaster: Forecaster, settings: Settings, most: int = MOST_BATCH) -> int:
    """The largest batch that fits with the ring that is asked for; 0 if none does."""
    return largest(
        lambda n: forecaster.quick_peak(settings.but(batch=n), settings),
        forecaster.machine.limit_bytes,
        most=most,
        known={settings.batch: forecaster.peak(settings)},
        fixed=forecaster.fixed(settings),
    )


def longest(forecaster: Forecaster, settings: Settings, most: int, unit: int = SEQ_UNIT) -> int:
    """The longest sequence, a multiple of `unit`, of which one fits; 0 if none does."""
    start = settings.but(batch=1, seq=max(min(settings.seq, most) // unit, 1) * unit)
    return unit * largest(
        lambda n: forecaster.quick_peak(start.but(seq=n * unit), start),
        forecaster.machine.limit_bytes,
        most=most // unit,
        known={start.seq // unit: forecaster.peak(start)},
        fixed=forecaster.fixed(start),
    )


def _ways(asked: Settings) -> Iterator[tuple[Settings, str]]:
    """As asked, and then with what saves memory."""
    yield asked, ""
    saved = "gradient checkpointing keeps a block's input in place of what is inside"
    halved = "bfloat16 weights with split masters take half the memory and keep float32's numbers"
    if not asked.grad_checkpointing:
        yield asked.but(grad_checkpointing=True), saved
    if asked.dtype in ("float32", "mixed"):
        half = asked.but(dtype="bfloat16", master="auto")
        yield half, halved
        if not asked.grad_checkpointing:
            yield half.but(grad_checkpointing=True), f"{halved}; {saved}"


def _more_layers(
    forecaster: Forecaster, traced: Settings, batch: int, why: list[str]
) -> Settings | None:
    """As many layers a group, in powers of two, as fit with a ring for all of it; None: no more.

    Args:
        forecaster: For which machine.
        traced: Settings with another batch, or this one.
        batch: What is to fit.
        why: Gains a reason.
    """
    m, limit = traced.layers_per_group, forecaster.machine.limit_bytes
    if not isinstance(m, int):
        return None
    made = forecaster.forecast(traced, traced.store)
    # What a group adds: its gradients, and a ring that still holds all of its state.
    each = [
        sum(c * d.itemsize for c, d in zip(found.counts, found.dtypes, strict=True))
        + step.bytes_out * (traced.store != "device")
        for found, step in zip(forecaster.traces(traced), made.steps, strict=True)
    ]
    peak = forecaster.quick_peak(traced.but(batch=batch), traced)
    factor = 1
    while 2 * factor < len(each):
        sums = [sum(each[i : i + 2 * factor]) for i in range(0, len(each), 2 * factor)]
        if peak + max(sums) - min(made.ring_bytes, max(sums)) > limit:
            break
        factor *= 2
    # Gradients are not all that grows: layers that are trained keep their inputs, too.
    while factor > 1:
        wider = traced.but(batch=batch, layers_per_group=factor * m)
        if forecaster.peak(wider) <= limit:
            why.append(
                f"groups of {factor * m} layers and a ring for them fit beside that batch: every "
                f"weight is updated {factor} times as often as with {m}"
            )
            return wider
        factor //= 2
    return None


def _with_ring(forecaster: Forecaster, settings: Settings, why: list[str]) -> Recommendation:
    """Page by the rules of choices.py, and the ring that the peak leaves room for."""
    small = forecaster.forecast(settings, settings.store)
    limit = forecaster.machine.limit_bytes
    chosen = choices.choose(
        [step.bytes_out for step in small.steps],
        len(settings.stored),
        forecaster.machine.chosen(limit - small.peak_bytes + small.ring_bytes),
        store=settings.store,
        staging=small.staging,
        page_bytes=settings.page_bytes,
    )
    paged = settings.but(page_bytes=chosen.page_bytes)
    ring = None if settings.staging != "auto" else best(rings(forecaster, paged, settings.store))
    final = paged.but(staging=settings.staging if ring is None else ring.staging)
    made = forecaster.forecast(final, settings.store)
    if made.peak_bytes > limit:  # larger pages need not fill a ring as well
        final, made = settings, small
    if ring is not None:
        why.append(
            f"a ring of {made.ring_bytes / 2**20:.0f} MiB is the smallest of those that fit and "
            f"hide about all they can: {made.mean('exposed_ms'):.1f} ms of "
            f"{made.mean('step_ms'):.0f} are left to wait"
        )
    step_ms = made.mean("step_ms")
    return Recommendation(
        final.batch,
        final.seq,
        final.dtype,
        final.master,
        final.state_dtype,
        final.grad_checkpointing,
        final.layers_per_group,
        made.store,
        made.staging,
        made.page_bytes,
        made.peak_bytes,
        step_ms,
        made.mean("exposed_ms"),
        1e3 * final.batch * final.seq / step_ms,
        _call(final, made.staging, made.page_bytes),
        tuple(why),
    )


def _nothing(forecaster: Forecaster, asked: Settings) -> Recommendation:
    """Where not even one short sequence fits."""
    made = forecaster.forecast(asked, asked.store)
    weights = max(group.weights for group in made.footprints)
    return Recommendation(
        0,
        0,
        asked.dtype,
        asked.master,
        asked.state_dtype,
        asked.grad_checkpointing,
        asked.layers_per_group,
        made.store,
        made.staging,
        made.page_bytes,
        made.peak_bytes,
        0.0,
        0.0,
        0.0,
        "",
        (
            f"nothing fits: the weights alone take {weights / 2**30:.2f} GiB in {asked.dtype}, and "
            f"tensors can have {forecaster.machine.limit_bytes / 2**30:.2f} GiB. Take a larger "
            "card, or fewer bytes a weight (--dtype bfloat16)",
        ),
    )


def _call(settings: Settings, staging: int, page_bytes: int) -> str:
    """How the optimizer is made, what is default left out."""
    options: dict[str, Any] = {
        "momentum": 0.9 if settings.optimizer == "sgdm" else None,
        "layers_per_group": settings.layers_per_group if settings.layers_per_group != 1 else None,
        "order": settings.order if settings.order != "bottom2up" else None,
        "store": settings.store,
        "staging": staging if settings.store != "device" else None,
        "page_bytes": page_bytes if settings.store != "device" else None,
    }
    words = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if settings.master != "auto":
        words.append(f"master={settings.master!r}")
    if settings.state_dtype != "float32":
        eight = settings.state_dtype == "8bit"
        words.append("state_dtype=" + ('"8bit"' if eight else f"torch.{settings.state_dtype}"))
    return f"hift_ext.{_CLASSES[settings.optimizer]}(model, lr, {', '.join(words)})".replace(
        "'", '"'
    )
