"""What a site releases: a round's contribution, and noised statistics of held-out units. Nothing else leaves charged.

The order is the promise: the identical request gets the stored bytes; the ledger is charged durably before a record is
touched; the reply is stored before it is sent, so that noise is never drawn twice for one request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from flwr.app import RecordDict

from client.data.prepare import check_prepared, open_units
from client.ledger.events import EVALUATION, TRAINING, Purpose
from client.ledger.ledger import Ledger, Reservation
from client.protocol.evaluate import noised_sums
from client.protocol.replies import Replies, ReplyDamaged
from client.protocol.site import (
    Joined,
    Site,
    SiteDeclined,
    check_approved,
    digest_of_offer,
    joined_run,
    load_modules,
    make_plan,
)
from client.solvers import open_solver
from common import messages
from common.events import ReplyResent, ReplySent
from common.privacy.accounting import Mechanism
from common.privacy.noise import NoiseStream
from common.process.threads import one_thread
from common.tasks import Task
from common.types import (
    BudgetExhausted,
    DeclineReason,
    Delta,
    Plan,
)

MAX_CHARGES = 3
"""Charges of one round: the first, and again after a crash."""


def train(site: Site, request: messages.TrainRequest) -> RecordDict:
    """One round's contribution, or the stored one if this very request was answered before.

    Raises:
        SiteDeclined: not joined or prepared, heads that do not fit, or a budget that does not cover the plan.
    """
    joined = joined_run(site, request.run_id)

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        check_approved(site, joined.run_id, digest_of_offer(joined.folder), use=True)
        tasks = _requested_tasks(site, joined, request)
        heads = load_modules(site, joined, tasks, request.heads)
        plan = make_plan(site.config, joined)
        reservation = ledger.reserve(
            Mechanism.of(plan),
            run=joined.run_id,
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
            evaluation_budget=site.share,
        )
        delta = _solve(site, joined, request.round, tasks, heads, plan)
        return messages.TrainReply(delta, plan, joined.run.delta_precision), reservation, plan.steps

    return _answered_once(site, joined, request, TRAINING, answer)


def evaluate(site: Site, request: messages.EvaluateRequest) -> RecordDict:
    """Noised statistics of held-out units under these heads, or the stored ones; charged to the share for evaluations.

    Raises:
        SiteDeclined: not joined or prepared, a round the run does not evaluate, heads that do not fit, a share that
            does not cover it, or a site that evaluates locally only.
    """
    joined = joined_run(site, request.run_id)
    share, asked = site.share, joined.run.evaluation
    if share is None:
        raise SiteDeclined(
            DeclineReason.EVALUATION_LOCAL, "this site's file says: nothing about held-out units is sent"
        )
    if asked is None or not asked.due(request.round, joined.run.rounds):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run does not evaluate after this round")

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        check_approved(site, joined.run_id, digest_of_offer(joined.folder), use=True)
        tasks = _requested_tasks(site, joined, request)
        heads = load_modules(site, joined, tasks, request.heads)
        reservation, mechanism = ledger.reserve_evaluation(
            share,
            len(tasks),
            run=joined.run_id,
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
        )
        device = site.device()
        stream = NoiseStream(site.entropy(f"{joined.run.name}/{site.config.name}/evaluation/{request.round}"))
        heads = {name: head.to(device) for name, head in heads.items()}
        with one_thread():
            sums = noised_sums(
                heads,
                tasks,
                open_units(joined.folder / "data", "test", list(tasks), device).passed(heads),
                mechanism=mechanism,
                stream=stream,
            )
        return messages.EvaluateReply(sums, mechanism.noise_multiplier), reservation, mechanism.steps

    return _answered_once(site, joined, request, EVALUATION, answer)


# --- parts -----------------------------------------------------------------------------------------------------------


def _answered_once(
    site: Site,
    joined: Joined,
    request: messages.TrainRequest | messages.EvaluateRequest,
    what: Purpose,
    answer: Callable[[str, Ledger], tuple[messages.Reply, Reservation, int]],
) -> RecordDict:
    """The stored reply to this very request; else a new one, stored before it is sent.

    Args:
        site: who answers.
        joined: the run.
        request: what is asked.
        what: for the journal.
        answer: given the request's digest and the ledger, charges and computes: the reply, its charge, and the number
            of releases.
    """
    digest = messages.request_digest(messages.encode(request))
    try:
        with Replies.exclusive(joined.folder) as replies:
            stored = replies.find(digest)
            if stored is not None:
                site.journal.write(
                    ReplyResent(run_id=joined.run_id, round=request.round, purpose=what, size_bytes=len(stored))
                )
                return messages.from_bytes(stored)
            ledger = site.ledger()
            _check_asked_once(ledger, joined, request.round, what, digest)
            reply, reservation, num_releases = answer(digest, ledger)
            records = messages.encode(reply)
            data = messages.to_bytes(records)
            replies.store(digest, data)
            ledger.commit(reservation)
    except BudgetExhausted as error:
        raise SiteDeclined(DeclineReason.BUDGET, str(error)) from error
    except ReplyDamaged as error:
        raise SiteDeclined(DeclineReason.INTERNAL, str(error)) from error
    site.journal.write(
        ReplySent(
            run_id=joined.run_id,
            round=request.round,
            purpose=what,
            num_releases=num_releases,
            size_bytes=len(data),
        )
    )
    return records


def _check_asked_once(ledger: Ledger, joined: Joined, round_: int, what: Purpose, digest: str) -> None:
    """A round is answered to one request: else a coordinator could ask it over and over, up to the whole budget.

    Charges that were cut off, by a crash or an error, may be made again a few times.

    Raises:
        SiteDeclined: another request of this round was answered, or it was charged too often.
    """
    about = (joined.run_id, what, round_)
    charges = [charge for charge in ledger.charges() if (charge.run, charge.purpose, charge.round) == about]
    if any(charge.committed and charge.request != digest for charge in charges):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "this round was answered already, to another request")
    if len(charges) >= MAX_CHARGES:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, f"this round was charged {MAX_CHARGES} times already")


def _requested_tasks(
    site: Site, joined: Joined, request: messages.TrainRequest | messages.EvaluateRequest
) -> dict[str, Task]:
    tasks = joined.tasks(site.config)
    if not 1 <= request.round <= joined.run.rounds:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the round is outside the run")
    if set(request.heads) != set(joined.sizes(site.config)):
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "the heads are not those of this site's tasks")
    path = joined.folder / "prepared.json"
    if not path.exists() or json.loads(path.read_text(encoding="utf-8"))["offer"] != digest_of_offer(joined.folder):
        raise SiteDeclined(DeclineReason.NOT_PREPARED, "the run's data are not prepared, or for another offer")
    # Before anything is charged: what must fail costs nothing.
    check_prepared(joined.folder / "data")
    return tasks


def _solve(
    site: Site, joined: Joined, round_: int, tasks: Mapping[str, Task], heads: Mapping[str, torch.nn.Module], plan: Plan
) -> Delta:
    device = site.device()
    # The purpose names everything that makes a release distinct; a key from the operating system ignores it.
    stream = NoiseStream(site.entropy(f"{joined.run.name}/{site.config.name}/{round_}"))
    with one_thread():
        return open_solver(joined.run.solver, "solver").solve(
            {name: head.to(device) for name, head in heads.items()},
            tasks,
            open_units(joined.folder / "data", "train", list(tasks), device),
            plan=plan,
            public_sizes=joined.sizes(site.config),
            stream=stream,
        )
