"""The choice of a backbone by sums over all sites, which a simulation adds up as a secure sum would.

Half of the units releases the sums of features of each class, the other half each candidate's number of units that are
nearest to the mean of their class (`client.choice.moments`). Each site adds its share of the noise, and only totals are
used. A unit is in one half: the ledger is charged one Gaussian release, before anything is computed.

# Shapes: C classes, E directions, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.choice.moments import (
    COUNTS,
    DIRECTIONS,
    MeanClassifier,
    add_up_classes,
    add_up_hits,
    check_one_class,
    draw_directions,
)
from client.data.units import Units
from client.ledger.ledger import Reservation
from client.protocol.site import Site
from common.privacy.accounting import Mechanism
from common.privacy.gaussian import gdp_mu
from common.privacy.noise import open_stream
from common.run import Name, RunConfig
from common.secure_sum.terms import SumRules
from common.secure_sum.vectors import choose_lattice, make_mechanism
from common.tasks import LabelPrior
from common.types import BadInput, Plan, Unit
from server.choice.outcome import MomentScore
from simulations.choice.candidates import Candidate

MIN_SIGNAL = 25.0
"""mu x declared units / (classes x root of the candidates x the noise of one site's share to that of all) below which a
score is mostly noise (docs/transfer.md)."""


@dataclass(frozen=True)
class MomentQuestion:
    """The question that every site answers, and the public numbers of the answer.

    Attributes:
        task: the task that the candidates are compared on.
        name: its name.
        candidates: the candidates, in the order of their file.
        rules: the rules of the secure sum.
        unit: what the release protects.
        delta: the run's delta.
        epsilon: epsilon of the release at that delta.
    """

    task: LabelPrior
    name: Name
    candidates: Sequence[Candidate]
    rules: SumRules
    unit: Unit
    delta: float
    epsilon: float

    @property
    def mu(self) -> float:
        """The price as the Gaussian's mu."""
        return gdp_mu(self.epsilon, self.delta)

    @property
    def plan(self) -> Plan:
        """The release."""
        return Plan(1.0, 1, 1.0, (1.0 + 1e-7) / self.mu, self.unit)

    @property
    def mechanism(self) -> Mechanism:
        """The release as a ledger charges it."""
        return make_mechanism(self.plan, self.rules)


def plan_question(
    run: RunConfig, task: LabelPrior, name: Name, candidates: Sequence[Candidate], epsilon: float
) -> MomentQuestion:
    """Returns the question with its public numbers.

    Args:
        run: the run, which sums securely.
        task: the task that the candidates are compared on.
        name: its name.
        candidates: the candidates.
        epsilon: epsilon of the release at the run's delta.

    Raises:
        BadInput: the run does not sum securely, or its records may have several classes.
    """
    if run.trust is None or run.colluding is None or run.requested_privacy is None:
        raise BadInput(
            "--by moments: expected a run with `trust: secure_sum`, whose sites share the noise of one sum, got none; "
            "--by vote needs no sum"
        )
    check_one_class(task, name)
    rules, privacy = SumRules(run.cohort.min_sites, run.colluding), run.requested_privacy
    return MomentQuestion(task, name, candidates, rules, privacy.unit, privacy.delta, epsilon)


def compute_signal(question: MomentQuestion, sizes: Sequence[int]) -> float:
    """Returns how far a score stands out of its noise, by public numbers alone.

    Args:
        question: the question.
        sizes: declared number of units of each site.
    """
    spread = math.sqrt(len(question.candidates) * len(sizes)) * question.rules.noise_share
    return question.mu * sum(sizes) / (question.task.num_counts * spread)


def score_candidates(
    question: MomentQuestion, sites: Sequence[tuple[Site, Units]], run_id: str
) -> dict[Name, MomentScore]:
    """Returns each candidate's score; every site is charged before its records are read for it.

    Args:
        question: the question.
        sites: each site with its training units, the task's records as each candidate sees them by its name.
        run_id: id under which sites are charged.

    Raises:
        BudgetExhausted: a site's budget does not cover the release; none is computed.
    """
    lattice = choose_lattice(question.plan, question.rules)
    charges: list[tuple[Site, Reservation]] = []
    for site, _ in sites:
        reservation = site.ledger().reserve(
            question.mechanism,
            run=site.config.name_charge(run_id),
            round=0,
            request="",
            evaluation_budget=site.share,
        )
        charges.append((site, reservation))
    streams = [open_stream(site.entropy, run_id, site.config.name, "moments") for site, _ in sites]
    halves = [stream.coins(units.num_units, 0.5) for stream, (_, units) in zip(streams, sites, strict=True)]
    directions = {
        each.name: draw_directions(each.backbone.digest, each.backbone.feature_dim) for each in question.candidates
    }

    def add_noise(sums: Sequence[Tensor]) -> NDArray[np.float64]:
        """Returns what a secure sum of the sites' vectors shows, in a unit's own measure."""
        noised = [
            lattice.add_noise(each, stream.rounded_gaussian(len(each), lattice.log2_deviation), stream)
            for each, stream in zip(sums, streams, strict=True)
        ]
        return torch.stack(noised).sum(0).double().numpy() * lattice.spacing

    task, noise = question.task, math.sqrt(len(sites)) * lattice.spacing * 2.0**lattice.log2_deviation
    classes = add_noise(
        [
            add_up_classes(task, units, directions, half_U, lattice)
            for (_, units), half_U in zip(sites, halves, strict=True)
        ]
    )
    widths = {each.name: min(DIRECTIONS, each.backbone.feature_dim) for each in question.candidates}
    classifiers = make_classifiers(classes, noise, task.num_counts, widths)
    hits_K = add_noise(
        [
            add_up_hits(task, units, directions, classifiers, ~half_U, lattice)
            for (_, units), half_U in zip(sites, halves, strict=True)
        ]
    )
    for site, reservation in charges:
        site.ledger().commit(reservation)
    size = sum(site.config.tasks[question.name].public_size for site, _ in sites) / 2.0
    return _make_scores(hits_K, noise, size, list(classifiers))


def make_classifiers(
    values: NDArray[np.float64], noise: float, num_classes: int, widths: Mapping[Name, int]
) -> dict[Name, MeanClassifier]:
    """Returns each candidate's classifier from the first release.

    Args:
        values: the total, in the order of `add_up_classes`.
        noise: deviation of the noise in each value.
        num_classes: number C of classes.
        widths: candidate -> number of its directions.
    """
    scale = math.sqrt((1.0 - COUNTS) / len(widths))
    # A class that noise has left nothing of counts as half of its deviation.
    least = max(0.5, noise / math.sqrt(COUNTS) / 2.0)
    counts_C = np.maximum(values[:num_classes] / math.sqrt(COUNTS), least)
    classifiers, position = {}, num_classes
    for name, width in widths.items():
        sums_CE = values[position : position + num_classes * width].reshape(num_classes, width) / scale
        means_CE, position = sums_CE / counts_C[:, None], position + num_classes * width
        added_C = width * (noise / scale / counts_C) ** 2
        squares_C = np.maximum(np.square(means_CE).sum(1) - added_C, 0.0)
        classifiers[name] = MeanClassifier(means_CE, squares_C)
    return classifiers


def _make_scores(
    hits_K: NDArray[np.float64], noise: float, size: float, names: Sequence[Name]
) -> dict[Name, MomentScore]:
    root = math.sqrt(len(names))
    scores = {}
    for name, hits in zip(names, hits_K * root, strict=True):
        accuracy = float(hits) / size
        inside = min(1.0, max(0.0, accuracy))
        error = math.hypot(noise * root, math.sqrt(size * inside * (1.0 - inside))) / size
        scores[name] = MomentScore(accuracy, error)
    return scores
