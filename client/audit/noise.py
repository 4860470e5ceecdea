"""The law of released noise, on values that the audited solver really adds.

A site without records answers several requests: some steps of a round, the same request again (as after a restart),
another round, a run of another name, an evaluation. Each stream is opened as the site opens it. What is added to each
sum is compared, all of it together, with whole numbers floor(2**m X) of independent standard normals X:

- a value, or four values in a row, that occurred before, with either sign, at any distance in any request: a key used
  again, a period, a block that is copied, a shift;
- the scale; the shares of 64 equally likely cells and of the tails; the lowest bits, which must be fair coins;
- correlation within a release (its spectrum) and between releases, at every lag.

Every bound is exact for the law above and holds for the smallest number of tests: the whole raises a false alarm at
most once in a million audits (`ALARM`). And the release of known small noise must be a whole number of steps of the
lattice, the very sum that passed the site's stream.

# Shapes: N noise values, V values of one release, B bands of a spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, chi2, gamma, norm
from torch import Tensor, nn

from client.audit.canaries import spread_places
from client.audit.stand_ins import open_on_stand_ins
from client.audit.statistics import Bools, Floats
from client.data.units import TaskRecords, Units
from client.solvers import Solver
from common.model.parameters import create_heads
from common.privacy.lattice import Lattice
from common.privacy.noise import KEY_BYTES, Entropy, NoiseStream, SeededEntropy, open_stream
from common.tasks import Task
from common.types import Delta, Plan

ALARM = 1e-6
"""Probability with which all tests of this module together alarm although everything is right."""

FEWEST_VALUES = 2**16
"""Values of one release: several periods of any block of a few ten thousand."""

MOST_STEPS = 2
_MOST_WIDTH = 2**15
_ROW = 4
"""Values in a row that never occur twice."""

_CELLS, _BANDS, _SPARE_BITS = 64, 64, 12
_TAILS = (3.0, 3.5, 4.0, 4.5)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Released:
    """One release: the exact sum, what was added to it, and the deviation that was asked for.

    Attributes:
        total: in steps of the lattice, as the solver summed it.
        noise: as it was added.
        log2_deviation: m; None where nothing was drawn.
    """

    total: Tensor
    noise: NDArray[np.generic]
    log2_deviation: int | None


@final
class InspectingStream(NoiseStream):
    """A stream of the audit's own: it hands on a site's stream, or known noise, and keeps what is released.

    Attributes:
        seen: the releases so far.
    """

    def __init__(self, inner: NoiseStream | None = None, *, known: Integers | None = None) -> None:
        NoiseStream.__init__(self, bytes(KEY_BYTES))
        self._inner = inner
        self._known = known
        self._log2_deviation: int | None = None
        self.seen: list[Released] = []

    def coins(self, count: int, probability: float) -> Bools:
        """Returns the site's coins; all true where noise is known."""
        return np.ones(count, np.bool_) if self._inner is None else self._inner.coins(count, probability)

    def rounded_gaussian(self, count: int, log2_deviation: int) -> Integers:
        """Returns the site's noise; where it is known that, and no noise where there is none."""
        self._log2_deviation = log2_deviation
        if self._inner is not None:
            return self._inner.rounded_gaussian(count, log2_deviation)
        values = np.zeros(count, np.int64)
        if self._known is not None:
            values[: len(self._known)] = self._known[:count]
            self._known = self._known[count:]
        return values

    def inspect(self, total: Tensor, noise: NDArray[np.int64]) -> None:
        """Keeps one release."""
        self.seen.append(Released(total.detach().cpu().clone(), np.array(noise), self._log2_deviation))


# --- what is observed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseObservation:
    """Noise of a site without records, and one release of known noise.

    Attributes:
        releases: what was released, in the order of the requests.
        num_expected: number of releases that the plan says.
        requests: the requests in words.
        known_release: what passed the stream in one step with known noise, of a million steps of the lattice at most.
        released: parameter group -> the update that followed, in the order of the noise.
    """

    releases: Sequence[Released]
    num_expected: int
    requests: Sequence[str]
    known_release: Sequence[Released]
    released: Mapping[str, Floats]


