"""A site: its settings, its folders, and what it knows of a run it joined."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from client.config import NoisedEvaluation, SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.measured import Measured, find_measured
from client.ledger.older_copy import check_claims, check_replies
from client.ledger.overlap import claim_run
from client.ledger.place import locate_ledgers
from client.protocol.approvals import Approvals
from client.solvers import Solver, SummingSolver, open_solver
from common.events import FileJournal, Journal, ReplySent, read_site_journal, select_events
from common.files import private_folder
from common.model.moments import (
    CLASSES,
    MOST_STORED_NOISE,
    SCATTER,
    get_subject,
    is_of_backbone,
    list_parts,
    select_parts,
)
from common.offers import parse_offer
from common.plugins import fulfils
from common.privacy.accounting import Mechanism
from common.privacy.shares import plan_moments
from common.run import RunConfig
from common.scorers import Scorer, compute_min_size, open_scorer
from common.secure_sum.attempt import Member
from common.secure_sum.identity import format_public_key, read_identity
from common.secure_sum.terms import SumRules
from common.tasks import LabelPrior, Task, WritesTexts, open_on_backbones, open_task, open_tasks
from common.types import (
    MAX_ROUND_STEPS,
    MAX_STEPS,
    BadInput,
    DeclineReason,
    DigestMismatch,
    Heads,
    LedgerDamaged,
    Plan,
    check_delta,
)

if TYPE_CHECKING:
    import torch

    from client.data.backbone_store import BackboneStore
    from client.data.feature_store import FeatureStore
    from common.model.backbones import Backbone
    from common.privacy.noise import Entropy

FIRST_ROUND = "first_round"
"""File of a run's folder that holds the first round that a site which joined late planned for; else there is none."""
_OF_TRAINING = ("head", "scale")
"""Settings of a task that change nothing of how frequent its labels are."""

SECURE_SUM = "secure_sum.json"
"""File of a run's folder that holds the secrets of its newest secure sum, until the final heads come."""

FINAL_HEADS = "final_heads.bin"
"""File of a run's folder that holds the final heads once they came."""
MODELS = "models"
"""Folder of a site's state folder with its records and heads for models that came without a run."""
CHOSEN = "chosen"
"""File of a choice's folder that holds the name of the candidate that was chosen, once it came."""
PERSONAL_HEADS = "personal_heads.private"
"""File of a run's folder that holds the heads which the site adapted to itself."""


class SiteDeclined(Exception):
    """A request that this site declines.

    Attributes:
        reason: the only part that is sent to the coordinator.
        detail: a sentence for the site's own journal.
        logged: True where the journal has said so before, so that it is not written again.
    """

    def __init__(self, reason: DeclineReason, detail: str, *, logged: bool = False) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
        self.logged = logged


@dataclass(frozen=True)
class Site:
    """A data holder.

    Attributes:
        config: its settings.
        entropy: where its noise keys come from.
        progress: told how far encoding is.
        opened: backbones by digest that are open in this process already (`BackboneStore`).
    """

    config: SiteConfig
    entropy: Entropy
    progress: Callable[[int, int], None] | None = None
    opened: Mapping[str, Backbone] | None = None

    @property
    def share(self) -> NoisedEvaluation | None:
        """The part of the budget that is held for evaluations; None where held-out units are evaluated locally."""
        return None if self.config.evaluation == "local" else self.config.evaluation

    @property
    def journal(self) -> Journal:
        """The site's own record of what it sent and refused."""
        return FileJournal(private_folder(self.config.coordinator_dir) / "site.jsonl")

    def ledger(self) -> Ledger:
        """Returns the ledger of this site's population.

        Raises:
            BadInput: there is one under other terms, or there are two.
            LedgerDamaged: it does not verify, is gone from a site that has answered before, or is an older copy.
        """
        config, folder = self.config, locate_ledgers(self.config)
        _check_ledger(config, folder, Ledger.find(folder, config.registry))
        return Ledger.open(
            folder,
            population=config.registry,
            unit=config.unit,
            epsilon_cap=config.budget.epsilon,
            delta=config.budget.delta,
            filter=config.budget.filter,
        )

    @contextmanager
    def hold_ledger(self) -> Iterator[Ledger]:
        """Yields what `ledger` returns, for several questions that it is read and verified once for (`Ledger.hold`).

        Raises:
            BadInput: see `ledger`.
            LedgerDamaged: see `ledger`.
        """
        known = Ledger.find(locate_ledgers(self.config), self.config.registry)
        with nullcontext() if known is None else known.hold():
            yield self.ledger()

    def backbones(self) -> BackboneStore:
        """Returns the store of the backbones received so far."""
        from client.data.backbone_store import BackboneStore

        limit = int(self.config.backbone_limit_gib * 2**30)
        return BackboneStore(self.config.coordinator_dir / "backbones", self.opened, max_bytes=limit)

    def features(self) -> FeatureStore:
        """Cached features; sites of one simulation may share the folder."""
        from client.data.feature_store import FeatureStore

        return FeatureStore(self.features_folder())

    def features_folder(self) -> Path:
        """Returns the folder of cached features."""
        return (self.config.cache_dir or self.config.state_dir) / "features"

    def device(self) -> torch.device:
        """Returns the device to encode and train on."""
        from common.model.backbones import choose_device  # Here: a command that reads a budget needs no torch.

        return choose_device(self.config.device)


