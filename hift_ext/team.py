# SPDX-License-Identifier: Apache-2.0
"""The ranks that save or load one checkpoint together, and agree on how each part of it went.

Where one fails all raise, and none is left waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from typing_extensions import Self

from hift_ext.distributed import difference
from hift_ext.sharding import is_sharded
from hift_ext.shards import CheckpointError

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

T = TypeVar("T")

_KINDS: tuple[type[Exception], ...] = (
    CheckpointError,
    FileExistsError,
    FileNotFoundError,
    OSError,
    TypeError,
    ValueError,
    RuntimeError,
)
"""What a rank raises for another one: the first that fits, else the last."""


class Team:
    """The ranks that hold parts of an optimizer's parameters; one where it holds them whole.

    Args:
        groups: Process groups, one for each dimension of the ranks' mesh; none: this rank alone.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        self._groups = groups
        self.rank = dist.get_rank() if groups else 0
        self.ranks = [self.rank]
        if groups:
            self.ranks = sorted(self._gather(None))

    @classmethod
    def of(cls, optimizer: HiFTOptimizer) -> Self:
        """The ranks that an optimizer's parameters are cut over.

        Raises:
            RuntimeError: Not all parameters are on one device mesh.
        """
        placed: list[Any] = [p for p in optimizer.state.entries if is_sharded(p)]
        if not placed:
            return cls()
        mesh = placed[0].device_mesh
        other = next((p for p in placed if p.device_mesh != mesh), None)
        if other is not None:
            raise RuntimeError(
                f"{optimizer._say(placed[0])} and {optimizer._say(other)} are on different device "
                "meshes, and hift_ext.save and load deal in one: use torch.distributed.checkpoint, "
                "with get_state_dict and set_state_dict"
            )
        return cls([mesh.get_group(dim) for dim in range(mesh.ndim)])

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return not self._groups

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == self.ranks[0]

    def _gather(self, value: Any) -> dict[int, Any]:
        known = {self.rank: value}
        for group in self._groups:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, known, group=group)
            known = {rank: each for part in gathered for rank, each in part.items()}
        return known

    def together(self, work: Callable[[], T]) -> dict[int, T]:
        """Does one part of the work on every rank; all must come here.

        Args:
            work: This rank's; what it returns is sent to all.

        Returns:
            By rank, what each returned.

        Raises:
            Exception: What this rank's work raised, or else one of the same kind for another's.
            RuntimeError: A rank has ended or did not answer.
        """
        if self.alone:
            return {self.rank: work()}
        mine: BaseException | None = None
        value: T | None = None
        try:
            value = work()
        except BaseException as error:  # Ctrl-C, too: the others wait for an answer
            mine = error
        told = None if mine is None else (_kind(mine), f"{type(mine).__name__}: {mine}")
        try:
            known = self._gather((told, value))
        except Exception as error:
            raise (
                mine
                or RuntimeError(
                    "another rank has ended or did not answer while a checkpoint was saved or "
                    "loaded. A checkpoint that was there is whole: the last one, or, at the very "
                    "end of a save, the new one"
                )
            ) from error
        if mine is not None:
            raise mine
        for rank in self.ranks:
            if known[rank][0] is not None:
                kind, text = known[rank][0]
                raise _KINDS[kind](f"rank {rank} failed, and so all ranks stop. {text}")
        return {rank: known[rank][1] for rank in self.ranks}

    def agree(self, facts: dict[int, dict[str, Any]]) -> None:
        """Refuses ranks that differ.

        Args:
            facts: By rank, as `together` gave them; the same on all.

        Raises:
            RuntimeError: What differs where.
        """
        problem = difference(facts)
        if problem:
            raise RuntimeError(
                f"the ranks would not save or load the same checkpoint: {problem}. Call it with "
                "the same path after as many steps of equal optimizers on every rank"
            )


def _kind(error: BaseException) -> int:
    fitting = (number for number, kind in enumerate(_KINDS) if isinstance(error, kind))
    return next(fitting, len(_KINDS) - 1)
