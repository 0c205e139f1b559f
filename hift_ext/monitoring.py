# SPDX-License-Identifier: Apache-2.0
"""`hift_ext.monitor`: a line of JSON for every step, and a picture of where time and memory went.

It listens by hooks of the model and by the optimizer's own call; nothing waits for the GPU.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import Self

from hift_ext import timeline
from hift_ext.intervals import IN, OUT, READ, WRITE, keep_intervals, take_intervals
from hift_ext.moments import Clock, CudaClock, Memory, Moment, clock_of
from hift_ext.recent import Ran, Recent
from hift_ext.runlog import RunLog, facts, union_ms

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

log = logging.getLogger("hift_ext")

_MOST_INTERVALS = 1 << 16  # of one step
_OWN = {"kind", "step", "pass", "group", "group_index", "lr", "bytes_in", "bytes_out"}
_MOST_OUTPUTS = 16  # of a forward: tensors that are watched for the first gradient


def monitor(
    optimizer: HiFTOptimizer,
    path: str | os.PathLike[str],
    *,
    plot: str | os.PathLike[str] | None = None,
    append: bool = False,
    window: int = 12,
) -> Monitor:
    """Watches a training inside `with`, from outside: the loop stays as it is.

    `path` gets one line of JSON for the run (`"kind": "run"`: what was chosen, where state is) and
    one for every step (`"kind": "step"`). A line is written whole, when the next forward or step
    begins; where the process dies, that of the last step is missing, on a GPU those that it had not
    finished. What is not known, or not finite, is null.

    Args:
        optimizer: Any HiFT optimizer. Without a module, `forward_ms` and `backward_ms` are null.
        path: The log. Processes of one training need one each.
        plot: A PNG, drawn at the end, also after an error: copies, updates, forward, backward and
            waits of the last steps, and the memory of the whole run. Needs matplotlib.
        append: Go on behind what `path` holds; otherwise it must not exist.
        window: Steps in the picture.

    Raises:
        FileExistsError: `path` exists, and `append` does not say to go on.
        FileNotFoundError: There is no directory for one of the files.
        ImportError: `plot` without matplotlib.
        RuntimeError: The optimizer is closed, or another monitor watches it.
        TypeError: `optimizer` is no HiFT optimizer.
        ValueError: `window` is not positive, or `plot` no PNG's name.
    """
    return Monitor(optimizer, path, plot=plot, append=append, window=window)


@dataclass
class _Step:
    """What is known of one step; moments until its line is written."""

    forwards: list[tuple[Moment, Moment]] = field(default_factory=list)
    backwards: list[tuple[Moment, Moment]] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)
    before: Moment = None  # the end of the step before, or this one's first moment
    begin: Moment = None  # of optimizer.step()
    end: Moment = None
    last: Moment = None  # all that the line waits for
    taken: tuple[int, int] = (0, 0)  # memory now, and at most


class _Hook:
    """A module's hook that holds its monitor weakly; a copy of the model gets one that is idle."""

    def __init__(self, monitor: Monitor | None, name: str) -> None:
        self._monitor = None if monitor is None else weakref.ref(monitor)
        self._name = name
        self._run = torch.compiler.disable(self._call)  # a compiled model's hooks are traced

    def __call__(self, *args: Any) -> None:
        self._run(*args)

    def _call(self, *args: Any) -> None:
        monitor = None if self._monitor is None else self._monitor()
        if monitor is not None and torch.is_grad_enabled():
            getattr(monitor, self._name)(args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._name)


