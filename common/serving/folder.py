"""The folder of a finished model: how it is written, and how it is read and verified.

    config.json                     `ModelConfig`: tasks, labels, backbones, privacy, metrics, digests
    heads/TASK.safetensors          the head of each task
    heads/BACKBONE.trunk.safetensors  the trained part of a backbone, where there is one
    backbones/BACKBONE.safetensors  the frozen backbone of the tasks
    moments/TASK.classes.safetensors  what was released of a task's classes, where the run measured it; and
    moments/BACKBONE.scatter.safetensors  of products of features (`common.model.class_moments`)

Nothing in it is executed. `config.json` names the SHA-256 of every head, and the digest of every backbone covers its
settings, its preprocessing and its weights: a model that was changed is refused. Nothing here loads torch, so that the
coordinator can write a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import instead
from common.files import private_folder, write_atomic
from common.model.class_moments import ClassMoments, unpack_class_moments
from common.model.moments import CLASSES, SCATTER
from common.plugins import Frozen
from common.run import Name, RunConfig, Trainable, drop_unset
from common.types import RELATION, BackboneBlob, BadInput, DigestMismatch, Heads, Relation, Unit

CONFIG = "config.json"
MODEL = "model"
"""Name of the model's folder in the folder of a run."""
FORMAT: Literal["headwater model"] = "headwater model"
VERSION: Literal[1] = 1

NEVER_LEAVES = "contains unnoised information: never leaves"
"""Mark of what was computed from a site's records without noise."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
"""Temperatures that a coordinator may send: with others, float32 outputs would be no numbers. Fitted ones lie between
0.25 and 4 (`common.tasks.parts.calibration`)."""


class Metric(Frozen):
    """One metric on held-out units.

    Attributes:
        value: its value; null where it is undefined.
        standard_error: standard error due to the privacy noise of its release; null where no noise was added.
    """

    value: float | None
    standard_error: float | None = None


class ModelTask(Frozen):
    """One task of a model.

    Attributes:
        settings: the task's settings, with its labels.
        backbone: name of the backbone that its head stands on.
        trunk: name of the trained part of that backbone; null where all of it is frozen.
        temperature: number by which outputs are divided before they become probabilities; null where none is known.
        metrics: metric -> its value on held-out units.
    """

    settings: dict[str, Any]
    backbone: Name
    # Part of a file's name, as tasks and backbones are: it may not lead out of the folder.
    trunk: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}\.trunk$")] | None = None
    temperature: float | None = Field(default=None, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    metrics: dict[str, Metric] = {}


class ModelBackbone(Frozen):
    """One backbone of a model.

    Attributes:
        digest: 64 hex digits over its settings and weights.
        spec: its resolved settings, with the preprocessing and projection.
        source: its weights as the run file names them, a path as its last part; null where the site knows the digest
            only.
        licence: licence of its weights as the run file declares it; null where it does not.
        trainable: settings of the part that was trained; null where all is frozen.
    """

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    spec: dict[str, Any]
    source: str | None = None
    licence: str | None = None
    trainable: Trainable | None = None


class ModelPrivacy(Frozen):
    """The differential privacy that a model was trained with.

    Attributes:
        unit: what one budget protects.
        delta: delta of the run.
        relation: neighbouring relation.
        epsilon: site -> epsilon spent in the run, of the sites where it is known.
    """

    unit: Unit
    delta: float = Field(ge=0, le=1)
    relation: Relation = RELATION
    epsilon: dict[str, Annotated[float, Field(ge=0)] | None] = {}


class ModelStart(Frozen):
    """The beginning of a model that no run trained (`headwater start-from`).

    Attributes:
        prior: digest over the parameters of the model that it started from.
        names: whether a head was made from names of classes.
        records: whether labelled records had a part in a head, without noise: the model then never leaves its site.
    """

    prior: str
    names: bool
    records: bool


class ModelConfig(Frozen):
    """All that is known of a finished model but its numbers.

    Attributes:
        format: names this format.
        version: version of this format.
        run: id of the run that trained it.
        created: day on which it was written, as YYYY-MM-DD.
        seed: seed of the run.
        rounds: number of rounds that the run asked for.
        tasks: task -> what its head is.
        backbones: name -> what it is.
        privacy: how it was trained; null where the run was not private.
        solver: settings of the solver.
        heads: digest over all parameters, as the sites were sent it.
        files: file of a head, a trunk or moments -> its SHA-256.
        start: how it started from the run's model; null where it is the run's own.
    """

    format: Literal["headwater model"] = FORMAT
    version: Literal[1] = VERSION
    run: str
    created: str
    seed: int
    rounds: int
    tasks: dict[Name, ModelTask] = Field(min_length=1)
    backbones: dict[Name, ModelBackbone] = Field(min_length=1)
    privacy: ModelPrivacy | None = None
    solver: dict[str, Any] = {}
    heads: str
    files: dict[str, str]
    start: ModelStart | None = None

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("start",))

    @property
    def never_leaves(self) -> bool:
        """True where the model contains unnoised information of a site's records."""
        return self.start is not None and self.start.records

    @model_validator(mode="after")
    def _check_backbones(self) -> Self:
        if not {task.backbone for task in self.tasks.values()} <= set(self.backbones):
            raise ValueError("expected tasks on backbones of the model")
        return self


