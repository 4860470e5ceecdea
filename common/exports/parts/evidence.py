"""The evidence for an output check: what its reader signs before weights leave a safe environment.

A folder with `evidence.md` (to read and sign) and beside it the same facts for programs: `ledger.json`, `SHA256SUMS` of
the files that would leave, the run's settings, the audit's verdict and the attacks' results. Parties that know
different things make it from the same parts: a site from its own ledger and records, a simulator from all its sites, a
coordinator from its summary. Nothing here reads a record.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.bundle import compute_code_digest
from common.events import AuditVerdict, Interval
from common.exports.parts.markdown import escape, format_number, make_table, quote
from common.files import private_folder, write_atomic
from common.privacy.accounting import Mechanism, round_up
from common.serving.folder import CONFIG, ModelConfig, find_model, read_backbone, read_config, read_heads
from common.types import BadInput, DigestMismatch, Relation, Unit, heads_digest

EVIDENCE = "evidence.md"
PERSONAL = ".private"
"""End of the names of files that never leave a site."""
MOST_PRICES, MOST_SITES = 20, 50
"""Different prices, and sites of one price, that the document lists; those of all are in `ledger.json`."""


@dataclass(frozen=True)
class ChargedReleases:
    """Equal releases of one run, from one ledger.

    Attributes:
        purpose: what was released.
        rounds: numbers of their rounds, in order; 0 is what was released before the first.
        mechanism: each of them.
    """

    purpose: str
    rounds: tuple[int, ...]
    mechanism: Mechanism


@dataclass(frozen=True)
class LedgerStatement:
    """The price of a run at one site.

    Attributes:
        site: name of the site.
        source: sentence that says from what the statement was made.
        unit: what the budget protects.
        delta: delta of the budget.
        relation: neighbouring relation.
        releases: what was charged for the run.
        epsilon: epsilon of these releases, composed at once; infinite where one has no noise.
        population: id of the people or records that the budget protects; None where it is not known.
        budget: epsilon of the whole budget; None where it is not known.
        before: epsilon of all that was charged before the run; None where it is not known.
        now: epsilon of all that is charged now; None where it is not known.
        filter: kind of the privacy filter that decides; None where it is not known.
    """

    site: str
    source: str
    unit: Unit
    delta: float
    relation: Relation
    releases: tuple[ChargedReleases, ...]
    epsilon: float
    population: str | None = None
    budget: float | None = None
    before: float | None = None
    now: float | None = None
    filter: str | None = None


@dataclass(frozen=True)
class AttackRate:
    """A true positive rate of an attack.

    Attributes:
        wanted: largest false positive rate that was allowed.
        false_positives: number of non-members that were taken for members.
        rate: part of the members that were recognised.
        interval: 95 % interval of that part, for this threshold.
        bound: largest part that the promise allows at the false positive rate that was reached; None without privacy.
    """

    wanted: float
    false_positives: int
    rate: float
    interval: Interval
    bound: float | None


@dataclass(frozen=True)
class AttackOutcome:
    """One attack on one task.

    Attributes:
        name: name of the attack.
        task: name of the task.
        num_members: number of units that took part in training.
        num_others: number of held-out units.
        auc: probability that a member's score is above a non-member's.
        auc_interval: its 95 % interval.
        auc_bound: the largest that the promise allows; None without privacy.
        rates: true positive rates at low false positive rates.
        contradicts: whether the attack shows more than the promise allows, at 95 % confidence.
        report: the same result in SACRO-ML's layout.
    """

    name: str
    task: str
    num_members: int
    num_others: int
    auc: float
    auc_interval: Interval
    auc_bound: float | None
    rates: tuple[AttackRate, ...]
    contradicts: bool
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Everything that the folder says.

    Attributes:
        model: folder of the model that would leave.
        config: what is known of it.
        party: who makes the evidence, in words, such as `site north`.
        statements: the price at each site.
        sent: sentences about what has left already.
        verdicts: who audited -> result; empty where none is known.
        audit_note: sentence about the audit where there is no result.
        digests: name -> digest of what the run was approved under, beside those of the model.
        settings: name of the file -> content: the run's settings as they were approved.
        attacks: results of attacks; None where none were made.
        attack_note: sentence about how they were made, or why not.
    """

    model: Path
    config: ModelConfig
    party: str
    statements: tuple[LedgerStatement, ...]
    sent: tuple[str, ...]
    verdicts: Mapping[str, AuditVerdict]
    audit_note: str
    digests: Mapping[str, str]
    settings: Mapping[str, bytes]
    attacks: tuple[AttackOutcome, ...] | None
    attack_note: str