class Monitor:
    """What `hift_ext.monitor` gives; a context manager, to be entered once."""

    def __init__(
        self,
        optimizer: HiFTOptimizer,
        path: str | os.PathLike[str],
        *,
        plot: str | os.PathLike[str] | None = None,
        append: bool = False,
        window: int = 12,
    ) -> None:
        from hift_ext.optimizer import HiFTOptimizer

        if not isinstance(optimizer, HiFTOptimizer):
            raise TypeError(
                f"monitor watches a HiFT optimizer, not {type(optimizer).__name__}; what "
                "accelerate's prepare() gave has it as .optimizer"
            )
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a positive number of steps, not {window!r}")
        self._plot = None if plot is None else timeline.check_can_draw(plot)
        self._path, self._append = Path(path), append
        self._optimizer = optimizer
        self._hooks: list[Any] = []
        self._log: RunLog | None = None
        self._clock: Clock | None = None
        self._step = _Step()
        self._waiting: deque[_Step] = deque()  # steps whose lines are not written
        self._last_end: Moment = None
        self._forward: Moment = None
        self._backward: Moment = None
        self._engine: object = None  # that keeps intervals for us
        self._turn: tuple[int, float] = (0, 0.0)
        self._said = False
        self._recent = Recent(window)

    # Beginning and end --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        optimizer = self._optimizer
        with optimizer._turnstile.alone():
            optimizer._check_open()
            if optimizer._monitor is not None:
                raise RuntimeError(
                    f"another monitor writes {optimizer._monitor._path} and watches this "
                    "optimizer: leave its `with` first"
                )
            if self._log is not None:
                raise RuntimeError("this monitor was used: make a new one, with append=True")
            self._log = RunLog(self._path, self._append)
            model = optimizer._model
            if model is not None:
                self._hooks = [
                    model.register_forward_pre_hook(_Hook(self, "_forward_begins")),
                    model.register_forward_hook(_Hook(self, "_forward_ends")),
                ]
            optimizer._monitor = self
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        optimizer = self._optimizer
        with optimizer._turnstile.lock:
            if optimizer._monitor is not self:
                return
            optimizer._monitor = None
        for hook in self._hooks:
            hook.remove()
        assert self._log is not None
        try:
            if self._clock is not None:
                self._clock.wait()
            self._collect()
            keep_intervals(optimizer.state.engine, 0)
            self._write(everything=True)
        finally:
            self._log.close()
            if self._clock is not None:
                self._memory.close()
        if self._plot is None:
            return
        try:
            timeline.draw(self._plot, self._picture())
        except Exception as error:
            if kind is None:
                raise
            log.warning("the picture %s could not be drawn: %s", self._plot, error)

    def tell(self, **values: Any) -> None:
        """Adds values to a step's line, such as `loss=loss`.

        They are of the step under way once its forward has begun, else of the last one: call it
        between a forward and the next. Without a module, call it after `step()`.

        Args:
            **values: Numbers, texts, or tensors of one element; a tensor on a GPU is copied behind
                the work queued so far, and nobody waits for it.

        Raises:
            RuntimeError: There is no step to tell of, or this monitor is not entered.
            TypeError: A value of another kind.
            ValueError: A name that lines have already.
        """
        if self._optimizer._monitor is not self:
            raise RuntimeError("tell() belongs inside the monitor's `with`")
        taken = [name for name in values if name.endswith(("_ms", "_bytes")) or name in _OWN]
        if taken:
            raise ValueError(f"{taken[0]!r} is the monitor's own: call the value something else")
        checked = {name: _told(name, value) for name, value in values.items()}
        under_way = self._forward is not None or self._step.forwards
        if not under_way and not self._waiting:
            raise RuntimeError("there has been no forward or step yet that could be told of")
        step = self._step if under_way else self._waiting[-1]
        step.told.update(checked)
        step.last = self._now()  # values of a GPU are on their way until then

    # What happens -------------------------------------------------------------------------------

    def _now(self) -> Moment:
        if self._clock is None:
            device = self._optimizer._groups[0].params[0].device
            self._clock = clock_of(device)
            self._memory = Memory(device)
        return self._clock.now()

    def _forward_begins(self, _: object) -> None:
        self._write()
        self._backward = None  # one that raised
        self._forward = self._now()
        if self._step.before is None:
            self._step.before = self._forward if self._last_end is None else self._last_end

    def _forward_ends(self, args: tuple[Any, ...]) -> None:
        if self._forward is None:  # the monitor came in the midst of it
            return
        self._step.forwards.append((self._forward, self._now()))
        self._forward = None
        self._memory.look()
        for number, tensor in enumerate(_tensors(args[-1])):
            if number == _MOST_OUTPUTS:
                break
            tensor.register_hook(self._gradient_comes)

    def _gradient_comes(self, _: torch.Tensor) -> None:
        if self._backward is None and self._optimizer._monitor is self:
            self._backward = self._now()
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(self._backward_ends)  # runs when all gradients are there

    def _backward_ends(self) -> None:
        if self._backward is not None:
            self._step.backwards.append((self._backward, self._now()))
            self._backward = None
            self._memory.look()

    def _step_begins(self) -> None:
        """Called by the optimizer, under its lock, before it changes anything."""
        self._write()
        optimizer, step = self._optimizer, self._step
        engine = optimizer.state.engine
        if engine is not None and engine is not self._engine:
            keep_intervals(engine, _MOST_INTERVALS)
            self._engine = engine
        self._turn = optimizer._schedule.as_dict["position"], optimizer.current_lr
        step.begin = self._now()
        if step.before is None:
            step.before = step.begin if self._last_end is None else self._last_end

    def _step_ended(self, group: int, pass_index: int) -> None:
        """Called by the optimizer when the step's report is there."""
        optimizer, step = self._optimizer, self._step
        step.end = self._last_end = self._now()
        self._step = _Step()
        self._forward = None
        position, lr = self._turn
        norm = optimizer.grad_norm
        step.taken = self._memory.look(), self._memory.highest
        bytes_in, bytes_out, wait, transfer, update, _ = optimizer._report
        step.line = {
            "kind": "step",
            "step": pass_index * len(optimizer._groups) + position,
            "pass": pass_index,
            "group": optimizer._groups[group].name,
            "group_index": group,
            "lr": lr,
            "loss": None,
            "grad_norm": None if norm is None else _told("grad_norm", norm),
            "update_ms": update,
            "wait_ms": wait,
            "transfer_ms": transfer,
            "hidden_ms": max(0.0, transfer - wait),
            **self._collect(),
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            **self._memory.facts(),
        }
        step.last = self._now()
        self._waiting.append(step)

    def _collect(self) -> dict[str, float]:
        """Takes what the engine tells of its copies: milliseconds of those in and out."""
        told, lost = take_intervals(self._optimizer.state.engine)
        self._recent.moved(told)
        if lost and not self._said:
            self._said = True
            log.warning("a step moved %d pages more than the monitor keeps in mind", lost)
        return {
            "transfer_in_ms": union_ms([i[4:] for i in told if i[0] in (IN, READ)]),
            "transfer_out_ms": union_ms([i[4:] for i in told if i[0] in (OUT, WRITE)]),
        }

    # What is written ----------------------------------------------------------------------------

    def _write(self, everything: bool = False) -> None:
        """Writes the lines of the steps that are done."""
        clock, out = self._clock, self._log
        assert out is not None
        if out.is_empty and (everything or self._waiting):
            out.write(facts(self._optimizer))
        while self._waiting and clock is not None:
            step = self._waiting[0]
            if not everything and not clock.passed(step.last):
                return
            self._waiting.popleft()
            self._finish(step, clock, out)

    def _finish(self, step: _Step, clock: Clock, out: RunLog) -> None:
        def spans(moments: list[tuple[Moment, Moment]]) -> list[timeline.Span]:
            return [(clock.seconds(begin), clock.seconds(end)) for begin, end in moments]

        def ms(parts: list[timeline.Span]) -> float | None:
            return 1e3 * sum(end - begin for begin, end in parts) if parts else None

        forwards, backwards = spans(step.forwards), spans(step.backwards)
        before, begin, end = map(clock.seconds, (step.before, step.begin, step.end))
        line = dict(step.line)
        timed = {
            "step_ms": 1e3 * (end - before),
            "forward_ms": ms(forwards),
            "backward_ms": ms(backwards),
            "optimizer_ms": 1e3 * (end - begin),
        }
        head = {k: line.pop(k) for k in ("kind", "step", "pass", "group", "group_index", "lr")}
        line = {**head, **timed, **line}
        line = {k: round(v, 4) if k.endswith("_ms") and v else v for k, v in line.items()}
        out.write({**line, **step.told})
        ran = Ran(head["group"], (before, end), (begin, end), forwards, backwards)
        self._recent.ran(ran, *step.taken)
        if isinstance(clock, CudaClock):
            clock.move(step.end)

    def _picture(self) -> timeline.Picture:
        name, groups = type(self._optimizer).__name__, len(self._optimizer.groups)
        engine = self._optimizer.state.engine
        where = "" if engine is None else f", state in {engine.description}"
        on_gpu = isinstance(self._clock, CudaClock)
        memory = "GPU memory" if on_gpu else "process memory"
        return self._recent.picture(f"{name}, {groups} groups{where}", memory)


def _told(name: str, value: Any) -> Any:
    """A value as a line can hold it, or a tensor on the host whose bytes may still be coming."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}, not of one element")
        # Copied: the user may change it before the line is written.
        value = value.detach()
        return value.clone() if value.device.type == "cpu" else value.to("cpu", non_blocking=True)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: tell() takes numbers, texts and tensors")


def _tensors(output: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors with a gradient to come in what a forward gave."""
    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
    elif depth < 3:
        if isinstance(output, Mapping):
            parts = list(output.values())
        elif isinstance(output, (tuple, list)):
            parts = list(output)
        else:
            parts = list(getattr(output, "__dict__", {}).values())
        for part in parts:
            yield from _tensors(part, depth + 1)
