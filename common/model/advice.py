"""Advice on a run before it is trained: whether to train together, what trains, and where the noise is added.

One table of rules on public numbers; of each topic the first that applies is given, with its reason and the experiment
behind it (docs/transfer.md, "Decide"). `solver: {kind: auto}` chooses all that is not said here, and
`headwater simulate plan` computes the same v for the run that follows.

Nothing here reads a record or a result.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.model.auto import ROUNDS
from common.model.guessing import Totals, compute_v
from common.run import RunConfig
from common.tasks import Task

HOPELESS_V, NEAR_V = 15.0, 90.0
"""Values of v below which most of what a head learns is lost, and from which little is."""

LEAST_RECORDS = 300
"""Number of records from which a trained block of a network for pictures was ever better than its head alone."""

UNRELATED = 0.9
"""Distance from a backbone's home from which records were of another kind altogether."""

LOSSES = ((1, 48), (3.4, 46), (7, 38), (11, 38), (16, 24), (21, 22), (25, 18), (31, 13), (47, 6), (70, 5), (92, 5),
          (158, 1), (475, 0))  # fmt: skip
"""Points of accuracy that privacy cost on CIFAR-10, the hardest set measured, by v (benchmarks/sizes.py)."""


@dataclass(frozen=True)
class Situation:
    """The public numbers of one task of a run.

    Attributes:
        modality: `picture`, `text` or `sound`; None for what is neither or not known.
        num_units: declared number of units of all its sites together.
        num_sites: number of those sites.
        private: whether the run has privacy.
        v: v of a linear head with noise at each site; None where the task's kind has no such number.
        v_secure: v with a secure sum; None where there is none, or too few sites for one.
        last_block: name of the last block of the backbone that can train; None where none can.
        seconds: seconds a record in the backbone on this machine; None where it was not measured.
        distance: distance of the sites' records from the backbone's home; None where it is not known.
    """

    modality: str | None
    num_units: int
    num_sites: int
    private: bool
    v: float | None
    v_secure: float | None
    last_block: str | None
    seconds: float | None
    distance: float | None

    @property
    def secure(self) -> bool:
        """True where a secure sum is advised: it needs less noise, and there is something to win by it."""
        return self.v is not None and self.v_secure is not None and self.v_secure > self.v and self.v < NEAR_V

    @property
    def advised_v(self) -> float | None:
        """The v of the run that is advised."""
        return self.v_secure if self.secure else self.v


@dataclass(frozen=True)
class Line:
    """One piece of advice.

    Attributes:
        topic: what it is about.
        choice: what is advised.
        reason: why, with the numbers it follows from.
        evidence: the experiment behind it.
    """

    topic: str
    choice: str
    reason: str
    evidence: str


@dataclass(frozen=True)
class Advice:
    """All advice on one task.

    Attributes:
        together: whether training together is advised at all.
        trains: what trains.
        rounds: number of rounds.
        secure: whether sums are to be secure.
        loss: points of accuracy that privacy cost on the hardest set measured at this v; None where there is no v.
        lines: every choice with its reason.
    """

    together: bool
    trains: str
    rounds: int
    secure: bool
    loss: float | None
    lines: tuple[Line, ...]


def advise(situation: Situation) -> Advice:
    """Returns the advice on one task from public numbers."""
    lines = {}
    for rule in RULES:
        if rule.topic not in lines and rule.applies(situation):
            reason = rule.reason.format_map(_describe(situation))
            lines[rule.topic] = Line(rule.topic, rule.choice.format_map(_describe(situation)), reason, rule.evidence)
    return Advice(
        together=not _has_low_v(situation),
        trains=lines["what trains"].choice,
        rounds=ROUNDS,
        secure=situation.secure,
        loss=None if situation.advised_v is None else estimate_points(situation.advised_v),
        lines=tuple(lines.values()),
    )


def estimate_points(v: float) -> float:
    """Returns the points of accuracy that privacy cost on the hardest set measured at this v; it falls as v grows."""
    values = [value for value, _ in LOSSES]
    at = bisect.bisect_right(values, v)
    if at in (0, len(LOSSES)):
        return float(LOSSES[min(at, len(LOSSES) - 1)][1])
    (low, before), (high, after) = LOSSES[at - 1], LOSSES[at]
    return before + (after - before) * (v - low) / (high - low)


