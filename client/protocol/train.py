"""The update of one round, charged and noised."""

from __future__ import annotations

from flwr.app import RecordDict

from client.ledger.events import TRAINING
from client.ledger.ledger import Ledger, Reservation
from client.protocol.answer import answer_once, open_request
from client.protocol.site import (
    Site,
    check_approved,
    digest_of_offer,
    joined_run,
    make_plan,
)
from client.solvers import open_solver
from common import messages
from common.privacy.accounting import Mechanism
from common.privacy.noise import open_stream
from common.process.threads import steady_time


def train(site: Site, request: messages.TrainRequest) -> RecordDict:
    """One round's contribution, or the stored one if this very request was answered before.

    Raises:
        SiteDeclined: not joined or prepared, heads that do not fit, or a budget that does not cover the plan.
    """
    joined = joined_run(site, request.run_id)

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        check_approved(site, joined.run_id, digest_of_offer(joined.folder), use=True)
        opened = open_request(site, joined, request, "train")
        plan = make_plan(site.config, joined)
        solver = open_solver(joined.run.solver, "solver")
        reservation = ledger.reserve(
            Mechanism.of(plan),
            run=site.config.name_charge(joined.run_id),
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
            evaluation_budget=site.share,
        )
        # The purpose names everything that makes a release distinct; a key from the operating system ignores it.
        stream = open_stream(site.entropy, joined.run.name, site.config.name, str(request.round))
        with steady_time():
            delta = solver.solve(
                opened.modules,
                opened.tasks,
                opened.units,
                plan=plan,
                public_sizes=joined.sizes(site.config),
                stream=stream,
            )
        reply = messages.TrainReply(delta, plan, joined.run.delta_precision, reservation.witness)
        return reply, reservation, plan.steps

    return answer_once(site, joined, request, TRAINING, answer)
