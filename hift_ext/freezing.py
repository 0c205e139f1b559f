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
        for param in trained:
            param.requires_grad = False
        self._frozen.setdefault(group, []).extend(trained)

    def thaw(self, group: int) -> None:
        """Lets those of a group's parameters that were frozen here have gradients again."""
        for param in self._frozen.pop(group, ()):
            param.requires_grad = True

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

    def __call__(self, module: nn.Module, args: object) -> None:
        """Runs before the module's forward."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None and optimizer.freeze_inactive():
            check_ddp(sum(len(group.params) for group in optimizer.groups))

    def is_dead(self) -> bool:
        """Whether this hook has no optimizer (any more)."""
        return self._optimizer is None or self._optimizer() is None

    def __reduce__(self) -> tuple[Any, ...]:
        optimizer = None if self._optimizer is None else self._optimizer()
        names = self.frozen_names if optimizer is None else optimizer.frozen_names()
        return FreezeHook, (None, names)


def check_ddp(trained: int) -> None:
    """Refuses a DistributedDataParallel that was made when parameters were frozen already.

    Its reducer knows only what required a gradient then, and would not average the rest.

    Raises:
        RuntimeError: Fewer parameters are registered than are trained in turn.
    """
    ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    registered = int(ddp._get_ddp_logging_data().get("num_parameter_tensors", trained))
    if registered < trained:
        raise RuntimeError(
            f"DistributedDataParallel registered {registered} parameters and HiFT trains {trained} "
            "in turn: wrap the model before its first forward under the optimizer, while all "
            "require gradients"
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