def observe_noise(
    solver: Solver, plan: Plan, tasks: Mapping[str, Task], public_sizes: Mapping[str, int], entropy: Entropy
) -> NoiseObservation:
    """Returns what a site without records releases to several requests.

    Args:
        solver: the audited solver.
        plan: plan of a round; few of its steps are observed.
        tasks: the site's tasks.
        public_sizes: parameter group -> declared number of units.
        entropy: source of the keys, as the site uses it.
    """
    heads, count = _make_wide_heads(tasks)
    tasks = open_on_stand_ins(tasks, {name: _read_width(head) for name, head in heads.items()})
    nobody, sizes = _hold_nobody(tasks, heads), {name: public_sizes[name] for name in heads}
    short = replace(plan, steps=min(plan.steps, MOST_STEPS))
    requests = [("one", "1", "a round"), ("one", "2", "the next round"), ("two", "1", "a round of another run")]
    if not isinstance(entropy, SeededEntropy):  # Its keys repeat by design, in simulations and tests.
        requests.insert(1, ("one", "1", "the same round asked again"))
    releases: list[Released] = []
    for run, release, _ in requests:
        stream = InspectingStream(open_stream(entropy, f"audit-{run}", "site", release))
        solver.solve(heads, tasks, nobody, plan=short, public_sizes=sizes, stream=stream)
        releases += stream.seen
    lattice = _lattice_of(plan)
    evaluation = open_stream(entropy, "audit-one", "site", "evaluation/1")
    noise = evaluation.rounded_gaussian(count, lattice.log2_deviation)
    releases.append(Released(torch.zeros(count, dtype=torch.int64), noise, lattice.log2_deviation))
    known = np.random.default_rng(0).integers(-(2**20), 2**20, count)
    inspecting = InspectingStream(known=known)
    update = solver.solve(heads, tasks, nobody, plan=replace(plan, steps=1), public_sizes=sizes, stream=inspecting)
    return NoiseObservation(
        releases,
        len(requests) * short.steps + 1,
        [*(words for *_, words in requests), "an evaluation"],
        inspecting.seen,
        _flatten_update(update, heads),
    )


def _lattice_of(plan: Plan) -> Lattice:
    assert plan.clip_norm is not None
    return Lattice.of(plan.clip_norm, plan.noise_multiplier)


def _make_wide_heads(tasks: Mapping[str, Task]) -> tuple[dict[str, nn.Module], int]:
    """Returns heads of zeros with enough weights together, and their number."""
    width = 32
    while True:
        heads = create_heads(tasks, dict.fromkeys(tasks, width), seed=0)
        count = sum(part.numel() for head in heads.values() for part in head.parameters())
        if count >= FEWEST_VALUES or width >= _MOST_WIDTH:
            break
        width *= 2
    with torch.no_grad():
        for head in heads.values():
            for part in head.parameters():
                part.zero_()
    return heads, count


def _read_width(head: nn.Module) -> int:
    return next(iter(head.parameters())).shape[1]


def _hold_nobody(tasks: Mapping[str, Task], heads: Mapping[str, nn.Module]) -> Units:
    made = {}
    for name, task in tasks.items():
        width = _read_width(heads[name])
        nothing = torch.zeros(0, dtype=torch.long)
        features_RD, labels = spread_places(task, torch.zeros(0, width)), task.codec.missing()[None][:0]
        made[name] = TaskRecords.of(features_RD, labels, nothing.bool(), nothing, 0)
    return Units(0, made)


def _flatten_update(update: Delta, heads: Mapping[str, nn.Module]) -> dict[str, Floats]:
    return {
        name: np.concatenate([update.heads[name][part].ravel() for part, _ in heads[name].named_parameters()]).astype(
            np.float64
        )
        for name in sorted(heads)
    }


# --- what is decided -------------------------------------------------------------------------------------------------


