"""The evidence that a site's own files give for an output check: its ledger, its audit, and attacks on its records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.audit.membership import Promise, compute_auc, compute_rates, is_contradicted
from client.audit.sacro import make_report
from client.config import SiteConfig
from client.ledger.events import EVALUATION
from client.ledger.history import Charge, History
from client.protocol.approvals import Approvals
from client.protocol.site import Site, SiteDeclined, digest_of_offer, find_ledger, joined_run
from common.events import AuditVerdict, RunAudited, read_site_journal, select_events
from common.exports.parts.evidence import (
    AttackOutcome,
    ChargedReleases,
    Evidence,
    LedgerStatement,
    open_leaving_model,
)
from common.privacy.accounting import compute_epsilon
from common.privacy.noise import Entropy, os_entropy
from common.serving.folder import MODEL, ModelConfig, find_model, read_config
from common.types import RELATION, BadInput

NO_ATTACK = "No attack was made (`--no-attack`)."
OWN_LEDGER = "From the ledger of the site's population, which verified."


def collect_site_evidence(
    config: SiteConfig,
    path: Path | None = None,
    *,
    run_id: str | None = None,
    attack: bool = True,
    observe: Any = None,
    entropy: Entropy = os_entropy,
) -> Evidence:
    """Returns what a site knows of a run's model; nothing is sent or charged.

    Args:
        config: the site's file, with one coordinator selected.
        path: folder of the model that would leave, or of its run; None for the one in the run's folder here.
        run_id: id of the run; None for the model's.
        attack: whether the model is attacked with the site's records.
        observe: receives the progress of the attack: phase, steps done, steps in all.
        entropy: source of the attack's random numbers.

    Raises:
        BadInput: there is no such run here, it has not ended, the model is not its, or its records are gone.
        DigestMismatch: a head was changed since the model was written.
        LedgerDamaged: the ledger does not verify.
    """
    if path is None and run_id is None:
        raise BadInput("expected a model's folder or --run ID, got neither")
    name = run_id or read_config(find_model(path or Path())).run
    site = Site(config, entropy)
    try:
        joined = joined_run(site, name)
    except SiteDeclined as declined:
        raise BadInput(f"run {name}: {declined.detail}") from declined
    folder, model = open_leaving_model(joined.folder / MODEL if path is None else path)
    own = read_config(joined.folder / MODEL)
    if (model.run, model.heads) != (own.run, own.heads):
        raise BadInput(f"{folder}: expected the model of run {name} as it arrived here, got another one")
    statement = state_ledger(config, name)
    verdicts = find_verdicts(config, name)
    outcomes, note = None, NO_ATTACK
    if attack:
        from client.personal.membership import attack_heads  # Here: it loads torch.

        try:
            found = attack_heads(site, name, observe or _ignore)
        except SiteDeclined as declined:
            raise BadInput(f"run {name}: {declined.detail}; use --no-attack") from declined
        outcomes = judge_attacks({config.name: found}, [statement], model)
        note = explain_attacks(f"all units of site {config.name} that it prepared for the run")
    digest = digest_of_offer(joined.folder)
    return Evidence(
        model=folder,
        config=model,
        party=f"site {config.name}",
        statements=(statement,),
        sent=_list_sent(joined.folder, statement),
        verdicts=verdicts,
        audit_note="The site holds no audit of this run: the run did not require one.",
        digests={"offer, as the site approved it": digest, **_find_approval(config, digest)},
        settings={"offer.json": (joined.folder / "offer.json").read_bytes()},
        attacks=outcomes,
        attack_note=note,
    )


def _ignore(phase: str, done: int, total: int) -> None:
    del phase, done, total


def state_ledger(config: SiteConfig, run_id: str) -> LedgerStatement:
    """Returns the price of a run at a site, from its ledger.

    Args:
        config: the site's file, with one coordinator selected.
        run_id: id of the run.

    Raises:
        BadInput: there is no ledger, or no charge of the run in it.
        LedgerDamaged: it does not verify.
    """
    ledger = find_ledger(config)
    if ledger is None:
        raise BadInput(f"site {config.name}: expected the ledger of {config.registry}, found none: nothing was charged")
    history, charged = ledger.history(), config.name_charge(run_id)
    own = {number: each for number, each in history.charges.items() if each.run == charged}
    if not own:
        raise BadInput(f"site {config.name}: expected charges of run {run_id} in its ledger, found none")
    first = min(own)
    earlier = {number: each for number, each in history.charges.items() if number < first}
    # A later recovery's assumption is about what came before it too.
    before = History(history.terms, earlier, history.assumed).compute_epsilon()
    chosen = history.find_filter()
    return LedgerStatement(
        site=config.name,
        source=OWN_LEDGER,
        population=config.registry,
        unit=history.terms.unit,
        delta=history.terms.delta,
        relation=RELATION,
        releases=group_charges(list(own.values())),
        epsilon=history.compute_run_epsilon(charged),
        budget=history.terms.epsilon_cap,
        before=before,
        now=history.compute_epsilon(),
        filter=None if chosen is None else chosen.kind,
    )


def group_charges(charges: Sequence[Charge]) -> tuple[ChargedReleases, ...]:
    """Returns charges with equal ones together, each round once for each time that it was charged."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for each in charges:
        groups.setdefault((each.purpose, each.mechanism), []).append(each.round)
    return tuple(
        ChargedReleases(purpose, tuple(sorted(rounds)), mechanism) for (purpose, mechanism), rounds in groups.items()
    )


