"""The values that cross a room's border: heads, plans, contributions, refusals.

Everything here is immutable and free of behaviour that touches records.

Shapes: heads are plain NumPy float32 arrays, so that a message never carries anything executable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from mmap import mmap
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Params = Mapping[str, NDArray[np.float32]]
"""One head: parameter name -> float32 array."""

Heads = Mapping[str, Params]
"""Task name -> head."""

FIXED = "fixed."
"""Begins the names of a head's numbers that travel with it and never train: they are in no update."""


def select_trained(params: Params) -> Params:
    """Returns the parameters that train, and that an update therefore holds."""
    return {name: values for name, values in params.items() if not name.startswith(FIXED)}


Relation = Literal["add_remove"]
RELATION: Relation = "add_remove"
"""The only neighbouring relation in use: one unit's records are added or removed."""


FilterKind = Literal["gdp", "renyi"]
"""Kinds of privacy filters (common/privacy/filters.py)."""

MAX_STEPS = 1_000_000
"""Steps of a whole run; more would hold a site for hours."""

MAX_ROUND_STEPS = 1_000
"""Steps of one round. With much noise steps cost next to nothing, and each makes the time that one unit takes more: so
many small steps would add up to a difference that a coordinator can measure."""


class Range(NamedTuple):
    """The numbers that are accepted for a setting which affects privacy, both ends included."""

    low: float
    high: float

    def check(self, key: str, value: float) -> None:
        """Raises BadInput where a value is outside, or no number at all."""
        if not self.low <= value <= self.high:
            raise BadInput(f"{key}: expected {self.low:g} to {self.high:g}, got {value!r:.24}")


# Beyond these, doubles and float32 round by as much as a value is long, and accounting overflows.
EPSILONS = Range(1e-4, 1e4)
DELTAS = Range(1e-12, 0.1)
NOISE_MULTIPLIERS = Range(1e-3, 1e9)
SAMPLING_RATES = Range(1e-6, 1.0)
CLIP_NORMS = Range(1e-9, 1e9)


def check_delta(delta: float, size: int, key: str) -> None:
    """Checks that so few of a population's units may lose everything with probability delta: none, nearly surely.

    Args:
        delta: the delta.
        size: declared number of units.
        key: of the delta, for the message.

    Raises:
        BadInput: the delta is above 1 / (10 * size).
    """
    largest = 1.0 / (10 * size)
    if delta > largest * (1.0 + 1e-9):
        raise BadInput(
            f"{key}: expected at most {largest:.3g}, which is 1 / (10 x {size} declared units), got {delta:g}; choose "
            "a smaller delta, or declare the true size"
        )


MAX_BACKBONES = 16
"""Backbones of one run at most: each is a network in a site's memory and a file on its disk."""


class HeadwaterError(Exception):
    """Root of the errors a user can act on; the message is one sentence for a person.

    HeadwaterError
    |-- BadInput            a file, key, value or argument is wrong (exit code 2)
    |   `-- BadRecord       one record cannot be used (row and file are named, never its content)
    |-- DigestMismatch      weights are not the ones that were agreed on
    |-- BudgetExhausted     a reservation would exceed the registry's budget
    |-- LedgerDamaged       the ledger's chain does not verify
    |-- RunFailed           a run ended without a usable result
    |   `-- RunInterrupted  a round did not reach its quorum in time; the run can be resumed
    `-- Interrupted         a person ended a run that can be resumed (exit code 130)
    """


class BadInput(HeadwaterError):
    """A file, key, value or argument is wrong."""


class BadRecord(BadInput):
    """One record cannot be used. The message states why and holds nothing of the record's content."""


class WeightsNeeded(BadRecord):
    """A record cannot be preprocessed without what travels with the backbone's weights; nothing is wrong with it."""


class DigestMismatch(HeadwaterError):
    """Weights differ from the digest that was agreed on."""


class BudgetExhausted(HeadwaterError):
    """A reservation would exceed the registry's budget."""


class LedgerDamaged(HeadwaterError):
    """A ledger's chain does not verify, or is an older copy of itself."""


class RecordsUnusable(HeadwaterError):
    """Too few of a site's records can be used, or one that may not be left out cannot."""


class RunFailed(HeadwaterError):
    """A run ended without a usable result."""


class RunInterrupted(RunFailed):
    """A round did not reach its quorum in time; the run can be resumed after its last whole round."""


class Interrupted(HeadwaterError):
    """A person ended a run that can be resumed."""


class Unit(StrEnum):
    """The unit that one budget protects."""

    EXAMPLE = "example"
    PATIENT = "patient"


