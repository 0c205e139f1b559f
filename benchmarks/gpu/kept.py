# SPDX-License-Identifier: Apache-2.0
# Spans whose numbers are kept in fewer bits, for section `bits`: every type of state, masters and
# rounding at random, updated here and there and compared to the bit.
"""Part of section `bits`: the general kernels against the CPU's passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hift_ext import ops

STATES = (torch.float32, torch.bfloat16, torch.uint8)
WAYS = ("nearest", "stochastic", "fp32", "split")
"""Of weights, by csrc/core/span.h's numbers."""

COUNTS = [0, 1, 31, 255, 256, 257, 4095, 4097, 8193 + 77]
FIRSTS = [0, 1279, (1 << 32) - 100, (5 << 32) - 3]
"""Elements of a parameter that spans begin at; random numbers have another key at 2^32."""

KEY = 0x9E3779B97F4A7C15


def offered(param: torch.dtype, way: str) -> bool:
    """What core/kept.h offers."""
    half = param == torch.float16 and way == "fp32"
    return way == "nearest" or param == torch.bfloat16 or half


@dataclass
class Kept:
    """Spans of one rule and one way, side by side, with gaps that must not change.

    Attributes:
        rule: Its name.
        way: Of the weights.
        stochastic: Whether state is rounded at random.
        hyper: The spans' numbers.
        places: Of each span: first value, elements, the parameter's element that is its first.
        streams: By name: `param`, `grad`, `master`, `state 0`, `scale 0` and so on.
    """

    rule: str
    way: str
    stochastic: bool
    hyper: tuple[float, ...]
    places: list[tuple[int, int, int]]
    streams: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        rule: str,
        pair: Sequence[torch.dtype],
        state: torch.dtype,
        way: str,
        stochastic: bool,
        hyper: tuple[float, ...],
        counts: Sequence[int],
    ) -> Kept:
        """Spans of all counts; every second one's addresses are misaligned."""
        draw = torch.Generator().manual_seed(len(way) + 10 * stochastic)
        coded, places, end = state == torch.uint8, [], 0
        for number, count in enumerate(counts):
            # Blocks of codes begin where the pages' do.
            begin = end if coded else end + number % 2
            places.append((begin, count, FIRSTS[number % len(FIRSTS)]))
            end = (1 - -(begin + count) // 256) * 256 if coded else begin + count + 5
        made = cls(rule, way, stochastic, hyper, places)
        made.streams["param"] = torch.randn(end, generator=draw).to(pair[0])
        made.streams["grad"] = torch.randn(end, generator=draw).to(pair[1])
        if way == "fp32":
            master = made.streams["param"].float() * (1 + 1e-4 * torch.rand(end, generator=draw))
            master[::5] = 0.5  # set by somebody else: the weight counts
            made.streams["master"] = master
        elif way == "split":
            low = torch.randint(-(1 << 15), 1 << 15, (end,), generator=draw)
            made.streams["master"] = low.to(torch.int16)
        for i in range(ops.RULES[rule][1]):
            if coded:
                codes = torch.randint(0, 121, (end,), generator=draw).to(torch.uint8)
                made.streams[f"state {i}"] = codes
                made.streams[f"scale {i}"] = torch.rand(end // 256 + 1, generator=draw)
            else:
                values = torch.randn(end, generator=draw).abs()
                made.streams[f"state {i}"] = values.to(state)
        return made

    def copy(self, device: torch.device) -> Kept:
        """The same values elsewhere."""
        streams = {name: t.to(device, copy=True) for name, t in self.streams.items()}
        return Kept(self.rule, self.way, self.stochastic, self.hyper, self.places, streams)

    def rows(self) -> list[tuple[Any, ...]]:
        """What the binding takes."""
        param, grad = self.streams["param"], self.streams["grad"]
        kind = ops.kind(self.rule, param.dtype, grad.dtype) | WAYS.index(self.way) << 16
        states = ops.RULES[self.rule][1]
        state = STATES.index(self.streams["state 0"].dtype) if states else 0
        rows = []
        for begin, count, first in self.places:

            def at(name: str, place: int = begin) -> int:
                tensor = self.streams.get(name)
                return 0 if tensor is None else tensor.data_ptr() + place * tensor.element_size()

            scales = [at(f"scale {i}", begin // 256) for i in range(states)] if state == 2 else []
            kept = (state, scales, at("master"), self.stochastic, KEY, first)
            addresses = [at(f"state {i}") for i in range(states)]
            rows.append((at("param"), at("grad"), count, kind, addresses, self.hyper, kept))
        return rows


def compare(
    before: Kept,
    device: torch.device,
    here: Callable[[list[tuple[Any, ...]]], None],
    there: Callable[[list[tuple[Any, ...]]], None],
) -> str:
    """Runs the spans by both; how they differ, empty if they do not."""
    a, b = before.copy(torch.device("cpu")), before.copy(device)
    here(a.rows())
    there(b.rows())
    for name, tensor in a.streams.items():
        other = b.streams[name].cpu()
        differ = (tensor.view(torch.uint8) != other.view(torch.uint8)).nonzero().flatten().tolist()
        if differ:
            return f"{name}: {len(differ)} bytes, first {differ[0]} (CPU, CUDA)"
    if torch.equal(a.streams["param"], before.streams["param"]):
        return "an update changed nothing"
    return ""


def checks(
    rule: str,
    pairs: Sequence[Sequence[torch.dtype]],
    hyper: tuple[float, ...],
    device: torch.device,
    here: Callable[[list[tuple[Any, ...]]], None],
    there: Callable[[list[tuple[Any, ...]]], None],
    counts: Sequence[int] = COUNTS,
) -> Iterator[tuple[str, Callable[[], str], int]]:
    """Name, check, and number of spans, for every way that is not a specialised kernel's."""
    states, signs = ops.RULES[rule][1], ops.RULES[rule][3]
    for pair, state, way, random in itertools.product(pairs, STATES, WAYS, (False, True)):
        if not offered(pair[0], way) or (state == torch.uint8 and (not states or signs < 0)):
            continue
        if way == "nearest" and (state == torch.float32 or not states):
            continue
        before = Kept.random(rule, pair, state, way, random, hyper, counts)
        types = " with ".join(str(t).removeprefix("torch.") for t in pair)
        name = f"{types}, state {state}, {way}{', random state' if random else ''}"
        yield name, partial(compare, before, device, here, there), len(counts)
