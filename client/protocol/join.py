"""Joining a run: agree to an offer or decline it.

Nothing is spent here. The order inside `join` is a promise too: what depends on the budget is answered only for a run
that somebody at the site approved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from client.audit.verdict import AuditTooSlow, get_audit_verdict
from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.older_copy import check_witness
from client.protocol.approvals import Approvals, check_offer
from client.protocol.balance import explain_largest_epsilon, find_largest_epsilon
from client.protocol.requirements import (
    num_parameters,
    refuse_long_vote,
    refuse_what_does_not_fit,
    refuse_what_takes_too_long,
    untrained_modules,
)
from client.protocol.site import (
    FIRST_ROUND,
    Joined,
    Site,
    SiteDeclined,
    check_allowed,
    check_approved,
    claim_sums,
    find_sum_rules,
    make_plan,
    open_member,
    plan_measurement,
    plan_vote,
    read_first_round,
    run_folder,
)
from client.solvers import open_solver
from common import messages
from common.events import BackboneUnusable, RunAudited, RunJoined
from common.files import private_folder, write_atomic
from common.offers import Offer
from common.privacy.accounting import Mechanism
from common.secure_sum.vectors import make_mechanism
from common.tasks import Task
from common.types import (
    BadInput,
    BudgetExhausted,
    DeclineReason,
    Plan,
    RunFailed,
)


def join(site: Site, request: messages.JoinRequest) -> messages.JoinReply:
    """Agree to a run or decline it; nothing is spent and no record is opened.

    Raises:
        SiteDeclined: a task, backbone, solver, unit, size or the whole run's price is not acceptable here, nobody
            has approved the run, it requires an audit that the solver does not pass here, or no round is left.
    """
    joined = _read_offer(site, request)
    tasks = joined.tasks(site.config)
    if not tasks:
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "no task of the run is configured and allowed here")
    check_allowed(site.config, joined)
    joined = _choose_first_round(site, joined, request.first_round)
    rules = find_sum_rules(site.config, joined)
    if rules is not None:
        open_member(site.config)
    # Before anything about the budget is answered: else offers could bisect what is left of it.
    try:
        check_approved(site, joined.run_id, Offer(request.run, request.backbones).digest, use=False)
    except SiteDeclined as declined:
        # A coordinator asks every few seconds while it waits: one line says it.
        raise SiteDeclined(declined.reason, declined.detail, logged=not _let_wait(site, request)) from declined
    if joined.run.choice is not None:
        return _join_choice(site, joined, request)
    plan = accept_training(site.config, joined)
    ledger = site.ledger()
    check_witness(ledger, request.witness)
    if rules is not None:
        claim_sums(site.config, joined, ledger)
    _pass_audit(site, joined, request, tasks)
    if plan.private:
        # A resumed run was partly paid for: what its rounds were charged is not held again.
        run, rounds = site.config.name_charge(joined.run_id), joined.num_rounds
        measured = plan_measurement(site.config, joined).plan if joined.first_round == 1 else None
        try:
            ledger.earmark(
                make_mechanism(plan.over(rounds), rules),
                run=run,
                rounds=rounds,
                before=None if measured is None else Mechanism.of(measured),
                evaluation_budget=site.share,
            )
        except BudgetExhausted as error:
            raise SiteDeclined(DeclineReason.BUDGET, str(error)) from error
    return _agree(site, joined, request, ledger)


def accept_training(config: SiteConfig, joined: Joined) -> Plan:
    """Returns the plan of one round of a run whose training a site can do as it promises.

    Args:
        config: the site file.
        joined: the run.

    Raises:
        SiteDeclined: what the run trains, its steps or its time do not fit.
    """
    tasks = joined.tasks(config)
    try:
        refuse_what_does_not_fit(joined.run, tasks)
        plan = make_plan(config, joined)
        refuse_what_takes_too_long(plan, num_parameters(joined.run, tasks), max(joined.sizes(config).values()))
        # Now: once a round is charged it is too late.
        open_solver(joined.run.solver, "solver").check_modules(untrained_modules(joined.run, tasks))
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    return plan


def _join_choice(site: Site, joined: Joined, request: messages.JoinRequest) -> messages.JoinReply:
    """Agrees to a choice: the price of a vote is held, where the site declares enough units to vote."""
    vote = plan_vote(site.config, joined)
    try:
        refuse_long_vote(joined.run, vote.public_size)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    ledger = site.ledger()
    check_witness(ledger, request.witness)
    if vote.public_size >= vote.min_size:
        try:
            ledger.earmark(
                vote.mechanism,
                run=site.config.name_charge(joined.run_id),
                rounds=joined.num_rounds,
                evaluation_budget=site.share,
            )
        except BudgetExhausted as error:
            largest = find_largest_epsilon(site.config, vote.make_mechanism, vote.epsilon)
            raise SiteDeclined(DeclineReason.BUDGET, f"{error}; {explain_largest_epsilon(largest)}") from error
    return _agree(site, joined, request, ledger)


def _agree(site: Site, joined: Joined, request: messages.JoinRequest, ledger: Ledger) -> messages.JoinReply:
    """Keeps the offer and returns the site's declarations."""
    tasks = joined.tasks(site.config)
    private_folder(joined.folder)
    if joined.first_round != read_first_round(joined.folder):
        write_atomic(joined.folder / FIRST_ROUND, str(joined.first_round).encode())
    write_atomic(joined.folder / "offer.json", Offer(request.run, request.backbones).to_bytes())
    site.journal.write(
        RunJoined(
            run_id=joined.run_id,
            tasks=tuple(sorted(tasks)),
            first_round=joined.first_round,
            rounds=joined.run.rounds,
        )
    )
    return messages.JoinReply(
        site=site.config.name,
        tasks={name: site.config.tasks[name].public_size for name in tasks},
        unit=site.config.unit,
        delta=site.config.budget.delta,
        budget_epsilon=site.config.budget.epsilon,
        backbones={name: _held(site, digest) for name, digest in joined.digests(tasks).items()},
        witness=ledger.make_witness(),
    )


