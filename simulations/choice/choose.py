"""The choice of a backbone before a run: each simulated site votes under its budget, or public records stand in.

A site encodes its training records with every candidate, charges its ledger, computes the scorer's costs and releases
which candidate costs least (`client.choice.vote`). The candidate with most votes is chosen. Which sites may vote
follows from declared sizes alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from client.choice.vote import cast_vote
from client.config import SiteConfig
from client.data.prepare import Encoding, open_units, prepare_candidates
from client.data.units import Units
from client.protocol.site import Site
from common.files import private_folder, without_flushing, write_atomic
from common.privacy.accounting import Mechanism
from common.privacy.exponential import compute_choice_mu
from common.privacy.noise import Entropy, open_stream, os_entropy
from common.run import Name
from common.scorers import Scorer, compute_min_size, open_scorer
from common.tasks import LabelPrior, Task
from common.types import EPSILONS, BadInput
from common.yaml import load, write_yaml
from server.choice.outcome import RESULT, BackboneChoice, CandidateFacts, Price, ProxyScore, make_choice
from server.rounds.messenger import Observe
from simulations.check import check_simulation
from simulations.choice.candidates import Candidate, open_candidates
from simulations.choice.moments import MIN_SIGNAL, MomentQuestion, compute_signal, plan_question, score_candidates
from simulations.choice.proxy import ProxyFile, score_on_public_records
from simulations.config import SimulationConfig
from simulations.experiment import choose_entropy, create_folder, make_paths_absolute
from simulations.federate import ignore_progress
from simulations.partition import build_sites

VOTE = "vote.json"
"""File of a site's state folder with its vote."""


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
) -> BackboneChoice:
    """Compares candidates for the backbone of a task, and returns which is chosen.

    Args:
        config: the simulation, for its sites, its tasks and their budgets; its own backbone is not used.
        backbones: file of candidates.
        task: name of the task; None where the run has only one.
        epsilon: pure epsilon of each site's vote, or epsilon of the sums at the run's delta; None asks no site.
        by: what sites are asked for: votes, or sums over all of them (`simulations.choice.moments`).
        proxy: file of a public data set; None for no public score.
        out: folder of the vote's sites, with their ledgers, new or empty; by default a new one under `runs_dir`.
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
    facts = {each.name: each.facts for each in candidates.values()}
    scores = {} if proxy is None else _score_all(proxy, candidates, observe)
    if epsilon is None:
        return make_choice(name, facts, scores=scores)
    EPSILONS.check("--epsilon", epsilon)
    scorer = open_scorer(file.scorer, f"{backbones}: scorer")
    opened = opened_tasks[name]
    if not isinstance(opened, LabelPrior):
        raise BadInput(f"tasks.{name}: expected a task with classes to vote on, got kind {opened.kind!r}; use --proxy")
    question = None if by == "vote" else plan_question(config.run, opened, name, list(candidates.values()), epsilon)
    folder = create_folder(config, out)
    write_yaml(folder / "config.yaml", make_paths_absolute(config))
    with without_flushing():  # A power cut may cost a simulation its choice: its ledgers protect nobody.
        built = config.list_training_sites(build_sites(config, folder / "sites"))
        sites = [site for site in built if name in site.tasks]
        keys = entropy or choose_entropy(config)
        if question is not None:
            choice = _sum_over_sites(question, [Site(site, keys) for site in sites], folder, facts, scores, observe)
            write_atomic(folder / RESULT, json.dumps(asdict(choice), indent=2).encode())
            return choice
        least = compute_min_size(scorer, epsilon)
        voting = [site for site in sites if site.tasks[name].public_size >= least]
        if not voting:
            shutil.rmtree(folder)
            raise BadInput(_explain_too_few(epsilon, least, max(site.tasks[name].public_size for site in sites)))
        ballot = Ballot(opened, name, list(candidates.values()), scorer, epsilon, folder.name)
        votes = {}
        for position, site in enumerate(voting):
            observe("votes", position, len(voting))
            votes[site.name] = _vote(Site(site, keys), ballot, observe)
        observe("votes", len(voting), len(voting))
        price = _make_price(Mechanism.of_choice(epsilon, scorer.sensitivity), voting)
    abstained = [site.name for site in sites if site.name not in votes]
    choice = make_choice(name, facts, scores=scores, votes=votes, abstained=abstained, min_size=least, price=price)
    write_atomic(folder / RESULT, json.dumps(asdict(choice), indent=2).encode())
    return choice


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ballot:
    """The question that every voting site answers.

    Attributes:
        task: the task that the candidates are compared on.
        name: its name.
        candidates: the candidates, in the order of their file.
        scorer: the kind of cost.
        epsilon: pure epsilon of a vote.
        run: id under which votes are charged.
    """

    task: LabelPrior
    name: Name
    candidates: Sequence[Candidate]
    scorer: Scorer
    epsilon: float
    run: str


def _vote(site: Site, ballot: Ballot, observe: Observe) -> Name:
    """Returns the candidate that a site votes for; the vote is stored in the site's folder."""
    config = site.config
    units = _encode(site, ballot.name, ballot.task, ballot.candidates, observe)
    ledger = site.ledger()
    vote, reservation = cast_vote(
        ledger,
        ballot.scorer,
        ballot.task,
        units,
        epsilon=ballot.epsilon,
        public_size=config.tasks[ballot.name].public_size,
        run=config.name_charge(ballot.run),
        stream=open_stream(site.entropy, ballot.run, config.name, "vote"),
        evaluation_budget=site.share,
    )
    write_atomic(config.state_dir / VOTE, json.dumps({"task": ballot.name, "vote": vote}).encode())
    ledger.commit(reservation)
    return vote


