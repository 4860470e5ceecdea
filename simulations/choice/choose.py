"""The choice of a backbone before a run: each simulated site votes under its budget, or public records stand in.

A site encodes its training records with every candidate, charges its ledger, computes the scorer's costs and releases
which candidate costs least (`client.choice.vote`). The candidate with most votes is chosen. Which sites may vote
follows from declared sizes alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch

from client.choice.vote import cast_vote
from client.config import SiteConfig
from client.data.prepare import Encoding, open_units, prepare_candidates
from client.data.units import Units
from client.protocol.site import Site
from common.files import private_folder, without_flushing, write_atomic
from common.privacy.accounting import Mechanism
from common.privacy.exponential import compute_choice_mu
from common.privacy.noise import Entropy, open_stream
from common.run import Name
from common.scorers import Scorer, compute_min_size, open_scorer
from common.tasks import LabelPrior, Task
from common.types import EPSILONS, BadInput, HeadwaterError
from common.yaml import load, write_yaml
from server.choice.outcome import RESULT, BackboneChoice, MomentScore, Price, ProxyScore, make_choice
from server.rounds.messenger import Observe
from simulations.check import check_simulation
from simulations.choice.candidates import Candidate, open_candidates
from simulations.choice.moments import MomentQuestion, plan_question, score_candidates
from simulations.choice.prices import check_sums, select_voters
from simulations.choice.proxy import ProxyFile, score_on_public_records
from simulations.config import SimulationConfig
from simulations.experiment import choose_entropy, create_folder, make_paths_absolute
from simulations.federate import ignore_progress
from simulations.partition import build_sites

VOTE = "vote.json"
"""File of a site's state folder with its vote."""


@dataclass(frozen=True)
class SiteAnswers:
    """The answers of sites to a question, and their price.

    Attributes:
        votes: site -> the candidate that it voted for.
        moments: candidate -> its score by sums over all sites.
        min_size: declared size from which on a site votes; None without a vote.
        price: price at each site; None where none was asked.
    """

    votes: Mapping[str, Name] = field(default_factory=dict)
    moments: Mapping[Name, MomentScore] = field(default_factory=dict)
    min_size: int | None = None
    price: Price | None = None


class SiteQuestion(Protocol):
    """A question to sites about the candidates."""

    def select(self, sites: Sequence[SiteConfig]) -> Sequence[SiteConfig]:
        """Returns the sites that are to be asked, by public numbers. Raises BadInput or BudgetExhausted."""

    def ask(self, sites: Sequence[Site], run: str, observe: Observe) -> SiteAnswers:
        """Returns the sites' answers, for which their ledgers were charged.

        Args:
            sites: the sites that were selected.
            run: id under which each ledger is charged.
            observe: receives the progress.
        """


def choose_backbone(
    config: SimulationConfig,
    backbones: Path,
    *,
    task: Name | None = None,
    epsilon: float | None = None,
    by: Literal["vote", "moments"] = "vote",
    proxy: Path | None = None,
    out: Path | None = None,
    entropy: Entropy | None = None,
    observe: Observe = ignore_progress,
) -> tuple[BackboneChoice, Path]:
    """Compares candidates for the backbone of a task, and returns which is chosen, and the file that holds the result.

    Sizes and budgets are checked before anything is encoded. A choice that is refused leaves no folder.

    Args:
        config: the simulation, for its sites, its tasks and their budgets; its own backbone is not used.
        backbones: file of candidates.
        task: name of the task; None where the run has only one.
        epsilon: pure epsilon of each site's vote, or epsilon of the sums at the run's delta; None asks no site.
        by: what sites are asked for: votes, or sums over all of them (`simulations.choice.moments`).
        proxy: file of a public data set; None for no public score.
        out: folder of the result and of the vote's sites, with their ledgers, new or empty; by default a new one under
            `runs_dir`.
        entropy: source of the keys of noise, for tests; by default the operating system, or `noise_seed`.
        observe: receives the progress: phase, number of steps done, number of all steps.

    Raises:
        BadInput: a setting or a file is wrong, a candidate cannot read the records, or no site is large enough.
        BudgetExhausted: a site's budget does not cover its vote.
    """
    if epsilon is None and proxy is None:
        raise BadInput(
            "choose: expected --epsilon, the price of each site's vote, or --proxy, public records; got none"
        )
    opened_tasks = check_simulation(config)
    name = _choose_task(opened_tasks, task)
    file, candidates = open_candidates(backbones)
    question: SiteQuestion | None = None
    if epsilon is not None:
        EPSILONS.check("--epsilon", epsilon)
        scorer, opened = open_scorer(file.scorer, f"{backbones}: scorer"), opened_tasks[name]
        if not isinstance(opened, LabelPrior):
            raise BadInput(
                f"tasks.{name}: expected a task with classes to vote on, got kind {opened.kind!r}; use --proxy"
            )
        compared = list(candidates.values())
        if by == "vote":
            question = Ballot(opened, name, compared, scorer, epsilon)
        else:
            question = Sums(plan_question(config.run, opened, name, compared, epsilon))
    folder = create_folder(config, out)
    sites: Sequence[SiteConfig] = []
    asked: Sequence[SiteConfig] = []
    answers = SiteAnswers()
    try:
        write_yaml(folder / "config.yaml", make_paths_absolute(config))
        with without_flushing():  # A power cut may cost a simulation its choice: its ledgers protect nobody.
            if question is not None:
                built = config.list_training_sites(build_sites(config, folder / "sites"))
                sites = [site for site in built if name in site.tasks]
                asked = question.select(sites)
            scores = {} if proxy is None else _score_all(proxy, candidates, observe)
            facts = {each.name: each.measure_facts() for each in candidates.values()}
            if question is not None:
                keys = entropy or choose_entropy(config)
                answers = question.ask([Site(site, keys) for site in asked], folder.name, observe)
        abstained = [site.name for site in sites if site not in asked]
        choice = make_choice(name, facts, scores=scores, abstained=abstained, **vars(answers))
    except HeadwaterError:
        shutil.rmtree(folder)
        raise
    write_atomic(folder / RESULT, json.dumps(asdict(choice), indent=2).encode())
    return choice, folder / RESULT


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ballot:
    """The question for which candidate a site votes.

    Attributes:
        task: the task that the candidates are compared on.
        name: its name.
        candidates: the candidates, in the order of their file.
        scorer: the kind of cost.
        epsilon: pure epsilon of a vote.
    """

    task: LabelPrior
    name: Name
    candidates: Sequence[Candidate]
    scorer: Scorer
    epsilon: float

    def select(self, sites: Sequence[SiteConfig]) -> Sequence[SiteConfig]:
        """Returns the sites that declare enough units to vote. Raises BadInput or BudgetExhausted."""
        return select_voters(sites, self.name, self.scorer, self.epsilon)

    def ask(self, sites: Sequence[Site], run: str, observe: Observe) -> SiteAnswers:
        """Returns the sites' votes.

        Args:
            sites: the sites that were selected.
            run: id under which each ledger is charged.
            observe: receives the progress.
        """
        votes = {}
        for position, site in enumerate(sites):
            observe("votes", position, len(sites))
            votes[site.config.name] = self._vote(site, run, observe)
        observe("votes", len(sites), len(sites))
        mechanism = Mechanism.of_choice(self.epsilon, self.scorer.sensitivity)
        price = Price(
            mechanism.kind, self.epsilon, self.scorer.sensitivity, compute_choice_mu(self.epsilon), _list_shares(sites)
        )
        return SiteAnswers(votes=votes, min_size=compute_min_size(self.scorer, self.epsilon), price=price)

    def _vote(self, site: Site, run: str, observe: Observe) -> Name:
        """Returns the candidate that a site votes for; the vote is stored in the site's folder."""
        config = site.config
        units = _encode(site, self.name, self.task, self.candidates, observe)
        ledger = site.ledger()
        vote, reservation = cast_vote(
            ledger,
            self.scorer,
            self.task,
            units,
            epsilon=self.epsilon,
            public_size=config.tasks[self.name].public_size,
            run=config.name_charge(run),
            stream=open_stream(site.entropy, run, config.name, "vote"),
            evaluation_budget=site.share,
        )
        write_atomic(config.state_dir / VOTE, json.dumps({"task": self.name, "vote": vote}).encode())
        ledger.commit(reservation)
        return vote


