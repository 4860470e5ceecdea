"""Before a run and after it: agree or decline, receive backbones, encode records, take the final heads home.

Nothing is spent here. The order inside `join` is a promise too: what depends on the budget is answered only for a run
that somebody at the site approved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from client.audit.verdict import AuditTooSlow, get_audit_verdict
from client.data.prepare import Encoding, prepare
from client.ledger.events import TRAINING
from client.protocol.approvals import Approvals, Offer
from client.protocol.requirements import refuse_what_does_not_fit, untrained_modules
from client.protocol.site import (
    STOPPED,
    Joined,
    Site,
    SiteDeclined,
    check_allowed,
    check_approved,
    digest_of_offer,
    joined_run,
    load_modules,
    make_plan,
    run_folder,
)
from client.solvers import open_solver
from common import messages
from common.events import BackboneUnusable, HeadsReceived, RunAudited, RunJoined, RunPrepared
from common.files import private_folder, write_atomic
from common.model.backbones import Backbone
from common.model.trunks import freeze_parts
from common.offers import compute_run_digest, encode_offer
from common.privacy.accounting import Mechanism
from common.tasks import Task
from common.types import (
    BadInput,
    DeclineReason,
    DigestMismatch,
    RunFailed,
    heads_digest,
)


def join(site: Site, request: messages.JoinRequest) -> messages.JoinReply:
    """Agree to a run or decline it; nothing is spent and no record is opened.

    Raises:
        SiteDeclined: a task, backbone, solver, unit, size or the whole run's price is not acceptable here, nobody
            has approved the run, or it requires an audit that the solver does not pass here.
    """
    _refuse_while_stopped(site)
    joined = _read_offer(site, request)
    tasks = joined.tasks(site.config)
    if not tasks:
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "no task of the run is configured and allowed here")
    check_allowed(site.config, joined)
    # Before anything about the budget is answered: else offers could bisect what is left of it.
    try:
        check_approved(site, joined.run_id, compute_run_digest(request.run, request.backbones), use=False)
    except SiteDeclined as declined:
        # A coordinator asks every few seconds while it waits: one line says it.
        raise SiteDeclined(declined.reason, declined.detail, logged=not _let_wait(site, request)) from declined
    try:
        refuse_what_does_not_fit(joined.run, tasks)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    plan = make_plan(site.config, joined)
    _check_heads(joined, tasks)
    ledger = site.ledger()
    # A resumed run was partly paid for; each round's reservation stays the gate.
    paid = {charge.round for charge in ledger.charges() if (charge.run, charge.purpose) == (joined.run_id, TRAINING)}
    rounds = joined.run.rounds - len(paid)
    whole = [Mechanism.of(plan.over(rounds))] if rounds > 0 else []
    if plan.private and whole and not ledger.affords(whole, site.share):
        raise SiteDeclined(DeclineReason.BUDGET, "the run's whole price exceeds what the registry has left")
    _pass_audit(site, joined, request, tasks)
    write_atomic(private_folder(joined.folder) / "offer.json", encode_offer(request.run, request.backbones))
    site.journal.write(RunJoined(run_id=joined.run_id, tasks=tuple(sorted(tasks))))
    return messages.JoinReply(
        site=site.config.name,
        tasks={name: site.config.tasks[name].public_size for name in tasks},
        unit=site.config.unit,
        delta=site.config.budget.delta,
        budget_epsilon=site.config.budget.epsilon,
        backbones={name: _held(site, digest) for name, digest in joined.digests(tasks).items()},
    )


def keep_part(site: Site, request: messages.PartRequest) -> messages.Ready:
    """Keep one part of a backbone that was agreed on, unless the whole is here already.

    Raises:
        SiteDeclined: not joined, or no task here stands on the backbone.
    """
    joined = joined_run(site, request.run_id)
    _refuse_others(site, joined, [request.digest])
    if not site.backbones().has(request.digest):
        site.backbones().put_part(request.digest, request.index, request.total, request.data)
    return messages.Ready()


def prepare_run(site: Site, request: messages.PrepareRequest) -> messages.Ready:
    """Put the backbones together whose parts were sent, encode records, write the run's label arrays.

    Raises:
        SiteDeclined: not joined, or a backbone is not one that was agreed on.
    """
    _refuse_while_stopped(site)
    joined = joined_run(site, request.run_id)
    _refuse_others(site, joined, request.specs)
    tasks = joined.tasks(site.config)
    try:
        opened = _open_backbones(site, joined, joined.digests(tasks), request.specs)
    except DigestMismatch as error:
        raise SiteDeclined(DeclineReason.BACKBONE_NOT_ALLOWED, str(error)) from error
    try:
        frozen = freeze_parts(joined.run, opened)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    try:
        preparation = prepare(
            site.config,
            tasks,
            {name: frozen[joined.run.backbone_of(name)] for name in tasks},
            Encoding(site.features(), site.device(), site.progress),
            joined.folder / "data",
        )
    except BadInput as error:
        _stop(site, str(error))
        raise
    feature_dims = {name: opened[joined.run.backbone_of(name)].feature_dim for name in tasks}
    prepared = {"feature_dims": feature_dims, "offer": digest_of_offer(joined.folder)}
    # Last: its presence marks complete preparation.
    write_atomic(joined.folder / "prepared.json", json.dumps(prepared).encode())
    num_left_out = sum(problem.row is not None for problem in preparation.problems)
    site.journal.write(
        RunPrepared(run_id=joined.run_id, num_left_out=num_left_out, precision_error=preparation.precision_error)
    )
    return messages.Ready()


def finish(site: Site, request: messages.FinishRequest) -> messages.Ready:
    """Keep the run's final heads, verified by digest."""
    joined = joined_run(site, request.run_id)
    tasks = joined.tasks(site.config)
    if set(request.heads) != set(joined.sizes(site.config)):
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "the final heads are not those of this site's tasks")
    if not (joined.folder / "prepared.json").exists():
        raise SiteDeclined(DeclineReason.NOT_PREPARED, "the run's data are not prepared")
    load_modules(site, joined, tasks, request.heads)
    if heads_digest(request.heads) != request.digest:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the final heads differ from their digest")
    records = messages.encode(request)
    write_atomic(joined.folder / "final_heads.bin", messages.to_bytes(records))
    site.journal.write(HeadsReceived(run_id=joined.run_id, heads=request.digest))
    return messages.Ready()