def judge_noise(plan: Plan, observed: NoiseObservation) -> Iterator[str]:
    """Yields a sentence for each way in which noise differs from its law."""
    lattice = _lattice_of(plan)
    releases = observed.releases
    if len(releases) != observed.num_expected or not observed.known_release:
        yield "not every released sum passes the site's stream, so that its noise is not the stream's"
        return
    everything = [*releases, *observed.known_release]
    if not all(is_whole(each.total) and each.noise.dtype == np.int64 for each in everything):
        yield "sums or noise are not whole numbers: a release is not rounded to its lattice"
        return
    if any(each.log2_deviation != lattice.log2_deviation for each in releases):
        yield "noise is drawn for another lattice than the plan's"
    if any(bool(each.total.any()) for each in releases):
        yield "a site without records releases a sum that is not zero"
    if not _is_whole(observed):
        yield "what is released is not the sum that passed the site's stream, in whole steps of the lattice"
    yield from find_noise_problems([each.noise for each in releases], lattice.log2_deviation)


def is_whole(total: Tensor) -> bool:
    """Returns whether a sum consists of whole numbers, of whatever type."""
    return not total.is_floating_point() or torch.equal(total, total.trunc())


def _is_whole(observed: NoiseObservation) -> bool:
    """Returns whether the update is one factor for each group times the noise that passed, exact to float32."""
    start = 0
    for values in observed.released.values():
        known = observed.known_release[0].noise[start : start + len(values)].astype(np.int64)
        start += len(values)
        moved = known != 0
        if not moved.any():
            return False
        factor = float(np.median(values[moved] / known[moved]))
        if not np.isfinite(factor) or factor == 0.0 or not (np.abs(values / factor - known) < 0.4).all():
            return False
    return True


def find_noise_problems(noises: Sequence[NDArray[np.generic]], log2_deviation: int) -> Iterator[str]:
    """Yields a sentence for each test that noise of several releases fails.

    Args:
        noises: whole numbers that were added, release by release.
        log2_deviation: m of the law that is accounted for.
    """
    whole_N = np.concatenate(noises).astype(np.int64)
    if find_repetition(whole_N, log2_deviation):
        yield (
            f"released noise repeats itself: {_ROW} values in a row, or too many single ones, occur twice in the same "
            "release or in another one"
        )
    standard = [(np.asarray(noise, np.float64) + 0.5) * 2.0**-log2_deviation for noise in noises]
    normal_N = np.concatenate(standard)
    spectral = [values_V[:FEWEST_VALUES] for values_V in standard]  # A power of two, for speed.
    each = ALARM / 16.0  # Five families below, with at most two tails each, and repetition.
    energy = float(np.sum(normal_N**2))
    if min(chi2.cdf(energy, normal_N.size), chi2.sf(energy, normal_N.size)) < each / 2.0:
        yield (
            f"released noise has {math.sqrt(energy / normal_N.size):.4g} times the standard deviation that is "
            "accounted for"
        )
        return
    if _has_other_law(normal_N, each):
        yield "released noise is not normal: some values are too frequent, or its tails are too light or too heavy"
    if _has_unfair_bits(whole_N, log2_deviation, each):
        yield "the lowest digits of released noise are not random"
    if _is_correlated_within(spectral, each):
        yield "neighbouring values of released noise are correlated"
    if _is_correlated_between(spectral, each):
        yield "the noise of one release is correlated with that of another"


def find_repetition(whole_N: Integers, log2_deviation: int) -> bool:
    """Returns whether values occur again that independent draws do not repeat.

    With p the largest probability of a magnitude: a value equals one of the N before it with probability at most N p,
    whatever came before, so that the number of repeated ones is below a binomial; and two runs of four values are equal
    with probability at most p**4, overlapping or not.

    Args:
        whole_N: noise of all releases, in their order.
        log2_deviation: m.
    """
    magnitude_N = (whole_N ^ (whole_N >> 63)).astype(np.uint64)  # Of both signs.
    count, peak = len(whole_N), 2.0 * 0.3989423 * 2.0**-log2_deviation
    repeated = int((np.diff(np.sort(magnitude_N)) == 0).sum())
    if binom.sf(repeated - 1, count, min(1.0, count * peak)) < ALARM / 32.0:
        return True
    # At m = 20, the smallest, and two million values this happens by chance once in 10**12.
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
    mixed_N = np.zeros(max(0, count - _ROW + 1), np.uint64)
    for offset in range(_ROW):
        mixed_N += (magnitude_N[offset : offset + len(mixed_N)] + np.uint64(1)) * factors[offset]
    order = np.argsort(mixed_N)
    alike = np.flatnonzero(np.diff(mixed_N[order]) == 0)
    first, second = order[alike], order[alike + 1]
    equal = np.ones(len(alike), np.bool_)
    for offset in range(_ROW):
        equal &= magnitude_N[first + offset] == magnitude_N[second + offset]
    return bool(equal.any())