def find_ledger(config: SiteConfig) -> Ledger | None:
    """Returns the ledger of a site's population as it is; None where there never was one.

    Raises:
        BadInput: there are two.
        LedgerDamaged: it is gone from a site that has answered before, or lacks the charge of an answer.
    """
    folder = locate_ledgers(config)
    ledger = Ledger.find(folder, config.registry)
    _check_ledger(config, folder, ledger)
    return ledger


def _check_ledger(config: SiteConfig, folder: Path, ledger: Ledger | None) -> None:
    """Checks what was found of a ledger in a folder of ledgers; raises LedgerDamaged as `find_ledger` does."""
    if ledger is None and has_replies(config):
        raise LedgerDamaged(f"ledger {config.registry}: it is missing in {folder}, at a site that has answered before")
    if ledger is not None:
        check_claims(ledger)
        check_replies(ledger, config.list_coordinator_dirs())


def has_replies(config: SiteConfig) -> bool:
    """Returns true if a reply of any run is stored or was noted as sent: then something may have left."""
    return any(
        any(place.glob("runs/*/replies/*")) or select_events(read_site_journal(place / "site.jsonl"), ReplySent)
        for place in config.list_coordinator_dirs().values()
    )


@dataclass(frozen=True)
class Joined:
    """The agreement of a site to one run, as kept on its disk.

    Attributes:
        run_id: the run's id.
        run: the run's settings.
        backbones: digests of all of the run's backbones, by name.
        folder: the run's folder at the site.
        first_round: the first round for which the site plans its noise and its price.
        offer_digest: the digest under which the run was offered; "" where it came without an offer.
    """

    run_id: str
    run: RunConfig
    backbones: Mapping[str, str]
    folder: Path
    first_round: int = 1
    offer_digest: str = ""

    @property
    def num_rounds(self) -> int:
        """The number of rounds over which the site plans the requested privacy."""
        return self.run.rounds - self.first_round + 1

    def tasks(self, config: SiteConfig) -> dict[str, Task]:
        """The run's tasks that this site takes part in."""
        return {
            name: self._open_task(name)
            for name in self.run.tasks
            if name in config.tasks and (config.allow.tasks == "any" or name in config.allow.tasks)
        }

    # Opened once: a run is remembered, and each of its rounds asks several times.
    def _open_task(self, name: str) -> Task:
        if name not in self._opened:
            self._opened[name] = open_task(self.run.tasks[name], f"tasks.{name}")
        return self._opened[name]

    @cached_property
    def _opened(self) -> dict[str, Task]:
        return {}

    @cached_property
    def heads(self) -> dict[tuple[str, int], torch.nn.Module]:
        """Task and number of features -> its head, whose values are those of the last request (`load_kept_modules`)."""
        return {}

    @cached_property
    def solver(self) -> Solver:
        """The run's solver.

        Raises:
            BadInput: its settings are not valid.
        """
        return open_solver(self.run.solver, "solver")

    def sizes(self, config: SiteConfig) -> dict[str, int]:
        """The entries of the heads that this site trains, with their public sizes: its tasks', and those of trunks."""
        return self.run.parameter_group_sizes({name: config.tasks[name].public_size for name in self.tasks(config)})

    def digests(self, tasks: Iterable[str]) -> dict[str, str]:
        """Digest of each backbone, by name, that some of the run's tasks stand on: no other comes to this site."""
        needed = {name for task in tasks for name in self.run.backbones_of(task)}
        return {name: digest for name, digest in self.backbones.items() if name in needed}


