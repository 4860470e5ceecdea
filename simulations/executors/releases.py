"""Releases of a shard's sites beside their updates: statistics of held-out units, and sums before the first round.

Each is what `client.protocol` releases at one site under the same key, to the bit; statistics are computed for all
sites at once.

# Shapes: B sites that are asked; R records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from client.protocol.evaluate import SUMS, noised_sums, sum_statistics_each
from client.protocol.site import Measurement
from client.solvers.parts.moments import release_moments
from common.privacy.accounting import Mechanism
from common.privacy.lattice import Lattice, check_unit_count
from common.privacy.noise import NoiseStream
from common.run import RunConfig
from common.tasks import select_round
from common.tasks.parts.calibration import make_released_statistic
from common.types import Heads
from simulations.executors.alike import Alike


def evaluate_each(
    run: RunConfig,
    alike: Alike,
    heads: Heads,
    sites: NDArray[np.int64],
    *,
    offsets: Mapping[str, Sequence[float]],
    mechanism: Mechanism,
    round_: int,
    streams: Sequence[NoiseStream],
) -> dict[int, Heads]:
    """Returns what `client.protocol.evaluate.noised_sums` returns at each of some sites.

    Args:
        run: the run.
        alike: sites that train the same heads.
        heads: heads to evaluate.
        sites: int64 [B], those of them that are asked, ascending.
        offsets: task -> the offset of its outputs in training, where its head is served with another one.
        mechanism: what each was charged.
        round_: number of the round.
        streams: for each, the source of its noise.
    """
    assert mechanism.sensitivity is not None
    held_out, modules = alike.open_held_out(), alike.open_modules(heads)
    check_unit_count(int(np.diff(held_out.start_S).max(initial=0)))
    lattice = Lattice.of(mechanism.sensitivity, mechanism.noise_multiplier)
    found: dict[int, dict[str, dict[str, NDArray[np.float32]]]] = {number: {} for number in sites.tolist()}
    for name, task in sorted(select_round(alike.tasks, round_, run.rounds).items()):
        statistic = make_released_statistic(task, calibrate=_calibrates(run), offset=offsets.get(name))
        site_R = torch.from_numpy(np.repeat(np.arange(len(held_out)), np.diff(held_out.rows[name])))
        records = held_out.units.tasks[name]
        total_SN = sum_statistics_each(modules[name], task, records, lattice, site_R, len(held_out), statistic)
        # In a stream's own order: the tasks by name.
        noise_BN = NoiseStream.draw_each(streams, statistic.size, lattice.log2_deviation)
        total_BN = total_SN[torch.from_numpy(alike.place_S[sites])]
        released_BN = lattice.release(total_BN, noise_BN, streams[0]).numpy().astype(np.float32)
        for number, values in zip(sites.tolist(), released_BN, strict=True):
            found[number][name] = {SUMS: values}
    return dict(found)


def evaluate_alone(
    run: RunConfig,
    alike: Alike,
    heads: Heads,
    number: int,
    *,
    offsets: Mapping[str, Sequence[float]],
    mechanism: Mechanism,
    round_: int,
    stream: NoiseStream,
) -> Heads:
    """Returns the noised statistics of one site's held-out units, as the site computes them by itself.

    Args:
        run: the run.
        alike: sites that train the same heads.
        heads: heads to evaluate.
        number: the site.
        offsets: task -> the offset of its outputs in training, where its head is served with another one.
        mechanism: what it was charged.
        round_: number of the round.
        stream: source of its noise.
    """
    tasks = select_round(alike.tasks, round_, run.rounds)
    return noised_sums(
        alike.open_modules(heads),
        tasks,
        alike.open_held_out().select_site(int(alike.place_S[number])),
        mechanism=mechanism,
        stream=stream,
        calibrate=_calibrates(run),
        offsets=offsets,
    )


def measure_alone(run: RunConfig, alike: Alike, number: int, asked: Measurement, stream: NoiseStream) -> Heads:
    """Returns the noised sums that a run measures before its first round at one site.

    Args:
        run: the run.
        alike: sites that train the same heads.
        number: the site.
        asked: the sums and what was charged for them.
        stream: source of the noise.
    """
    assert asked.plan is not None
    units = alike.units.select_site(int(alike.place_S[number]))
    return dict(release_moments(asked.parts, run, alike.tasks, units, plan=asked.plan, stream=stream))


def _calibrates(run: RunConfig) -> bool:
    return run.evaluation is not None and run.evaluation.calibrate