def _is_outside(events: int, trials: int, probability: float, error: float) -> bool:
    tails = binom.cdf(events, trials, probability), binom.sf(events - 1, trials, probability)
    return bool(min(tails) < error / 2.0)


def _has_other_law(normal_N: Floats, error: float) -> bool:
    """Returns whether a cell or a tail has another share of the values than it should."""
    tests = _CELLS + len(_TAILS)
    bounds = norm.ppf(np.arange(1, _CELLS) / _CELLS)
    counts = np.bincount(np.searchsorted(bounds, normal_N), minlength=_CELLS)
    if any(_is_outside(int(events), normal_N.size, 1.0 / _CELLS, error / tests) for events in counts):
        return True
    beyond = [(int((np.abs(normal_N) > bound).sum()), float(2.0 * norm.sf(bound))) for bound in _TAILS]
    return any(_is_outside(events, normal_N.size, share, error / tests) for events, share in beyond)


def _has_unfair_bits(whole_N: Integers, log2_deviation: int, error: float) -> bool:
    """Returns whether one of the lowest bits is no fair coin; they are to 2**-24 where they matter least."""
    bits = log2_deviation - _SPARE_BITS
    return any(_is_outside(int(((whole_N >> bit) & 1).sum()), whole_N.size, 0.5, error / bits) for bit in range(bits))


def _is_correlated_within(standard: Sequence[Floats], error: float) -> bool:
    """Returns whether the spectrum is not flat: its ordinates are independent and exponential for white noise."""
    ordinates = [
        np.abs(np.fft.rfft(values_V)[1 : (len(values_V) + 1) // 2]) ** 2 / len(values_V) for values_V in standard
    ]
    ordinates = [each for each in ordinates if len(each) >= _BANDS]
    if not ordinates:
        return False
    powers_B = np.zeros(_BANDS)
    sizes_B = np.zeros(_BANDS)
    for each in ordinates:
        for band, part in enumerate(np.array_split(each, _BANDS)):
            powers_B[band] += part.sum()
            sizes_B[band] += len(part)
    low, high = gamma.cdf(powers_B, sizes_B), gamma.sf(powers_B, sizes_B)
    total = sum(len(each) for each in ordinates)
    line = max(float(each.max()) for each in ordinates)
    return bool(np.minimum(low, high).min() < error / (4.0 * _BANDS) or total * math.exp(-line) < error / 2.0)


def _is_correlated_between(standard: Sequence[Floats], error: float) -> bool:
    """Returns whether releases are correlated at some lag: given one of them, each sum is exactly normal."""
    pairs = [(0, other) for other in range(1, len(standard))]
    pairs += [(other, other + 1) for other in range(1, len(standard) - 1)]
    pairs = [(a, b) for a, b in pairs if len(standard[a]) == len(standard[b])]
    spectra = [np.fft.rfft(values_V) for values_V in standard]
    for first, second in pairs:
        sums_V = np.fft.irfft(spectra[first] * spectra[second].conj(), len(standard[first]))
        largest = float(np.abs(sums_V).max()) / math.sqrt(float(np.sum(standard[second] ** 2)))
        if 2.0 * norm.sf(largest) * len(sums_V) * len(pairs) < error:
            return True
    return False


def describe_noise(observed: NoiseObservation) -> str:
    """Returns what was tried, in one sentence."""
    values = sum(each.noise.size for each in observed.releases)
    return (
        f"{values:,} noise values of {len(observed.releases)} releases ({', '.join(observed.requests)}) were searched "
        "for repetition at any distance and compared with the law, scale, tails and independence that are accounted "
        f"for (false alarms: one in {1 / ALARM:,.0f} audits)."
    )