def describe_model(
    run: RunConfig,
    run_id: str,
    heads: Heads,
    backbones: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    digest: str,
    epsilon: Mapping[str, float | None],
    temperatures: Mapping[str, float],
    metrics: Mapping[str, Mapping[str, Metric]] | None = None,
) -> ModelConfig:
    """Returns what is to be known of a run's final heads.

    Args:
        run: settings of the run.
        run_id: id of the run.
        heads: final parameters of heads and trunks by name; a site has those of its own tasks.
        backbones: backbone name -> its digest and its resolved settings.
        digest: digest over all parameters.
        epsilon: site -> epsilon spent in the run.
        temperatures: task -> temperature, where one is known.
        metrics: task -> metric -> its value, where any are known.
    """
    names = [name for name in run.tasks if name in heads]
    asked = run.requested_privacy
    return ModelConfig(
        run=run_id,
        created=time.strftime("%Y-%m-%d"),
        seed=run.seed,
        rounds=run.rounds,
        tasks={
            name: ModelTask(
                settings=run.tasks[name].settings(),
                backbone=run.backbone_of(name),
                trunk=run.trunk_of(name),
                temperature=temperatures.get(name),
                metrics=dict((metrics or {}).get(name, {})),
            )
            for name in names
        },
        backbones={
            name: ModelBackbone(
                digest=backbones[name][0],
                spec=dict(backbones[name][1]),
                source=_name_source(run, name),
                licence=run.licences.get(name),
                trainable=run.trainable.get(name),
            )
            for name in dict.fromkeys(run.backbone_of(task) for task in names)
        },
        privacy=None if asked is None else ModelPrivacy(unit=asked.unit, delta=asked.delta, epsilon=dict(epsilon)),
        solver=run.solver.settings(),
        heads=digest,
        files={},
    )


def _name_source(run: RunConfig, backbone: str) -> str | None:
    weights = run.backbone_specs[backbone].settings().get("weights")
    return Path(weights).name if isinstance(weights, str) else None


