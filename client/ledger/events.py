"""The events of a ledger: one frozen model for each kind of line, with the fields that stand on disk.

Invariant: the fields' names and order are the format on disk, which ledgers keep for ever. A field that older lines
lack has a default and is written only where it was given, so that an event which was read is written again as it was.
A line with other fields than these is of another version, and the ledger is not opened: what it means for the budget
is not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.privacy.accounting import Mechanism
from common.types import RELATION, BadInput, FilterKind, LedgerDamaged, Unit

Purpose = Literal["training", "evaluation"]
TRAINING: Purpose = "training"
EVALUATION: Purpose = "evaluation"


@dataclass(frozen=True)
class Terms:
    """The terms that a ledger keeps.

    Attributes:
        unit: what the budget protects.
        epsilon_cap: all that may ever be spent, at `delta`.
        delta: the delta that the site chose.
        relation: which data sets count as neighbours.
        filter: kind of the privacy filter; None: the first charge fixes it.
    """

    unit: Unit
    epsilon_cap: float
    delta: float
    relation: str = RELATION
    filter: FilterKind | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon_cap < math.inf:
            raise BadInput(f"budget.epsilon: expected a finite number > 0, got {self.epsilon_cap}")
        if not 0.0 < self.delta < 1.0:
            raise BadInput(f"budget.delta: expected a number in (0, 1), got {self.delta}")

    def list_fields(self) -> dict[str, Any]:
        """Returns the fields as ledgers keep them: a filter only where one was named."""
        return {name: value for name, value in asdict(self).items() if name != "filter" or value is not None}


class LedgerFacts(BaseModel):
    """Base of what stands in a ledger: immutable, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LedgerCreated(LedgerFacts):
    """A ledger begins."""

    event: Literal["created"] = "created"
    registry: str
    unit: Unit
    epsilon_cap: float
    delta: float
    relation: str
    filter: FilterKind | None = None


class TermsAmended(LedgerFacts):
    """The terms changed; nothing that was spent is reset."""

    event: Literal["amended"] = "amended"
    before: Terms
    unit: Unit
    epsilon_cap: float
    delta: float
    relation: str
    filter: FilterKind | None = None
    reason: str = ""


class LedgerRecovered(LedgerFacts):
    """A ledger begins in place of a damaged one.

    Attributes:
        seen: the damage, in one sentence.
        kept_aside: name of the folder with the damaged files; None where they were gone.
        replaced: names of the chains that this ledger stands for from now on: their witnesses are settled.
    """

    event: Literal["recovered"] = "recovered"
    registry: str
    unit: Unit
    epsilon_cap: float
    delta: float
    relation: str
    filter: FilterKind | None = None
    reason: str
    seen: str
    kept_aside: str | None
    replaced: tuple[str, ...] = ()


class OriginalLine(LedgerFacts):
    """Number and time that a line had in the damaged ledger from which a recovery kept it."""

    n: int
    time: float


class LossAssumed(LedgerFacts):
    """A recovery counts everything before this line as this much.

    Attributes:
        epsilon: at `delta`; None where a release without noise cannot be excluded: infinite.
    """

    event: Literal["assumed"] = "assumed"
    epsilon: float | None
    delta: float
    original: OriginalLine | None = None


class ChargeReserved(LedgerFacts):
    """A charge counts from here on; it is on disk before anything is computed from a record.

    Attributes:
        run: id of the run.
        round: number of its round.
        request: digest of the request that is answered.
        mechanism: the worst that may be released.
        purpose: what is released; lines older than evaluations lack it.
    """

    event: Literal["reserved"] = "reserved"
    run: str
    round: int
    request: str
    mechanism: Mechanism
    purpose: Purpose = TRAINING
    original: OriginalLine | None = None


class ChargeCommitted(LedgerFacts):
    """The reply of a charge is stored.

    Attributes:
        reserved: number of the line that reserved the charge.
    """

    event: Literal["committed"] = "committed"
    reserved: int
    original: OriginalLine | None = None


class ChargeRefused(LedgerFacts):
    """A charge was refused and nothing is spent; the fields are those of `ChargeReserved`."""

    event: Literal["refused"] = "refused"
    run: str
    round: int
    request: str
    mechanism: Mechanism
    purpose: Purpose = TRAINING


class RunEarmarked(LedgerFacts):
    """A site joined a run: what its training may still cost is held for it.

    Attributes:
        run: id of the run.
        mechanism: releases of all its rounds together.
        rounds: number of its rounds.
        before: the release before its first round; None where it has none, or it was paid for by an earlier run.
    """

    event: Literal["earmarked"] = "earmarked"
    run: str
    mechanism: Mechanism
    rounds: int
    before: Mechanism | None = None