def find_verdicts(config: SiteConfig, run_id: str) -> dict[str, AuditVerdict]:
    """Returns the result of the site's last audit of a run, by the site's name; empty where it made none."""
    events = select_events(read_site_journal(config.coordinator_dir / "site.jsonl"), RunAudited)
    own = [event.verdict for event in events if event.run_id == run_id]
    return {config.name: own[-1]} if own else {}


def _list_sent(folder: Path, statement: LedgerStatement) -> tuple[str, ...]:
    replies = [path for path in sorted((folder / "replies").glob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in replies)
    charged = sum(len(each.rounds) for each in statement.releases)
    return (
        f"- {charged} release(s) were charged for this run; {len(replies)} stored repl{_end(len(replies))}, {size:,} "
        "bytes, went to the coordinator or may have. They are in `replies/` of the run's folder, and are noised as "
        "section 4 says.",
        "- What the coordinator made of all sites' updates is the model. Other sites have it too.",
    )


def _end(count: int) -> str:
    return "y" if count == 1 else "ies"


def _find_approval(config: SiteConfig, digest: str) -> dict[str, str]:
    if config.approval == "automatic":
        return {}
    approved = [each for each in Approvals(config.coordinator_dir).all() if each.digest == digest]
    return {"approval by the site's staff, of the offer": digest} if approved else {}


# --- attacks ---------------------------------------------------------------------------------------------------------


def explain_attacks(units: str) -> str:
    """Returns a sentence that says who was attacked how, and by what rule attacks are bounded.

    Args:
        units: names the units, in words.
    """
    return (
        f"Membership inference with {units}: members trained the model, others were held out. The loss attack takes a "
        "unit with a small loss for a member; LiRA (offline, one spread for all) compares its loss with heads that "
        "were trained without it, on random halves of the same units. Where units were held out by something else than "
        "chance, such as a published split, the attacks see that difference too. A bound is the largest value that the "
        "charges of section 4 allow to any attack; where the site's releases were one Gaussian mechanism it is exact, "
        "otherwise it follows from ε and δ."
    )


def judge_attacks(
    sites: Mapping[str, Mapping[str, Any]], statements: Sequence[LedgerStatement], model: ModelConfig
) -> tuple[AttackOutcome, ...]:
    """Returns the result of every attack on every task, over the units of some sites together.

    Args:
        sites: site -> task -> the scores of its units (`client.personal.membership.AttackedUnits`).
        statements: price at each of them; the weakest promise bounds the attacks.
        model: what is known of the model.
    """
    from client.personal.membership import LIRA, NUM_SHADOWS, make_scores

    promises = [_read_promise(each) for each in statements] if model.privacy is not None else []
    about = {
        "name": "linear or small heads on frozen features",
        "run": model.run,
        "rounds": model.rounds,
        "solver": model.solver,
        "epsilon": [each.epsilon if math.isfinite(each.epsilon) else None for each in statements],
        "delta": [each.delta for each in statements],
    }
    shadows = {"n_shadow_models": NUM_SHADOWS, "mode": "offline", "fix_variance": True}
    outcomes = []
    for task in model.tasks:
        own = {site: found[task] for site, found in sites.items() if task in found}
        for name, scores in make_scores(own).items():
            promise = max(promises, key=lambda each: each.auc, default=None)
            auc, interval = compute_auc(scores)
            outcomes.append(
                AttackOutcome(
                    name=name,
                    task=task,
                    num_members=len(scores.member_M),
                    num_others=len(scores.other_N),
                    auc=auc,
                    auc_interval=interval,
                    auc_bound=None if promise is None else promise.auc,
                    rates=compute_rates(scores, promise),
                    contradicts=is_contradicted(scores, promise),
                    report=make_report(name, scores, {"task": task, **(shadows if name == LIRA else {})}, about),
                )
            )
    return tuple(outcomes)


def _read_promise(statement: LedgerStatement) -> Promise:
    """Returns the bound on attacks that a site's releases for training give: evaluations are no part of the model."""
    trained = [group for group in statement.releases if group.purpose != EVALUATION]
    training = [group.mechanism for group in trained for _ in group.rounds]
    return Promise.of(training, compute_epsilon(training, statement.delta), statement.delta)
