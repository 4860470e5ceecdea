"""An audited solver with planted records before it, and what its releases say when it is asked.

Everything is measured relative to what one clipped unit moves, so that neither learning rates nor divisors need to be
known: noise is right if it is `noise_multiplier` times the largest part of a unit in the release.

# Shapes: M canaries, W rows of all entries' first weights; an entry is a task's head or a trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from client.audit.canaries import Planted, ProbeStream
from client.audit.statistics import Bools, Floats
from client.data.units import Units
from client.solvers import Solver
from common.privacy.noise import Entropy, NoiseStream
from common.tasks import Task
from common.types import Plan, RunFailed

Accountant = Callable[[Plan, int, float], float]
"""(plan of a round, rounds, delta) -> the epsilon a site shows after them."""

PROBES = 8
"""Canaries that an exact check needs: their directions differ only in the label."""

STILL = 10**9
"""Factor on declared sizes that makes weights stand still: then a round's steps all answer alike."""


@dataclass(frozen=True)
class Audited:
    """What is audited, by its real parts: tests pass broken ones.

    Attributes:
        solver: whose `solve` is called.
        plan: of one round.
        tasks: clipped jointly.
        public_sizes: entry -> declared number of units.
        rounds: of the run.
        delta: of the claim.
        entropy: where the keys of coins and noise come from, by round.
        accountant: what the site would show.
        trunks: task -> the trunk its records pass, of those that pass one; none where backbones are frozen.
        num_canaries: more give tighter bounds and take longer.
        max_steps: noised sums to ask for at most.
    """

    solver: Solver
    plan: Plan
    tasks: Mapping[str, Task]
    public_sizes: Mapping[str, int]
    rounds: int
    delta: float
    entropy: Entropy
    accountant: Accountant
    trunks: Mapping[str, str] = field(default_factory=dict)
    num_canaries: int = 1000
    max_steps: int = 200


@dataclass(frozen=True)
class Lab:
    """The audited solver with the planted records before it.

    A release is read as entry -> (canaries' columns, free columns).
    """

    audited: Audited
    planted: Planted

    @property
    def clip_norm(self) -> float:
        """Of the plan, which has one."""
        clip_norm = self.audited.plan.clip_norm
        assert clip_norm is not None
        return clip_norm

    @property
    def step(self) -> Plan:
        """The plan of one step."""
        return replace(self.audited.plan, steps=1)

    def first(self, count: int) -> Bools:
        """The first few canaries."""
        return np.arange(self.planted.num_canaries) < count

    def ask(
        self, units: Units, plan: Plan, stream: NoiseStream, sizes_factor: int = 1
    ) -> dict[str, tuple[Floats, Floats]]:
        """What one call of the solver releases."""
        sizes = {name: size * sizes_factor for name, size in self.audited.public_sizes.items()}
        delta = self.audited.solver.solve(
            self.planted.heads, self.audited.tasks, units, plan=plan, public_sizes=sizes, stream=stream
        )
        return {
            name: (self.planted.canaries_in(delta, name), self.planted.free_in(delta, name))
            for name in self.planted.heads
        }

    def gains(self, plan: Plan, sizes_factor: int = 1, scale: float = 1.0) -> dict[str, float]:
        """Entry -> released change / summed gradient, from clipped canaries without noise."""
        present = self.first(PROBES)
        units = self.planted.units(present, background=False, scale=scale)
        released = self.ask(units, plan, ProbeStream(0.0), sizes_factor)
        gains = {}
        for name, (canaries, _) in released.items():
            direction = self.planted.direction[name][:, present]
            gains[name] = float((canaries[:, present] * direction).sum() / (direction**2).sum() / self.clip_norm)
            if not np.isfinite(gains[name]) or gains[name] == 0.0:
                raise RunFailed(f"audit: {name}: a canary does not reach the release; nothing can be measured")
        return gains

    def reach(self, gains: Mapping[str, float]) -> float:
        """How far a round of standing weights moves along a canary that takes part in every step; one step is 1.

        As a length over all entries: weight decay turns a gradient a little from one entry to another.
        """
        present = self.first(PROBES)
        units = self.planted.units(present, background=False)
        released = self.ask(units, self.audited.plan, ProbeStream(0.0), STILL)
        parts = [canaries[:, present] / (gains[name] * self.clip_norm) for name, (canaries, _) in released.items()]
        return float(np.linalg.norm(np.concatenate(parts), axis=0).mean())

    def noise_gains(self, released: Mapping[str, tuple[Floats, Floats]]) -> dict[str, float]:
        """Entry -> released change / summed noise, where every noise value was 1 and no record reaches."""
        claimed = self.audited.plan.noise_multiplier * self.clip_norm
        return {name: float(free.mean()) / claimed for name, (_, free) in released.items()}

    def weights(self, gains: Mapping[str, float]) -> dict[str, float]:
        """Entry -> its weight in `signals`: 1 where a release shows as much of a unit as is claimed, more where more.

        A million where noise is missing altogether.
        """
        nobody = self.planted.units(self.first(0), background=False)
        noise_gains = self.noise_gains(self.ask(nobody, self.step, ProbeStream(1.0)))
        return {name: (gain / max(abs(noise_gains[name]), 1e-3 * abs(gain))) ** 2 for name, gain in gains.items()}

    def signals(
        self,
        released: Mapping[str, tuple[Floats, Floats]],
        gains: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
    ) -> Floats:
        """signal_M: the release along each canary's direction; a clipped canary's part is 1.

        Args:
            released: by `ask`.
            gains: by `gains`.
            weights: of entries, relative to each other; None: all alike.
        """
        signal_M, whole_M = np.zeros(self.planted.num_canaries), np.zeros(self.planted.num_canaries)
        for name, (canaries, _) in released.items():
            direction, weight = self.planted.direction[name], 1.0 if weights is None else weights[name]
            signal_M += weight * (canaries * direction).sum(axis=0) / (gains[name] * self.clip_norm)
            whole_M += weight * (direction**2).sum(axis=0)
        return signal_M / whole_M

    def noise(self, released: Mapping[str, tuple[Floats, Floats]], gains: Mapping[str, float]) -> Floats:
        """W x FREE: released noise / the claimed standard deviation of one step."""
        claimed = self.audited.plan.noise_multiplier * self.clip_norm
        return np.concatenate([free / (gains[name] * claimed) for name, (_, free) in released.items()])
