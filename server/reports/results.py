"""The folder of a run: its name, the versions it was made with, its summary and its model."""

from __future__ import annotations

import json
import platform
import secrets
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from common.bundle import compute_code_digest
from common.events import Summary, TaskSummary, read_run_journal
from common.files import write_atomic
from common.offers import SentBackbone
from common.run import RunConfig
from common.serving.folder import MODEL, Metric, describe_model, write_model
from common.types import Heads, heads_digest
from server.reports.summary import summarize
from server.rounds.evaluation import select_temperatures

PACKAGES = ("flwr", "numpy", "opacus", "ray", "safetensors", "scikit-learn", "torch", "torchvision")


def new_run_folder(parent: Path, name: str) -> Path:
    """Creates and returns a folder `<name>-<time>-<four hex digits>`; its name is the run's id."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = parent / f"{name}-{stamp}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def write_environment(path: Path, seeds: Mapping[str, int | None]) -> None:
    """Writes package versions, the digest of the code that sites review, and the seeds."""
    facts = {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "code_digest": compute_code_digest(),
        "seeds": dict(seeds),
    }
    write_atomic(path, json.dumps(facts, indent=2).encode())


def _version(package: str) -> str | None:
    # One by one: listing all installed packages takes half a second.
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(
    folder: Path,
    run: RunConfig,
    backbones: Mapping[str, SentBackbone],
    heads: Heads,
    moments: Heads = MappingProxyType({}),
) -> Summary:
    """Writes `summary.json` and the model to a run's folder, and returns the summary.

    Args:
        folder: folder of the run, with its journal.
        run: settings of the run.
        backbones: the run's backbones by name; none where the run failed before they were open.
        heads: final parameters of heads and trunks by name; empty where the run failed.
        moments: what the run released of classes before its first round.
    """
    # An earlier attempt's: where there is one, the model is whole.
    (folder / "summary.json").unlink(missing_ok=True)
    summary = summarize(read_run_journal(folder / "journal.jsonl"))
    if heads:
        config = describe_model(
            run,
            folder.name,
            heads,
            {name: (backbone.digest, backbone.public_spec()) for name, backbone in backbones.items()},
            digest=heads_digest(heads),
            epsilon={name: site.epsilon for name, site in summary.sites.items() if site.rounds},
            temperatures=find_temperatures(summary),
            metrics={name: list_metrics(task) for name, task in summary.tasks.items()},
        )
        blobs = {name: backbone.blob() for name, backbone in backbones.items()}
        write_model(folder / MODEL, config, heads, blobs, moments)
    write_atomic(folder / "summary.json", summary.to_json().encode())
    return summary


def has_results(folder: Path, names: Iterable[str]) -> bool:
    """Returns whether a run's folder has all heads of a run that ended, and the summary that was written after them."""
    # Older releases wrote the heads alone, beside the summary.
    places = [folder / MODEL / "heads", folder / "heads"]
    whole = any(all((place / f"{name}.safetensors").exists() for name in names) for place in places)
    return whole and (folder / "summary.json").exists()


def find_temperatures(summary: Summary) -> dict[str, float]:
    """Returns the temperature of each task's final head; tasks without a readable one are left out."""
    evaluations = {name: task.evaluation for name, task in summary.tasks.items() if task.evaluation is not None}
    final = {name: evaluation for name, evaluation in evaluations.items() if evaluation.round == summary.rounds}
    return select_temperatures(final)


def list_metrics(task: TaskSummary) -> dict[str, Metric]:
    """Returns a task's final metrics: exact ones where a simulator knows them, else those that sites released."""
    if task.metrics:
        return {name: Metric(value=value) for name, value in task.metrics.items()}
    if task.evaluation is None:
        return {}
    errors = task.evaluation.standard_errors
    return {
        name: Metric(value=value, standard_error=errors.get(name)) for name, value in task.evaluation.metrics.items()
    }
