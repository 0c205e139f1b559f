# SPDX-License-Identifier: Apache-2.0
"""HiFTOptimizer: the policy, the same for every rule.

Each step updates one group of layers; a pass visits every group once (arXiv 2401.15207).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import nn
from typing_extensions import Self, Unpack

from hift_ext import interchange, layout, ops, settings
from hift_ext.booking import Step, Turnstile, all_or_nothing, book, pass_on
from hift_ext.clipping import Reduce
from hift_ext.engines import StateEngine
from hift_ext.freezing import (
    OTHER_OPEN,
    FreezeHook,
    Freezer,
    check_member,
    freeze_inactive,
    frozen_in_copy,
    other_keeper,
)
from hift_ext.layers import Group, make_groups
from hift_ext.notices import Notices
from hift_ext.options import HiFTOptions, check_offered, checked
from hift_ext.paged_state import Entry, PagedState
from hift_ext.precision import Precision
from hift_ext.profiling import stage, staged
from hift_ext.schedule import Schedule, make_order
from hift_ext.totals import Totals, stats
from hift_ext.update import quiet, update_group

if TYPE_CHECKING:
    from hift_ext.monitoring import Monitor

log = logging.getLogger("hift_ext")

_ANY_PARAMETER = torch.empty(0, dtype=torch.float32, device="cpu")


class HiFTOptimizer(torch.optim.Optimizer):
    """Base of the HiFT optimizers; use a subclass such as `hift_ext.AdamW`.

    A subclass names the rule, the state and the hyper-parameters, and torch's class where there is
    one; `hift_ext/adagrad.py` is the shortest.

    Args:
        params: An `nn.Module`, or what torch.optim takes: parameters, named parameters, or dicts.
        defaults: Arguments of torch's own class.
        **options: See `HiFTOptions`.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None  # whose settings these are
    has_step: ClassVar[bool] = True  # torch keeps `step` in the state
    state_from_start: ClassVar[bool] = False  # torch makes the state when the optimizer is made

    _grad_norm: torch.Tensor | None = None
    _reduce_norm: Reduce | None = None  # where gradients are sharded: see clipping.py
    _monitor: Monitor | None = None

    # Set when the state is laid out, at the first step or load.
    _device: torch.device
    _device_index: int
    _precision: Precision
    _stream_count: int
    _sharded: bool

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over grad_scale and found_inf

    def rule(self, group: dict[str, Any]) -> str:
        """Name of the rule in csrc/rules that a param_group uses."""
        raise NotImplementedError

    def streams(self, group: dict[str, Any]) -> list[ops.StreamSpec]:
        """State of a param_group's parameters, in the rule's order."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any], lr: float, step: int) -> tuple[float, ...]:
        """The rule's Hyper for the `step`-th visit (from 1) at rate `lr`, folded in double."""
        raise NotImplementedError

    def __init__(
        self, params: Any, defaults: dict[str, Any], **options: Unpack[HiFTOptions]
    ) -> None:
        check_offered(defaults)
        if self.torch_class is not None:
            # torch's own class knows which settings are wrong, and says so in torch's words.
            defaults = dict(self.torch_class([_ANY_PARAMETER], **defaults).defaults)
        self._options = checked(options)
        model = self._options["model"]
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("params is a module and model= is another one: pass one of them")
            model, params = params, list(params.parameters())
        self._model: nn.Module | None = model
        self._constructed = False
        self._turnstile = Turnstile()
        super().__init__(params, defaults)
        self._begin(frozen_in_copy(model))

    # Construction: groups, schedule, freezing ---------------------------------------------------

    def _begin(self, frozen_before: set[str]) -> None:
        names = self._names()
        members = [p for group in self.param_groups for p in group["params"]]
        trainable = [p for p in members if p.requires_grad or names.get(p) in frozen_before]
        if any(other_keeper(p, None) for p in members):
            raise RuntimeError(OTHER_OPEN)
        named = [(names[p], p) for p in members if p in names]
        source: Any = self._model if self._model is not None else (named or None)
        self._groups: list[Group] = make_groups(
            source,
            trainable,
            layers_per_group=self._options["layers_per_group"],
            groups=self._options["groups"],
        )
        if not self._groups:
            raise ValueError(
                "no parameter requires a gradient: there is nothing to train. Set requires_grad on "
                "the parameters to train before making the optimizer"
            )
        seed = self._options["seed"]
        self._schedule = Schedule(make_order(self._options["order"], len(self._groups), seed), seed)
        self.param_groups[0]["hift"] = self._schedule.as_dict
        self.state: PagedState = PagedState(  # type: ignore[assignment]
            has_step=self.has_step, from_start=self.state_from_start
        )
        self._entries: list[list[Entry]] = []  # by group
        layout.enter(self, [group.params for group in self._groups])
        self._report, self._totals = ops.Report(), Totals()
        self._notices = Notices()
        self._under_way: Step | None = None
        self._suspect: str | None = None  # a member of the active group that was replaced
        self._members = settings.members(self)
        self._closed = False
        self._frozen_for = -1
        self._freezer = self.state.freezer = Freezer()
        self._hook: Any = None
        for p in trainable:  # some are frozen where the model is a copy of one an optimizer drove
            p.requires_grad_(True)
        self._attach()
        self._constructed = True

    def _attach(self) -> None:
        """Ties the optimizer to its model: from here on only the active group has gradients."""
        # Deleting the optimizer must not leave a model that cannot train.
        weakref.finalize(self, self._freezer.close).atexit = False
        if self._model is None:
            self.freeze_inactive()
            return
        interchange.drop_dead_hooks(self._model)
        # Before other hooks: FSDP2's takes over requires_grad from the shards it gathers.
        self._hook = self._model.register_forward_pre_hook(FreezeHook(self), prepend=True)

    def _names(self) -> dict[torch.Tensor, str]:
        if self._model is not None:
            return {p: name for name, p in self._model.named_parameters()}
        return {
            p: name
            for group in self.param_groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }

    def freeze_inactive(self, *, everywhere: bool = False) -> bool:
        """Lets only the active group have gradients. Called by the model's forward pre-hook.

        Args:
            everywhere: Look at every group: others undo freezes too (peft, whenever adapters are
                switched off and on). Otherwise only what changed with the turn is looked at.

        Returns:
            Whether this was the first time.
        """
        return staged("freeze", None, freeze_inactive, self, everywhere)

    def frozen_names(self) -> tuple[str, ...]:
        """Names of the parameters that are frozen now because their group is not active."""
        frozen = self._freezer.frozen()
        return tuple(name for p, name in self._names().items() if id(p) in frozen)

    # What a user may ask ------------------------------------------------------------------------

    @property
    def groups(self) -> Sequence[Group]:
        """HiFT's groups, each with `name`, `params`, `numel`; not torch's `param_groups`."""
        return tuple(self._groups)

    @property
    def active(self) -> int:
        """Index of the group that the next step updates."""
        return self._schedule.active

    @property
    def pass_index(self) -> int:
        """Passes completed: how often every group has had its turn."""
        return self._schedule.pass_index

    @property
    def current_lr(self) -> float:
        """The learning rate in force for the first param_group.

        The pass's latched one, or, between passes, the one that the next step will latch.
        """
        latched = self._schedule.latched
        return float(self.param_groups[0]["lr"]) if latched is None else latched[0]

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of the gradients of the last step that had some, before it was clipped.

        A float32 scalar on the parameters' device, without the scaler's factor; on a GPU reading
        its value waits for it. None before the first such step and without `max_grad_norm`.
        """
        return self._grad_norm

    def stats(self) -> dict[str, float]:
        """What the last step moved (bytes) and how long it took (milliseconds).

        `wait_ms` is the time the step stood still for pages, `transfer_ms` the time in which copies
        ran since the step before, `hidden_ms` what of it cost nothing; `update_ms` the arithmetic.
        A GPU's times come late: they are of what was finished when the step was queued.
        """
        return stats(self._report, self.state.engine)

    def summary(self) -> dict[str, Any]:
        """The same of all steps since the optimizer was made; copies and pickles begin anew.

        `steps`, `passes` and the sums `bytes_in` and `bytes_out`; the `_ms` of a step under `mean`
        and `worst`; under `groups` the same of each by `name`. A GPU's times come a step late: they
        count to the group after theirs.
        """
        return self._totals.summary([group.name for group in self._groups], self.pass_index)

    # The step -----------------------------------------------------------------------------------

    @quiet
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the active group and moves on to the next.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            RuntimeError: The optimizer is closed, a gradient is sparse or on another device, or
                with `error_if_nonfinite` the gradients' norm is NaN or infinite.
            TypeError: A parameter or gradient type that is not offered.
            OSError: The page file could not be read or written; see the message.
            ValueError: A setting in `param_groups` that cannot be used.
        """
        self._check_open()
        loss = None
        if closure is None and interchange.asks_for_state(self):
            return None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
            return loss  # the scaler skips this step: the group keeps its turn
        all_or_nothing(self, found_inf)
        return loss

    def _take_turn(self, found_inf: torch.Tensor | None) -> None:
        self._check_open()
        schedule, monitor = self._schedule, self._monitor
        if monitor is not None:
            monitor._step_begins()
        settings.check_unchanged(self, whole=schedule.latched is None)
        if self._suspect is not None and self._model is not None:
            check_member(self._model, self, self._suspect)
        if schedule.latched is None:
            settings.latch(self)
        passes, engine, active = schedule.pass_index, self.state.engine, schedule.active
        name = self._groups[active].name
        report = staged("step", name, update_group, self, self._entries[active], found_inf)
        if report is None:
            self._notices.no_gradient(self._groups[self.active].name, passes)
            if engine is not None:
                with stage("prefetch"):
                    engine.prefetch(schedule.following)
            pass_on(self, schedule.next())
        self._report = report or ops.Report()
        self._totals.add(active, self._report)
        if monitor is not None:
            monitor._step_ended(active, passes)
        if schedule.pass_index != passes:
            self._notices.pass_ended()
        if self._model is None:
            self.freeze_inactive()

    # State --------------------------------------------------------------------------------------

    def _say(self, p: torch.Tensor) -> str:
        name = self._names().get(p)
        return f"parameter {name!r}" if name else f"a parameter of shape {tuple(p.shape)}"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                "this optimizer is closed, and its state is gone: save it before close(), and make "
                "a new one to train on"
            )

    def _engine(self) -> StateEngine:
        """The engine; laid out at its first use, when the parameters' device is known."""
        return layout.lay_out(self) if self.state.engine is None else self.state.engine

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param_group: its trainable parameters are one more group from the next pass on."""
        with self._turnstile.alone():
            super().add_param_group(param_group)
            if not self._constructed:
                return
            try:
                self._check_open()
                layout.join(self, self.param_groups[-1])
            except BaseException:
                self.param_groups.pop()
                raise
            self._members = settings.members(self)

    def state_dict(self) -> dict[str, Any]:
        """Torch's, of a moment between two steps, wherever it is called from.

        Views of host memory; of a file, copies that the system can write out. 8-bit state is there
        in float32, masters as `master` or `master_low` (int16: what the bfloat16 weight lacks).

        Raises:
            RuntimeError: The optimizer is closed, and its state gone.
        """
        with self._turnstile.lock, self.state.masters():
            self._check_open()
            settings.check_unchanged(self, whole=True)
            book(self)
            return interchange.with_schedule(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state_dict of this class or of torch's own, from any device.

        State is written page by page in float32; order, cursor and latched rates come along where
        they were saved. Everything is checked before anything changes.

        Raises:
            TypeError: Not a state_dict, or state that is no tensor of real numbers.
            ValueError: Another number of param_groups, parameters or elements, missing state, or a
                schedule that cannot be.
        """
        with self._turnstile.alone():
            self._check_open()
            interchange.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        with self._turnstile.alone():
            return interchange.get_state(self)

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "a shallow copy would be a second optimizer on the same parameters: use "
            "copy.deepcopy((model, optimizer)), or a new optimizer and load_state_dict()"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        interchange.set_state(self, state)

    # The end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Restores `requires_grad`, finishes transfers, frees the state and removes scratch files.

        Safe to call twice. State tensors taken earlier stay valid.
        """
        with self._turnstile.lock:
            # Each line may be repeated: a close() that was interrupted is finished by another.
            self._closed = True
            self._freezer.close()
            if self._hook is not None:
                self._hook.remove()
            self.state.settle()
            engine, self.state.engine = self.state.engine, None
            for entry in self.state.entries.values():
                entry.visits = 0
            if engine is not None:
                engine.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
