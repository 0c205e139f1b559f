# SPDX-License-Identifier: Apache-2.0
"""Updates by Triton: what a span is, its checks and its launch.

The bits are those of the other backends (NaNs in the state excepted). It needs no compiler on the
user's machine but Triton's own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton

from hift_ext.triton_kernels import update_span
from hift_ext.triton_precision import BLOCK, block_key
from hift_ext.triton_rules import RULES

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(
        f"Triton {triton.__version__} flushes subnormal numbers in divisions and roots, so its "
        "updates differ from the other backends': use Triton 3.6 or later (torch 2.10 has it)"
    )

RUN = 1024
"""Elements of a program: 8 a thread, so that two 16-byte accesses of every stream are in flight."""

WARPS = 4

KEYED = 1 << 31
"""Elements of a launch whose random numbers have at most two keys."""

INTERPRETED = not isinstance(update_span, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set at import: kernels then run on the host, on host memory."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
_MASTERS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (),
    torch.bfloat16: (torch.float32, torch.int16),
    torch.float16: (torch.float32,),
}


class Span(NamedTuple):
    """Elements of one parameter with what one rule needs to update them.

    Attributes:
        param: Weights, float32, bfloat16 or float16; contiguous; changed in place.
        grad: Their gradient, of their type or float32, contiguous, with as many elements.
        states: The rule's state in its order, contiguous, with as many elements each; changed in
            place. All float32, all bfloat16, or all uint8: 8-bit codes, whole blocks of 256.
        rule: A name in RULES.
        hyper: The gradient's factor (1, or -1 to maximize), then the rule's hyper-parameters in
            the order of its C++ struct.
        scales: Of codes: float32, one for each block, for each state.
        master: float32, or int16: the low halves of masters of bfloat16 weights. Changed in place.
        stochastic: bfloat16 weights without a master are rounded at random.
        stochastic_state: So is state of less than 32 bits.
        key: Of the random numbers: seed, parameter and visit. 64 bits.
        element: The parameter's that is the span's first, for the random numbers.
    """

    param: torch.Tensor
    grad: torch.Tensor
    states: Sequence[torch.Tensor]
    rule: str
    hyper: Sequence[float]
    scales: Sequence[torch.Tensor] = ()
    master: torch.Tensor | None = None
    stochastic: bool = False
    stochastic_state: bool = False
    key: int = 0
    element: int = 0

    @property
    def weights(self) -> int:
        """How weights are kept, by the number that core/span.h has for it."""
        if self.master is not None:
            return 3 if self.master.dtype == torch.int16 else 2
        return 1 if self.stochastic else 0

    def parts(self) -> Iterator[Span]:
        """The span, cut where a launch would need more than two keys."""
        count = self.param.numel()
        if not (self.stochastic or self.stochastic_state) or count <= KEYED:
            yield self
            return
        for begin in range(0, count, KEYED):
            here = slice(begin, begin + KEYED)
            blocks = slice(begin // BLOCK, (begin + KEYED) // BLOCK)
            yield self._replace(
                param=self.param.view(-1)[here],
                grad=self.grad.view(-1)[here],
                states=[state.view(-1)[here] for state in self.states],
                scales=[scale[blocks] for scale in self.scales],
                master=None if self.master is None else self.master.view(-1)[here],
                element=self.element + begin,
            )


class Scalars(NamedTuple):
    """Scalars that enter the pass by address: float32 tensors of one element, or None.

    Attributes:
        grad_scale: Gradients are divided by it.
        clip: Gradients are multiplied by it.
        found_inf: Anything but 0: the step changes nothing.
    """

    grad_scale: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


def step(spans: Sequence[Span], scalars: Scalars | None = None) -> None:
    """Updates all spans in place, on torch's current stream of their device; returns at once.

    A launch per span: in a table of spans, as the CUDA kernel has it, Triton would not see which
    addresses are aligned, and 16-byte accesses would be lost. The host prepares a launch while the
    GPU works on the spans before it.

    Args:
        spans: On one CUDA device, or on the CPU under Triton's interpreter.
        scalars: On the spans' device.

    Raises:
        ValueError: A rule, a number of states or hyper-parameters, a size, a device or a layout
            does not fit. Nothing has been changed then.
        TypeError: A type is not offered. Nothing has been changed then.
    """
    scalars = scalars or Scalars()
    for span in spans:
        _check(span, scalars)
    for span in spans:
        for part in span.parts():
            if part.param.numel():
                launch(part, scalars)


def launch(span: Span, scalars: Scalars, *, compile_only: bool = False) -> Any:
    """Launches the kernel for one span that has elements; no checks.

    Args:
        span: What to update; one of its own parts.
        scalars: What scales it.
        compile_only: Stop where the launch would follow, with the kernel that it would run.

    Returns:
        Triton's compiled kernel; None under the interpreter.
    """
    # Rounded here as the launch would round them: the interpreter keeps Python's floats.
    grad_factor, *hyper = array("f", span.hyper)
    rule = RULES[span.rule]
    coded = len(span.scales) > 0
    states = [state.view(torch.int32) if coded else state for state in span.states]
    kept = states if span.master is None else [span.master, *states]
    random_state = (
        span.stochastic_state and bool(span.states) and span.states[0].dtype != torch.float32
    )
    block = span.element >> 32
    keys = [block_key(span.key, block), block_key(span.key, block + 1)]
    if not (random_state or span.weights == 1):
        keys = [0, 0]
    arguments = (
        span.param,
        span.grad,
        tuple(states),
        tuple(span.scales),
        span.master,
        tuple(hyper),
        grad_factor,
        *scalars,
        span.param.numel(),
        *(half for key in keys for half in (key & 0xFFFFFFFF, key >> 32)),
        span.element & 0xFFFFFFFF,
        rule.update,
        RUN,
        16 // max(t.element_size() for t in (span.param, span.grad, *kept)),
        rule.signed or (),
        span.weights,
        random_state,
    )
    # Without fusion every fma of the kernel is one that the rule asks for, as on the CPU.
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    grid = (triton.cdiv(span.param.numel(), RUN),)
    device = span.param.device
    # Triton launches on the current device, which need not be the parameters'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if compile_only:
            return update_span.warmup(*arguments, grid=grid, **options)
        return update_span[grid](*arguments, **options)


def tensor_at(address: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat tensor of `count` elements over memory that somebody else owns and keeps."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, count * dtype.itemsize)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (count,), (1,))


def _check(span: Span, scalars: Scalars) -> None:
    param, grad = span.param, span.grad
    if span.rule not in RULES:
        raise ValueError(f"rule {span.rule!r} is not offered; offered are {', '.join(RULES)}")
    rule = RULES[span.rule]
    if param.dtype not in _DTYPES or grad.dtype not in (param.dtype, torch.float32):
        raise TypeError(
            f"a {param.dtype} parameter with a {grad.dtype} gradient is not offered; offered are "
            "float32, bfloat16 and float16 parameters with gradients of their own type or float32"
        )
    if len(span.states) != rule.states:
        raise ValueError(
            f"rule {span.rule} takes {rule.states} states, not {len(span.states)}: pass them in "
            "the rule's order"
        )
    if len(span.hyper) != 1 + rule.hypers:
        raise ValueError(
            f"rule {span.rule} takes 1 + {rule.hypers} numbers, not {len(span.hyper)}: the "
            "gradient's factor, then the rule's hyper-parameters"
        )
    if not (param.device.type == "cuda" or (INTERPRETED and param.device.type == "cpu")):
        raise ValueError(
            f"the parameter is on {param.device}: Triton updates tensors on CUDA devices; set "
            "TRITON_INTERPRET=1 before the first import to run its interpreter on the CPU"
        )
    coded = any(state.dtype == torch.uint8 for state in span.states)
    tensors = {"gradient": grad, **{f"state {i}": state for i, state in enumerate(span.states)}}
    if span.master is not None:
        tensors["master"] = span.master
    for name, tensor in tensors.items():
        blocks = -(-param.numel() // BLOCK) * BLOCK
        count = blocks if coded and name.startswith("state") else param.numel()
        if tensor.numel() != count:
            rule_of = "codes are whole blocks of 256" if coded else "they must be as many"
            raise ValueError(
                f"the {name} has {tensor.numel()} elements and the parameter {param.numel()}: "
                f"{rule_of}"
            )
    tensors |= _check_kept(span)
    tensors["parameter"] = param
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"the {name} has strides {tuple(tensor.stride())} at shape {tuple(tensor.shape)}: "
                "pass contiguous tensors"
            )
    for name, scalar in zip(scalars._fields, scalars, strict=True):
        if scalar is None:
            continue
        if scalar.dtype != torch.float32 or scalar.numel() != 1:
            raise TypeError(
                f"{name} is a {scalar.dtype} tensor of {scalar.numel()} elements: pass one float32"
            )
        tensors[name] = scalar
    for name, tensor in tensors.items():
        if tensor.device != param.device:
            raise ValueError(
                f"the {name} is on {tensor.device} and the parameter on {param.device}: keep them "
                "on one device"
            )


def _check_kept(span: Span) -> dict[str, torch.Tensor]:
    """The scales, by name; see core/kept.h for what is offered."""
    param, rule = span.param, RULES[span.rule]
    types = {state.dtype for state in span.states}
    for i, state in enumerate(span.states):
        if state.dtype not in _STATE_DTYPES or len(types) > 1:
            raise TypeError(
                f"state {i} is {state.dtype}: all state is float32, bfloat16, or uint8 codes"
            )
    coded = torch.uint8 in types
    if coded and rule.signed is None:
        raise TypeError(f"state of rule {span.rule} is not kept as 8-bit codes")
    if coded and any(state.data_ptr() % 4 != 0 for state in span.states):
        raise ValueError("codes do not begin at a word of 4 bytes")
    if len(span.scales) != (len(span.states) if coded else 0):
        raise ValueError(f"{len(span.scales)} scales for {len(span.states)} states of {types}")
    for i, scale in enumerate(span.scales):
        if scale.dtype != torch.float32 or scale.numel() != -(-param.numel() // BLOCK):
            raise ValueError(
                f"the scale of state {i} is a {scale.dtype} tensor of {scale.numel()} elements: "
                "pass one float32 for every block of 256"
            )
    offered = _MASTERS[param.dtype]
    if span.master is not None and span.master.dtype not in offered:
        raise TypeError(f"a {span.master.dtype} master of {param.dtype} weights is not offered")
    if span.stochastic and (span.master is not None or param.dtype != torch.bfloat16):
        raise TypeError("only bfloat16 weights without a master are rounded at random")
    return {f"scale of state {i}": scale for i, scale in enumerate(span.scales)}
