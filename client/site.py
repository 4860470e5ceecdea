"""One site's side of a run: join, prepare, train, finish. What leaves is decided here and nowhere else.

The order inside `train` is the promise: the identical request gets the stored bytes; the ledger is charged durably
before a record is touched; the reply is stored before it is sent, so that noise is never drawn twice for one request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import RecordDict

from client.approvals import Approvals, Offer
from client.audit_gate import AuditTooSlow, audit_verdict
from client.backbone_store import BackboneStore
from client.data import open_units, prepare
from client.evaluation import noised_sums
from client.features import FeatureStore
from client.history import EVALUATION, TRAINING, Purpose
from client.ledger import Ledger, Reservation
from client.limits import refuse_what_does_not_fit
from client.replies import Replies, ReplyDamaged
from client.solvers import Solver, one_thread, open_solver
from common import wire
from common.config import NoisedEvaluation, Privacy, RunConfig, SiteConfig, parse
from common.files import private_folder, write_atomic
from common.heads import initial_heads, load_parameters
from common.journal import FileJournal, Journal
from common.offers import offer_bytes, run_digest
from common.privacy.accounting import Mechanism
from common.privacy.noise import Entropy, NoiseStream
from common.tasks import Task, open_task
from common.types import (
    BadInput,
    BudgetExhausted,
    Delta,
    DigestMismatch,
    Heads,
    LedgerDamaged,
    Plan,
    Refusal,
    RunFailed,
    heads_digest,
)

STOPPED = "stopped.txt"
MAX_STEPS = 1_000_000
"""Steps of a whole run; more would hold a site for hours."""


class DeclinedRequest(Exception):
    """A request this site does not fulfil. The refusal is sent; the detail stays in the site's own journal."""

    def __init__(self, refusal: Refusal, detail: str) -> None:
        super().__init__(f"{refusal.value}: {detail}")
        self.refusal = refusal
        self.detail = detail


@dataclass(frozen=True)
class Site:
    """A data holder: its settings, where its noise keys come from, and who is told how far encoding is."""

    config: SiteConfig
    entropy: Entropy
    progress: Callable[[int, int], None] | None = None

    @property
    def share(self) -> NoisedEvaluation | None:
        """The part of the budget that is held for evaluations; None where held-out units are evaluated locally."""
        return None if self.config.evaluation == "local" else self.config.evaluation

    @property
    def journal(self) -> Journal:
        """The site's own record of what it sent and refused."""
        return FileJournal(private_folder(self.config.state_dir) / "site.jsonl")

    def ledger(self) -> Ledger:
        """What this site's registry has spent.

        Raises:
            LedgerDamaged: it does not verify, or all ledgers are gone from a site that has answered before.
        """
        config = self.config
        if self.has_replies() and Ledger.find(config.state_dir / "ledgers", config.registry) is None:
            raise LedgerDamaged(f"ledger {config.registry}: it is missing at a site that has answered before")
        return Ledger.open(
            config.state_dir / "ledgers",
            registry=config.registry,
            unit=config.unit,
            epsilon_cap=config.budget.epsilon,
            delta=config.budget.delta,
        )

    def has_replies(self) -> bool:
        """Whether a reply is stored from any run: then something may have left."""
        return any((self.config.state_dir / "runs").glob("*/replies/*"))

    def backbones(self) -> BackboneStore:
        """Backbones received so far."""
        return BackboneStore(self.config.state_dir / "backbones")

    def features(self) -> FeatureStore:
        """Cached features; sites of one simulation may share the folder."""
        return FeatureStore(self.features_folder())

    def features_folder(self) -> Path:
        """Where cached features are."""
        return (self.config.cache_dir or self.config.state_dir) / "features"

    def device(self) -> torch.device:
        """The device to encode and train on."""
        wanted = self.config.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise BadInput("device: expected a CUDA device, found none; write `device: auto` or `cpu`")
        return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Joined:
    """What a site agreed to in one run, as kept on its disk."""

    run_id: str
    run: RunConfig
    backbone_digest: str
    folder: Path

    @property
    def privacy(self) -> Privacy | None:
        """Requested privacy; None in a non-private run."""
        return None if self.run.privacy == "non_private" else self.run.privacy

    def tasks(self, config: SiteConfig) -> dict[str, Task]:
        """The run's tasks that this site takes part in."""
        return {
            name: open_task(spec, f"tasks.{name}")
            for name, spec in self.run.tasks.items()
            if name in config.tasks and (config.allow.tasks == "any" or name in config.allow.tasks)
        }


