"""The folder of a run: its name, the versions it was made with, its summary and its heads."""

from __future__ import annotations

import json
import platform
import secrets
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from common.bundle import compute_code_digest
from common.events import Summary, read_run_journal
from common.files import write_atomic
from common.run import RunConfig
from common.types import Heads
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


def write_results(folder: Path, run: RunConfig, backbones: Mapping[str, str], heads: Heads) -> Summary:
    """Writes `summary.json` and the heads to a run's folder, and returns the summary.

    Args:
        folder: folder of the run, with its journal.
        run: settings of the run.
        backbones: backbone name -> digest.
        heads: final parameters of heads and trunks by name; empty where the run failed.
    """
    # An earlier attempt's: where there is one, the heads are whole.
    (folder / "summary.json").unlink(missing_ok=True)
    summary = summarize(read_run_journal(folder / "journal.jsonl"))
    epsilon = {name: site.epsilon for name, site in summary.sites.items() if site.rounds}
    save_heads(folder, run, backbones, heads, epsilon, find_temperatures(summary))
    write_atomic(folder / "summary.json", summary.to_json().encode())
    return summary


def has_results(folder: Path, names: Iterable[str]) -> bool:
    """Returns whether a run's folder has all heads of a run that ended, and the summary that was written after them."""
    heads = [folder / "heads" / f"{name}.safetensors" for name in names]
    return all(path.exists() for path in [folder / "summary.json", *heads])


def find_temperatures(summary: Summary) -> dict[str, float]:
    """Returns the temperature of each task's final head; tasks without a readable one are left out."""
    evaluations = {name: task.evaluation for name, task in summary.tasks.items() if task.evaluation is not None}
    final = {name: evaluation for name, evaluation in evaluations.items() if evaluation.round == summary.rounds}
    return select_temperatures(final)


def save_heads(
    folder: Path,
    run: RunConfig,
    backbones: Mapping[str, str],
    heads: Heads,
    epsilon: Mapping[str, float | None],
    temperatures: Mapping[str, float],
) -> None:
    """Writes each head as `heads/<task>.safetensors` and each trunk as `heads/<backbone>.trunk.safetensors`.

    The metadata of each file names the task, its settings, the backbone's digest, epsilon of each site, and the
    temperature where one is known.

    Args:
        folder: folder of the run.
        run: settings of the run.
        backbones: backbone name -> digest.
        heads: final parameters of heads and trunks by name.
        epsilon: site name -> epsilon spent in this run; None where the run is not private.
        temperatures: task -> number by which its head's outputs are to be divided before they become probabilities.
    """
    (folder / "heads").mkdir(exist_ok=True)
    for name, params in heads.items():
        describe = _describe_head if name in run.tasks else _describe_trunk
        arrays = {key: np.asarray(array, order="C") for key, array in params.items()}
        metadata = {**describe(run, name, backbones), "epsilon": json.dumps(dict(epsilon))}
        if name in temperatures:
            metadata["temperature"] = json.dumps(temperatures[name])
        write_atomic(folder / "heads" / f"{name}.safetensors", save(arrays, metadata=metadata))


def _describe_head(run: RunConfig, task: str, backbones: Mapping[str, str]) -> dict[str, str]:
    settings = run.tasks[task].settings()
    trunk = run.trunk_of(task)
    return {
        "task": task,
        "settings": json.dumps(settings),
        "labels": json.dumps(settings.get("labels")),
        "backbone_digest": backbones[run.backbone_of(task)],
        **({} if trunk is None else {"trunk": trunk}),
    }


def _describe_trunk(run: RunConfig, trunk: str, backbones: Mapping[str, str]) -> dict[str, str]:
    name = trunk.removesuffix(".trunk")
    trainable = run.trainable[name].model_dump_json()
    return {"trunk": trunk, "backbone_digest": backbones[name], "trainable": trainable}