class EarmarkReleased(LedgerFacts):
    """A run ended or was given up: nothing is held for it any more.

    Attributes:
        run: id of the run.
    """

    event: Literal["released"] = "released"
    run: str


class TornLineRemoved(LedgerFacts):
    """A crash had left part of a line, which was removed.

    Attributes:
        bytes: its size.
    """

    event: Literal["sealed"] = "sealed"
    bytes: int


LedgerEvent = (
    LedgerCreated
    | TermsAmended
    | LedgerRecovered
    | LossAssumed
    | ChargeReserved
    | ChargeCommitted
    | ChargeRefused
    | RunEarmarked
    | EarmarkReleased
    | TornLineRemoved
)


class SharedLedgerCreated(LedgerFacts):
    """A ledger of many sites begins.

    Attributes:
        num_sites: number of the sites.
        names: SHA-256 over their names, in their order.
    """

    event: Literal["shared"] = "shared"
    num_sites: int
    names: str
    unit: Unit
    epsilon_cap: float
    delta: float
    relation: str
    filter: FilterKind | None = None


class SitesEarmarked(LedgerFacts):
    """Some sites joined a run; the fields are those of `RunEarmarked`, and the sites as bits."""

    event: Literal["sites_earmarked"] = "sites_earmarked"
    run: str
    mechanism: Mechanism
    rounds: int
    sites: str
    before: Mechanism | None = None


class SitesReserved(LedgerFacts):
    """Some sites are charged; the fields are those of `ChargeReserved`, and the sites as bits."""

    event: Literal["sites_reserved"] = "sites_reserved"
    run: str
    round: int
    request: str
    mechanism: Mechanism
    sites: str
    purpose: Purpose = TRAINING


class SitesRefused(LedgerFacts):
    """Some sites' budgets do not cover a charge, and nothing of theirs is spent."""

    event: Literal["sites_refused"] = "sites_refused"
    run: str
    round: int
    request: str
    mechanism: Mechanism
    sites: str
    purpose: Purpose = TRAINING


class SitesReleased(LedgerFacts):
    """The run ended: nothing is held for it any more."""

    event: Literal["sites_released"] = "sites_released"
    run: str


SharedLedgerEvent = (
    SharedLedgerCreated
    | SitesEarmarked
    | SitesReserved
    | SitesRefused
    | SitesReleased
    | ChargeCommitted
    | TornLineRemoved
)
"""The lines of a ledger that many simulated sites share (`client.ledger.shared`); no other ledger has any of them."""


@dataclass(frozen=True)
class LedgerLine:
    """One line of a ledger.

    Attributes:
        number: its place, from 0.
        time: when it was written, in seconds since 1970.
        event: what it says.
    """

    number: int
    time: float
    event: LedgerEvent


def read_lines(bodies: Sequence[str]) -> list[LedgerLine]:
    """Returns the lines of a chain (`client.ledger.chain`) that verified.

    Raises:
        LedgerDamaged: a line is none of these events.
    """
    return [_read_line(body) for body in bodies]


def write_facts(event: LedgerFacts) -> dict[str, Any]:
    """Returns the fields of an event that stand on disk beside its name: all that were given, in their order."""
    return event.model_dump(mode="json", exclude={"event"}, exclude_unset=True)


def read_shared_line(body: str) -> SharedLedgerEvent:
    """Returns a line of a ledger that many sites share, of a chain that verified.

    Raises:
        LedgerDamaged: it is none of these events.
    """
    values = json.loads(body)
    number = values.pop("n")
    values.pop("time")
    try:
        return _shared_adapter().validate_json(json.dumps(values))
    except ValidationError as error:
        raise LedgerDamaged(f"line {number + 1} of the ledger is none of a ledger that many sites share") from error


@lru_cache(maxsize=2**15)
def _read_line(body: str) -> LedgerLine:
    # Remembered: every step of a round reads the whole ledger.
    values = json.loads(body)
    number, time = values.pop("n"), values.pop("time")
    try:
        # Through JSON: in pydantic's strict mode, which mechanisms have, only JSON gives a mapping for a dataclass.
        return LedgerLine(number, time, _adapter().validate_json(json.dumps(values)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LedgerDamaged(
            f"line {number + 1} of the ledger is of another version: {place}: {first['msg']}"
        ) from error


@cache
def _adapter() -> TypeAdapter[LedgerEvent]:
    return TypeAdapter(Annotated[LedgerEvent, Field(discriminator="event")])


@cache
def _shared_adapter() -> TypeAdapter[SharedLedgerEvent]:
    return TypeAdapter(Annotated[SharedLedgerEvent, Field(discriminator="event")])