def check_approved(site: Site, run_id: str, digest: str, *, use: bool) -> None:
    """Checks that somebody here approved the run under this digest, or need not. Raises SiteDeclined.

    Args:
        site: who is asked.
        run_id: of the run.
        digest: of its offer.
        use: before a charge: the run then has its approval for itself.
    """
    if site.config.approval == "automatic":
        return
    approvals = Approvals(site.config.coordinator_dir)
    if not (approvals.use(digest, run_id) if use else approvals.covers(digest, run_id)):
        suspension = approvals.find_suspension(digest)
        if suspension is not None:
            fault = f"{suspension}; the approval is not in force of run {digest}"
        elif any(approval.digest == digest for approval in approvals.all()):
            fault = f"each approval of run {digest} was used by an earlier run, and covers no other"
        else:
            fault = f"nobody approved run {digest}"
        detail = f"{fault}; see `headwater site approve SITE.yaml`"
        raise SiteDeclined(DeclineReason.NOT_APPROVED, detail)


def digest_of_offer(folder: Path) -> str:
    """The digest under which the run of a folder was offered."""
    return hashlib.sha256((folder / "offer.json").read_bytes()).hexdigest()


def joined_run(site: Site, run_id: str) -> Joined:
    """A run this site joined. Raises SiteDeclined for any other, and for one whose files are damaged."""
    folder = run_folder(site, run_id)
    try:
        offer = (folder / "offer.json").read_bytes()
    except FileNotFoundError:
        raise SiteDeclined(DeclineReason.UNKNOWN_RUN, "this site did not join the run") from None
    try:
        return _joined(run_id, offer, folder, read_first_round(folder))
    except BadInput as error:
        # The site's own file is damaged: no fault of the request.
        raise SiteDeclined(DeclineReason.INTERNAL, str(error)) from error


@lru_cache(maxsize=1024)
def _joined(run_id: str, offer: bytes, folder: Path, first_round: int) -> Joined:
    # Remembered for these very bytes: a site reads the same ones in every round.
    parsed = parse_offer(offer, str(folder / "offer.json"))
    digest = hashlib.sha256(offer).hexdigest()
    return Joined(run_id, parsed.run_config(folder), parsed.backbones, folder, first_round, digest)


def read_first_round(folder: Path) -> int:
    """Returns the first round that a site planned for when it joined the run of a folder.

    Raises:
        BadInput: the file that holds it is damaged.
    """
    path = folder / FIRST_ROUND
    text = path.read_bytes() if path.exists() else b"1"
    if not text.isdigit() or not 1 <= int(text[:10]) <= MAX_STEPS:
        raise BadInput(f"{path}: expected the number of a round, got something else")
    return int(text)


def run_folder(site: Site, run_id: str) -> Path:
    """Returns the folder in which a run is kept. Raises SiteDeclined where its id is not a plain name."""
    # A run id comes from the network and becomes a folder name.
    plain = run_id.isascii() and all(char.isalnum() or char in "-_" for char in run_id)
    if not run_id or len(run_id) > 128 or not plain:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run's id is not a plain name")
    return site.config.coordinator_dir / "runs" / run_id


def check_prepared(joined: Joined) -> dict[str, int]:
    """Returns the width of each task's features, as preparing the run noted it last.

    Raises:
        SiteDeclined: the run is not prepared, or for another offer, or the note is damaged.
    """
    try:
        prepared = json.loads((joined.folder / "prepared.json").read_bytes())
        feature_dims: dict[str, int] = prepared["feature_dims"]
        current = prepared["offer"] == joined.offer_digest
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        current = False
    if not current:
        raise SiteDeclined(DeclineReason.NOT_PREPARED, "the run's data are not prepared, or for another offer")
    return feature_dims


