"""Everything that a run needs torch for, made before it starts, by a process that then ends.

That is the backbones' digests and settings, their weights as they travel, and the heads before the first round. The
run's own process, which lives for as long as the run, reads them and never loads torch.

    state/backbones/DIGEST.safetensors   weights as they travel, once for all runs
    state/prepared/KEY.*                 what was made of these settings and weights files, for the next command
    runs/RUN_ID/backbones.json           digest, settings and hash of the weights of each of the run's backbones
    runs/RUN_ID/checkpoint.safetensors   at first the state before the first round

Invariant: KEY covers everything that the result is made of (settings, weights files by size and times, the code, the
versions of the packages), so that what is found under it needs no check but that of the weights' hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from common.backbones import Kind, list_weights_paths
from common.bundle import compute_code_digest
from common.errors import explain_os_error, instead
from common.files import private_folder, stamp_file, write_atomic
from common.plugins import resolve
from common.process.apart import run_apart
from common.run import Name, RunConfig
from common.types import BackboneBlob, BadInput
from server.deployment.federation import Federation
from server.rounds.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

_BACKBONES = "backbones.json"
_CHECKPOINT = "checkpoint.safetensors"
_PACKAGES = (
    "monai",
    "numpy",
    "onnxruntime",
    "open_clip_torch",
    "peft",
    "safetensors",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)
_MOST_PREPARED = 16
"""So many preparations are kept for the next command; runs keep their own."""


@dataclass(frozen=True)
class StoredBackbone:
    """A backbone as it travels, in a file.

    Attributes:
        digest: 64 hex digits over settings and weights.
        spec: JSON text of the settings without any path.
        sha256: 64 hex digits over the file with the weights.
        path: that file.
        feature_dim: number of its features; 0 where an older release prepared it.
    """

    digest: str
    spec: str
    sha256: str
    path: Path
    feature_dim: int = 0

    def public_spec(self) -> dict[str, Any]:
        """Returns the resolved settings as plain values; they hold no path."""
        values: dict[str, Any] = json.loads(self.spec)
        return values

    def blob(self) -> BackboneBlob:
        """Returns the backbone with its weights mapped into memory, so that they are read part by part.

        Raises:
            BadInput: the file is missing or damaged.
        """
        try:
            with self.path.open("rb") as file:
                # Of a backbone without weights too, the file is never empty: it has a header.
                weights = mmap(file.fileno(), 0, access=ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.path}: expected a backbone's weights{instead(error)}; {_RESUME}") from error
        if hashlib.sha256(weights).hexdigest() != self.sha256:
            raise BadInput(f"{self.path}: expected a backbone's weights, got a damaged file; {_RESUME}")
        return BackboneBlob(spec=self.spec, weights=weights, digest=self.digest)


_RESUME = "`headwater coordinator resume` writes it again and continues the run"


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs torch for.

    Attributes:
        backbones: the run's backbones by name.
        start: the state before the first round; its run's id is empty.
    """

    backbones: Mapping[Name, StoredBackbone]
    start: Checkpoint


