"""The page a security officer reads: everything a site released or refused, from its ledger and its journal.

A release is a ledger's charge; its bytes are those of the stored reply, whatever the journal says. A charge without a
stored reply is shown too: a crash may have happened anywhere after it. So is a reply that only the journal knows: a
recovery keeps no charge that did not verify.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.config import SiteConfig
from client.ledger.events import (
    ChargeRefused,
    ChargeReserved,
    EarmarkReleased,
    LedgerCreated,
    LedgerEvent,
    LedgerLine,
    LedgerRecovered,
    LossAssumed,
    Purpose,
    RunEarmarked,
    TermsAmended,
    TornLineRemoved,
)
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from common.events import (
    EncodingContinues,
    RecordsPurged,
    ReplyResent,
    ReplySent,
    RequestDeclined,
    RunAudited,
    RunPrepared,
    SiteEvent,
    read_site_journal,
    select_events,
)
from common.privacy.accounting import Mechanism


@dataclass(frozen=True)
class LoggedRelease:
    """One charge and what left for it.

    Attributes:
        time: seconds since 1970 when it was reserved.
        run: for which run.
        round: of that run.
        purpose: training, or evaluation of held-out units.
        mechanism: what was charged; None where only the journal knows of the release.
        bytes: of the stored reply; None where none is stored.
        resent: how often the identical bytes were sent again, for nothing.
    """

    time: float
    run: str
    round: int
    purpose: Purpose
    mechanism: Mechanism | None
    bytes: int | None
    resent: int


@dataclass(frozen=True)
class Refused:
    """A request or charge that was refused; `detail` never leaves the site."""

    time: float
    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Change:
    """Something done to the ledger or by the site's staff."""

    time: float
    event: str
    detail: str


@dataclass(frozen=True)
class LoggedEncoding:
    """The encoding of a source as it was when it was last heard of.

    Attributes:
        time: seconds since 1970 when that was.
        run: the run that is prepared.
        num_done: records that were encoded.
        num_records: records of the source.
        rate: records a second.
    """

    time: float
    run: str
    num_done: int
    num_records: int
    rate: float


@dataclass(frozen=True)
class Statement:
    """All three, each in order of time, and the encoding under way, None where there is none."""

    releases: tuple[LoggedRelease, ...]
    refusals: tuple[Refused, ...]
    changes: tuple[Change, ...]
    encoding: LoggedEncoding | None = None


def statement(config: SiteConfig) -> Statement:
    """Returns the releases, refusals and changes of a site.

    Raises:
        LedgerDamaged: the registry's ledger does not verify.
    """
    ledger = Ledger.find(locate_ledgers(config), config.registry)
    lines = [] if ledger is None else ledger.lines()
    events = _read_journals(config)
    resent = Counter((event.run_id, event.round, event.purpose) for event in select_events(events, ReplyResent))
    releases = [_release(config, line, line.event, resent) for line in lines if isinstance(line.event, ChargeReserved)]
    known = {(each.run, each.round, each.purpose) for each in releases}
    for event in select_events(events, ReplySent):
        key = (event.run_id, event.round, event.purpose)
        if key not in known:
            releases.append(LoggedRelease(event.time, *key, None, event.size_bytes, resent[key]))
    refusals = [
        *(
            Refused(event.time, "request", event.reason, event.detail)
            for event in select_events(events, RequestDeclined)
        ),
        *(
            Refused(line.time, "ledger", "budget", f"{line.event.run} round {line.event.round} {line.event.purpose}")
            for line in lines
            if isinstance(line.event, ChargeRefused)
        ),
    ]
    changes = [
        *(Change(line.time, line.event.event, detail) for line in lines if (detail := _change(line.event)) is not None),
        *(Change(event.time, "audited", _audited(event)) for event in select_events(events, RunAudited)),
        *(
            Change(event.time, "purged", f"{event.num_excluded} new exclusion(s)")
            for event in select_events(events, RecordsPurged)
        ),
    ]
    return Statement(
        tuple(sorted(releases, key=lambda each: each.time)),
        tuple(sorted(refusals, key=lambda each: each.time)),
        tuple(sorted(changes, key=lambda each: each.time)),
        _find_encoding(events),
    )


