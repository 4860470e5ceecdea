"""The evidence that a coordinator's run gives for an output check: its journal's public numbers, and no record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import instead
from common.events import (
    AuditVerdict,
    HeadsEvaluated,
    MomentsMeasured,
    RunEvent,
    SiteJoined,
    SiteSummary,
    SolverAudited,
    Summary,
    read_run_journal,
    select_events,
)
from common.exports.parts.evidence import ChargedReleases, Evidence, LedgerStatement, open_leaving_model
from common.privacy.accounting import Mechanism
from common.serving.folder import find_model
from common.types import RELATION, BadInput
from server.reports.summary import select_rounds

NO_RECORDS = "No attack was made: a coordinator has no record to attack with. Each site can make its own."
SUMMARY = "From the coordinator's summary, which counts what it accepted; the site's own ledger decides."


def read_run(path: Path) -> tuple[Path, Summary, list[RunEvent]]:
    """Returns the folder of a run that ended, its summary and its journal.

    Args:
        path: folder of the run, or of its model.

    Raises:
        BadInput: the folder is no run's, or the run failed, was interrupted or has not ended.
    """
    folder = find_model(path).parent
    if not (folder / "summary.json").is_file() or not (folder / "journal.jsonl").is_file():
        raise BadInput(
            f"{path}: expected the folder of a finished run, whose summary says what was charged, found a model "
            "without it; at a site name its file with --site"
        )
    try:
        summary = Summary.model_validate_json((folder / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        detail = "" if isinstance(error, ValidationError) else instead(error)
        raise BadInput(f"{folder / 'summary.json'}: expected a run's summary{detail}") from error
    if summary.status not in ("completed", "partial"):
        raise BadInput(f"{folder}: expected a run that ended, got one that is {summary.status}")
    return folder, summary, read_run_journal(folder / "journal.jsonl")


def collect_run_evidence(path: Path) -> Evidence:
    """Returns what a coordinator knows of a run's model.

    Args:
        path: folder of the run, or of its model.

    Raises:
        BadInput: there is no finished run with a model there.
        DigestMismatch: a head was changed since the model was written.
    """
    folder, summary, events = read_run(path)
    model, config = open_leaving_model(path)
    if config.privacy is None:
        statements = []
    else:
        statements = [_state_site(events, name, site) for name, site in summary.sites.items() if site.delta is not None]
    settings = folder / "config.yaml"
    return Evidence(
        model=model,
        config=config,
        party=f"the coordinator of run {config.run}",
        statements=tuple(statements),
        sent=tell_sent(summary),
        verdicts=find_verdict(events),
        audit_note=tell_audit(summary),
        digests={},
        settings={"config.yaml": settings.read_bytes()} if settings.is_file() else {},
        attacks=None,
        attack_note=NO_RECORDS,
    )


def tell_sent(summary: Summary) -> tuple[str, ...]:
    """Returns sentences about what left the sites in a run."""
    return (
        f"- The sites' updates of {summary.rounds} round(s) reached the coordinator, and the final heads were sent to "
        "the sites.",
    )


def find_verdict(events: Sequence[RunEvent]) -> dict[str, AuditVerdict]:
    """Returns the result of a simulator's own audit; empty where it made none."""
    own = select_events(events, SolverAudited)
    return {"the simulator": own[-1].verdict} if own else {}


def tell_audit(summary: Summary) -> str:
    """Returns a sentence about the audit of a run whose result is not in its journal."""
    if summary.audit.required:
        return "Each site had to audit its solver before it joined, and declined otherwise; the results are theirs."
    return "No audit was required, and none is in the run's journal."


def _state_site(events: Sequence[RunEvent], name: str, site: SiteSummary) -> LedgerStatement:
    assert site.delta is not None and site.unit is not None
    joined = [event for event in select_events(events, SiteJoined) if event.site == name]
    return LedgerStatement(
        site=name,
        source=SUMMARY,
        unit=site.unit,
        delta=site.delta,
        relation=site.relation or RELATION,
        releases=_list_releases(events, name),
        epsilon=math.inf if site.epsilon is None else site.epsilon,
        budget=joined[-1].budget_epsilon if joined else None,
    )


def _list_releases(events: Sequence[RunEvent], name: str) -> tuple[ChargedReleases, ...]:
    """Returns what was accepted of a site, equal releases together."""
    groups: dict[tuple[str, Any], list[int]] = {}

    def add(purpose: str, round_: int, mechanism: Mechanism) -> None:
        groups.setdefault((purpose, mechanism), []).append(round_)

    for measured in select_events(events, MomentsMeasured)[-1:]:
        if measured.noise_multipliers.get(name, 0.0) > 0.0:
            add("sums", 0, Mechanism("gaussian", measured.noise_multipliers[name], 1.0, 1, 1.0))
    for number, ended in sorted(select_rounds(events).items()):
        if name in ended.sites:
            add("training", number, Mechanism.of(ended.sites[name].plan))
    evaluations = {event.round: event for event in select_events(events, HeadsEvaluated)}
    for number, evaluated in sorted(evaluations.items()):
        if evaluated.noise_multipliers.get(name, 0.0) > 0.0:
            add("evaluation", number, Mechanism("gaussian", evaluated.noise_multipliers[name], 1.0, 1, 1.0))
    return tuple(ChargedReleases(purpose, tuple(rounds), each) for (purpose, each), rounds in groups.items())