@dataclass(frozen=True)
class LeavingFile:
    """A file that would leave.

    Attributes:
        path: its place in the model's folder.
        size: its size, in bytes.
        sha256: digest of its content.
    """

    path: str
    size: int
    sha256: str


def check_target(folder: Path) -> None:
    """Checks that evidence would be written over nothing. Raises BadInput."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: expected a new or empty folder, found something there")


def open_leaving_model(path: Path) -> tuple[Path, ModelConfig]:
    """Returns the folder and config of the model that would leave; its heads are verified.

    Raises:
        BadInput: there is none, or with it lie heads that a site adapted to itself, or what is no plain file.
        DigestMismatch: a head was changed since the model was written.
    """
    if path.suffix == PERSONAL:
        raise BadInput(f"{path}: expected a run's model, got heads that a site adapted to itself, which never leave it")
    folder = find_model(path)
    config = read_config(folder)
    _find_files(folder)
    read_heads(folder, config)
    return folder, config


def _check_weights(folder: Path, config: ModelConfig) -> None:
    """Raises DigestMismatch where heads or backbones are not the run's: anything could have been put in their place."""
    # Digests of files are in the same folder, for whoever may change one; this one is the run's.
    if heads_digest(read_heads(folder, config)) != config.heads:
        raise DigestMismatch(f"{folder}: the heads are not those that the run ended with")
    for name in config.backbones:
        if (folder / "backbones" / f"{name}.safetensors").is_file():
            _check_backbone(folder, name, config)


def _check_backbone(folder: Path, name: str, config: ModelConfig) -> None:
    from common.model.backbones import verify_blob  # Here: it loads torch.

    try:
        verify_blob(read_backbone(folder, name, config))
    except (BadInput, DigestMismatch) as error:
        raise DigestMismatch(f"{folder}: backbone {name}: its weights or settings are not the run's") from error


def list_leaving_files(folder: Path) -> list[LeavingFile]:
    """Returns the files of a model's folder, in order of their paths. Raises BadInput where something else is there."""
    found = []
    for path in _find_files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append(LeavingFile(path.relative_to(folder).as_posix(), path.stat().st_size, digest))
    return found


