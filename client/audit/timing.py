"""The time of one charge, in two worlds that differ by one unit's values: units and records are as many.

The audit plays a coordinator whose heads meet the unit's labels in one world, so that it has next to no gradient; in
the other its values are extreme (`VALUES`). One task's charges are timed in pairs of both worlds, in random order:
where time does not depend on the world, which of a pair takes longer is a fair coin whatever else the machine does. A
sign test of "longer by more than 5 %" is exact, and all together raise a false alarm at most once in a million audits;
ending early where nothing shows only lowers that rate. It is the processor's time: other programs disturb it less.

A finding is a warning: replies leave at ticks, and a shared machine hides small differences. One of more than `GROSS`
times in both of two independent repetitions refutes the claim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from client.audit.attack import FIXED_WEIGHTS
from client.audit.neighbours import Audited, gather, make_plain
from client.audit.noise import InspectingStream
from client.data.units import Units
from common.privacy.noise import NoiseStream
from common.types import BadInput, RunFailed

ALARM, EFFECT, GROSS = 1e-6, 1.05, 2.0
OTHERS, FEWEST_PAIRS, MOST_PAIRS = 3, 8, 120
_CHARGE_S, _MOST_STEPS = 0.008, 16

VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "huge and clipped": lambda plain: -1e12 * plain,
    "saturated": lambda plain: 1e4 * plain,
    # By its bits: a processor that takes denormal numbers for zeros would write zeros.
    "denormal": lambda plain: torch.full_like(plain, 700, dtype=torch.int32).view(torch.float32),
    "zero": torch.zeros_like,
}
"""A unit's values in words -> its features, from those that meet its labels."""

NEEDED = int(binom.isf(ALARM / (2 * len(VALUES)), MOST_PAIRS, 0.5)) + 1
"""Pairs of one sign, of at most `MOST_PAIRS`, that are a finding."""


Timings = Mapping[str, Sequence[Sequence[float]]]
"""Values in words -> for each repetition, the ratio of each pair: time with extreme values / with plain ones."""


def measure_times(run: Audited, stream: NoiseStream) -> Timings:
    """Returns a comparison for each kind of extreme values, of one task after the other.

    Args:
        run: the audited solver.
        stream: source of records, heads and the order of pairs.
    """
    random = np.random.default_rng(int(stream.uniform(1)[0] * 2**53))
    names = random.permutation(sorted(run.tasks)).tolist()
    found = {}
    for number, (values, change) in enumerate(VALUES.items()):
        one = [names[number % len(names)]]
        trunks = {name: run.trunks[name] for name in one if name in run.trunks}
        one_task = replace(run, tasks={name: run.tasks[name] for name in one}, trunks=trunks)
        found[values] = list(_compare(one_task, change, random))
    return found


def _compare(run: Audited, change: Callable[[Tensor], Tensor], random: np.random.Generator) -> Iterator[list[float]]:
    """Yields the ratios of each repetition."""
    modules, person = make_plain(run, random)
    sizes = {name: run.public_sizes[name] * FIXED_WEIGHTS for name in modules}
    plain = gather(run, [person] * (OTHERS + 1))
    extreme = gather(run, [person] * OTHERS + [replace(person, features_RD=change(person.features_RD))])

    def charge(units: Units, steps: int) -> float:
        plan = replace(run.plan, steps=steps)
        started = time.process_time()
        with suppress(BadInput, RunFailed):  # An answer that fails takes its time too.
            run.solver.solve(modules, run.tasks, units, plan=plan, public_sizes=sizes, stream=InspectingStream())
        return max(time.process_time() - started, 1e-9)

    *_, one_s, two_s = (charge(units, 1) for units in (extreme, plain, extreme, plain))
    steps = max(1, min(_MOST_STEPS, int(_CHARGE_S / max(one_s, two_s))))
    for _ in range(2):
        ratios: list[float] = []
        while _is_open(ratios):
            first, second = (extreme, plain) if random.random() < 0.5 else (plain, extreme)
            ratio = charge(first, steps) / charge(second, steps)
            ratios.append(ratio if first is extreme else 1.0 / ratio)
        yield ratios
        if _count_signs(ratios) < NEEDED or 1.0 / GROSS <= np.median(ratios) <= GROSS:
            return


def _count_signs(ratios: Sequence[float]) -> int:
    """Returns how many pairs differ by more than the effect, in the direction that more of them have."""
    return max(sum(ratio > EFFECT for ratio in ratios), sum(ratio < 1.0 / EFFECT for ratio in ratios))


def _is_open(ratios: Sequence[float]) -> bool:
    return len(ratios) < FEWEST_PAIRS or (
        len(ratios) < MOST_PAIRS and 0.55 * len(ratios) < _count_signs(ratios) < NEEDED
    )


def judge_times(timings: Timings, *, gross: bool) -> Iterator[str]:
    """Yields a sentence for each finding that refutes the claim (`gross`), or for each that is only a warning."""
    for values, repetitions in timings.items():
        medians = [float(np.median(ratios)) for ratios in repetitions]
        found = [_count_signs(ratios) >= NEEDED for ratios in repetitions]
        is_gross = len(found) == 2 and all(found) and (min(medians) > GROSS or max(medians) < 1.0 / GROSS)
        if found[0] and is_gross == gross:
            yield f"a unit whose values are {values} makes a charge take {medians[0]:.3g} times as long"


def describe_times(timings: Timings) -> str:
    """Returns what was tried, in one sentence."""
    medians = [float(np.median(repetitions[0])) for repetitions in timings.values()]
    return (
        f"{sum(len(ratios) for each in timings.values() for ratios in each)} pairs of charges at sites of "
        f"{OTHERS + 1} units were timed in random order, with one unit plain and with values that are "
        f"{', '.join(VALUES)}: the median ratio of times was {min(medians):.3g} to {max(medians):.3g}."
    )
