"""The vote of a site on a backbone: charged before anything is computed, then only the winner's number is released."""

from __future__ import annotations

import math

from client.choice.rows import make_comparable_rows
from client.config import NoisedEvaluation
from client.data.units import Units
from client.ledger.ledger import Ledger, Reservation
from common.privacy.accounting import Mechanism
from common.privacy.lattice import check_unit_count
from common.privacy.noise import NoiseStream
from common.scorers import Scorer
from common.tasks import LabelPrior

_STEP = 2.0**-20
"""Costs are rounded to whole multiples of it."""


def cast_vote(
    ledger: Ledger,
    scorer: Scorer,
    task: LabelPrior,
    units: Units,
    *,
    epsilon: float,
    public_size: int,
    run: str,
    stream: NoiseStream,
    round: int = 0,
    request: str = "",
    evaluation_budget: NoisedEvaluation | None = None,
    paid: Reservation | None = None,
) -> tuple[str, Reservation]:
    """Returns the name of the candidate that a site votes for, and the charge, to be committed once it is stored.

    Args:
        ledger: the ledger of the site's population.
        scorer: the kind of cost.
        task: the task that the candidates are compared on.
        units: the site's training units, with the task's records as each candidate sees them by its name.
        epsilon: pure epsilon of the vote.
        public_size: declared number of units.
        run: id under which the vote is charged.
        stream: source of the noise.
        round: round under which it is charged.
        request: digest of the request that it answers; empty in a simulation.
        evaluation_budget: the part of the budget that is held for evaluations.
        paid: the charge of a vote that was cut off before it was stored; None for a new charge.

    Raises:
        BudgetExhausted: the budget does not cover the vote; nothing is computed.
        BadInput: there are more units than can be added exactly.
    """
    check_unit_count(units.num_units)
    mechanism = Mechanism.of_choice(epsilon, scorer.sensitivity)
    reservation = paid or ledger.reserve(
        mechanism, run=run, round=round, request=request, evaluation_budget=evaluation_budget
    )
    costs = [scorer.compute_cost(rows, public_size) for rows in make_comparable_rows(task, list(units.tasks.values()))]
    # Each is less than a step too small, and so is the sensitivity: three steps are within `ROUNDING`.
    whole = [math.floor(cost / _STEP) for cost in costs]
    sensitivity = math.floor(scorer.sensitivity / _STEP)
    place = stream.choose_least_cost(whole, sensitivity, mechanism.choice_epsilon)
    return list(units.tasks)[place], reservation
