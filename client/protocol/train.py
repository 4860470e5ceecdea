"""The update of one round, charged and noised."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import RecordDict

from client.data.prepare import open_units
from client.ledger.events import TRAINING
from client.ledger.ledger import Ledger, Reservation
from client.protocol.answer import answer_once, get_requested_tasks
from client.protocol.site import (
    Joined,
    Site,
    check_approved,
    digest_of_offer,
    joined_run,
    load_modules,
    make_plan,
)
from client.solvers import open_solver
from common import messages
from common.privacy.accounting import Mechanism
from common.privacy.noise import NoiseStream
from common.process.threads import one_thread
from common.tasks import Task
from common.types import (
    Delta,
    Plan,
)


def train(site: Site, request: messages.TrainRequest) -> RecordDict:
    """One round's contribution, or the stored one if this very request was answered before.

    Raises:
        SiteDeclined: not joined or prepared, heads that do not fit, or a budget that does not cover the plan.
    """
    joined = joined_run(site, request.run_id)

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        check_approved(site, joined.run_id, digest_of_offer(joined.folder), use=True)
        tasks = get_requested_tasks(site, joined, request)
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

    return answer_once(site, joined, request, TRAINING, answer)


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
