"""The outcome of a choice: the votes, what is known of each candidate, and the price; what `choice.json` holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from common.errors import instead
from common.events import SiteJoined, VotesCounted, read_run_journal, select_events
from common.files import write_atomic
from common.offers import SentBackbone
from common.privacy.accounting import Mechanism
from common.privacy.exponential import compute_choice_mu
from common.privacy.filters import choose_filter
from common.run import Name, RunConfig
from common.types import BadInput

RESULT = "choice.json"
"""File of a choice's folder with everything that is shown."""


@dataclass(frozen=True)
class Price:
    """The price of one site's vote, or of its part of sums over all sites, in its ledger.

    Attributes:
        mechanism: kind of the release.
        epsilon: pure epsilon (delta 0) of the vote alone; of sums, epsilon at the run's delta.
        sensitivity: what one unit changes of the candidates' costs at most, or of the sums.
        mu: the vote counts in a ledger of full-batch releases as this Gaussian does; of sums, their own.
        budget_used: part of each asked site's budget that the filter counts, by site.
    """

    mechanism: str
    epsilon: float
    sensitivity: float
    mu: float
    budget_used: Mapping[str, float]


@dataclass(frozen=True)
class ProxyScore:
    """A candidate's score on public records.

    Attributes:
        accuracy: part of the records that a classifier fitted on the other folds labels right.
        error: its standard error, by the number of records.
    """

    accuracy: float
    error: float


@dataclass(frozen=True)
class MomentScore:
    """A candidate's score by sums over all sites.

    Attributes:
        accuracy: part of one half of the units that are nearest to the mean of their class over the other half, noised.
        error: its standard error, by the noise and the declared number of units.
    """

    accuracy: float
    error: float


@dataclass(frozen=True)
class CandidateFacts:
    """The public facts of a candidate.

    Attributes:
        dimension: number of its features.
        seconds: seconds a record in the network on this machine; None where it was not timed.
        megabytes: size of what travels to a site.
        licence: declared licence of its weights; None where none is declared.
    """

    dimension: int
    seconds: float | None
    megabytes: float
    licence: str | None


@dataclass(frozen=True)
class CandidateRow:
    """One line of the table.

    Attributes:
        name: name of the candidate.
        votes: number of sites that voted for it; None without a vote.
        proxy: its score on public records; None without a proxy.
        dimension: number of its features.
        seconds: seconds a record in the network on this machine; None where it was not timed.
        megabytes: size of what travels to a site.
        licence: declared licence of its weights; None where none is declared.
        moments: its score by sums over all sites; None without them.
    """

    name: str
    votes: int | None
    proxy: ProxyScore | None
    dimension: int
    seconds: float | None
    megabytes: float
    licence: str | None
    moments: MomentScore | None = None


@dataclass(frozen=True)
class BackboneChoice:
    """The outcome of `choose`.

    Attributes:
        task: name of the task.
        chosen: name of the candidate with most votes; without a vote, of the one with the highest score by sums over
            all sites, or the highest public one.
        by: `vote`, `moments` or `public proxy`.
        rows: the candidates, in the order of their file.
        site_votes: site -> the candidate that it voted for; empty without a vote.
        abstained: sites whose declared size is too small to vote.
        min_size: declared size from which on a site votes; None without a vote.
        price: price of each vote; None without one.
    """

    task: str
    chosen: str
    by: str
    rows: Sequence[CandidateRow]
    site_votes: Mapping[str, str]
    abstained: Sequence[str]
    min_size: int | None
    price: Price | None


def write_choice(folder: Path, run: RunConfig, backbones: Mapping[str, SentBackbone]) -> None:
    """Writes `choice.json` to the folder of a deployed choice, from its journal.

    Args:
        folder: the choice's folder.
        run: its settings.
        backbones: the candidates by name.
    """
    events = read_run_journal(folder / "journal.jsonl")
    counted, joined = select_events(events, VotesCounted)[-1], select_events(events, SiteJoined)
    vote = Mechanism.of_choice(counted.epsilon, counted.sensitivity)
    # Of what each site declares: its ledger, which alone knows what is left, stays there.
    used = {
        each.site: choose_filter(vote, None, each.budget_epsilon, each.delta).compute_share([vote])
        for each in joined
        if each.site in counted.votes
    }
    facts = {
        name: CandidateFacts(
            backbones[name].feature_dim, None, len(backbones[name].blob().weights) / 1e6, run.licences.get(name)
        )
        for name in run.backbone_specs
    }
    choice = make_choice(
        counted.task,
        facts,
        votes=counted.votes,
        abstained=counted.abstained,
        min_size=counted.min_size,
        price=Price(vote.kind, counted.epsilon, counted.sensitivity, compute_choice_mu(counted.epsilon), used),
    )
    write_atomic(folder / RESULT, json.dumps(asdict(choice), indent=2).encode())


def read_choice(folder: Path) -> BackboneChoice:
    """Returns the outcome that was written to a folder. Raises BadInput where the file is damaged."""
    try:
        return TypeAdapter(BackboneChoice).validate_json((folder / RESULT).read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / RESULT}: expected the result of a choice{instead(error)}") from error


def count_votes(votes: Iterable[Name], candidates: Sequence[Name]) -> Name:
    """Returns the candidate with most votes; of several, the first in the order of their file, which is public."""
    counts = Counter(votes)
    return max(candidates, key=lambda name: counts[name])


def make_choice(
    task: Name,
    candidates: Mapping[Name, CandidateFacts],
    *,
    scores: Mapping[Name, ProxyScore] | None = None,
    votes: Mapping[str, Name] | None = None,
    moments: Mapping[Name, MomentScore] | None = None,
    abstained: Sequence[str] = (),
    min_size: int | None = None,
    price: Price | None = None,
) -> BackboneChoice:
    """Returns the outcome: the candidate with most votes, or without votes the one with the highest score.

    Args:
        task: name of the task.
        candidates: name -> facts of each candidate, in the order of their file.
        scores: name -> public score; None without a proxy.
        votes: site -> name of the candidate that it voted for; None without a vote.
        moments: name -> score by sums over all sites; None without them. It goes before the public one.
        abstained: sites whose declared size is too small to vote.
        min_size: declared size from which on a site votes.
        price: price of each vote, or of each site's sums.
    """
    scores, votes, moments = scores or {}, votes or {}, moments or {}
    counts = Counter(votes.values())
    if votes:
        chosen = count_votes(votes.values(), list(candidates))
    else:
        chosen = max(candidates, key=lambda name: (moments or scores)[name].accuracy)
    rows = [
        CandidateRow(
            name,
            counts[name] if votes else None,
            scores.get(name),
            each.dimension,
            each.seconds,
            each.megabytes,
            each.licence,
            moments.get(name),
        )
        for name, each in candidates.items()
    ]
    by = "vote" if votes else "moments" if moments else "public proxy"
    return BackboneChoice(task, chosen, by, rows, votes, abstained, min_size, price)
