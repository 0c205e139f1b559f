# SPDX-License-Identifier: Apache-2.0
"""A callback of the Hugging Face Trainer that says what HiFT does, in the Trainer's own logs.

`hift_ext.integrations` imports it when it is asked for.
"""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

from transformers import TrainerCallback

from hift_ext.monitoring import Monitor
from hift_ext.optimizer import HiFTOptimizer
from hift_ext.timeline import check_can_draw

log = logging.getLogger("hift_ext")

_OURS = {"step", "lr", "group", "pass"}  # of a monitor's line
_AVERAGED = ("bytes_in", "bytes_out", "hidden_ms", "wait_ms", "update_ms")


class HiFTCallback(TrainerCallback):
    """Adds to every row that the Trainer logs with a loss.

    `hift/group`, `hift/pass` and `hift/lr` are the group, pass and latched rate of the row's last
    step (`learning_rate` is the scheduler's, which the next pass may latch); `hift/bytes_in`,
    `hift/bytes_out`, `hift/hidden_ms`, `hift/wait_ms` and `hift/update_ms` are averages per step
    since the row before, because groups differ in size. See `HiFTOptimizer.stats`.
    """

    def __init__(self) -> None:
        self._optimizer: HiFTOptimizer | None = None
        self._turn: dict[str, float] = {}
        self._sums = dict.fromkeys(_AVERAGED, 0.0)
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the optimizer and says once what was chosen.

        Raises:
            TypeError: The Trainer trains with another optimizer.
        """
        optimizer = _found(kwargs.get("optimizer"), type(self).__name__)
        if optimizer is None or optimizer is self._optimizer:
            return
        self._optimizer = optimizer
        self._steps = 0
        if state.is_world_process_zero:
            log.info("%s", _choice(optimizer, args.max_grad_norm))
            if state.max_steps < len(optimizer.groups):
                log.warning(
                    "the training has %d steps and a pass %d: not every group gets its turn; "
                    "layers_per_group= makes fewer groups",
                    state.max_steps,
                    len(optimizer.groups),
                )
            if _asks_in_vain(kwargs.get("model")):
                log.warning(
                    "the model's embeddings ask for gradients, so that every backward goes down to "
                    "them instead of stopping at the active group. Only reentrant checkpointing "
                    "needs that: enable checkpointing on the model, with use_reentrant=False, call "
                    "model.disable_input_require_grads() after it, and leave "
                    "TrainingArguments.gradient_checkpointing off"
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers whose turn it is: after the step it is the next group's."""
        if self._optimizer is not None:
            self._turn = {
                "hift/group": self._optimizer.active,
                "hift/pass": self._optimizer.pass_index,
                "hift/lr": self._optimizer.current_lr,
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds up what the step moved and waited for."""
        if self._optimizer is not None:
            stats = self._optimizer.stats()
            for name in _AVERAGED:
                self._sums[name] += stats[name]
            self._steps += 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Adds the values to the row, also in the Trainer's history."""
        if logs is None or "loss" not in logs or not self._steps:
            return
        values = {**self._turn, **{f"hift/{k}": v / self._steps for k, v in self._sums.items()}}
        self._sums = dict.fromkeys(_AVERAGED, 0.0)
        self._steps = 0
        logs.update(values)
        # The Trainer has copied the row into its history already.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)


class MonitorCallback(TrainerCallback):
    """`hift_ext.monitor` around the Trainer's training: see there for `path` and `plot`.

    A step's line gets what the Trainer logs after it, such as `loss`. Only the first process
    writes. The picture is drawn when the training ends, also by an error: then when the process
    does. A training that begins anew (`auto_find_batch_size`) goes on behind the last one's lines.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        plot: str | os.PathLike[str] | None = None,
        *,
        append: bool = False,
        window: int = 12,
    ) -> None:
        if plot is not None:
            check_can_draw(plot)
        self._path, self._plot = path, plot
        self._append, self._window = append, window
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to watch the optimizer.

        Raises:
            FileExistsError: The log exists, and `append` does not say to go on.
            TypeError: The Trainer trains with another optimizer.
        """
        optimizer = _found(kwargs.get("optimizer"), type(self).__name__)
        if optimizer is None or not state.is_world_process_zero:
            return
        self._end()
        self.monitor = Monitor(
            optimizer, self._path, plot=self._plot, append=self._append, window=self._window
        )
        self.monitor.__enter__()
        self._append = True
        atexit.register(self._end)  # the Trainer does not tell of a training that failed

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Hands on what was logged with a loss."""
        if self.monitor is None or logs is None or "loss" not in logs:
            return
        kinds = (bool, int, float, str)
        names = [n for n, v in logs.items() if n not in _OURS and isinstance(v, kinds)]
        self.monitor.tell(**{n: logs[n] for n in names if not n.startswith("hift/")})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the log and draws."""
        self._end()

    def _end(self) -> None:
        atexit.unregister(self._end)
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor.__exit__(None, None, None)


def _found(optimizer: Any, asking: str) -> HiFTOptimizer | None:
    """The HiFT optimizer under what accelerate wraps around it; None where there is none yet.

    Raises:
        TypeError: It is another optimizer.
    """
    while optimizer is not None and not isinstance(optimizer, HiFTOptimizer):
        inner = getattr(optimizer, "optimizer", None)  # accelerate wraps optimizers
        if inner is None:
            raise TypeError(
                f"{asking} reports on a HiFT optimizer, and the Trainer's is "
                f"{type(optimizer).__name__}: pass optimizers=(hift_ext.AdamW(model, ...), "
                "None) or optimizer_cls_and_kwargs=hift_ext.integrations.for_trainer(args)"
            )
        optimizer = inner
    return optimizer


def _choice(optimizer: HiFTOptimizer, clipped_at: float | None) -> str:
    """What is trained how, in one line."""
    options, groups = optimizer._options, optimizer.groups
    largest = max(groups, key=lambda group: group.numel)
    own = options["max_grad_norm"]
    clips = [
        f"the {who}'s max_grad_norm={limit}"
        for who, limit in (("Trainer", clipped_at), ("optimizer", own))
        if limit
    ]
    return (
        f"{type(optimizer).__name__}: {len(groups)} groups, order {options['order']!r}, the "
        f"largest {largest.name!r} ({largest.numel:,} weights), store {options['store']!r}, "
        f"clipped by {' and '.join(clips) or 'nothing'}"
    )


def _asks_in_vain(model: Any) -> bool:
    """Whether transformers makes inputs require gradients for checkpoints that need none."""
    if not hasattr(model, "modules") or not getattr(model, "_require_grads_hook", None):
        return False
    functions = [
        getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()
    ]
    settings = [getattr(function, "keywords", {}) for function in functions if function]
    return bool(settings) and not any(each.get("use_reentrant", True) for each in settings)