def check_allowed(config: SiteConfig, joined: Joined) -> None:
    """Checks that a run's backbones, solver and privacy are acceptable here. Raises SiteDeclined."""
    allow = config.allow
    for name, digest in joined.digests(joined.tasks(config)).items():
        # All or nothing: which of its tasks a site takes part in does not depend on weights.
        if allow.backbones != "any" and digest not in allow.backbones:
            raise SiteDeclined(
                DeclineReason.BACKBONE_NOT_ALLOWED, f"the digest of {joined.run.backbone_key(name)} is not allowed here"
            )
    if joined.run.choice is None and allow.solvers != "any" and joined.run.solver.kind not in allow.solvers:
        kind = joined.run.solver.kind
        raise SiteDeclined(
            DeclineReason.SOLVER_NOT_ALLOWED,
            f"solver {kind} is not allowed here; `allow.solvers` of the site file lists {', '.join(allow.solvers)}",
        )
    asked = joined.run.requested_privacy
    if asked is None and not allow.non_private:
        raise SiteDeclined(
            DeclineReason.SOLVER_NOT_ALLOWED, "the run is not private and this site's file does not allow it"
        )
    if asked is not None and asked.unit != config.unit:
        raise SiteDeclined(DeclineReason.UNIT_DIFFERS, f"the run protects {asked.unit}, this site {config.unit}")
    sizes = joined.sizes(config).values()
    if asked is not None and sizes:
        try:
            check_delta(asked.delta, max(sizes), "privacy.delta")
        except BadInput as error:
            raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error


def make_plan(config: SiteConfig, joined: Joined) -> Plan:
    """The public numbers of one round of a run here. Raises SiteDeclined."""
    if joined.run.choice is not None:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run is a choice among backbones, which trains nothing")
    try:
        solver = joined.solver
        plan = solver.plan(joined.run.training_privacy, config.unit, joined.num_rounds)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    if plan.steps > MAX_ROUND_STEPS:
        raise SiteDeclined(
            DeclineReason.BAD_REQUEST,
            f"a round has {plan.steps} steps, expected at most {MAX_ROUND_STEPS}; take more rounds of fewer steps",
        )
    if plan.steps * joined.num_rounds > MAX_STEPS:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, f"the run asks for more than {MAX_STEPS} steps")
    if solver.private != plan.private or plan.private != (joined.run.requested_privacy is not None):
        raise SiteDeclined(DeclineReason.SOLVER_NOT_ALLOWED, "solver, plan and requested privacy do not agree")
    return plan


@dataclass(frozen=True)
class PlannedVote:
    """The public numbers of a site's vote on a backbone.

    Attributes:
        name: name of the task.
        task: the task.
        scorer: what the vote minimises.
        epsilon: pure epsilon of the vote.
        min_size: declared size from which on a site votes.
        public_size: this site's declared size.
    """

    name: str
    task: LabelPrior
    scorer: Scorer
    epsilon: float
    min_size: int
    public_size: int

    @property
    def mechanism(self) -> Mechanism:
        """The price of the vote."""
        return self.make_mechanism(self.epsilon)

    def make_mechanism(self, epsilon: float) -> Mechanism:
        """Returns the price of the same vote at another pure epsilon."""
        return Mechanism.of_choice(epsilon, self.scorer.sensitivity)


def plan_vote(config: SiteConfig, joined: Joined) -> PlannedVote:
    """Returns the public numbers of a site's vote in a choice.

    Args:
        config: the site file.
        joined: the choice, with its task at this site.

    Raises:
        SiteDeclined: the run is no choice, or its scorer or its task is none that can be voted with.
    """
    run = joined.run
    if run.choice is None or run.requested_privacy is None or run.requested_privacy.target_epsilon is None:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run is no choice among backbones")
    ((name, task),) = joined.tasks(config).items()
    epsilon = run.requested_privacy.target_epsilon
    try:
        scorer = open_scorer(run.choice.scorer, "choice.scorer")
        if not isinstance(task, LabelPrior):
            raise BadInput(f"tasks.{name}: expected a task with classes to vote on, got kind {task.kind!r}")
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    least = compute_min_size(scorer, epsilon)
    return PlannedVote(name, task, scorer, epsilon, least, config.tasks[name].public_size)