def _find_files(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise BadInput(f"{path}: expected plain files in the model's folder, got a link or device")
        if path.suffix == PERSONAL:
            raise BadInput(f"{path}: heads that a site adapted to itself never leave it; move the file away")
    return paths


def write_evidence(evidence: Evidence, folder: Path) -> list[Path]:
    """Writes the folder, readable by its owner only, and returns its files.

    Raises:
        BadInput: the folder is not empty, or what would leave is not a model's folder.
        DigestMismatch: a head or backbone is not the run's.
    """
    check_target(folder)
    _check_weights(evidence.model, evidence.config)
    leaving = list_leaving_files(evidence.model)
    files = {
        EVIDENCE: make_document(evidence, leaving).encode(),
        "ledger.json": _to_json([_show_statement(each) for each in evidence.statements]),
        "SHA256SUMS": "".join(f"{each.sha256}  {each.path}\n" for each in leaving).encode(),
        **evidence.settings,
    }
    if evidence.verdicts:
        files["audit.json"] = _to_json({who: each.model_dump(mode="json") for who, each in evidence.verdicts.items()})
    if evidence.attacks:
        reports: dict[str, Any] = {}
        for each in evidence.attacks:
            reports |= each.report
        files["report.json"] = _to_json(reports)
    private_folder(folder)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def _to_json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _show_statement(statement: LedgerStatement) -> dict[str, Any]:
    """Returns a statement as plain values; an infinite epsilon is null, and `infinite` says so."""
    values = asdict(statement)
    for key in ("epsilon", "before", "now"):
        known = values[key] is not None and math.isfinite(values[key])
        values[key] = round_up(values[key], 4) if known else None
    return {**values, "infinite": math.isinf(statement.epsilon)}


# --- the document ----------------------------------------------------------------------------------------------------


def make_document(evidence: Evidence, leaving: Sequence[LeavingFile]) -> str:
    """Returns the document to read and sign, as Markdown.

    Args:
        evidence: the facts.
        leaving: the files that would leave.
    """
    sections = (
        ("What is asked", _describe_request(evidence, leaving)),
        ("Files that would leave", _describe_files(evidence, leaving)),
        ("What has left already", list(evidence.sent)),
        ("The promise, and what it cost", _describe_price(evidence)),
        ("How the promise was checked", _describe_audits(evidence)),
        ("Attacks on the model", _describe_attacks(evidence)),
        ("Risks that stay", _list_risks(evidence)),
        ("Settings and digests", _describe_digests(evidence)),
        ("Checks for the reader", _list_tasks(evidence)),
        ("Signatures", _make_signatures()),
    )
    lines = [f"# Evidence for the output check of run {escape(evidence.config.run)}", "", _make_mark(evidence), ""]
    for number, (heading, body) in enumerate(sections, start=1):
        lines += [f"## {number}. {heading}", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def _make_mark(evidence: Evidence) -> str:
    if evidence.attacks:
        return (
            "> **This folder does not leave without the output checker's consent.** The attacks of section 6, and "
            "`report.json`, were computed from records without noise; no budget was charged for them."
        )
    return (
        "> Nothing in this folder was computed from records without noise; it holds the ledger's charges and digests. "
        "Whether it leaves is for the output checker to say."
    )


def _describe_request(evidence: Evidence, leaving: Sequence[LeavingFile]) -> list[str]:
    config, total = evidence.config, sum(each.size for each in leaving)
    return [
        f"To let the model of run {quote(config.run)} leave: {len(leaving)} file(s), {total:,} bytes, listed in "
        f"section 2. Tasks: {', '.join(map(escape, config.tasks))}.",
        "",
        *make_table(
            ("what", "answer"),
            [
                ("made by", f"{escape(evidence.party)}, on {time.strftime('%Y-%m-%d')}"),
                ("project, and why the model is needed outside", "(to be filled in)"),
                ("who will have it, and under which agreement", "(to be filled in)"),
                ("data it was trained on, and their controller", "(to be filled in)"),
            ],
        ),
    ]


def _describe_files(evidence: Evidence, leaving: Sequence[LeavingFile]) -> list[str]:
    rows = [
        (quote(each.path), _describe_content(evidence.config, each.path), f"{each.size:,}", quote(each.sha256))
        for each in leaving
    ]
    return [
        *make_table(("file", "content", "bytes", "SHA-256"), rows),
        "",
        f"Folder: {quote(evidence.model)}. `SHA256SUMS` holds the same digests.",
    ]


def _describe_content(config: ModelConfig, path: str) -> str:
    """Returns what a file of the model holds, and whether records had a part in it."""
    noise = "with noise" if config.privacy is not None else "**without noise**"
    if path == CONFIG:
        exact = any(
            each.value is not None and each.standard_error is None
            for task in config.tasks.values()
            for each in task.metrics.values()
        )
        counted = "; **metrics computed without noise**" if exact else "; no number from records without noise"
        return f"settings, labels, digests, prices{counted}"
    if path.startswith("heads/"):
        part = "trained part of a backbone" if path.endswith(".trunk.safetensors") else "trained head"
        return f"{part}: from records, {noise}"
    if path.startswith("backbones/"):
        return "frozen weights that came from outside: no record here had a part in them"
    return "**not a part of a model: look at it**"


def _describe_price(evidence: Evidence) -> list[str]:
    if not evidence.statements:
        return ["**The run was not private: there is no promise, and no price.**"]
    groups: dict[LedgerStatement, list[LedgerStatement]] = {}
    for each in evidence.statements:
        groups.setdefault(replace(each, site="", population=None), []).append(each)
    lines = []
    for alike in list(groups.values())[:MOST_PRICES]:
        lines += [*_describe_statement(alike), ""]
    rest = sum(len(alike) for alike in list(groups.values())[MOST_PRICES:])
    if rest:
        lines += [f"{rest} more site(s) are in `ledger.json`.", ""]
    return lines[:-1]


def _describe_statement(alike: Sequence[LedgerStatement]) -> list[str]:
    """Returns the price at sites where it is the same."""
    statement = alike[0]
    names = ", ".join(
        escape(each.site) + ("" if each.population is None else f" (population {escape(each.population)})")
        for each in alike[:MOST_SITES]
    )
    names += f" and {len(alike) - MOST_SITES} more" if len(alike) > MOST_SITES else ""
    unit = {Unit.EXAMPLE: "one record", Unit.PATIENT: "all records of one patient"}[statement.unit]
    rows = [
        (
            escape(each.purpose),
            _show_rounds(each.rounds),
            _show_mechanism(each.mechanism),
            f"{each.mechanism.noise_multiplier:.4g}",
            f"{each.mechanism.sampling_rate:g}",
            f"{len(each.rounds)} x {each.mechanism.steps}",
        )
        for each in statement.releases
    ]
    budget = "not known" if statement.budget is None else f"{statement.budget:g}"
    heading = "Site" if len(alike) == 1 else f"{len(alike)} sites"
    return [
        f"**{heading}: {names}.** {escape(statement.source)} Protected: {unit} (neighbouring data sets "
        f"differ by it; relation {escape(statement.relation)}). δ = {statement.delta:g}.",
        "",
        *make_table(("what", "rounds", "mechanism", "noise multiplier", "sampling rate", "releases x steps"), rows),
        "",
        f"Composed at once: **ε = {_show_epsilon(statement.epsilon)}** for this run. Budget: {budget}. All that was "
        f"charged before the run: {_show_epsilon(statement.before)}; all that is charged now: "
        f"{_show_epsilon(statement.now)}. Privacy filter: {escape(statement.filter or 'not known')}.",
    ]


def _show_rounds(rounds: Sequence[int]) -> str:
    if tuple(rounds) == (0,):
        return "before the first"
    if len(rounds) > 2 and list(rounds) == list(range(rounds[0], rounds[-1] + 1)):
        return f"{rounds[0]} to {rounds[-1]}"
    shown = ", ".join(map(str, rounds[:10]))
    return shown if len(rounds) <= 10 else f"{shown}, and {len(rounds) - 10} more"


def _show_mechanism(mechanism: Mechanism) -> str:
    if mechanism.kind == "none":
        return "**without noise**"
    summed = "" if mechanism.min_sites is None else f", seen only in a sum of at least {mechanism.min_sites} sites"
    return f"Gaussian, L2 sensitivity {mechanism.sensitivity:g}{summed}"


def _show_epsilon(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{round_up(value):.2f}" if math.isfinite(value) else "infinite"


def _describe_audits(evidence: Evidence) -> list[str]:
    if not evidence.verdicts:
        return [evidence.audit_note]
    rows = [
        (
            escape(who),
            "passed" if each.passed else f"**FAILED**: {escape('; '.join(each.reasons))}",
            f"{round_up(each.epsilon_claimed):.2f}",
            f"{each.epsilon_lower_99_9:.2f}",
            f"{each.noise_std_ratio:.3f}",
        )
        for who, each in evidence.verdicts.items()
    ]
    return [
        "The audit attacks the solver's real code with synthetic records; it can refute a promise, not prove it. Whole "
        "results: `audit.json`.",
        "",
        *make_table(("audited by", "result", "ε claimed", "ε at least (99.9 %)", "noise, measured / accounted"), rows),
    ]


def _describe_attacks(evidence: Evidence) -> list[str]:
    if evidence.attacks is None:
        return [evidence.attack_note]
    rows = []
    for each in evidence.attacks:
        low, high = each.auc_interval
        bound = "none" if each.auc_bound is None else format_number(each.auc_bound)
        result = "**more than the promise allows**" if each.contradicts else "within the promise"
        rates = [
            f"{rate.rate:.3f} ({rate.interval[0]:.3f} to {rate.interval[1]:.3f}), {rate.false_positives} false; "
            f"{'no bound' if rate.bound is None else f'at most {rate.bound:.3f}'}"
            for rate in each.rates
        ]
        members = f"{each.num_members} / {each.num_others}"
        auc = f"{each.auc:.3f} ({low:.3f} to {high:.3f}); at most {bound}"
        rows.append((escape(each.task), escape(each.name), members, auc, *rates, result))
    if not rows:
        return [
            evidence.attack_note,
            "",
            "No task has two members and two others that can be scored: nothing is shown.",
        ]
    wanted = [f"recognised at FPR {rate.wanted:g}; bound" for rate in evidence.attacks[0].rates]
    return [
        evidence.attack_note,
        "",
        *make_table(("task", "attack", "members / others", "AUC; bound", *wanted, "result"), rows),
        "",
        "An AUC of 0.5 is a coin. FPR: part of the others that is taken for members; with few of them a small one is "
        "hardly measured. In brackets: 95 % intervals over the choice of units. The bounds are what the promise allows "
        "to anybody; an attack that stays below them proves nothing, one surely above refutes the promise. "
        "`report.json` holds the same attacks in the layout of SACRO-ML's reports.",
    ]


def _list_risks(evidence: Evidence) -> list[str]:
    if evidence.config.privacy is None:
        return [
            "- **The run was not private.** What the model shows about a single person is not bounded by anything. "
            "Treat its heads like the records themselves."
        ]
    worst = max((each.epsilon for each in evidence.statements), default=math.inf)
    return [
        f"- What the model shows about one protected unit is bounded by the largest ε above, "
        f"{_show_epsilon(worst)}, and by nothing else: a large ε is a weak promise.",
        "- What is true of many people at a site (how frequent a label is, which machine took the pictures) can be "
        "learned from the model; the promise is not about that.",
        "- The promise holds for the code whose digest is below, with noise from the operating system, and for a "
        "declared unit that is the true one: patient ids that differ for one person would break it.",
        "- A model can be wrong, or wrong for some people more than for others; differential privacy does not speak "
        "of it.",
        "- What has left cannot be called back, also where a patient withdraws later.",
    ]


def _describe_digests(evidence: Evidence) -> list[str]:
    config = evidence.config
    rows = [
        ("all trained parameters", quote(config.heads)),
        *((f"backbone {escape(name)}", quote(each.digest)) for name, each in config.backbones.items()),
        *((escape(name), quote(digest)) for name, digest in evidence.digests.items()),
        ("Headwater's code that made this evidence", quote(compute_code_digest())),
    ]
    files = ", ".join(map(quote, evidence.settings)) or "none"
    return [*make_table(("what", "digest"), rows), "", f"Settings as they were approved: {files}."]


def _list_tasks(evidence: Evidence) -> list[str]:
    tasks = [
        "`sha256sum -c SHA256SUMS`, run in the folder that would leave, names every file OK, and it holds no other.",
        "Every file that came from records says so in section 2, and has noise.",
        "ε, δ and unit of section 4 are those that the ethics board or data controller agreed to.",
        "The audit passed, or its absence is accepted.",
        "No attack shows more than the promise allows."
        if evidence.attacks
        else "The absence of an attack is accepted, or one is made where the records are (without `--no-attack`).",
        "Labels, names of tasks and of sites in `config.json` may be known outside.",
        "The licence of each backbone allows to hand it on.",
    ]
    return [f"- [ ] {task}" for task in tasks]


def _make_signatures() -> list[str]:
    roles = ("who asks", "first output checker", "second output checker", "data controller")
    return make_table(("role", "name", "date", "decision and signature"), [(role, "", "", "") for role in roles])
