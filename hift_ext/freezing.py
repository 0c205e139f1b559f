# SPDX-License-Identifier: Apache-2.0
"""Which parameters require gradients: only the active group's, and who froze the others.

Every freeze is recorded per parameter: it can be undone, and is never taken for the user's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from hift_ext.distributed import Watch

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

_keepers: Any = WeakIdKeyDictionary()  # parameter -> weak reference to the Freezer that claimed it


class Freezer:
    """Turns `requires_grad` on and off for one optimizer's parameters."""

    def __init__(self) -> None:
        self._frozen: dict[int, list[torch.Tensor]] = {}  # by group
        self._claimed: list[torch.Tensor] = []
        self.lifted = False

    def claim(self, params: Iterable[torch.Tensor]) -> None:
        """Marks `params` as driven by this optimizer; all or nothing.

        Raises:
            RuntimeError: Another open optimizer drives one of them.
        """
        params = list(params)
        for param in params:
            if other_keeper(param, self):
                raise RuntimeError(OTHER_OPEN)
        for param in params:
            _keepers[param] = weakref.ref(self)
        self._claimed += params

    def freeze(self, group: int, params: Iterable[torch.Tensor]) -> None:
        """Stops gradients of those of a group's parameters that have them."""
        trained = [param for param in params if param.requires_grad]
        if not trained:
            return
        frozen = self._frozen.setdefault(group, [])
        if frozen:  # another hand undid our freeze
            known = {id(param) for param in frozen}
            frozen.extend(param for param in trained if id(param) not in known)
        else:
            frozen.extend(trained)
        # Last: of an interrupted freeze all is undone.
        for param in trained:
            param.requires_grad = False

    def thaw(self, group: int) -> None:
        """Lets those of a group's parameters that were frozen here have gradients again."""
        for param in self._frozen.get(group, ()):
            param.requires_grad = True
        self._frozen.pop(group, None)  # last: an interrupted thaw is repeated

    def lift(self) -> None:
        """Lets all have gradients until the optimizer freezes again, before the next forward."""
        for group in list(self._frozen):
            self.thaw(group)
        self.lifted = True

    def frozen(self) -> set[int]:
        """The `id` of every parameter that is frozen by this optimizer now."""
        return {id(param) for params in self._frozen.values() for param in params}

    def close(self) -> None:
        """Undoes every freeze and gives the parameters back."""
        self.lift()
        for param in self._claimed:
            keeper = _keepers.get(param)
            if keeper is not None and keeper() is self:
                del _keepers[param]
        self._claimed = []


def freeze_inactive(optimizer: HiFTOptimizer, everywhere: bool) -> bool:
    """Implements `HiFTOptimizer.freeze_inactive`."""
    groups, freezer = optimizer._groups, optimizer._freezer
    active, last = optimizer._schedule.active, optimizer._frozen_for
    everywhere = everywhere or freezer.lifted
    if optimizer._closed or len(groups) == 1 or (last == active and not everywhere):
        return False
    first = last < 0
    if first:
        freezer.claim(p for group in groups for p in group.params)
    for index in range(len(groups)) if first or everywhere else (last,):
        if index != active:
            freezer.freeze(index, groups[index].params)
    freezer.thaw(active)
    optimizer._frozen_for, freezer.lifted = active, False
    return first


OTHER_OPEN = (
    "these parameters are driven by another HiFT optimizer that is still open: call its close(), "
    "or delete it, before making a second one on the same model"
)


def other_keeper(param: torch.Tensor, freezer: Freezer | None) -> bool:
    """Whether another open optimizer than `freezer`'s has claimed `param`."""
    reference = _keepers.get(param)
    keeper = None if reference is None else reference()
    return keeper is not None and keeper is not freezer


class FreezeHook:
    """A forward pre-hook that freezes for the group that is active now.

    It holds its optimizer weakly. A copy of a model (deepcopy, pickle) carries a hook that does
    nothing but remember which parameters were frozen in the original; see `frozen_in_copy`.
    """

    def __init__(self, optimizer: HiFTOptimizer | None, frozen_names: tuple[str, ...] = ()) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.frozen_names = frozen_names
        self._seen: tuple[int, int] | None = None  # the turn whose members were looked at
        self._watch = Watch()
        # A compiled model's hooks are traced. This one must run: a trace would guard on the turn.
        self._run = torch.compiler.disable(self._freeze)

    def __call__(self, module: nn.Module, args: object) -> None:
        """Runs before the module's forward."""
        self._run(module)

    def _freeze(self, module: nn.Module) -> None:
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or optimizer._closed:
            return
        self._watch(optimizer, module)
        turn = (optimizer.pass_index, optimizer.active)
        if turn != self._seen:
            # functional_call() replaces parameters while it lasts: step() looks again.
            optimizer._suspect = replaced_member(module, optimizer)
            self._seen = turn
        optimizer.freeze_inactive(everywhere=True)

    def is_dead(self) -> bool:
        """Whether this hook has no optimizer (any more)."""
        return self._optimizer is None or self._optimizer() is None

    def __reduce__(self) -> tuple[Any, ...]:
        optimizer = None if self._optimizer is None else self._optimizer()
        names = self.frozen_names if optimizer is None else optimizer.frozen_names()
        return FreezeHook, (None, names)


def replaced_member(module: nn.Module, optimizer: HiFTOptimizer) -> str | None:
    """Name of a parameter of the active group that stands for another, unknown one now.

    To be called before the group is thawed: a copy of a frozen parameter does not require gradients
    either, and one that the user put in frozen is meant to be.
    """
    group = optimizer.groups[optimizer.active]
    for name, known in zip(group.names, group.params, strict=True):
        found = _found(module, name)
        # FSDP2's parameters, of another type, change places all the time.
        if found is None or found is known or type(known) is not nn.Parameter:
            continue
        meant = found in optimizer.state.entries or any(p is known for p in module.parameters())
        if not meant and (found.requires_grad or id(known) in optimizer._freezer.frozen()):
            return name
    return None


def _found(module: nn.Module, name: str) -> torch.Tensor | None:
    try:
        return module.get_parameter(name)
    except AttributeError:  # nameless, renamed (by a parametrization), or taken out
        return None


def check_member(module: nn.Module, optimizer: HiFTOptimizer, name: str) -> None:
    """Refuses a module in which a parameter of the active group is still replaced.

    Raises:
        RuntimeError: Its name stands for another one, which nobody would train.
    """
    group = optimizer.groups[optimizer.active]
    known = dict(zip(group.names, group.params, strict=True)).get(name)
    if known is not None and _found(module, name) is not known:
        raise RuntimeError(
            f"parameter {name!r} of the model was replaced after the optimizer was made (by an "
            "assignment, to_empty(), or .to() a device of another kind): the new one would not be "
            "trained. Make a new optimizer, or copy the new values into the old parameter"
        )


def frozen_in_copy(model: nn.Module | None) -> set[str]:
    """Names of parameters that an optimizer had frozen in the model this one is a copy of."""
    hooks = () if model is None else tuple(model._forward_pre_hooks.values())
    return {
        name
        for hook in hooks
        if isinstance(hook, FreezeHook) and hook.is_dead()
        for name in hook.frozen_names
    }
