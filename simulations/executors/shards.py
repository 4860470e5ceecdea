"""The shards of a run, wherever they are: asked all at once, or one of them.

They are in this process (`LocalShards`), or each is a Ray actor (`simulations.executors.ray_shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from common.types import RunFailed
from simulations.executors.alike import Gathering
from simulations.executors.shard import Shard

_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")

OpenShards = Callable[[Gathering, Sequence[NDArray[np.int64]]], "Shards"]
"""Opens the shards of prepared sites: all of them, and the sites of each."""


class ShardEnded(RunFailed):
    """A shard's process ended; the run can be resumed after its last whole round."""


class Shards(Protocol):
    """The shards of a run, wherever they are."""

    def __len__(self) -> int:
        """The number of shards."""

    def ask(self, method: Callable[[Shard, _Argument], _Answer], arguments: Sequence[_Argument]) -> list[_Answer]:
        """Returns what a method of each shard returns, of all at the same time where there are several processes.

        Args:
            method: the method.
            arguments: for each shard its argument.

        Raises:
            ShardEnded: a shard's process ended.
        """

    def ask_one(self, shard: int, method: Callable[[Shard, _Argument], _Answer], argument: _Argument) -> _Answer:
        """Returns what a method of one shard returns.

        Args:
            shard: number of the shard.
            method: the method.
            argument: its argument.

        Raises:
            ShardEnded: the shard's process ended.
        """

    def close(self) -> None:
        """Ends the shards' processes."""


@final
class LocalShards:
    """Shards in this process, one after the other."""

    def __init__(self, gathering: Gathering, divided: Sequence[NDArray[np.int64]]) -> None:
        """Args: gathering: all sites; divided: the sites of each shard."""
        self._shards = [Shard(gathering, numbers) for numbers in divided]

    def __len__(self) -> int:
        return len(self._shards)

    def ask(self, method: Callable[[Shard, _Argument], _Answer], arguments: Sequence[_Argument]) -> list[_Answer]:
        """Returns what a method of each shard returns. See `Shards.ask`."""
        return [method(shard, argument) for shard, argument in zip(self._shards, arguments, strict=True)]

    def ask_one(self, shard: int, method: Callable[[Shard, _Argument], _Answer], argument: _Argument) -> _Answer:
        """Returns what a method of one shard returns. See `Shards.ask_one`.

        Args:
            shard: number of the shard.
            method: the method.
            argument: its argument.
        """
        return method(self._shards[shard], argument)

    def close(self) -> None:
        """Does nothing."""