def prepare_run(federation: Federation, run: RunConfig) -> Prepared:
    """Returns what a run needs torch for, made in a process of its own where it was not made before.

    Args:
        federation: the federation whose folder keeps it.
        run: the run, with absolute paths (`common.run.resolve_backbone_paths`).

    Raises:
        BadInput: a backbone, a task, or the part of a backbone that trains cannot be opened; the folder cannot be
            written.
    """
    key = _compute_key(run)
    found = None if key is None else _find_prepared(federation, key)
    if found is None:
        key = key or "unnamed"
        run_apart(_prepare, federation.state, run, key)
        found = _find_prepared(federation, key)
        if found is None:
            raise BadInput(f"{federation.state}: expected a folder that keeps what is written to it")
        _remove_old(federation)
    return found


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Writes what was prepared to a run's folder; a checkpoint that is there already stays.

    Args:
        folder: the run's folder; its name is the run's id.
        prepared: what was prepared.
    """
    if not (folder / _CHECKPOINT).exists():
        save_checkpoint(folder / _CHECKPOINT, replace(prepared.start, run_id=folder.name))
    write_atomic(folder / _BACKBONES, _encode_backbones(prepared.backbones))


def load_backbones(federation_state: Path, folder: Path) -> dict[Name, StoredBackbone]:
    """Returns the backbones of a run that was prepared.

    Args:
        federation_state: the federation's folder `state`.
        folder: the run's folder.

    Raises:
        BadInput: it was prepared by an older release, or the file is damaged.
    """
    try:
        return _read_backbones(federation_state, folder / _BACKBONES)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / _BACKBONES}: expected the run's backbones{instead(error)}; {_RESUME}") from error


def prepare_again(federation: Federation, folder: Path, run: RunConfig, digests: Mapping[Name, str]) -> None:
    """Prepares a run that is to be continued, where what it stands on is missing or damaged.

    Args:
        federation: the run's federation.
        folder: the run's folder.
        run: the run's settings.
        digests: digests of the run's backbones when it began; none where it has not begun.

    Raises:
        BadInput: it cannot be prepared, or its weights are not those with which it began.
    """
    try:
        for backbone in load_backbones(federation.state, folder).values():
            backbone.blob()
        if (folder / _CHECKPOINT).exists():
            return
    except BadInput:
        pass  # Of an older release, or damaged: made again below.
    prepared = prepare_run(federation, run)
    changed = [
        name for name, backbone in prepared.backbones.items() if digests.get(name, backbone.digest) != backbone.digest
    ]
    if changed:
        raise BadInput(
            f"{run.backbone_key(changed[0])}: expected the weights with which {folder.name} began, got others; put "
            "those back, or start a new run"
        )
    write_prepared(folder, prepared)


# --- the process that loads torch ------------------------------------------------------------------------------------


def _prepare(state: Path, run: RunConfig, key: str) -> None:
    """Writes what a run needs torch for. This process loads torch."""
    from common.model.backbones import open_backbones
    from server.rounds.initial_state import create_initial_state

    opened = open_backbones(run)
    start = create_initial_state(run, "", opened)
    try:
        weights, prepared = (private_folder(state / name) for name in ("backbones", "prepared"))
        stored = {}
        for name, backbone in opened.items():
            blob = backbone.blob()
            stored[name] = StoredBackbone(
                blob.digest,
                blob.spec,
                hashlib.sha256(blob.weights).hexdigest(),
                _name_weights(state, blob.digest),
                backbone.feature_dim,
            )
            try:
                stored[name].blob()
            except BadInput:
                write_atomic(weights / stored[name].path.name, bytes(blob.weights))
        save_checkpoint(prepared / f"{key}.safetensors", start)
        # Last: where it is, the others are.
        write_atomic(prepared / f"{key}.json", _encode_backbones(stored))
    except OSError as error:
        raise BadInput(f"{state}: expected a folder that can be written; {explain_os_error(error)}") from error


# --- parts -----------------------------------------------------------------------------------------------------------


def _compute_key(run: RunConfig) -> str | None:
    """Returns 64 hex digits over all that a preparation depends on; None where weights may change unnoticed."""
    kinds: dict[Name, Kind] = {
        name: resolve("common.backbones", spec, run.backbone_key(name)) for name, spec in run.backbone_specs.items()
    }
    stamps = []
    for kind in kinds.values():
        paths = list_weights_paths(kind)
        if paths is None:
            return None
        stamps.append([(str(file), *stamp_file(file)) for path in paths for file in _list_files(path)])
    about = {
        "backbones": {name: kind.model_dump(mode="json", by_alias=True) for name, kind in kinds.items()},
        "run": run.model_dump(mode="json", include={"seed", "tasks", "trainable", "aggregation"}),
        "stamps": stamps,
        "code": compute_code_digest(),
        "packages": {name: _find_version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _list_files(path: Path) -> list[Path]:
    """Returns a file, or all files of a folder; nothing where there is none, which opening it will say."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name_weights(state: Path, digest: str) -> Path:
    return state / "backbones" / f"{digest}.safetensors"


def _encode_backbones(backbones: Mapping[Name, StoredBackbone]) -> bytes:
    facts = {
        name: {"digest": each.digest, "spec": each.spec, "sha256": each.sha256, "feature_dim": each.feature_dim}
        for name, each in backbones.items()
    }
    return json.dumps(facts, indent=2).encode()


def _read_backbones(state: Path, path: Path) -> dict[Name, StoredBackbone]:
    return {
        name: StoredBackbone(
            facts["digest"],
            facts["spec"],
            facts["sha256"],
            _name_weights(state, facts["digest"]),
            facts.get("feature_dim", 0),
        )
        for name, facts in json.loads(path.read_bytes()).items()
    }


def _find_prepared(federation: Federation, key: str) -> Prepared | None:
    """Returns what was prepared under a key; None where there is nothing whole."""
    folder = federation.state / "prepared"
    try:
        backbones = _read_backbones(federation.state, folder / f"{key}.json")
        for backbone in backbones.values():
            backbone.blob()
        return Prepared(backbones, load_checkpoint(folder / f"{key}.safetensors"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, BadInput):
        return None


def _remove_old(federation: Federation) -> None:
    """Removes old preparations, and the weights that neither a preparation nor a run's folder names."""
    kept = sorted((federation.state / "prepared").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[_MOST_PREPARED:]:
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)
    named = set()
    for path in [*kept[:_MOST_PREPARED], *federation.runs.glob(f"*/{_BACKBONES}")]:
        try:
            named |= {backbone.path for backbone in _read_backbones(federation.state, path).values()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # Damaged: whoever needs it makes it again.
    for path in set((federation.state / "backbones").glob("*.safetensors")) - named:
        path.unlink()