def find_sum_rules(config: SiteConfig, joined: Joined) -> SumRules | None:
    """Returns the rules of a run's secure sums; None in a run that has none.

    Raises:
        SiteDeclined: this site's file has no secure sums or other rules, the run's solver does not release whole sums,
            or this site has not all of the run's tasks or came after the first round.
    """
    run = joined.run
    if run.trust is None:
        return None
    if config.secure_sum is None:
        raise SiteDeclined(DeclineReason.TRUST, "the run sums securely, and this site's file has no `secure_sum`")
    rules = config.secure_sum.rules
    if (run.cohort.min_sites, run.colluding) != (rules.min_sites, rules.colluding):
        raise SiteDeclined(
            DeclineReason.TRUST,
            f"the run sums at least {run.cohort.min_sites} sites of which {run.colluding} may collude, and this site's "
            f"file says {rules.min_sites} and {rules.colluding}",
        )
    if not isinstance(joined.solver, SummingSolver):
        raise SiteDeclined(
            DeclineReason.SOLVER_NOT_ALLOWED, f"solver {run.solver.kind} cannot be summed securely; kind head_sum can"
        )
    if set(joined.tasks(config)) != set(run.tasks):
        raise SiteDeclined(DeclineReason.TRUST, "the run sums securely, and this site has not all of its tasks")
    if joined.first_round > 1:
        raise SiteDeclined(DeclineReason.TRUST, "the run sums securely, and this site came after its first round")
    return rules


def claim_sums(config: SiteConfig, joined: Joined, ledger: Ledger) -> None:
    """Checks that no other site of this population takes part in a run of secure sums.

    Args:
        config: the site file.
        joined: the run.
        ledger: the population's ledger.

    Raises:
        SiteDeclined: one does.
    """
    if not claim_run(ledger.folder, config.name_charge(joined.run_id), config.name):
        raise SiteDeclined(
            DeclineReason.TRUST,
            f"another site of registry {config.registry} takes part in the run's secure sums, and a unit may be in a "
            "sum once",
        )


def open_member(config: SiteConfig) -> Member:
    """Returns this site as a member of secure sums, with its private identity key.

    Raises:
        SiteDeclined: the key is missing, or is not the one of this site in the roster.
    """
    assert config.secure_sum is not None  # `find_sum_rules` has looked.
    try:
        identity = read_identity(config.secure_sum.identity)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.TRUST, f"secure_sum.identity: {error}") from error
    if format_public_key(identity) != config.secure_sum.roster[config.name]:
        raise SiteDeclined(
            DeclineReason.TRUST, f"secure_sum.roster.{config.name}: expected the public key of secure_sum.identity"
        )
    return Member(config.name, identity, config.secure_sum.roster)


@dataclass(frozen=True)
class Measurement:
    """The sums that a run asks for before its first round, at one site.

    Attributes:
        parts: name of each sum -> its public factor.
        about: name -> plain values that say what the sum is of, at this population.
        stored: name -> what the population paid for in an earlier run, and is sent again.
        plan: the release of the others; None where there are none.
    """

    parts: Mapping[str, float]
    about: Mapping[str, object]
    stored: Mapping[str, Measured]
    plan: Plan | None

    @property
    def missing(self) -> dict[str, float]:
        """The sums that are not stored, with their factors."""
        return {name: factor for name, factor in self.parts.items() if name not in self.stored}


def plan_measurement(config: SiteConfig, joined: Joined) -> Measurement:
    """Returns what a run asks for before its first round here, and what of it was paid for before.

    Raises:
        SiteDeclined: the run's settings contradict each other.
    """
    run, own = joined.run, joined.tasks(config)
    try:
        everything = open_tasks(run)
        parts = select_parts(list_parts(run, everything), run, own)
        whole = plan_moments(run, config.unit)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    about = {name: _describe_part(name, config, joined, own) for name in parts}
    folder, stored = locate_ledgers(config) / config.registry, {}
    for name, factor in parts.items():
        assert whole is not None  # Where there are parts there is a plan.
        found = find_measured(folder, about[name])
        # Noisier than this run would make it: not worth what it saves.
        if found is not None and found.deviation <= MOST_STORED_NOISE * whole.noise_multiplier / factor:
            stored[name] = found
    reach = math.sqrt(sum(factor**2 for name, factor in parts.items() if name not in stored))
    plan = None
    if reach and whole is not None:
        # The noise stays; a unit can move fewer numbers.
        plan = replace(whole, clip_norm=reach, noise_multiplier=whole.noise_multiplier / reach)
        plan = plan if whole.private else whole
    return Measurement(parts, about, stored, plan)


