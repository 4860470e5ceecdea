"""Shards as Ray actors: each a process of its own, on this machine or on any machine of a Ray cluster.

An actor opens its sites' records from the run's folder, which every machine has at the same path, keeps them and their
keys, and answers with sums. An actor that ends is answered with one sentence and ends the run: its round is charged
already, and `resume` charges it again, opens all shards again and goes on after the last whole round.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, final

import numpy as np
from numpy.typing import NDArray

from simulations.config import Executor
from simulations.executors.alike import Gathering
from simulations.executors.shard import Shard
from simulations.executors.shards import ShardEnded, Shards

_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")


class _Actor:
    """One shard in a process of its own."""

    def __init__(self, gathering: Gathering, numbers: NDArray[np.int64]) -> None:
        # As many threads as cores would divide arrays where rows end.
        import torch

        torch.set_num_threads(1)
        self._shard = Shard(gathering, numbers)

    def ask(self, method: Callable[[Shard, Any], Any], argument: Any) -> Any:
        """Returns what a method of the shard returns."""
        return method(self._shard, argument)


@final
class RayShards:
    """Shards as Ray actors; see `simulations.executors.shards.Shards`."""

    def __init__(self, gathering: Gathering, divided: Sequence[NDArray[np.int64]], executor: Executor) -> None:
        """Starts the actors, and waits until all have opened their sites.

        Args:
            gathering: all sites of the run, prepared.
            divided: the sites of each shard.
            executor: cores and GPUs of each actor, and the address of a Ray cluster; without one Ray starts here.

        Raises:
            ShardEnded: a shard could not be opened.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Else Ray warns of its own future.
        import ray  # Only this executor pays for it.

        self._ray, self._is_ours = ray, not ray.is_initialized()
        if self._is_ours:
            named: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if executor.ray_address:
                named["address"] = executor.ray_address
            else:
                # Here a core may hold several shards: there is nowhere else to go.
                cores = max(os.cpu_count() or 1, round(len(divided) * executor.cpus_per_site + 0.5))
                named |= {"address": "local", "include_dashboard": False, "num_cpus": cores}
            ray.init(**named)
        options = {
            "num_cpus": executor.cpus_per_site,
            "num_gpus": executor.gpus_per_site,
            "scheduling_strategy": "SPREAD",
        }
        everything, actor = ray.put(gathering), cast(Any, ray.remote(_Actor))
        self._actors: list[Any] = [actor.options(**options).remote(everything, numbers) for numbers in divided]
        self.ask(Shard.count_sites, [None] * len(divided))

    def __len__(self) -> int:
        return len(self._actors)

    def ask(self, method: Callable[[Shard, _Argument], _Answer], arguments: Sequence[_Argument]) -> list[_Answer]:
        """Returns what a method of each shard returns. See `Shards.ask`."""
        pairs = zip(self._actors, arguments, strict=True)
        under_way = [actor.ask.remote(method, argument) for actor, argument in pairs]
        return [self._await(shard, answer) for shard, answer in enumerate(under_way)]

    def ask_one(self, shard: int, method: Callable[[Shard, _Argument], _Answer], argument: _Argument) -> _Answer:
        """Returns what a method of one shard returns. See `Shards.ask_one`.

        Args:
            shard: number of the shard.
            method: the method.
            argument: its argument.
        """
        answer: _Answer = self._await(shard, self._actors[shard].ask.remote(method, argument))
        return answer

    def close(self) -> None:
        """Ends the actors, and Ray where it was started for them."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._is_ours:
            self._ray.shutdown()

    def _await(self, shard: int, answer: Any) -> Any:
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise ShardEnded(
                f"shard {shard + 1} of {len(self._actors)} ended: its process was killed, or its machine left"
            ) from error


def open_on_ray(executor: Executor) -> Callable[[Gathering, Sequence[NDArray[np.int64]]], Shards]:
    """Returns what opens shards as Ray actors.

    Args:
        executor: the executor's settings.
    """

    def open_shards(gathering: Gathering, divided: Sequence[NDArray[np.int64]]) -> Shards:
        return RayShards(gathering, divided, executor)

    return open_shards
