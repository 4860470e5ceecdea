"""The releases of training units: the update of a round, and before the first round what the run measures."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import RecordDict

from client.ledger.events import TRAINING
from client.ledger.ledger import Ledger, Reservation
from client.ledger.measured import Measured, keep_measured
from client.ledger.older_copy import check_witness
from client.protocol.answer import answer_once, open_request, open_side
from client.protocol.site import (
    Site,
    SiteDeclined,
    check_approved,
    check_prepared,
    joined_run,
    make_plan,
    plan_measurement,
)
from common import messages
from common.events import ReplyResent
from common.privacy.accounting import Mechanism
from common.privacy.noise import open_stream
from common.process.threads import steady_time
from common.types import DeclineReason, LedgerWitness


def train(site: Site, request: messages.TrainRequest) -> RecordDict:
    """One round's contribution, or the stored one if this very request was answered before.

    Raises:
        SiteDeclined: not joined or prepared, heads that do not fit, or a budget that does not cover the plan.
    """
    joined = joined_run(site, request.run_id)
    if joined.run.trust is not None:
        raise SiteDeclined(DeclineReason.TRUST, "the run sums securely: no update of this site alone leaves")

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        check_approved(site, joined.run_id, joined.offer_digest, use=True)
        opened = open_request(site, joined, request, "train")
        plan = make_plan(site.config, joined)
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
            delta = joined.solver.solve(
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


def measure(site: Site, request: messages.MomentsRequest) -> RecordDict:
    """Returns the sums that a run measures before its first round; what the population paid for before is sent again.

    Raises:
        SiteDeclined: not joined or prepared, a run that measures nothing here, or a budget that does not cover it.
    """
    joined = joined_run(site, request.run_id)
    asked = plan_measurement(site.config, joined)
    if not asked.parts or joined.first_round > 1:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run measures nothing at this site before its first round")
    check_approved(site, joined.run_id, joined.offer_digest, use=True)
    if asked.plan is None:
        ledger = site.ledger()
        check_witness(ledger, request.witness)
        records = messages.encode(_make_moments_reply(asked.stored, ledger.make_witness()))
        size = messages.encoded_size(records)
        site.journal.write(ReplyResent(run_id=joined.run_id, round=request.round, purpose=TRAINING, size_bytes=size))
        return records

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        plan = asked.plan
        assert plan is not None  # Looked at above.
        check_prepared(joined)
        tasks = joined.tasks(site.config)
        units = open_side(joined, tasks, "train", site.device())
        reservation = ledger.reserve(
            Mechanism.of(plan),
            run=site.config.name_charge(joined.run_id),
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
            evaluation_budget=site.share,
        )
        stream = open_stream(site.entropy, joined.run.name, site.config.name, str(request.round))
        from client.solvers.parts.moments import release_moments  # Here: what only plans needs no torch.

        with steady_time():
            sums = release_moments(asked.missing, joined.run, tasks, units, plan=plan, stream=stream)
        deviation = plan.noise_multiplier * (plan.clip_norm or 0.0)
        new = {
            name: Measured(sums[name]["sum"], deviation / factor if plan.private else 0.0)
            for name, factor in asked.missing.items()
        }
        for name, measured in new.items():
            keep_measured(ledger.folder, asked.about[name], measured)
        return _make_moments_reply({**asked.stored, **new}, reservation.witness), reservation, plan.steps

    return answer_once(site, joined, request, TRAINING, answer)


def _make_moments_reply(sums: Mapping[str, Measured], witness: LedgerWitness | None) -> messages.MomentsReply:
    return messages.MomentsReply(
        {name: {"sum": each.values} for name, each in sums.items()},
        {name: each.deviation for name, each in sums.items()},
        witness,
    )