def _describe_part(part: str, config: SiteConfig, joined: Joined, tasks: Mapping[str, Task]) -> dict[str, object]:
    """Returns what a sum is of: the same values in a later run mean the same sum."""
    subject = get_subject(part)
    if is_of_backbone(part):
        on_it = [name for name in tasks if joined.run.backbone_of(name) == subject]
        sources = sorted({config.tasks[name].source for name in on_it})
        kind = "scatter" if part.endswith(SCATTER) else "mean"
        return {kind: joined.backbones.get(subject, ""), "sources": sources, "unit": config.unit.value}
    settings = {key: value for key, value in joined.run.tasks[subject].settings().items() if key not in _OF_TRAINING}
    columns = config.tasks[subject].model_dump(mode="json", exclude={"mix"})
    # The key's former name: sums that were paid for under it are found again.
    columns["column"] = columns.pop("label")
    about = {"task": settings, "columns": columns, "unit": config.unit.value}
    if part.endswith(CLASSES):
        return {"classes": subject, "backbone": joined.backbones.get(joined.run.backbone_of(subject), ""), **about}
    return {"counts": subject, **about}


def load_modules(site: Site, joined: Joined, tasks: Mapping[str, Task], heads: Heads) -> dict[str, torch.nn.Module]:
    """Returns the parameters that were sent as modules to train: heads, and trunks.

    Args:
        site: the site.
        joined: the run.
        tasks: task -> its definition, for the tasks of this site.
        heads: parameter group -> parameters.

    Raises:
        SiteDeclined: they do not fit, a value is not finite or too large, or the run is not prepared.
    """
    feature_dims = check_prepared(joined)
    modules = {name: task.head(feature_dims[name]) for name, task in tasks.items()}
    return _load_parameters(modules | make_untrained_trunks(site, joined, tasks), heads)


def load_kept_modules(
    site: Site, joined: Joined, tasks: Mapping[str, Task], heads: Heads
) -> dict[str, torch.nn.Module]:
    """Returns what `load_modules` does, in heads that are built once for a run: one request at a time may have them.

    Args:
        site: the site.
        joined: the run, whose replies' lock is held.
        tasks: task -> its definition, for the tasks of this site.
        heads: parameter group -> parameters.

    Raises:
        SiteDeclined: see `load_modules`.
    """
    device, modules = site.device(), {}
    for name, feature_dim in check_prepared(joined).items():
        if name in tasks:
            key = (name, feature_dim)
            if key not in joined.heads:
                joined.heads[key] = tasks[name].head(feature_dim).to(device)
            modules[name] = joined.heads[key]
    trunks = make_untrained_trunks(site, joined, tasks)
    modules = {name: modules[name] for name in tasks} | {name: trunk.to(device) for name, trunk in trunks.items()}
    return _load_parameters(modules, heads)


def _load_parameters(modules: dict[str, torch.nn.Module], heads: Heads) -> dict[str, torch.nn.Module]:
    """Puts parameters that were sent into modules, and returns these. Raises SiteDeclined as `load_modules` does."""
    from common.model.parameters import load_parameters

    for name, module in modules.items():
        try:
            load_parameters(module, heads[name])
        except BadInput as error:
            raise SiteDeclined(DeclineReason.BAD_REQUEST, f"{name}: {error}") from error
    return modules


def open_on_stored(site: Site, joined: Joined) -> dict[str, Task]:
    """Returns the run's tasks that this site takes part in, those that write texts opened on their stored backbones.

    Args:
        site: the site.
        joined: the run.

    Raises:
        SiteDeclined: a backbone is gone or damaged, or does not fit.
    """
    tasks = joined.tasks(site.config)
    writing = [name for name, task in tasks.items() if fulfils(task, WritesTexts)]
    try:
        languages = {
            name: site.backbones().open_language(joined.backbones[joined.run.backbone_of(name)]) for name in writing
        }
        return open_on_backbones(tasks, languages)
    except (BadInput, DigestMismatch) as error:
        raise SiteDeclined(DeclineReason.NOT_PREPARED, str(error)) from error


def make_untrained_trunks(site: Site, joined: Joined, tasks: Mapping[str, Task]) -> dict[str, torch.nn.Module]:
    """Returns the trunks that some tasks' records pass, as their backbones have them; none where all is frozen.

    Args:
        site: the site.
        joined: the run.
        tasks: task -> its definition.
    """
    names = {joined.run.backbone_of(task) for task in tasks if joined.run.trunk_of(task) is not None}
    if not names:
        return {}
    from common.model.trunks import trunks

    store = site.backbones()
    return trunks(joined.run, {name: store.open(joined.backbones[name]) for name in sorted(names)})
