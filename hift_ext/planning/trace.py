# SPDX-License-Identifier: Apache-2.0
# What forward and backward need, for each position of the active group: found by executing them on
# fake tensors. The optimizer's own buffers come after, in footprint.py.
"""Memory and compute of a step, traced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ext.layers import Group, make_groups
from hift_ext.planning import lora
from hift_ext.planning.as_on_gpu import AsOnGpu
from hift_ext.planning.models import config_of
from hift_ext.planning.recorder import GRADIENTS, OTHER, WEIGHTS, Recorder
from hift_ext.planning.workload import Workload, loss_of, make_inputs, make_model

__all__ = ["Peak", "Progress", "Trace", "Workload", "trace", "trace_full", "trace_lora"]

Progress = Callable[[str, float], None]
"""Called with what is being done, and the share done, 0 to 1."""


@dataclass(frozen=True)
class Peak:
    """Bytes that are live at one instant, by category.

    Attributes:
        weights: Parameters and buffers.
        gradients: What is, or ends up in, a parameter's `.grad`.
        activations: Made in forward (or in a checkpoint's second forward) for backward.
        other: Inputs, and temporaries of forward and backward.
    """

    weights: int
    gradients: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        """All categories together."""
        return self.weights + self.gradients + self.activations + self.other


@dataclass(frozen=True)
class Trace:
    """One step with one group active, without anything of the optimizer's.

    Attributes:
        index: The group's place among the groups; -1 where all, or adapters, are trained.
        name: The group's name.
        params: Number of its parameters.
        numel: Their elements.
        counts: Elements of each.
        dtypes: Type of each.
        start: Live when the step begins.
        forward: Live at the peak inside forward, the loss included.
        above: Live at the peak inside backward, before the group's first gradient is made.
        own: Live at the peak inside backward from then on.
        end: Live when backward is over, at `optimizer.step()`: weights, gradients, inputs, loss.
        forward_flops: Floating-point operations of forward (matrix products and attention, whose
            causal half is counted as a whole, as torch's FlopCounterMode does).
        backward_flops: The same of backward, second forwards of checkpoints included.
        executed: False where the numbers follow exactly from those of executed neighbours.
    """

    index: int
    name: str
    params: int
    numel: int
    counts: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    start: Peak
    forward: Peak
    above: Peak
    own: Peak
    end: Peak
    forward_flops: int
    backward_flops: int
    executed: bool = True

    @property
    def backward(self) -> Peak:
        """Live at the peak inside backward."""
        return max(self.above, self.own, key=lambda peak: peak.total)

    @property
    def peak(self) -> Peak:
        """The larger of the peaks inside forward and inside backward."""
        return max(self.forward, self.backward, key=lambda peak: peak.total)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that is measured, in one row."""
        peaks = (self.start, self.forward, self.above, self.own, self.end)
        flat = (value for peak in peaks for value in dataclasses.astuple(peak))
        return *flat, self.forward_flops, self.backward_flops

    def with_numbers(self, numbers: Sequence[int]) -> Trace:
        """The same group with other numbers, not executed."""
        start, forward, above, own, end = (Peak(*numbers[i : i + 4]) for i in range(0, 20, 4))
        return dataclasses.replace(
            self,
            start=start,
            forward=forward,
            above=above,
            own=own,
            end=end,
            forward_flops=numbers[20],
            backward_flops=numbers[21],
            executed=False,
        )


def trace(
    workload: Workload,
    *,
    positions: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Trace]:
    """Executes one forward and backward per distinct position of the active group.

    Between two executed positions of a run of like groups the others follow, where two more in the
    middle are to the byte what the outer two predict; else the run's ends are set apart, and then
    it is halved. A peak is the largest
    of sums that are linear in the position of like groups, so it is convex in it: a chord that it
    touches inside it does not leave. Two neighbours are tried, for blocks that alternate.

    Args:
        workload: What is run.
        positions: Groups to execute; None: all, as said above.
        progress: Told how far it is.

    Returns:
        One Trace a group, in forward order (in the given order with `positions`).

    Raises:
        IndexError: A position that is not one of the groups.
        ValueError: Nothing is trainable, `seq` is beyond the model's positions, or the model does
            not fit the workload.
    """
    with _fake(workload) as model:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("the model has no parameter that requires gradients")
        groups = make_groups(
            model,
            trainable,
            layers_per_group=workload.layers_per_group,
            groups=workload.groups,
        )
        runner = _Runner(workload, model, groups, trainable, progress)
        if positions is not None:
            for index in positions:
                if not 0 <= index < len(groups):
                    raise IndexError(f"position {index} is not one of the {len(groups)} groups")
            return [runner.run(index) for index in positions]
        for first, last in _runs(groups):
            runner.fill(first, last)
        return [runner.done[i] for i in range(len(groups))]


def trace_full(workload: Workload) -> Trace:
    """One step of standard full fine-tuning: every trainable parameter has a gradient."""
    with _fake(workload) as model:
        trained = [p for p in model.parameters() if p.requires_grad]
        return _execute(workload, model, trained, "full fine-tuning")


def trace_lora(workload: Workload, rank: int = 16) -> Trace:
    """One step of LoRA: float32 adapters of `rank` on every linear layer of the blocks.

    Raises:
        ValueError: The model has no blocks with linear layers, or `rank` is below 1.
    """
    with _fake(workload) as model:
        trained = lora.adapt(model, rank)
        return _execute(workload, model, trained, f"LoRA, rank {rank}")


@contextlib.contextmanager
def _fake(workload: Workload) -> Iterator[nn.Module]:
    """The workload's model as fake tensors, in training."""
    model = workload.model
    if not isinstance(model, nn.Module) and not callable(model):
        # Read before anything is fake: what an import makes outlives the mode.
        workload = dataclasses.replace(workload, model=config_of(model))
    # A mask stays real: see make_inputs.
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield make_model(workload)


def _runs(groups: Sequence[Group]) -> Iterator[tuple[int, int]]:
    """First and last index of each stretch of groups with parameters of the same shapes."""
    shapes = [[p.shape for p in group.params] for group in groups]
    first = 0
    for i in range(1, len(groups) + 1):
        if i == len(groups) or shapes[i] != shapes[first]:
            yield first, i - 1
            first = i


@dataclass
class _Runner:
    """Executes groups, each once at most."""

    workload: Workload
    model: nn.Module
    groups: Sequence[Group]
    trainable: Sequence[nn.Parameter]
    progress: Progress | None
    done: dict[int, Trace] = field(default_factory=dict)

    def run(self, index: int) -> Trace:
        """The group's trace, executed now or before."""
        if index not in self.done:
            group = self.groups[index]
            if self.progress is not None:
                self.progress(f"tracing {group.name}", len(self.done) / len(self.groups))
            for param in self.trainable:
                param.requires_grad_(False)
            self.done[index] = _execute(self.workload, self.model, group.params, group.name, index)
        return self.done[index]

    def fill(self, first: int, last: int) -> None:
        """Fills in a stretch of like groups."""
        if last - first < 4:
            for index in range(first, last + 1):
                self.run(index)
        # The outermost may differ: nothing is frozen below the first, nothing follows the last.
        elif not self._follow(first, last) and not self._follow(first + 1, last - 1):
            middle = (first + last) // 2
            self.fill(first, middle)
            self.fill(middle + 1, last)

    def _follow(self, first: int, last: int) -> bool:
        """Whether what lies between two groups follows from them; then it is filled in."""
        low, high, middle = self.run(first), self.run(last), (first + last) // 2
        if any(self.run(i).numbers != _between(low, high, i) for i in (middle, middle + 1)):
            return False
        for index in range(first + 1, last):
            numbers = _between(low, high, index)
            if numbers is None:
                return False
            if index not in self.done:
                like = dataclasses.replace(low, index=index, name=self.groups[index].name)
                self.done[index] = like.with_numbers(numbers)
        return True


def _between(low: Trace, high: Trace, index: int) -> tuple[int, ...] | None:
    """The numbers on the line through two traces; None where they are not whole."""
    share = Fraction(index - low.index, high.index - low.index)
    found = [a + (b - a) * share for a, b in zip(low.numbers, high.numbers, strict=True)]
    return tuple(int(x) for x in found) if all(x.denominator == 1 for x in found) else None


def _execute(
    workload: Workload,
    model: nn.Module,
    trained: Sequence[torch.Tensor],
    name: str,
    index: int = -1,
) -> Trace:
    """One forward and backward in which `trained` have gradients, and nothing is left behind."""
    for param in trained:
        param.requires_grad_(True)
        param.grad = torch.zeros_like(param) if workload.accumulate else None
    inputs = make_inputs(workload, model)
    recorder = Recorder()
    recorder.hold([*model.parameters(), *model.buffers()], WEIGHTS)
    recorder.hold([p.grad for p in trained if p.grad is not None], GRADIENTS)
    recorder.hold([x for x in inputs.values() if isinstance(x, torch.Tensor)], OTHER)
    kind = workload.autocast
    with recorder, AsOnGpu():
        with torch.autocast("cpu", dtype=kind, enabled=kind is not None):
            loss = loss_of(model, inputs)
        recorder.boundary = recorder.now
        forward_flops = recorder.flops
        if not loss.requires_grad:
            raise ValueError(f"the loss does not depend on {name!r}: nothing would be trained")
        loss.backward()
    recorder.mark([p.grad for p in trained if p.grad is not None], GRADIENTS)
    live = recorder.live()
    totals = live.sum(axis=0)
    cut, first = recorder.boundary + 1, recorder.first_gradient

    def at(column: int) -> Peak:
        return Peak(*(int(x) for x in live[:, column]))

    def peak(begin: int, end: int) -> Peak:
        return at(begin + int(totals[begin:end].argmax()))

    made = Trace(
        index=index,
        name=name,
        params=len(trained),
        numel=sum(p.numel() for p in trained),
        counts=tuple(p.numel() for p in trained),
        dtypes=tuple(p.dtype for p in trained),
        start=at(0),
        forward=peak(0, cut),
        above=peak(cut, max(first, cut + 1)),
        own=peak(first, recorder.now + 1),
        end=at(-1),
        forward_flops=forward_flops,
        backward_flops=recorder.flops - forward_flops,
    )
    for param in trained:
        param.grad = None
        param.requires_grad_(False)
    return made
