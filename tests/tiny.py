"""A small real federation for tests: well-separated vectors, one npz file per site, the `identity` backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from client.config import SiteConfig
from client.protocol.prepare import keep_part, prepare_run
from client.protocol.site import Site
from common import messages
from common.model.backbones import Backbone, open_backbones
from common.offers import list_digests, make_offer
from common.run import ONLY_BACKBONE, RunConfig
from common.yaml import parse

_Message = TypeVar("_Message")
DIM = 4
TASKS = {
    "colour": {"kind": "classification", "labels": ["red", "green", "blue"]},
    "size": {"kind": "classification", "labels": ["small", "large"]},
}


def run_config(**changes: Any) -> RunConfig:
    """A private full-batch run of two tasks; `changes` replace whole top-level keys."""
    values: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "rounds": 2,
        "backbone": {"kind": "identity", "dim": DIM},
        "tasks": TASKS,
        "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
        "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0},
        "aggregation": {"kind": "mean"},
        "cohort": {"min_sites": 1, "timeout_s": 5, "join_timeout_s": 1, "patience_s": 0.5},
    }
    return parse(RunConfig, {**values, **changes}, base=Path.cwd())


def give_backbone(site: Site, run_id: str, frozen: Backbone) -> None:
    """Send a site the backbone of a run it joined, in one part, and have it prepare."""
    blob = frozen.blob()
    keep_part(site, messages.PartRequest(run_id, frozen.digest, 0, 1, blob.weights))
    prepare_run(site, messages.PrepareRequest(run_id, {frozen.digest: blob.spec}))


def backbone() -> Backbone:
    """The run's backbone."""
    return open_backbones(run_config())[ONLY_BACKBONE]


def forged(model: Callable[..., _Message], *values: object) -> _Message:
    """Returns a message of values that its model refuses, as an attacker makes one."""
    message: Any = object.__new__(model)  # type: ignore[call-overload]
    for field, value in zip(dataclasses.fields(message), values, strict=True):
        object.__setattr__(message, field.name, value)
    return message  # type: ignore[no-any-return]


def offered(run_id: str, run: RunConfig, frozen: Backbone) -> messages.JoinRequest:
    """A run of one backbone as a coordinator offers it."""
    only = {ONLY_BACKBONE: frozen}
    return messages.JoinRequest(run_id, make_offer(run, only), list_digests(only))


def write_records(path: Path, seed: int, count: int = 40) -> None:
    """An npz file with a train and a test part; colours are corners of a simplex, sizes a direction."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, number in (("train", count), ("test", count // 2)):
        colour, size = rng.integers(0, 3, number), rng.integers(0, 2, number)
        vectors = 0.3 * rng.normal(size=(number, DIM))
        vectors[np.arange(number), colour] += 1.0
        vectors[:, 3] += 2.0 * size - 1.0
        arrays[f"{part}_x"] = vectors.astype(np.float32)
        arrays[f"{part}_colour"] = np.array(["red", "green", "blue"])[colour]
        arrays[f"{part}_size"] = np.array(["small", "large"])[size]
    np.savez(path, **arrays)


def site_config(folder: Path, name: str, **changes: Any) -> SiteConfig:
    """A site with records of its own under `folder`; `changes` replace whole top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npz"
    if not path.exists():
        write_records(path, seed=sum(name.encode()))
    columns = {"colour": "colour", "size": "size"}
    parts = {
        part: {"inputs": f"{part}_x", "labels": {column: f"{part}_{column}" for column in columns}}
        for part in ("train", "test")
    }
    state_dir = str(changes.get("state_dir", folder / f"{name}-state"))
    values: dict[str, Any] = {
        "name": name,
        "registry": f"{name}-registry",
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"records": {"kind": "npz", "path": str(path), "parts": parts}},
        "tasks": {task: {"source": "records", "label": task, "missing": "refuse", "public_size": 40} for task in TASKS},
        "split": {"test_fraction": 0.0},
        "on_bad_record": "stop",
        "evaluation": "local",
        "approval": "automatic",
        "ledger_dir": f"{state_dir}/ledgers",
        "state_dir": state_dir,
        "device": "cpu",
    }
    return parse(SiteConfig, {**values, **changes}, base=folder)