def _find_encoding(events: Sequence[SiteEvent]) -> LoggedEncoding | None:
    """Returns the last encoding whose run was neither prepared nor declined since; None where there is none."""
    last: LoggedEncoding | None = None
    for event in sorted(events, key=lambda each: each.time):
        match event:
            case EncodingContinues():
                last = LoggedEncoding(event.time, event.run_id, event.num_done, event.num_records, event.rate)
            case RunPrepared() if last is not None and event.run_id == last.run:
                last = None
            case RequestDeclined():
                last = None
            case _:
                pass
    return last


def _read_journals(config: SiteConfig) -> list[SiteEvent]:
    """Returns the events of all coordinators, with runs named as the ledger names them."""
    events: list[SiteEvent] = []
    for prefix, place in config.list_coordinator_dirs().items():
        for event in read_site_journal(place / "site.jsonl"):
            named = {"run_id": prefix + event.run_id} if prefix and hasattr(event, "run_id") else {}
            events.append(event.model_copy(update=named))
    return events


def as_json(page: Statement) -> dict[str, Any]:
    """The page as plain values."""
    return asdict(page)


def in_words(mechanism: Mechanism | None) -> str:
    """A mechanism as a person reads it."""
    if mechanism is None:
        return "lost with a damaged ledger"
    if mechanism.kind == "none":
        return f"{mechanism.steps} without noise: epsilon is infinite"
    if mechanism.kind == "exponential":
        return (
            f"{mechanism.steps} exponential, a choice among candidates at pure epsilon "
            f"{mechanism.choice_epsilon:.4g}, sensitivity {mechanism.sensitivity:g}"
        )
    return (
        f"{mechanism.steps} Gaussian, noise {mechanism.noise_multiplier:.4g}, rate {mechanism.sampling_rate:g}, "
        f"sensitivity {mechanism.sensitivity:g}"
    )


def _release(
    config: SiteConfig, line: LedgerLine, charge: ChargeReserved, resent: Mapping[tuple[str, int, Purpose], int]
) -> LoggedRelease:
    stored = config.locate_run(charge.run) / "replies" / charge.request
    size = stored.stat().st_size if charge.request and stored.is_file() else None
    key = (charge.run, charge.round, charge.purpose)
    time = line.time if charge.original is None else charge.original.time
    return LoggedRelease(time, *key, charge.mechanism, size, resent.get(key, 0))


def _audited(event: RunAudited) -> str:
    """A verdict on the solver that a run required; from the disk where it was known."""
    verdict = event.verdict
    outcome = "passed" if verdict.passed else f"FAILED: {verdict.reasons[0]}"
    return (
        f"run {event.run_id}: {outcome}; epsilon at least {verdict.epsilon_lower_99_9:.2f} at 99.9 %, "
        f"{verdict.epsilon_claimed:.2f} claimed"
    )


def _change(event: LedgerEvent) -> str | None:
    """Returns what changed, as a person reads it; None where the event is a charge."""
    match event:
        case TermsAmended(before=before):
            changed = [
                f"{name} {old} -> {new}"
                for name, old, new in (
                    ("unit", before.unit, event.unit),
                    ("epsilon_cap", before.epsilon_cap, event.epsilon_cap),
                    ("delta", before.delta, event.delta),
                    ("filter", before.filter, event.filter),
                )
                if old != new
            ]
            return f"{', '.join(changed)}; reason: {event.reason or 'none given'}"
        case LedgerRecovered():
            return f"{event.seen}; reason: {event.reason}; damaged files: {event.kept_aside}"
        case LossAssumed():
            known = "infinite" if event.epsilon is None else event.epsilon
            return f"everything before counts as epsilon {known} at delta {event.delta}"
        case TornLineRemoved():
            return f"a line torn by a crash was removed ({event.bytes} bytes)"
        case RunEarmarked():
            return f"{event.run}: held {in_words(event.mechanism)}"
        case EarmarkReleased():
            return f"{event.run}: nothing is held any more"
        case LedgerCreated():
            return f"unit {event.unit}, budget {event.epsilon_cap} at delta {event.delta}"
        case _:
            return None
