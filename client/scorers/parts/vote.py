"""The vote of a site on a backbone: charged before anything is computed, then only the winner's number is released."""

from __future__ import annotations

import math
from collections.abc import Sequence

from client.config import NoisedEvaluation
from client.data.units import Units
from client.ledger.ledger import Ledger, Reservation
from client.scorers import Scorer
from client.scorers.parts.rows import make_rows
from common.privacy.accounting import Mechanism
from common.privacy.lattice import check_unit_count
from common.privacy.noise import NoiseStream
from common.tasks import LabelPrior

MIN_SIGNAL = 25.0
"""Declared units x epsilon / sensitivity below which a vote is mostly noise: where it was reached, the vote's loss
against the best candidate stayed below 2.7 points on five data sets (docs/transfer.md)."""

_STEP = 2.0**-20
"""Costs are rounded to whole multiples of it."""


def compute_min_size(scorer: Scorer, epsilon: float) -> int:
    """Returns the declared number of units from which on a site may vote."""
    return math.ceil(MIN_SIGNAL * scorer.sensitivity / epsilon)


def cast_vote(
    ledger: Ledger,
    scorer: Scorer,
    task: LabelPrior,
    name: str,
    candidates: Sequence[Units],
    *,
    epsilon: float,
    public_size: int,
    run: str,
    stream: NoiseStream,
    evaluation_budget: NoisedEvaluation | None = None,
) -> tuple[int, Reservation]:
    """Returns the position of the candidate that a site votes for, and the charge, to be committed once it is stored.

    Args:
        ledger: the ledger of the site's population.
        scorer: the kind of cost.
        task: the task that the candidates are compared on.
        name: its name.
        candidates: the site's training units with the features of each candidate.
        epsilon: pure epsilon of the vote.
        public_size: declared number of units.
        run: id under which the vote is charged.
        stream: source of the noise.
        evaluation_budget: the part of the budget that is held for evaluations.

    Raises:
        BudgetExhausted: the budget does not cover the vote; nothing is computed.
        BadInput: there are more units than can be added exactly.
    """
    for units in candidates:
        check_unit_count(units.num_units)
    mechanism = Mechanism.of_choice(epsilon, scorer.sensitivity)
    reservation = ledger.reserve(mechanism, run=run, round=0, request="", evaluation_budget=evaluation_budget)
    costs = [scorer.compute_cost(make_rows(task, units.tasks[name]), public_size) for units in candidates]
    # Each is less than a step too small, and so is the sensitivity: three steps are within `ROUNDING`.
    whole = [math.floor(cost / _STEP) for cost in costs]
    sensitivity = math.floor(scorer.sensitivity / _STEP)
    return stream.choose_least_cost(whole, sensitivity, mechanism.choice_epsilon), reservation
