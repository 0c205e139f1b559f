# SPDX-License-Identifier: Apache-2.0
# Every storage that operations make, with its birth and death, counted in operations: below
# autograd, so forward, backward and a checkpoint's second forward are seen alike.
"""What is allocated, and for how long."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ROUND = 512  # torch's caching allocator gives whole multiples of so many bytes
_FOREVER = 2**62
_aten = torch.ops.aten
_FLASH = _aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ADD_IN_PLACE = _aten.add_.Tensor
_DEVICE = torch.ops.prim.device.default
_ADD = _aten.add.Tensor

CATEGORIES = ("weights", "gradients", "activations", "other")
WEIGHTS, GRADIENTS, ACTIVATIONS, OTHER = range(4)


@dataclass
class _Allocation:
    size: int  # bytes, as allocated
    born: int  # operation that made it; 0: before the first
    died: int = _FOREVER  # last operation during which it was there
    kind: int = OTHER
    forward: bool = False  # made by an operation that autograd recorded, or might have
    kept: bool = False  # still there when backward's own operations ran
    replaces: int = -1  # the allocation that a GPU would have added to in place


def allocated(nbytes: int) -> int:
    """Bytes that torch's caching allocator counts for a request of `nbytes`."""
    return -(-nbytes // _ROUND) * _ROUND


def _run(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """One operation; for real where every tensor is real, so that Python may ask for its values."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Records allocations and FLOPs of what runs inside, on fake tensors or real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.flops = 0
        self.boundary = 0  # the last operation of the forward proper; set by who runs it
        self._forward = True  # whether the latest operation was one of forward's
        self._made: list[_Allocation] = []
        self._extra: list[tuple[int, int]] = []  # operation, workspace inside it
        # By address of the storage; an address is used again only after its weak reference died.
        self._living: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def hold(self, tensors: Iterable[torch.Tensor], kind: int) -> None:
        """Counts `tensors` as there from the start."""
        for tensor in tensors:
            index = self._see(tensor, born=0)
            if index is not None:
                self._made[index].kind = kind

    def mark(self, tensors: Iterable[torch.Tensor], kind: int) -> None:
        """Says what living allocations are."""
        for tensor in tensors:
            self._made[self._living[tensor.untyped_storage()._cdata][0]].kind = kind

    def _see(self, tensor: torch.Tensor, born: int) -> int | None:
        """Follows the tensor's storage; its number where it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living:
            return None
        index = len(self._made)
        forward = self._forward
        self._made.append(_Allocation(allocated(storage.nbytes()), born, forward=forward))

        def gone(_: object) -> None:
            del self._living[key]
            made = self._made[index]
            made.died = self.now
            made.kept = not self._forward or 0 < made.born <= self.boundary < self.now

        self._living[key] = index, weakref.ref(storage, gone)
        return index

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation and looks at what it made."""
        if func is _DEVICE:  # no operation, and asked for at every one
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        self.now += 1
        # Backward runs without gradient mode; a checkpoint's second forward with it, in a node.
        self._forward = torch.is_grad_enabled() and (
            not self.boundary or torch._C._current_autograd_node() is not None
        )
        kwargs = kwargs or {}
        if func is _ADD_IN_PLACE and not self._forward:
            self._note_gradient(args[1])
        out = _run(func, args, kwargs)
        self._count(func, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                index = self._see(tensor, self.now)
                if index is not None and func is _ADD and not self._forward:
                    self._note_sum(index, args[0])
        return out

    def _note_sum(self, index: int, old: torch.Tensor) -> None:
        """Notes a sum of gradients, which autograd's engine adds in place where it alone holds one.

        Under a mode, or with tensors of a subclass, such as fake ones, it never does.
        """
        at = self._living[old.untyped_storage()._cdata][0]
        if old._is_view():  # its base holds the storage, too
            return
        if self._made[at].size == self._made[index].size:
            self._made[index].replaces = at

    def _note_gradient(self, new: Any) -> None:
        """Notes a gradient that is added to one from before."""
        node = torch._C._current_autograd_node()
        if node is not None and "AccumulateGrad" in node.name():
            self.mark([new], GRADIENTS)

    @property
    def first_gradient(self) -> int:
        """The operation that made the first gradient; `now` where there was none."""
        born = [made.born for made in self._made if made.kind == GRADIENTS]
        return min((b for b in born if b > self.boundary), default=self.now)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        if func is _FLASH or func is _FLASH_BACKWARD:
            back = func is _FLASH_BACKWARD
            query, key = args[back], args[1 + back]
            batch, heads, length, width = query.shape
            # Two products of length x length x width forward, five backward.
            self.flops += (5 if back else 2) * 2 * batch * heads * length * key.shape[2] * width
            if back and query.dtype != torch.float32:
                # The flash kernel of 16-bit types sums the query's gradient in float32.
                self._extra.append((self.now, allocated(4 * query.numel())))
            return
        counter = flop_registry.get(func._overloadpacket)
        if counter is not None:
            self.flops += counter(*args, **kwargs, out_val=out)

    def live(self) -> np.ndarray:
        """Bytes by category (rows, as in CATEGORIES) during each operation (columns).

        Column 0 is before the first, the last one after the last.
        """
        change = np.zeros((len(CATEGORIES), self.now + 3), dtype=np.int64)
        for made in self._made:
            if made.replaces >= 0:
                old = self._made[made.replaces]
                # Gone with the sum: the engine held it alone, and would have added to it.
                if old.died == made.born:
                    old.died = made.born - 1
        for made in self._made:
            kind = made.kind
            if kind == OTHER and made.forward and made.kept:
                kind = ACTIVATIONS
            change[kind, made.born] += made.size
            change[kind, max(made.born, min(made.died, self.now + 1) + 1)] -= made.size
        for at, size in self._extra:
            change[OTHER, at] += size
            change[OTHER, at + 1] -= size
        return np.cumsum(change, axis=1)[:, :-1]