def _held(site: Site, digest: str) -> messages.Held:
    """Returns the parts of a backbone that need not be sent: they are here, or the site's own files hold it."""
    try:
        whole = site.backbones().adopt(digest, site.config.own_backbones)
    except BadInput as error:
        site.journal.write(BackboneUnusable(detail=str(error)))
        whole = False
    return messages.Held(whole, site.backbones().held_parts(digest))


def _let_wait(site: Site, request: messages.JoinRequest) -> bool:
    """Keep an offer that nobody approved, for `headwater site approve`; whether it is new."""
    return Approvals(site.config.coordinator_dir).wait(Offer(request.run, request.backbones))


def _read_offer(site: Site, request: messages.JoinRequest) -> Joined:
    try:
        run = check_offer(Offer(request.run, request.backbones))
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    folder = run_folder(site, request.run_id)
    kept = folder / "offer.json"
    # Labels were encoded and plans accounted for the first offer: a second one under the same id could make a round's
    # failure depend on a record.
    if kept.exists() and kept.read_bytes() != Offer(request.run, request.backbones).to_bytes():
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "another offer was made under the same run id")
    return Joined(request.run_id, run, request.backbones, folder)


def _choose_first_round(site: Site, joined: Joined, offered: int) -> Joined:
    """Returns the run with the first round that this site plans for: the one offered, until the site began.

    A site that was in the roll call, or has been charged, keeps its plan: else noise for few rounds would pay for many.

    Raises:
        SiteDeclined: no round is left.
    """
    joined_before = (joined.folder / "offer.json").exists()
    charged = site.config.name_charge(joined.run_id)
    if joined_before:
        kept = read_first_round(joined.folder)
        if kept == 1 or _has_begun(site, joined, charged):
            return replace(joined, first_round=kept)
    if offered > joined.run.rounds:
        if joined_before:
            site.ledger().release(charged)
        raise SiteDeclined(
            DeclineReason.OVERTAKEN,
            f"run {joined.run_id}: no round of its {joined.run.rounds} is left for this site, which came too late; "
            "nothing was charged",
        )
    return replace(joined, first_round=offered)


def _has_begun(site: Site, joined: Joined, charged: str) -> bool:
    """Returns whether something of the run may have left: a charge in the ledger, or a reply that is stored."""
    stored = any((joined.folder / "replies").glob("*"))
    return stored or any(charge.run == charged for charge in site.ledger().charges())


def _pass_audit(site: Site, joined: Joined, request: messages.JoinRequest, tasks: Mapping[str, Task]) -> None:
    """Audit the solver here where the run requires it; the result stays at the site. Raises SiteDeclined."""
    if joined.run.audit != "required":
        return
    sizes = {name: site.config.tasks[name].public_size for name in tasks}
    audited, digest = joined.run, Offer(request.run, request.backbones).digest
    if joined.first_round > 1:
        # Another noise than that of the whole run: a verdict of its own.
        audited, digest = audited.model_copy(update={"rounds": joined.num_rounds}), f"{digest}/{joined.first_round}"
    try:
        verdict = get_audit_verdict(site.config, audited, digest, sizes, site.entropy)
    except (AuditTooSlow, BadInput, RunFailed) as error:
        raise SiteDeclined(
            DeclineReason.AUDIT, f"the run requires an audit, and it could not be done: {error}"
        ) from error
    site.journal.write(RunAudited(run_id=joined.run_id, verdict=verdict))
    if not verdict.passed:
        raise SiteDeclined(DeclineReason.AUDIT, f"the audit that the run requires failed: {verdict.reasons[0]}")