@dataclass(frozen=True)
class Sums:
    """The question for sums over all sites.

    Attributes:
        question: its public numbers.
    """

    question: MomentQuestion

    def select(self, sites: Sequence[SiteConfig]) -> Sequence[SiteConfig]:
        """Returns all sites. Raises BadInput where noise would decide, or BudgetExhausted."""
        check_sums(sites, self.question)
        return sites

    def ask(self, sites: Sequence[Site], run: str, observe: Observe) -> SiteAnswers:
        """Returns the scores by the sums.

        Args:
            sites: the sites that were selected.
            run: id under which each ledger is charged.
            observe: receives the progress.
        """
        question = self.question
        encoded = [(site, _encode(site, question.name, question.task, question.candidates, observe)) for site in sites]
        moments = score_candidates(question, encoded, run)
        price = Price("gaussian", question.epsilon, 1.0, question.mu, _list_shares(sites))
        return SiteAnswers(moments=moments, price=price)


def _encode(site: Site, task_name: Name, task: LabelPrior, candidates: Sequence[Candidate], observe: Observe) -> Units:
    """Returns a site's training units with every candidate's features. Raises BadInput where one reads none."""
    folder = private_folder(site.config.state_dir / "candidates") / "data"
    backbones = {each.name: each.backbone for each in candidates}
    named = {each.backbone.digest: partial(observe, f"encoding with {each.name}") for each in candidates}
    encoding = Encoding(site.features(), site.device(), named=named)
    prepare_candidates(site.config, task_name, task, backbones, encoding, folder)  # type: ignore[arg-type]
    units = open_units(folder, "train", list(backbones), torch.device("cpu"))
    for name, records in units.tasks.items():
        if not len(records.features_RD):
            alone = {name: backbones[name]}
            done = prepare_candidates(site.config, task_name, task, alone, encoding, folder)  # type: ignore[arg-type]
            because = f" ({done.problems[0].reason})" if done.problems else ""
            raise BadInput(
                f"candidates.{name}: expected a backbone that reads the records of task {task_name}, got one that "
                f"can use none of site {site.config.name}'s{because}"
            )
    return units


def _choose_task(tasks: Mapping[str, Task], name: Name | None) -> Name:
    if name is None and len(tasks) == 1:
        return next(iter(tasks))
    if name is None or name not in tasks:
        raise BadInput(f"--task: expected one of {', '.join(tasks)}, got {name or 'nothing'}")
    return name


def _score_all(path: Path, candidates: Mapping[Name, Candidate], observe: Observe) -> dict[Name, ProxyScore]:
    file = load(ProxyFile, path)
    return {name: score_on_public_records(file, path, each, observe) for name, each in candidates.items()}


def _list_shares(sites: Sequence[Site]) -> dict[str, float]:
    """Returns the part of each site's budget that its filter counts as used."""
    return {site.config.name: site.ledger().history().compute_share() for site in sites}
