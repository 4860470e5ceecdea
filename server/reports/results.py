"""A run's folder: its name, the facts about how it was made, and the heads it produced."""

from __future__ import annotations

import json
import platform
import secrets
import time
from collections.abc import Mapping
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

PACKAGES = ("flwr", "numpy", "opacus", "ray", "safetensors", "scikit-learn", "torch", "torchvision")


def new_run_folder(parent: Path, name: str) -> Path:
    """A new folder `<name>-<time>-<four hex digits>`; its name is the run's id."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = parent / f"{name}-{stamp}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def write_environment(path: Path, seeds: Mapping[str, int | None]) -> None:
    """Package versions, the digest of the code that sites review, and the seeds."""
    facts = {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "code_digest": compute_code_digest(),
        "seeds": dict(seeds),
    }
    write_atomic(path, json.dumps(facts, indent=2).encode())


def _version(package: str) -> str | None:
    # One by one: to read what is installed altogether takes half a second.
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(folder: Path, run: RunConfig, backbones: Mapping[str, str], heads: Heads) -> Summary:
    """Write `summary.json` from the journal, and the heads, with the digests of the run's backbones; the summary."""
    summary = summarize(read_run_journal(folder / "journal.jsonl"))
    epsilon = {name: site.epsilon for name, site in summary.sites.items() if site.rounds}
    save_heads(folder, run, backbones, heads, epsilon)
    write_atomic(folder / "summary.json", summary.to_json().encode())
    return summary


def save_heads(
    folder: Path, run: RunConfig, backbones: Mapping[str, str], heads: Heads, epsilon: Mapping[str, float | None]
) -> None:
    """Write `heads/<task>.safetensors`; the metadata says what each head is for and what it cost.

    A trunk is one more file, `heads/<backbone>.trunk.safetensors`, with what trained of that backbone.

    Args:
        folder: the run's folder.
        run: the run, for the tasks' settings.
        backbones: digest of each of the run's backbones.
        heads: final heads.
        epsilon: spent in this run by site; None for a non-private site.
    """
    (folder / "heads").mkdir(exist_ok=True)
    for entry, params in heads.items():
        about = _about_task(run, entry, backbones) if entry in run.tasks else _about_trunk(run, entry, backbones)
        arrays = {name: np.asarray(array, order="C") for name, array in params.items()}
        about = {**about, "epsilon": json.dumps(dict(epsilon))}
        write_atomic(folder / "heads" / f"{entry}.safetensors", save(arrays, metadata=about))


def _about_task(run: RunConfig, task: str, backbones: Mapping[str, str]) -> dict[str, str]:
    settings = run.tasks[task].settings()
    trunk = run.trunk_of(task)
    return {
        "task": task,
        "settings": json.dumps(settings),
        "labels": json.dumps(settings.get("labels")),
        "backbone_digest": backbones[run.backbone_of(task)],
        **({} if trunk is None else {"trunk": trunk}),
    }


def _about_trunk(run: RunConfig, entry: str, backbones: Mapping[str, str]) -> dict[str, str]:
    name = entry.removesuffix(".trunk")
    trainable = run.trainable[name].model_dump_json()
    return {"trunk": entry, "backbone_digest": backbones[name], "trainable": trainable}