def write_model(
    folder: Path,
    config: ModelConfig,
    heads: Heads,
    backbones: Mapping[str, BackboneBlob | Path],
    moments: Heads = MappingProxyType({}),
) -> None:
    """Writes a model's folder, in place of an earlier one; `config.json` comes last and marks a whole model.

    Args:
        folder: the model's folder.
        config: what is known of it; the digests of its files are added.
        heads: final parameters of heads and trunks by name.
        backbones: name -> the backbone as it travels, or the file of its weights, to which the model's becomes a second
            link where the file system allows it. One that is missing is left out.
        moments: what `common.model.class_moments.pack_class_moments` returned.
    """
    private_folder(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    for part in ("heads", "backbones", *(["moments"] if moments else [])):
        private_folder(folder / part)
    files = {}
    for part, groups in (("heads", heads), ("moments", moments)):
        for name, params in groups.items():
            content = save({key: np.asarray(array, dtype=np.float32, order="C") for key, array in params.items()})
            files[f"{part}/{name}.safetensors"] = hashlib.sha256(content).hexdigest()
            write_atomic(folder / part / f"{name}.safetensors", content)
    for name in config.backbones:
        given = backbones.get(name)
        if isinstance(given, Path):
            _link(given, folder / "backbones" / f"{name}.safetensors")
        elif given is not None:
            write_atomic(folder / "backbones" / f"{name}.safetensors", bytes(given.weights))
    whole = config.model_copy(update={"files": files})
    write_atomic(folder / CONFIG, (whole.model_dump_json(indent=2) + "\n").encode())


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        return  # Staff removed it: the heads are kept all the same.
    except OSError:
        write_atomic(target, source.read_bytes())


def find_model(path: Path) -> Path:
    """Returns the folder of a model, given itself or the folder of the run that it is the result of.

    Raises:
        BadInput: there is none.
    """
    for folder in (path, path / MODEL):
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists():
        raise BadInput(f"{path}: expected a model's folder or a finished run's, found nothing there")
    if (path / "journal.jsonl").is_file():
        raise BadInput(f"{path}: expected a finished run, got one without a model: it failed, or has not ended yet")
    raise BadInput(f"{path}: expected a model's folder, which has a {CONFIG}, or a finished run's")


def read_config(path: Path) -> ModelConfig:
    """Returns what is known of a model.

    Args:
        path: folder of the model, or of the run that it is the result of.

    Raises:
        BadInput: there is none, or it is of another format or version.
    """
    file = find_model(path) / CONFIG
    try:
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise BadInput(f"{file}: expected a Headwater model's config.json, got another one")
        if values.get("version") != VERSION:
            raise BadInput(f"{file}: expected version {VERSION} of the format, got {values.get('version')!r}")
        # JSON can hold halves of characters, which no file and no terminal takes.
        json.dumps(values, ensure_ascii=False).encode()
        return ModelConfig.model_validate(values)
    except (OSError, ValueError, RecursionError) as error:
        detail = f", got {error.error_count()} wrong or missing key(s)" if isinstance(error, ValidationError) else ""
        raise BadInput(f"{file}: expected a model's settings{detail or instead(error)}") from error


def refuse_home_model(path: Path, config: ModelConfig) -> None:
    """Raises BadInput where a model never leaves its site."""
    if config.never_leaves:
        raise BadInput(
            f"{path}: {NEVER_LEAVES}; `headwater predict` uses it here, and the model it started from may leave"
        )


def read_heads(path: Path, config: ModelConfig) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Returns the parameters of a model's heads and trunks by name, verified.

    Args:
        path: folder of the model, or of its run.
        config: what is known of it.

    Raises:
        BadInput: a file is missing.
        DigestMismatch: a file changed since the model was written.
    """
    folder = find_model(path)
    needed = [*config.tasks, *dict.fromkeys(task.trunk for task in config.tasks.values() if task.trunk is not None)]
    return {name: _read_params(folder, f"heads/{name}.safetensors", config) for name in needed}


def read_moments(path: Path, config: ModelConfig, task: Name) -> ClassMoments:
    """Returns what a model's run released of the classes of a task, verified.

    Args:
        path: folder of the model, or of its run.
        config: what is known of it.
        task: name of the task.

    Raises:
        BadInput: the model has no such task or no such moments, or a file is missing.
        DigestMismatch: a file changed since the model was written.
    """
    if task not in config.tasks:
        raise BadInput(f"task {task}: expected one of {', '.join(config.tasks)}")
    folder, backbone = find_model(path), config.tasks[task].backbone
    names = [
        name for name in (f"{task}{CLASSES}", f"{backbone}{SCATTER}") if f"moments/{name}.safetensors" in config.files
    ]
    groups = {name: _read_params(folder, f"moments/{name}.safetensors", config) for name in names}
    return unpack_class_moments(groups, task, backbone, len(config.tasks[task].settings.get("labels", ())))


def _read_params(folder: Path, name: str, config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    file = folder / name
    if not file.is_file():
        raise BadInput(f"{file}: expected a file of the model, found none")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != config.files.get(name):
        raise DigestMismatch(f"{file}: the file was changed since the model was written")
    try:
        return load(content)
    except (KeyError, SafetensorError, ValueError) as error:  # A key error: a type of numbers that numpy lacks.
        raise DigestMismatch(f"{file}: expected safetensors, got a damaged file") from error


def read_backbone(path: Path, name: str, config: ModelConfig, elsewhere: Path | None = None) -> BackboneBlob:
    """Returns one of a model's backbones as it travels, not verified yet (`common.model.backbones.load_blob`).

    Args:
        path: folder of the model, or of its run.
        name: the backbone's name.
        config: what is known of the model.
        elsewhere: file of the weights, or a folder with `NAME.safetensors` or `DIGEST.safetensors`, for a model that
            was handed on without them.

    Raises:
        BadInput: its weights are not there.
    """
    own, digest = find_model(path) / "backbones" / f"{name}.safetensors", config.backbones[name].digest
    candidates = [own]
    if elsewhere is not None:
        candidates += [elsewhere, elsewhere / f"{name}.safetensors", elsewhere / f"{digest}.safetensors"]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise BadInput(
            f"{own}: expected the weights of backbone {name}, found no file; name its safetensors file or a folder of "
            f"such files (digest {digest[:12]}...)"
        )
    spec = json.dumps(config.backbones[name].spec, sort_keys=True, separators=(",", ":"))
    return BackboneBlob(spec, found.read_bytes(), digest)