# --- parts -----------------------------------------------------------------------------------------------------------


def _held(site: Site, digest: str) -> messages.Held:
    """Returns the parts of a backbone that need not be sent: they are here, or the site's own files hold it."""
    try:
        whole = site.backbones().adopt(digest, site.config.own_backbones)
    except BadInput as error:
        site.journal.write(BackboneUnusable(detail=str(error)))
        whole = False
    return messages.Held(whole, site.backbones().held_parts(digest))


def _refuse_others(site: Site, joined: Joined, digests: Iterable[str]) -> None:
    """Raise SiteDeclined where a digest is of no backbone that the run's tasks here stand on."""
    if not set(digests) <= set(joined.digests(joined.tasks(site.config)).values()):
        raise SiteDeclined(DeclineReason.BACKBONE_NOT_ALLOWED, "no task of the run stands on that backbone here")


def _open_backbones(
    site: Site, joined: Joined, digests: Mapping[str, str], sent: Mapping[str, str]
) -> dict[str, Backbone]:
    """Some of the run's backbones by name, put together from their parts where they were sent.

    Raises:
        DigestMismatch: one is not what the digest names, or not what the run says of it, which the staff approved.
    """
    store, opened = site.backbones(), {}
    for name, digest in digests.items():
        arrived = digest in sent and not store.has(digest)
        opened[name] = store.assemble(digest, sent[digest]) if arrived else store.open(digest)
        if opened[name].public_spec() != joined.run.backbone_specs[name].settings():
            raise DigestMismatch(f"{joined.run.backbone_key(name)}: its settings are not those of the run")
    return opened


def _let_wait(site: Site, request: messages.JoinRequest) -> bool:
    """Keep an offer that nobody approved, for `headwater site approve`; whether it is new."""
    return Approvals(site.config.state_dir).wait(Offer(request.run, request.backbones))


def _read_offer(site: Site, request: messages.JoinRequest) -> Joined:
    try:
        run = Offer(request.run, request.backbones).config()
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    folder = run_folder(site, request.run_id)
    kept = folder / "offer.json"
    # Labels were encoded and plans accounted for the first offer: a second one under the same id could make a round's
    # failure depend on a record.
    if kept.exists() and kept.read_bytes() != encode_offer(request.run, request.backbones):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "another offer was made under the same run id")
    return Joined(request.run_id, run, request.backbones, folder)


def _pass_audit(site: Site, joined: Joined, request: messages.JoinRequest, tasks: Mapping[str, Task]) -> None:
    """Audit the solver here where the run requires it; the result stays at the site. Raises SiteDeclined."""
    if joined.run.audit != "required":
        return
    sizes = {name: site.config.tasks[name].public_size for name in tasks}
    digest = compute_run_digest(request.run, request.backbones)
    try:
        verdict = get_audit_verdict(site.config, joined.run, digest, sizes, site.entropy)
    except (AuditTooSlow, BadInput, RunFailed) as error:
        raise SiteDeclined(
            DeclineReason.AUDIT, f"the run requires an audit, and it could not be done: {error}"
        ) from error
    site.journal.write(RunAudited(run_id=joined.run_id, verdict=verdict))
    if not verdict.passed:
        raise SiteDeclined(DeclineReason.AUDIT, f"the audit that the run requires failed: {verdict.reasons[0]}")


def _stop(site: Site, detail: str) -> None:
    """Answer nobody until the site's staff has looked.

    Whether records stop a preparation is a fact about them. A coordinator that could ask again, with other labels or
    ranges, would learn a fact each time; so it learns one for each time a person clears the stop.
    """
    write_atomic(private_folder(site.config.state_dir) / STOPPED, detail.encode())


def _refuse_while_stopped(site: Site) -> None:
    path = site.config.state_dir / STOPPED
    if path.exists():
        detail = path.read_text(encoding="utf-8")
        raise SiteDeclined(DeclineReason.BAD_REQUEST, f"stopped since: {detail}; mend it and remove {path}")


def _check_heads(joined: Joined, tasks: Mapping[str, Task]) -> None:
    """Decline heads the solver cannot train, now: once a round is charged it is too late."""
    try:
        open_solver(joined.run.solver, "solver").check_modules(untrained_modules(joined.run, tasks))
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