# --- the five requests -----------------------------------------------------------------------------------------------


def join(site: Site, request: wire.JoinRequest) -> wire.JoinReply:
    """Agree to a run or decline it; nothing is spent and no record is opened.

    Raises:
        DeclinedRequest: a task, backbone, solver, unit, size or the whole run's price is not acceptable here, nobody
            has approved the run, or it requires an audit that the solver does not pass here.
    """
    _refuse_while_stopped(site)
    joined = _read_offer(site, request)
    tasks = joined.tasks(site.config)
    if not tasks:
        raise DeclinedRequest(Refusal.TASK_NOT_ALLOWED, "no task of the run is configured and allowed here")
    check_allowed(site.config, joined)
    # Before anything about the budget is answered: else offers could bisect what is left of it.
    try:
        _check_approved(site, joined.run_id, run_digest(request.run, request.backbone_digest))
    except DeclinedRequest:
        _let_wait(site, request)
        raise
    try:
        refuse_what_does_not_fit(joined.run, tasks)
    except BadInput as error:
        raise DeclinedRequest(Refusal.BAD_REQUEST, str(error)) from error
    plan = plan_of(site.config, joined)
    _check_heads(joined, tasks)
    ledger = site.ledger()
    # A resumed run was partly paid for; each round's reservation stays the gate.
    paid = {charge.round for charge in ledger.charges() if (charge.run, charge.purpose) == (joined.run_id, TRAINING)}
    rounds = joined.run.rounds - len(paid)
    whole = [Mechanism.of(replace(plan, steps=plan.steps * rounds))] if rounds > 0 else []
    if plan.private and whole and not ledger.affords(whole, site.share):
        raise DeclinedRequest(Refusal.BUDGET, "the run's whole price exceeds what the registry has left")
    _pass_audit(site, joined, request, tasks)
    write_atomic(private_folder(joined.folder) / "offer.json", offer_bytes(request.run, request.backbone_digest))
    site.journal.write("joined", run=joined.run_id, tasks=sorted(tasks))
    return wire.JoinReply(
        site=site.config.name,
        tasks={name: site.config.tasks[name].public_size for name in tasks},
        unit=site.config.unit,
        delta=site.config.budget.delta,
        budget_epsilon=site.config.budget.epsilon,
        has_backbone=_has_backbone(site, request.backbone_digest),
        held_parts=site.backbones().held_parts(request.backbone_digest),
    )


def keep_part(site: Site, request: wire.PartRequest) -> wire.Ready:
    """Keep one part of the backbone that was agreed on, unless the whole is here already.

    Raises:
        DeclinedRequest: not joined.
    """
    joined = joined_run(site, request.run_id)
    if not site.backbones().has(joined.backbone_digest):
        site.backbones().put_part(joined.backbone_digest, request.index, request.total, request.data)
    return wire.Ready()


def prepare_run(site: Site, request: wire.PrepareRequest) -> wire.Ready:
    """Put the backbone together where its parts were sent, encode records, write the run's label arrays.

    Raises:
        DeclinedRequest: not joined, or the backbone is not the one agreed on.
    """
    _refuse_while_stopped(site)
    joined = joined_run(site, request.run_id)
    store, digest = site.backbones(), joined.backbone_digest
    try:
        sent = request.spec is not None and not store.has(digest)
        backbone = store.assemble(digest, request.spec) if request.spec and sent else store.open(digest)
    except DigestMismatch as error:
        raise DeclinedRequest(Refusal.BACKBONE_NOT_ALLOWED, str(error)) from error
    tasks = joined.tasks(site.config)
    try:
        preparation = prepare(
            site.config,
            tasks,
            dict.fromkeys(tasks, backbone),
            site.features(),
            joined.folder / "data",
            device=site.device(),
            progress=site.progress,
        )
    except BadInput as error:
        _stop(site, str(error))
        raise
    prepared = {"feature_dim": backbone.feature_dim, "offer": _digest_of_offer(joined.folder)}
    # Last: its presence marks complete preparation.
    write_atomic(joined.folder / "prepared.json", json.dumps(prepared).encode())
    site.journal.write(
        "prepared",
        run=joined.run_id,
        problems=sum(problem.row is not None for problem in preparation.problems),
        precision_error=preparation.precision_error,
    )
    return wire.Ready()