class DeclineReason(StrEnum):
    """The fixed list of reasons a site may give. Nothing more detailed leaves a site."""

    UNKNOWN_RUN = "unknown_run"
    VERSION = "version"
    NOT_APPROVED = "not_approved"
    TASK_NOT_ALLOWED = "task_not_allowed"
    BACKBONE_NOT_ALLOWED = "backbone_not_allowed"
    SOLVER_NOT_ALLOWED = "solver_not_allowed"
    UNIT_DIFFERS = "unit_differs"
    BUDGET = "budget"
    TRUST = "trust"
    AUDIT = "audit"
    EVALUATION_LOCAL = "evaluation_local"
    BAD_REQUEST = "bad_request"
    NOT_PREPARED = "not_prepared"
    OVERTAKEN = "overtaken"
    TOO_LARGE = "too_large"
    INTERNAL = "internal"

    @property
    def explanation(self) -> str:
        """A clause for people that says what the word means."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    DeclineReason.UNKNOWN_RUN: "it has not joined this run",
    DeclineReason.VERSION: "its reviewed code is not the coordinator's",
    DeclineReason.NOT_APPROVED: "its staff has not approved the run",
    DeclineReason.TASK_NOT_ALLOWED: "its site file allows none of the run's tasks",
    DeclineReason.BACKBONE_NOT_ALLOWED: "its site file does not allow a backbone",
    DeclineReason.SOLVER_NOT_ALLOWED: "its site file does not allow the solver or its plan",
    DeclineReason.UNIT_DIFFERS: "its budget protects another unit",
    DeclineReason.BUDGET: "its budget does not cover what was asked",
    DeclineReason.TRUST: "its site file has no secure sums, or other rules or keys for them",
    DeclineReason.AUDIT: "the audit that the run requires did not pass there",
    DeclineReason.EVALUATION_LOCAL: "it evaluates for itself only",
    DeclineReason.BAD_REQUEST: "it found the request invalid; its own log says why",
    DeclineReason.NOT_PREPARED: "it has not prepared the run's data",
    DeclineReason.OVERTAKEN: "it came too late for the round; nothing was charged",
    DeclineReason.TOO_LARGE: "its reply is larger than an upload may be; raise max_upload_mib of the federation",
    DeclineReason.INTERNAL: "it failed; its own log says why",
}

DECLINED = "declined: "
"""Begins the reason of a reply by which a site declined; one word of the list follows."""


def explain_rejection(reason: str) -> str:
    """Returns why a reply was rejected, worded for people: a word of the list is followed by its explanation."""
    word = reason.removeprefix(DECLINED)
    if word == reason or word not in set(DeclineReason):
        return reason
    return f"{reason} ({DeclineReason(word).explanation})"


@dataclass(frozen=True)
class LedgerWitness:
    """A record of how far a site's ledger was, made by the site, kept by a coordinator and shown to the site again.

    Attributes:
        chain: name of the ledger's chain: the keyed digest of its first line, 64 hex digits.
        length: number of lines of the chain.
        mac: keyed digest of the last of these lines, 64 hex digits.
        tag: keyed digest of all three, 64 hex digits, by which the site knows its own witnesses.
    """

    chain: str
    length: int
    mac: str
    tag: str


@dataclass(frozen=True)
class Plan:
    """The public numbers of one private computation: what a site does in one round.

    Sampling, clipping, noise and accounting are all read from here, so that they cannot drift apart.

    Attributes:
        sampling_rate: probability with which each unit takes part in a step, in (0, 1]; 1 is full batch.
        steps: noised releases in one round, at least 1.
        clip_norm: L2 bound on one unit's summed gradient over all heads, within the bounds above; None without privacy.
        noise_multiplier: standard deviation of the noise divided by clip_norm; 0 without privacy.
        unit: what one budget protects.
    """

    sampling_rate: float
    steps: int
    clip_norm: float | None
    noise_multiplier: float
    unit: Unit

    def __post_init__(self) -> None:
        SAMPLING_RATES.check("sampling_rate", self.sampling_rate)
        if self.steps < 1:
            raise BadInput(f"steps: expected at least 1, got {self.steps}")
        if self.noise_multiplier != 0.0:
            NOISE_MULTIPLIERS.check("noise_multiplier", self.noise_multiplier)
            CLIP_NORMS.check("clip_norm", math.nan if self.clip_norm is None else self.clip_norm)

    @property
    def private(self) -> bool:
        """True where noise is added."""
        return self.noise_multiplier > 0.0

    def over(self, rounds: int) -> Plan:
        """Returns the plan of so many rounds as one: the same releases, `rounds` times as many steps.

        Raises:
            BadInput: `rounds` is below 1.
        """
        if rounds < 1:
            raise BadInput(f"rounds: expected at least 1, got {rounds}")
        return replace(self, steps=self.steps * rounds)


@dataclass(frozen=True)
class Delta:
    """The update that a site releases after one round: per task, new head minus the head it was sent."""

    heads: Heads


@dataclass(frozen=True)
class BackboneBlob:
    """A frozen backbone as it travels: how to build it, its weights, and the digest both must match.

    Attributes:
        spec: JSON text of the backbone's settings without any path.
        weights: safetensors bytes of the state dict; at the coordinator they may be a mapped file.
        digest: 64 hex digits over architecture, preprocessing and weights.
    """

    spec: str
    weights: bytes | mmap
    digest: str


def heads_digest(heads: Heads) -> str:
    """SHA-256 over names, shapes and bytes of all parameters, independent of mapping order."""
    sha = hashlib.sha256()
    for task in sorted(heads):
        for name in sorted(heads[task]):
            array = np.asarray(heads[task][name], dtype="<f4", order="C")
            sha.update(f"{task}\0{name}\0{array.shape}\0".encode())
            sha.update(array.tobytes())
    return sha.hexdigest()
