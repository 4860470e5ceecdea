"""The model card: what a stranger must know of a model before using it, computed from the model and its run.

A fact that is not known is said to be unknown. Everything that somebody else wrote (labels, ids, file names) is
escaped. The card begins with the metadata that Hugging Face reads (docs of `huggingface_hub.ModelCardData`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from common.exports.parts.facts import RunFacts
from common.exports.parts.markdown import escape, format_number, make_table, quote
from common.privacy.accounting import round_up
from common.serving.folder import Metric, ModelConfig, ModelPrivacy, ModelTask
from common.tasks import Calibratable, PairMetrics, reads_places
from common.types import Unit
from common.yaml import format_yaml

if TYPE_CHECKING:
    from common.exports.parts.exported import Exported

_MODALITIES = {
    "pixels": "image",
    "pixel_values": "image",
    "grey": "image",
    "input_ids": "text",
    "samples": "audio",
    "columns": "tabular",
}
"""First input of a network (`common.backbones.RawTensor`) -> beginning of Hugging Face's name of what it does."""
_OF_PLACES = {"boxes": "object-detection", "mask": "image-segmentation"}
"""Predictions about places of a picture (`Exported.find_prediction`) -> Hugging Face's name."""
_STARTED = (
    "A head from the names of its classes and public networks alone: no record had a part in its weights. It stands on "
    "the network of the run that the rest of this card is about, and subtracts the mean of features that the run "
    "released."
)
UNKNOWN_LICENCE = "not known: check before you publish"
_DEPLOYED = ("deployment", "flower_app")
_DIFFERENCES = {Unit.EXAMPLE: "one record", Unit.PATIENT: "all records of one patient"}
_RELATION = {"add_remove": "data sets of one site that differ by {difference}, which one has and the other lacks"}
_UNITS = {Unit.EXAMPLE: "record", Unit.PATIENT: "patient"}


@dataclass(frozen=True)
class CardSubject:
    """The part of a model that a card is about.

    Attributes:
        config: what is known of the model.
        tasks: names of the tasks that were exported.
        format: name of the format, such as `onnx`.
        used: sentences of Markdown that say how each file is used.
        library: library that loads the folder, as Hugging Face names it.
        facts: what is known of the run; None where its folder was not there.
        pipeline: Hugging Face's name of what the model does, such as `image-classification`; None for none.
        left_out: sentence that says which backbone is not part of the folder; None where all is there.
    """

    config: ModelConfig
    tasks: tuple[str, ...]
    format: str
    used: tuple[str, ...] = ()
    library: str = "headwater"
    facts: RunFacts | None = None
    pipeline: str | None = None
    left_out: str | None = None


def write_card(exported: Exported, name: str, used: Sequence[str], library: str) -> str:
    """Returns the card of an exported folder.

    Args:
        exported: what was exported.
        name: name of the format.
        used: sentences that say how each file of the format is used.
        library: library that loads the folder, as Hugging Face names it.
    """
    stated = "`preprocessing.json` states what comes before the network and what its outputs are."
    subject = CardSubject(
        config=exported.model.config,
        tasks=exported.tasks,
        format=name,
        library=library,
        used=(*used, stated),
        facts=exported.facts,
        pipeline=find_pipeline(exported),
        left_out=exported.explain_left_out() if exported.left_out else None,
    )
    return make_card(subject)


def find_pipeline(exported: Exported) -> str | None:
    """Returns Hugging Face's name of what a network does; None where it has none."""
    tasks = [exported.model.tasks[name] for name in exported.tasks]
    modality = _MODALITIES.get(exported.raw.tensors[0].name)
    if modality is None or exported.of_bags:
        return None
    predictions = {exported.find_prediction(name) for name in exported.tasks}
    if predictions & set(_OF_PLACES):
        # Of several the hub takes one: that which needs more of whoever uses it.
        return next(name for kind, name in _OF_PLACES.items() if kind in predictions) if modality == "image" else None
    if all(isinstance(task, Calibratable) for task in tasks):
        return f"{modality}-classification"
    if modality == "image" and all(isinstance(task, PairMetrics) for task in tasks):
        # None for boxes: what `serve` returns of them is a number for each label.
        return None if any(reads_places(task) for task in tasks) else "image-feature-extraction"
    return None


