# SPDX-License-Identifier: Apache-2.0
"""How numbers are kept: state in 32, 16 or 8 bits, weights with or without a master, and rounding.

The arithmetic is csrc/core/precision.h; what is offered stands in `ways`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hift_ext import ops
from hift_ext.ops import Stored, StreamSpec

BLOCK = 256
"""Elements of a block of 8-bit state, which share a scale; counted from a rank's first element."""

_WAYS = {None: 0, "stochastic": 1, "fp32": 2, "split": 3}
_STATE_TYPES: dict[Any, int] = {torch.float32: 0, torch.bfloat16: 1, "8bit": 2}


class Precision(NamedTuple):
    """How one optimizer keeps its numbers.

    Attributes:
        state_dtype: torch.float32, torch.bfloat16 or `"8bit"`.
        master: `"fp32"`, `"split"` or None.
        stochastic: Whether 16-bit weights without a master, and state in fewer than 32 bits, are
            rounded at random.
    """

    state_dtype: torch.dtype | str = torch.float32
    master: str | None = None
    stochastic: bool = False

    @property
    def state_code(self) -> int:
        """csrc/core/span.h's StateType."""
        return _STATE_TYPES[self.state_dtype]

    @property
    def ways(self) -> tuple[int, int, int]:
        """How weights of float32, bfloat16 and float16 are kept: csrc/core/span.h's Weights, or -1.

        The table of what is offered: float32 weights are their own master; bfloat16 ones are
        rounded to nearest or at random, or have a whole or a split master; float16 ones are rounded
        to nearest or have a whole master.
        """
        if self.master is not None:
            return 0, _WAYS[self.master], _WAYS["fp32"] if self.master == "fp32" else -1
        return (0, _WAYS["stochastic"], -1) if self.stochastic else (0, 0, 0)

    def stored(self, streams: Sequence[StreamSpec]) -> list[Stored]:
        """The streams of a page for a rule's state, in the engine's order."""
        if self.state_dtype == "8bit":
            state = [Stored(s.name, torch.uint8, BLOCK, BLOCK) for s in streams]
            scales = [Stored(f"{s.name}.scale", torch.float32, BLOCK) for s in streams]
        else:
            assert isinstance(self.state_dtype, torch.dtype)
            state = [Stored(s.name, self.state_dtype, fill=s.fill) for s in streams]
            scales = []
        master = {
            None: [],
            "fp32": [Stored("master", torch.float32)],
            "split": [Stored("master_low", torch.int16)],
        }
        return state + master[self.master] + scales


PLAIN = Precision()


def chosen(options: Mapping[str, Any], dtypes: Collection[torch.dtype]) -> Precision:
    """The precision that the options ask for, for parameters of these types.

    Raises:
        ValueError: The options do not fit the types; the message says which do.
    """
    wish, stochastic = options["master"], options["rounding"] == "stochastic"
    half, brain = torch.float16 in dtypes, torch.bfloat16 in dtypes
    if wish == "auto":
        wish = "fp32" if half else "split" if brain and not stochastic else None
    elif not (half or brain):
        wish = None  # float32 weights are their own master
    if wish == "split" and half:
        raise ValueError(
            "master='split' is for bfloat16 parameters, and some are float16: pass master='fp32'"
        )
    if wish is None and stochastic and half:
        raise ValueError(
            "rounding='stochastic' without a master is for bfloat16 parameters, and some are "
            "float16: pass master='fp32', or rounding='nearest'"
        )
    return Precision(options["state_dtype"], wish, stochastic)


def check_rule(precision: Precision, rule: str, streams: Sequence[StreamSpec]) -> None:
    """Whether the rule's state may be kept so.

    Raises:
        ValueError: It may not.
    """
    states, signs = ops.RULES[rule][1], ops.RULES[rule][3]
    if precision.state_dtype == "8bit" and states > 0 and signs < 0:
        offered = [name for name, (_, count, _, mask) in ops.RULES.items() if count and mask >= 0]
        raise ValueError(
            f"state_dtype='8bit' is not offered for {rule}; offered for {', '.join(offered)}. "
            "torch.float32 and torch.bfloat16 are offered for every rule"
        )
    # What is decoded here must be what the kernels encode.
    said = sum(1 << number for number, stream in enumerate(streams) if not stream.signed)
    if precision.state_dtype == "8bit" and states > 0 and said != signs:
        raise ValueError(f"the streams of {rule} do not say which are never below zero ({signs:b})")


# Stored values as floats and back ---------------------------------------------------------------


def decoded(
    codes: torch.Tensor, scales: torch.Tensor, to: torch.Tensor, signed: bool
) -> torch.Tensor:
    """State kept as 8-bit codes, as floats in `to` (flat, on the CPU), which is returned."""
    codes, scales = codes.cpu().contiguous(), scales.cpu().contiguous()
    ops.decode(codes, scales, signed, to)
    return to


def encoded(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8, whole blocks) and scales (float32, one a block) of flat float32 values."""
    blocks = -(-values.numel() // BLOCK)
    codes = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device="cpu")
    scales = torch.zeros(blocks, dtype=torch.float32, device="cpu")
    ops.encode(values, signed, codes, scales)
    return codes, scales


def joined(weights: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Whole masters (float32) of bfloat16 weights and the halves (int16) that go with them."""
    return ((weights.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def low_of(masters: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The halves that go with bfloat16 weights; 0 where a weight is not its master's rounding."""
    bits = masters.contiguous().view(torch.int32)
    bits = bits - ((bits & 0x1FFFF) == 0x8000).int()
    low = bits - (weights.view(torch.int16).int() << 16)
    fits = bits.view(torch.float32).bfloat16().view(torch.int16) == weights.view(torch.int16)
    return torch.where(fits & ~masters.isnan(), low, 0).to(torch.int16)