def train(site: Site, request: wire.TrainRequest) -> RecordDict:
    """One round's contribution, or the stored one if this very request was answered before.

    Raises:
        DeclinedRequest: not joined or prepared, heads that do not fit, or a budget that does not cover the plan.
    """
    joined = joined_run(site, request.run_id)

    def answer(digest: str) -> tuple[wire.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        _check_approved(site, joined.run_id, _digest_of_offer(joined.folder))
        tasks = _requested_tasks(site, joined, request)
        heads = _heads(joined, tasks, request.heads)
        plan = plan_of(site.config, joined)
        reservation = site.ledger().reserve(
            Mechanism.of(plan),
            run=joined.run_id,
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
            share=site.share,
        )
        delta = _solve(site, joined, request.round, tasks, heads, plan)
        return wire.TrainReply(delta, plan), reservation, plan.steps

    return _answered_once(site, joined, request, TRAINING, answer)


def evaluate(site: Site, request: wire.EvaluateRequest) -> RecordDict:
    """Noised statistics of held-out units under these heads, or the stored ones; charged to the share for evaluations.

    Raises:
        DeclinedRequest: not joined or prepared, a round the run does not evaluate, heads that do not fit, a share that
            does not cover it, or a site that evaluates locally only.
    """
    joined = joined_run(site, request.run_id)
    share, asked = site.share, joined.run.evaluation
    if share is None:
        raise DeclinedRequest(Refusal.EVALUATION_LOCAL, "this site's file says: nothing about held-out units is sent")
    if asked is None or not asked.due(request.round, joined.run.rounds):
        raise DeclinedRequest(Refusal.BAD_REQUEST, "the run does not evaluate after this round")

    def answer(digest: str) -> tuple[wire.Reply, Reservation, int]:
        _check_approved(site, joined.run_id, _digest_of_offer(joined.folder))
        tasks = _requested_tasks(site, joined, request)
        heads = _heads(joined, tasks, request.heads)
        reservation, mechanism = site.ledger().reserve_evaluation(
            share,
            len(tasks),
            run=joined.run_id,
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
        )
        device = site.device()
        stream = NoiseStream(site.entropy(f"{joined.run.name}/{site.config.name}/evaluation/{request.round}"))
        with one_thread():
            sums = noised_sums(
                {name: head.to(device) for name, head in heads.items()},
                tasks,
                open_units(joined.folder / "data", "test", list(tasks), device),
                mechanism=mechanism,
                stream=stream,
            )
        return wire.EvaluateReply(sums, mechanism.noise_multiplier), reservation, mechanism.steps

    return _answered_once(site, joined, request, EVALUATION, answer)


def finish(site: Site, request: wire.FinishRequest) -> wire.Ready:
    """Keep the run's final heads, verified by digest."""
    joined = joined_run(site, request.run_id)
    tasks = joined.tasks(site.config)
    if set(request.heads) != set(tasks):
        raise DeclinedRequest(Refusal.TASK_NOT_ALLOWED, "the final heads are not those of this site's tasks")
    if not (joined.folder / "prepared.json").exists():
        raise DeclinedRequest(Refusal.NOT_PREPARED, "the run's data are not prepared")
    _heads(joined, tasks, request.heads)
    if heads_digest(request.heads) != request.digest:
        raise DeclinedRequest(Refusal.BAD_REQUEST, "the final heads differ from their digest")
    records = wire.encode(request)
    write_atomic(joined.folder / "final_heads.bin", wire.to_bytes(records))
    site.journal.write("finished", run=joined.run_id, heads=request.digest)
    return wire.Ready()


# --- what they share -------------------------------------------------------------------------------------------------


def _has_backbone(site: Site, digest: str) -> bool:
    """Whether the backbone need not be sent: it is here, or the site opens it from its own files."""
    try:
        return site.backbones().adopt(digest, site.config.own_backbones)
    except BadInput as error:
        site.journal.write("own_backbone_unusable", detail=str(error))
        return False


def _check_approved(site: Site, run_id: str, digest: str) -> None:
    """Whether somebody here approved the run under this digest, or need not. Raises DeclinedRequest."""
    if site.config.approval == "automatic":
        return
    # One approval is for one run: resuming is free, offering the same again under another id is not.
    others = {charge.run for charge in site.ledger().charges()} - {run_id}
    used = sum(_offered_as(site, run) == digest for run in others)
    if Approvals(site.config.state_dir).count(digest) <= used:
        detail = f"nobody approved run {digest}; see `python -m client approve --list`"
        raise DeclinedRequest(Refusal.NOT_APPROVED, detail)


def _let_wait(site: Site, request: wire.JoinRequest) -> None:
    """Keep an offer that nobody approved, once, for `python -m client approve`."""
    offer = Offer(request.run, request.backbone_digest)
    if Approvals(site.config.state_dir).wait(offer):
        site.journal.write("waiting", run=request.run_id, digest=offer.digest)


def _offered_as(site: Site, run_id: str) -> str | None:
    """The digest a run was offered under; None where its folder is gone."""
    folder = site.config.state_dir / "runs" / run_id
    return _digest_of_offer(folder) if (folder / "offer.json").exists() else None


def _read_offer(site: Site, request: wire.JoinRequest) -> Joined:
    try:
        run = parse(RunConfig, request.run, base=Path("/nonexistent"))
    except BadInput as error:
        raise DeclinedRequest(Refusal.BAD_REQUEST, str(error)) from error
    folder = _run_folder(site, request.run_id)
    kept = folder / "offer.json"
    # Labels were encoded and plans accounted for the first offer: a second one under the same id could make a round's
    # failure depend on a record.
    if kept.exists() and kept.read_bytes() != offer_bytes(request.run, request.backbone_digest):
        raise DeclinedRequest(Refusal.BAD_REQUEST, "another offer was made under the same run id")
    return Joined(request.run_id, run, request.backbone_digest, folder)


def _pass_audit(site: Site, joined: Joined, request: wire.JoinRequest, tasks: Mapping[str, Task]) -> None:
    """Audit the solver here where the run requires it; the result stays at the site. Raises DeclinedRequest."""
    if joined.run.audit != "required":
        return
    sizes = {name: site.config.tasks[name].public_size for name in tasks}
    digest = run_digest(request.run, request.backbone_digest)
    try:
        verdict = audit_verdict(site.config, joined.run, digest, sizes, site.entropy)
    except (AuditTooSlow, BadInput, RunFailed) as error:
        raise DeclinedRequest(Refusal.AUDIT, f"the run requires an audit, and it could not be done: {error}") from error
    site.journal.write("audit", run=joined.run_id, **verdict)
    if not verdict["passed"]:
        raise DeclinedRequest(Refusal.AUDIT, f"the audit that the run requires failed: {verdict['reasons'][0]}")


def _digest_of_offer(folder: Path) -> str:
    return hashlib.sha256((folder / "offer.json").read_bytes()).hexdigest()


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
        raise DeclinedRequest(Refusal.BAD_REQUEST, f"stopped since: {detail}; mend it and remove {path}")


def joined_run(site: Site, run_id: str) -> Joined:
    """A run this site joined. Raises DeclinedRequest for any other."""
    folder = _run_folder(site, run_id)
    if not (folder / "offer.json").exists():
        raise DeclinedRequest(Refusal.UNKNOWN_RUN, "this site did not join the run")
    offer = json.loads((folder / "offer.json").read_text(encoding="utf-8"))
    run = parse(RunConfig, offer["run"], base=folder)
    return Joined(run_id, run, offer["backbone_digest"], folder)


def _run_folder(site: Site, run_id: str) -> Path:
    # A run id comes from the network and becomes a folder name.
    plain = run_id.isascii() and all(char.isalnum() or char in "-_" for char in run_id)
    if not run_id or len(run_id) > 128 or not plain:
        raise DeclinedRequest(Refusal.BAD_REQUEST, "the run's id is not a plain name")
    return site.config.state_dir / "runs" / run_id


def check_allowed(config: SiteConfig, joined: Joined) -> None:
    """Whether a run's backbone, solver and privacy are acceptable here. Raises DeclinedRequest."""
    allow = config.allow
    if allow.backbones != "any" and joined.backbone_digest not in allow.backbones:
        raise DeclinedRequest(Refusal.BACKBONE_NOT_ALLOWED, "the backbone's digest is not allowed here")
    if allow.solvers != "any" and joined.run.solver.kind not in allow.solvers:
        raise DeclinedRequest(Refusal.SOLVER_NOT_ALLOWED, "the solver is not allowed here")
    if joined.privacy is None and not allow.non_private:
        raise DeclinedRequest(
            Refusal.SOLVER_NOT_ALLOWED, "the run is not private and this site's file does not allow it"
        )
    if joined.privacy is not None and joined.privacy.unit != config.unit:
        raise DeclinedRequest(Refusal.UNIT_DIFFERS, f"the run protects {joined.privacy.unit}, this site {config.unit}")


def _check_heads(joined: Joined, tasks: Mapping[str, Task]) -> None:
    """Decline heads the solver cannot train, now: once a round is charged it is too late."""
    try:
        open_solver(joined.run.solver, "solver").check_heads(initial_heads(tasks, dict.fromkeys(tasks, 1), seed=0))
    except BadInput as error:
        raise DeclinedRequest(Refusal.BAD_REQUEST, str(error)) from error


def plan_of(config: SiteConfig, joined: Joined) -> Plan:
    """The public numbers of one round of a run here. Raises DeclinedRequest."""
    try:
        solver: Solver = open_solver(joined.run.solver, "solver")
        plan = solver.plan(joined.privacy, config.unit, joined.run.rounds)
    except BadInput as error:
        raise DeclinedRequest(Refusal.BAD_REQUEST, str(error)) from error
    if plan.steps * joined.run.rounds > MAX_STEPS:
        raise DeclinedRequest(Refusal.BAD_REQUEST, f"the run asks for more than {MAX_STEPS} steps")
    if solver.private != plan.private or plan.private != (joined.privacy is not None):
        raise DeclinedRequest(Refusal.SOLVER_NOT_ALLOWED, "solver, plan and requested privacy do not agree")
    return plan


def _answered_once(
    site: Site,
    joined: Joined,
    request: wire.TrainRequest | wire.EvaluateRequest,
    what: Purpose,
    answer: Callable[[str], tuple[wire.Reply, Reservation, int]],
) -> RecordDict:
    """The stored reply to this very request; else a new one, stored before it is sent.

    Args:
        site: who answers.
        joined: the run.
        request: what is asked.
        what: for the journal.
        answer: given the request's digest, charges and computes: the reply, its charge, and the number of releases.
    """
    digest = wire.request_digest(wire.encode(request))
    replies = Replies(joined.folder)
    about = {"run": joined.run_id, "round": request.round, "what": what}
    try:
        with replies.exclusive():
            stored = replies.find(digest)
            if stored is not None:
                site.journal.write("resent", **about, bytes=len(stored))
                return wire.from_bytes(stored)
            reply, reservation, num_releases = answer(digest)
            records = wire.encode(reply)
            data = wire.to_bytes(records)
            replies.store(digest, data)
            site.ledger().commit(reservation)
    except BudgetExhausted as error:
        raise DeclinedRequest(Refusal.BUDGET, str(error)) from error
    except ReplyDamaged as error:
        raise DeclinedRequest(Refusal.INTERNAL, str(error)) from error
    site.journal.write("sent", **about, mechanism=num_releases, bytes=len(data))
    return records


def _requested_tasks(site: Site, joined: Joined, request: wire.TrainRequest | wire.EvaluateRequest) -> dict[str, Task]:
    tasks = joined.tasks(site.config)
    if not 1 <= request.round <= joined.run.rounds:
        raise DeclinedRequest(Refusal.BAD_REQUEST, "the round is outside the run")
    if set(request.heads) != set(tasks):
        raise DeclinedRequest(Refusal.TASK_NOT_ALLOWED, "the heads are not those of this site's tasks")
    path = joined.folder / "prepared.json"
    if not path.exists() or json.loads(path.read_text(encoding="utf-8"))["offer"] != _digest_of_offer(joined.folder):
        raise DeclinedRequest(Refusal.NOT_PREPARED, "the run's data are not prepared, or for another offer")
    return tasks


def _heads(joined: Joined, tasks: Mapping[str, Task], heads: Heads) -> dict[str, torch.nn.Module]:
    feature_dim = json.loads((joined.folder / "prepared.json").read_text(encoding="utf-8"))["feature_dim"]
    modules = {}
    for name, task in tasks.items():
        module = task.head(feature_dim)
        try:
            load_parameters(module, heads[name])
        except BadInput as error:
            raise DeclinedRequest(Refusal.BAD_REQUEST, f"{name}: {error}") from error
        modules[name] = module
    return modules


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
            public_sizes={name: site.config.tasks[name].public_size for name in tasks},
            stream=stream,
        )
