"""Two ways of doing the same work, timed in turns in one process, and the line that says how they compare."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

Work = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One claim and what was seen.

    Attributes:
        name: of the claim.
        ratio: subject / reference, of the medians.
        target: what it should be at most.
        subject_s: median seconds of the claimed way.
        reference_s: median seconds of the other.
        repeats: of each.
        low: lower quartile of the ratios of each pair of turns; `ratio` where they were not timed in pairs.
        high: upper quartile of these.
        load: the machine's load average of the last minute at the end; its own work is part of it.
        note: setting, or why the target was missed.
    """

    name: str
    ratio: float
    target: float
    subject_s: float
    reference_s: float
    repeats: int
    low: float
    high: float
    load: float
    note: str = ""


def compare(
    name: str,
    subject: Work,
    reference: Work,
    *,
    target: float,
    repeats: int,
    note: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Time both in turns, after one of each that does not count; print the result as one line.

    With `time.process_time` the seconds are those of this process alone, of all its threads together.
    """
    subject()
    reference()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, seconds in ((subject, times[0]), (reference, times[1])):
            seconds.append(seconds_of(work, clock))
    ratios = [own / other for own, other in zip(*times, strict=True)]
    return stated(name, median(times[0]), median(times[1]), target=target, repeats=repeats, note=note, ratios=ratios)


def seconds_of(work: Work, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the seconds that a work takes."""
    started = clock()
    work()
    return clock() - started


def stated(
    name: str,
    subject: float,
    reference: float,
    *,
    target: float,
    repeats: int,
    note: str = "",
    ratios: Sequence[float] = (),
) -> Result:
    """Returns the result of two numbers, which need not be seconds where the note says so; prints it as one line.

    Args:
        name: name of the claim.
        subject: median of the claimed way.
        reference: median of the other.
        target: largest ratio that reaches the claim.
        repeats: turns of each.
        note: setting, or why the target was missed.
        ratios: ratio of each pair of turns, whose quartiles say how far they spread.
    """
    ratio = subject / reference
    low, _, high = quantiles(ratios) if len(ratios) > 1 else (ratio, ratio, ratio)
    result = Result(
        name,
        ratio=round(ratio, 4),
        target=target,
        subject_s=round(subject, 6),
        reference_s=round(reference, 6),
        repeats=repeats,
        low=round(low, 4),
        high=round(high, 4),
        load=round(os.getloadavg()[0], 2),
        note=note,
    )
    print(json.dumps(asdict(result)), flush=True)
    return result