def list_contradictions(run: RunConfig, tasks: Mapping[str, Task], totals: Mapping[str, Totals]) -> list[str]:
    """Returns one sentence for each way in which a run goes against the advice.

    Args:
        run: the run.
        tasks: some or all of its tasks by name.
        totals: task -> its sites and units; tasks without any are left out.
    """
    if run.requested_privacy is None:
        return []
    deep = [name for name in tasks if run.trunk_of(name)]
    found = []
    if deep:
        found.append(
            f"a part of the backbone trains under privacy ({', '.join(deep)}): in every experiment the head alone was "
            "better; leave `trainable` out (`headwater advise`)"
        )
    low = {name: v for name, v in compute_v(run, tasks, totals).items() if v is not None and v < HOPELESS_V}
    if low:
        shown = ", ".join(f"{name} {v:.0f}" for name, v in low.items())
        found.append(
            f"v is below {HOPELESS_V:g} ({shown}): where classes are hard to tell apart most is lost; a secure sum, "
            "more units or a larger epsilon raise it, and `headwater advise` says what works without"
        )
    return found


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One row of the table: where it applies, what is advised, and why."""

    topic: str
    choice: str
    applies: Callable[[Situation], bool]
    reason: str
    evidence: str


def _has_low_v(each: Situation) -> bool:
    return each.advised_v is not None and each.advised_v < HOPELESS_V


def _suits_block(each: Situation) -> bool:
    return each.modality == "picture" and each.last_block is not None and each.num_units >= LEAST_RECORDS


RULES = (
    Rule(
        "together", "no: names of the labels, shots at home, or nothing",
        _has_low_v,
        "v is {advised_v:.0f}, below 15: of classes that are hard to tell apart most is lost; `headwater start-from` a "
        "prior model costs no privacy",
        "of what is learned CIFAR-10 keeps 38 % at v 11; FSDD, which is easy, 19 % at v 3 and 81 % at 8",
    ),
    Rule(
        "together", "yes",
        lambda each: each.advised_v is not None,
        "v = mu N / (s C) is {advised_v:.0f}, at least 15",
        "CIFAR-10: half of what is learned is kept at v 16, 80 % at 31, 90 % at 47",
    ),
    Rule(
        "together", "yes",
        lambda each: each.private,
        "v counts classes, and this kind of task has none: `plan` says how much noise reaches an output",
        "none: the rule was measured on tasks with classes",
    ),
    Rule("together", "yes", lambda each: True, "the run is not private: nothing is lost to noise", "none needed"),
    Rule(
        "what trains", "head",
        lambda each: each.private,
        "under privacy the noise of a trunk grows with its parameters, and it takes the head's part of the clip",
        "epsilon 8: MRI head .917, last block .892, everything .500; SST-2 head .795, adapters .762, last layer .592; "
        "FSDD, 500 recordings: head .963, last stage .887",
    ),
    Rule(
        "what trains", "head; by hand also {last_block} and what follows",
        _suits_block,
        "not private, {num_units} pictures: a block can be better, with rates chosen on records that are held out of "
        "training; `configs/simulations/brain_mri_depth.yaml` is a beginning",
        "MRI, not private: head .925; block .954 by rates picked on the test set, .675 to .825 by rates that were not",
    ),
    Rule(
        "what trains", "head",
        lambda each: each.modality == "picture" and each.last_block is not None,
        "not private, but {num_units} pictures are fewer than 300, the fewest with which a block was better",
        "MRI has 320 training slices",
    ),
    Rule(
        "what trains", "head",
        lambda each: each.modality in ("text", "sound") and each.last_block is not None,
        "not private: on texts and recordings nothing deeper was better",
        "SST-2: head .802, adapters .793, last layer .799; FSDD, 100 / 500: head .970 / .973, last stage .923 / .973",
    ),
    Rule(
        "what trains", "head",
        lambda each: each.last_block is not None,
        "not private: no experiment says more of what this backbone reads",
        "none",
    ),
    Rule(
        "what trains", "head",
        lambda each: True,
        "no part of this backbone can be trained, or it could not be opened here",
        "none needed",
    ),
    Rule(
        "noise", "none", lambda each: not each.private, "the run is not private", "none needed",
    ),
    Rule(
        "noise", "secure sum (v {v_secure:.0f}; noise at sites: {v:.0f})",
        lambda each: each.secure,
        "the sum needs the noise once instead of {num_sites} times; v at sites is below 90",
        "CIFAR-10, 1000 records, epsilon 3, 5 sites: secure sum .66, noise at sites .60",
    ),
    Rule(
        "noise", "at each site (v {v:.0f}; secure sum: {v_secure:.0f})",
        lambda each: each.v is not None and each.v_secure is not None,
        "little is left to win, and each site's own noise needs no trust in other sites",
        "CIFAR-10: at v 90 privacy cost 5 points, at 158 and above 1",
    ),
    Rule(
        "noise", "at each site (v {v:.0f})",
        lambda each: each.v is not None,
        "a secure sum needs three sites, and a run whose heads are linear",
        "docs/secure-sum.md",
    ),
    Rule("noise", "at each site", lambda each: True, "nothing is known of this kind of task", "none"),
    Rule(
        "rounds", f"{ROUNDS}",
        lambda each: True,
        "more change little, because the step follows from the noise; rounds of a head cost seconds",
        "docs/auto.md: 24 to 96 rounds differ by less than two points",
    ),
    Rule(
        "expected loss", "{points:.0f} points of accuracy, as on CIFAR-10",
        lambda each: each.advised_v is not None,
        "v {advised_v:.0f}; from v 8 on, less where classes are easier to tell apart",
        "CIFAR-10 by v; FSDD lost 16 points at v 8, 2 at 19, 1 at 50",
    ),
    Rule("expected loss", "none to noise", lambda each: not each.private, "the run is not private", "none needed"),
    Rule("expected loss", "not known", lambda each: True, "no experiment with this kind of task by size", "none"),
    Rule(
        "time", "{seconds:.3f} s a record",
        lambda each: each.seconds is not None,
        "{encode_s:.0f} s to encode a site's {per_site:.0f} records once; rounds then read cached features",
        "measured on this machine, on made-up records",
    ),
    Rule(
        "time", "not measured",
        lambda each: True,
        "the backbone's weights are not on this machine, or no record can be made up for it",
        "none needed",
    ),
    Rule(
        "distance", "compare other backbones first: `headwater simulate choose`",
        lambda each: each.distance is not None and each.distance >= UNRELATED,
        "{distance:.2f} from the backbone's home is as far as records of another kind",
        "nuclei and digits lie 1.0 to 1.1 from photographs; MRI .66, where the head reaches .92",
    ),
    Rule(
        "distance", "keep this backbone",
        lambda each: each.distance is not None,
        "{distance:.2f} from the backbone's home is below .9",
        "MRI lies .66 from photographs, and a head on their features reaches .92",
    ),
)  # fmt: skip
"""The first rule that applies to a topic is the advice on it.

Adapters and everything are advised nowhere: no experiment was in their favour. No block is written into a file: `auto`
has no rate at which one keeps what it knows.
"""


def _describe(each: Situation) -> dict[str, object]:
    """Returns the numbers that the table's sentences name; what is not known is named by no rule that applies."""
    per_site = each.num_units / each.num_sites
    unknown = float("nan")
    return {
        "v": unknown if each.v is None else each.v,
        "v_secure": unknown if each.v_secure is None else each.v_secure,
        "advised_v": unknown if each.advised_v is None else each.advised_v,
        "points": unknown if each.advised_v is None else estimate_points(each.advised_v),
        "num_units": each.num_units,
        "num_sites": each.num_sites,
        "last_block": each.last_block,
        "seconds": unknown if each.seconds is None else each.seconds,
        "encode_s": per_site * (each.seconds or 0.0),
        "per_site": per_site,
        "distance": unknown if each.distance is None else each.distance,
    }