def _sum_over_sites(
    question: MomentQuestion,
    sites: Sequence[Site],
    folder: Path,
    facts: Mapping[Name, CandidateFacts],
    scores: Mapping[Name, ProxyScore],
    observe: Observe,
) -> BackboneChoice:
    """Returns the choice by sums over all sites. Raises BadInput where noise would decide, and asks no site then."""
    sizes = [site.config.tasks[question.name].public_size for site in sites]
    signal = compute_signal(question, sizes)
    if signal < MIN_SIGNAL:
        shutil.rmtree(folder)
        needed = math.ceil(sum(sizes) * MIN_SIGNAL / signal)
        raise BadInput(
            f"--epsilon {question.epsilon:g}: expected sites that declare at least {needed:,} units together, below "
            f"which the sums are mostly noise, got {sum(sizes):,}; rank on public records with --proxy"
        )
    encoded = [(site, _encode(site, question.name, question.task, question.candidates, observe)) for site in sites]
    moments = score_candidates(question, encoded, folder.name)
    used = {site.config.name: site.ledger().history().compute_share() for site in sites}
    price = Price("gaussian", question.epsilon, 1.0, question.mu, used)
    return make_choice(question.name, facts, scores=scores, moments=moments, price=price)


def _encode(site: Site, task_name: Name, task: LabelPrior, candidates: Sequence[Candidate], observe: Observe) -> Units:
    """Returns a site's training units with every candidate's features. Raises BadInput where one reads none."""
    folder = private_folder(site.config.state_dir / "candidates") / "data"
    backbones = {each.name: each.backbone for each in candidates}
    encoding = Encoding(site.features(), site.device(), partial(observe, "encoding"))
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


def _explain_too_few(epsilon: float, least: int, largest: int) -> str:
    enough = math.ceil(100.0 * epsilon * least / largest) / 100.0
    return (
        f"--epsilon {epsilon:g}: expected a site that declares at least {least} units, below which a vote is mostly "
        f"noise, got at most {largest}, for which epsilon {enough:g} is needed; rank on public records with --proxy"
    )


def _choose_task(tasks: Mapping[str, Task], name: Name | None) -> Name:
    if name is None and len(tasks) == 1:
        return next(iter(tasks))
    if name is None or name not in tasks:
        raise BadInput(f"--task: expected one of {', '.join(tasks)}, got {name or 'nothing'}")
    return name


def _score_all(path: Path, candidates: Mapping[Name, Candidate], observe: Observe) -> dict[Name, ProxyScore]:
    file = load(ProxyFile, path)
    return {name: score_on_public_records(file, path, each, observe) for name, each in candidates.items()}


def _make_price(mechanism: Mechanism, sites: Sequence[SiteConfig]) -> Price:
    used = {site.name: Site(site, os_entropy).ledger().history().compute_share() for site in sites}
    assert mechanism.sensitivity is not None
    epsilon = mechanism.choice_epsilon
    return Price(mechanism.kind, epsilon, mechanism.sensitivity, compute_choice_mu(epsilon), used)