def make_card(subject: CardSubject) -> str:
    """Returns the text of a model card, Markdown after YAML metadata."""
    sections = (
        ("How to use the files", _describe_use(subject)),
        ("Intended use", _describe_purpose(subject)),
        ("What it must not be used for", _describe_misuse(subject)),
        ("Data it was trained on", _describe_data(subject)),
        ("Metrics", _describe_metrics(subject)),
        ("Privacy", _describe_privacy(subject)),
        ("How it was checked", _describe_checks(subject)),
        ("Backbones, their source and licence", _describe_backbones(subject)),
        ("Preprocessing", _describe_preprocessing(subject)),
        ("Versions and digests", _describe_versions(subject)),
        ("How to cite", _describe_citation(subject)),
    )
    config = subject.config
    title = f"# {escape(config.run)}: {', '.join(map(escape, subject.tasks))}"
    summary = (
        "Small heads on frozen pre-trained networks, trained by several sites together; no record left a site. "
        + ("Each site's part was noised (differential privacy)." if config.privacy else "**Trained without privacy.**")
    )
    if config.start is not None:
        summary = f"{_STARTED} {summary}"
    lines = ["---", format_yaml(_make_metadata(subject)).rstrip(), "---", "", title, "", summary, ""]
    for heading, body in sections:
        lines += [f"## {heading}", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


# --- metadata --------------------------------------------------------------------------------------------------------


def _make_metadata(subject: CardSubject) -> dict[str, Any]:
    """Returns the metadata that Hugging Face reads. Its licence is the publisher's to choose."""
    tags = ["headwater", "federated-learning", "transfer-learning"]
    if subject.config.privacy is not None:
        tags.append("differential-privacy")
    values: dict[str, Any] = {
        "library_name": subject.library,
        "license": "other",
        "license_name": "not-declared",
        "tags": tags,
    }
    if subject.pipeline is not None:
        values["pipeline_tag"] = subject.pipeline
    results = [result for task in subject.tasks if (result := _list_result(subject, task)) is not None]
    if results:
        values["model-index"] = [{"name": subject.config.run, "results": results}]
    return values


def _list_result(subject: CardSubject, name: str) -> dict[str, Any] | None:
    task = subject.config.tasks[name]
    known = {metric: each.value for metric, each in task.metrics.items() if each.value is not None}
    if not known:
        return None
    return {
        "task": {"type": subject.pipeline or "other", "name": name},
        "dataset": {"type": "private", "name": f"{name}: held-out records of the sites, not public"},
        "metrics": [
            {"type": metric, "name": _name_metric(metric, task.metrics[metric]), "value": round(value, 4)}
            for metric, value in known.items()
        ],
    }


def _name_metric(name: str, metric: Metric) -> str:
    error = metric.standard_error
    return name if error is None else f"{name} (standard error {error:.4f} of the privacy noise)"


# --- sections --------------------------------------------------------------------------------------------------------


def _describe_use(subject: CardSubject) -> list[str]:
    lines = [f"- {sentence}" for sentence in subject.used] or [f"Exported as {escape(subject.format)}."]
    return lines if subject.left_out is None else [*lines, "", escape(subject.left_out)]


def _describe_purpose(subject: CardSubject) -> list[str]:
    lines = [
        "Research, and predictions that a qualified person checks, on records like those of the sites that trained it. "
        "For each record it gives:",
        "",
    ]
    for name in subject.tasks:
        task = subject.config.tasks[name]
        lines.append(f"- **{escape(name)}** ({escape(task.settings.get('kind'))}): {_describe_settings(task)}")
    return lines


def _describe_settings(task: ModelTask) -> str:
    """Returns a task's public settings in words: labels, ranges, thresholds, priors."""
    hidden = {"kind", "head", "scale", "start"}
    known = {key: value for key, value in task.settings.items() if key not in hidden and value not in (None, {}, [])}
    return "; ".join(f"{escape(key)}: {_show(value)}" for key, value in known.items()) or "no settings of its own"


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(key)} {_show(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_show(each) for each in value)
    return escape(value)


def _describe_misuse(subject: CardSubject) -> list[str]:
    chosen = [
        f"{escape(name)}: {escape(subject.config.tasks[name].settings['threshold'])}"
        for name in subject.tasks
        if subject.config.tasks[name].settings.get("threshold") is not None
    ]
    threshold = (
        f"Declared before training: {'; '.join(chosen)}." if chosen else "No threshold was chosen for anybody's use."
    )
    calibrated = [name for name in subject.tasks if subject.config.tasks[name].temperature is not None]
    calibration = (
        f"Calibrated by one temperature: {', '.join(map(escape, calibrated))}."
        if calibrated
        else "Its probabilities were not calibrated."
    )
    return [
        "- **It is not a medical device.** No authority has examined it. It must not decide on a person's diagnosis, "
        "treatment, insurance, work or credit, alone or as the only reason.",
        "- Not for people or records unlike those of the training sites: other ages, devices, protocols, countries or "
        "shares of labels. How well it works there is not known; measure it on labelled records of your own first.",
        f"- Not with a threshold that nobody chose for the purpose. {threshold} {calibration}",
        "- Not for telling whether a person's record was in the training data.",
    ]


def _describe_data(subject: CardSubject) -> list[str]:
    facts = subject.facts
    if facts is None:
        known = list(subject.config.privacy.epsilon) if subject.config.privacy is not None else []
        sites = f"Sites that are known: {', '.join(map(escape, known))}." if known else "The sites are not known."
        return [f"{sites} How many units each declared is not known: the run's folder was not there at export."]
    joined = {
        site: {task: sizes[task] for task in subject.tasks if task in sizes}
        for site, sizes in facts.public_sizes.items()
    }
    rows = [
        [
            escape(site),
            "; ".join(f"{escape(task)} {size:,}" for task, size in sizes.items()),
            "" if site not in facts.summary.sites else escape(facts.summary.sites[site].status),
        ]
        for site, sizes in sorted(joined.items())
        if sizes
    ]
    return [
        f"{len(rows)} site(s) had records of these tasks. A size is a public number that the site declared, in "
        f"{_name_units(subject.config.privacy)}; the true number is not known outside the site. Records themselves "
        "were read at the sites only; what they are, and who is in them, is for the sites to say.",
        "",
        *make_table(("site", "declared size", "took part"), rows),
    ]


def _name_units(privacy: ModelPrivacy | None) -> str:
    return "units" if privacy is None else f"{_UNITS[privacy.unit]}s"


def _describe_metrics(subject: CardSubject) -> list[str]:
    facts = subject.facts
    rows = []
    for name in subject.tasks:
        intervals = {} if facts is None else facts.intervals.get(name, {})
        smaller = () if facts is None else facts.errors.get(name, ())
        for metric, each in subject.config.tasks[name].metrics.items():
            interval = intervals.get(metric)
            rows.append(
                (
                    escape(name),
                    escape(metric) + (" (smaller is better)" if metric in smaller else ""),
                    _format_metric(each),
                    "not known" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
                )
            )
    if not rows:
        return ["None are known. Measure the model on labelled records of your own before any use."]
    table = make_table(("task", "metric", "value", "95 % interval over the choice of units"), rows)
    return [_explain_metrics(subject), "", *table]


def _format_metric(metric: Metric) -> str:
    value = format_number(metric.value)
    return value if metric.standard_error is None else f"{value} ± {metric.standard_error:.3f}"


def _explain_metrics(subject: CardSubject) -> str:
    """Returns who computed the metrics, on what, and what the number after ± is."""
    noised = any(each.standard_error is not None for name in subject.tasks for each in _list_metrics(subject, name))
    if noised:
        return (
            "Computed by the coordinator from sums over held-out records that the sites released with noise, and paid "
            "for from their budgets. The number after ± is the standard error of that noise alone; which records were "
            "held out adds to it."
        )
    if subject.facts is not None and subject.facts.summary.executor not in _DEPLOYED:
        return (
            "Computed by the simulator, without noise, on the held-out records of all sites together. This is a view "
            "that nobody has in a real federation, and it is outside the privacy promise."
        )
    return "Computed on held-out records; by whom is not known. No noise is stated."


def _list_metrics(subject: CardSubject, name: str) -> list[Metric]:
    return list(subject.config.tasks[name].metrics.values())


def _describe_privacy(subject: CardSubject) -> list[str]:
    privacy = subject.config.privacy
    if privacy is None:
        return [
            "**None.** The run was not private: the model may show who was in its training data, and to what extent is "
            "not bounded. Publish it only where all records may be published."
        ]
    unit = _UNITS[privacy.unit]
    neighbours = _RELATION[privacy.relation].format(difference=_DIFFERENCES[privacy.unit])
    return [
        f"(ε, δ)-differential privacy, promised by each site for its own records. What is protected: one {unit}. "
        f"Neighbours: {neighbours}. δ of the run: {privacy.delta:g}.",
        "",
        *make_table(("site", "ε of this run", "a guess about one " + unit), _list_prices(privacy)),
        "",
        f"*In words:* whatever anybody concludes about one {unit} from the model is at most e^ε times as probable as "
        f"it would be had the {unit} not taken part, but for probability δ. The last column says how often somebody "
        f"who knows everything else can be right at most, when guessing whether one {unit} took part, where both are "
        "equally probable: 50 % is a coin.",
        "",
        "*Not covered:* " + " ".join(_list_gaps(privacy, unit)),
    ]


def _list_prices(privacy: ModelPrivacy) -> list[tuple[str, str, str]]:
    rows = []
    for site, epsilon in sorted(privacy.epsilon.items()):
        known = epsilon is not None and math.isfinite(epsilon)
        shown = "not known" if epsilon is None else f"{round_up(epsilon):.2f}" if known else "infinite"
        guess = "not known"
        if epsilon is not None:
            guess = f"right in at most {min(100.0, round_up(100.0 * bound_guess(epsilon, privacy.delta))):.2f} %"
        rows.append((escape(site), shown, guess))
    return rows or [("not known", "not known", "not known")]


def bound_guess(epsilon: float, delta: float) -> float:
    """Returns the largest probability of a right guess whether one unit took part, where both are equally probable.

    Kairouz, Oh, Viswanath (2015): false and true positive rates differ by at most (e^epsilon - 1 + 2 delta) /
    (e^epsilon + 1).
    """
    if math.isinf(epsilon):
        return 1.0
    # Divided by e^epsilon, which alone overflows above 709.
    return (1.0 + delta * math.exp(-epsilon)) / (1.0 + math.exp(-epsilon))


def _list_gaps(privacy: ModelPrivacy, unit: str) -> list[str]:
    gaps = [
        "what is true of many people, which a model is meant to learn;",
        "other runs on the same people: their prices compose in each site's ledger, and only this run's are above;",
        "people known to several sites, whom each site protects by its own promise only;",
        "the data on which the backbone was pre-trained.",
    ]
    if privacy.unit == Unit.EXAMPLE:
        gaps.insert(0, f"a person with several records: the promise is for one {unit} at a time;")
    return gaps


def _describe_checks(subject: CardSubject) -> list[str]:
    audit = None if subject.facts is None else subject.facts.summary.audit
    if audit is None:
        return ["No audit is known: the run's folder was not there at export."]
    if audit.passed is None:
        required = "each site had to audit its solver before it joined; the results stayed there"
        return [f"The run's folder holds no audit's result: {required if audit.required else 'none was required'}."]
    lower = "not known" if audit.epsilon_lower_99_9 is None else f"{audit.epsilon_lower_99_9:.2f}"
    claimed = "not known" if audit.epsilon_claimed is None else f"{round_up(audit.epsilon_claimed):.2f}"
    lines = [
        f"A privacy audit attacked the solver's real code with synthetic records, and **"
        f"{'passed' if audit.passed else 'FAILED'}**: it shows an ε of at least {lower} (99.9 % confidence), and "
        f"{claimed} is claimed. An audit can refute a claim; it cannot prove one."
    ]
    return [*lines, *(f"- {escape(reason)}" for reason in audit.reasons or ())]


def _describe_backbones(subject: CardSubject) -> list[str]:
    config = subject.config
    used = dict.fromkeys(config.tasks[name].backbone for name in subject.tasks)
    rows = [
        (
            escape(name),
            escape(" ".join(str(config.backbones[name].spec.get(key) or "") for key in ("kind", "model"))),
            "not known" if config.backbones[name].source is None else quote(config.backbones[name].source),
            UNKNOWN_LICENCE if config.backbones[name].licence is None else escape(config.backbones[name].licence),
            quote(config.backbones[name].digest),
        )
        for name in used
    ]
    return [
        *make_table(("backbone", "kind", "weights", "licence", "digest (settings and weights)"), rows),
        "",
        "Licences and sources are as the run's coordinator declared them. The licence of the heads is for who "
        "publishes them to choose, and must agree with the backbone's.",
    ]


def _describe_preprocessing(subject: CardSubject) -> list[str]:
    lines = []
    for name in dict.fromkeys(subject.config.tasks[task].backbone for task in subject.tasks):
        own = {key: value for key, value in subject.config.backbones[name].spec.items() if value not in (None, {}, [])}
        settings = "; ".join(f"{escape(key)}: {_show(value)}" for key, value in own.items())
        lines.append(f"- **{escape(name)}**: {settings}")
    return [*lines, "", "Records that are prepared in another way give other, wrong predictions."]


def _describe_versions(subject: CardSubject) -> list[str]:
    config, facts = subject.config, subject.facts
    environment: Mapping[str, Any] = {} if facts is None else facts.environment
    packages = environment.get("packages")
    trained = (
        ", ".join(f"{escape(name)} {escape(number)}" for name, number in packages.items())
        if isinstance(packages, Mapping) and packages
        else "not known"
    )
    code = environment.get("code_digest")
    rows = [
        ("run", quote(config.run)),
        ("written on", escape(config.created)),
        ("rounds asked for", f"{config.rounds:,}"),
        ("digest of all trained parameters", quote(config.heads)),
        *((f"SHA-256 of {escape(name)}", quote(digest)) for name, digest in sorted(config.files.items())),
        ("digest of Headwater's code that trained it", quote(code) if isinstance(code, str) else "not known"),
        ("packages it was trained with", trained),
        ("exported with", f"headwater {_find_version()}, Python {platform.python_version()}"),
    ]
    return make_table(("what", "value"), rows)


def _find_version() -> str:
    try:
        return version("headwater")
    except PackageNotFoundError:
        return "(not installed)"


def _describe_citation(subject: CardSubject) -> list[str]:
    """Returns a BibTeX entry; only characters that cannot end a field are in it."""
    config = subject.config
    plain = "".join(char for char in config.run if char.isascii() and (char.isalnum() or char in "-_"))
    digest = "".join(char for char in config.heads if char.isascii() and char.isalnum())
    return [
        "```bibtex",
        f"@misc{{headwater-{plain},",
        f"  title = {{Heads trained by federated learning, run {plain}}},",
        f"  year = {{{''.join(char for char in config.created[:4] if char.isdigit())}}},",
        f"  note = {{Trained with Headwater; digest of the trained parameters {digest}}},",
        "}",
        "```",
    ]
