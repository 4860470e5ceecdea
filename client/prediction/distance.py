"""The distance of a site's own training records from means that may be known (`common.serving.means`).

The site's mean is exact and is neither kept nor sent. Its units are those that it trains on: a patient counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from client.data.prepare import Encoding, open_units, prepare
from client.data.units import Units
from client.personal.evaluate import find_last_run
from client.protocol.site import MODELS, Site, joined_run
from client.solvers.parts.moments import pool_features
from common.files import private_folder
from common.model.moments import CLASSES, has_classes
from common.serving.folder import CONFIG, MODEL, find_model, read_config, read_moments
from common.serving.means import FeatureMean, MeanDistance, combine_means, compute_distance, read_means, select_backbone
from common.serving.network import open_model
from common.serving.similarity import ALL
from common.tasks import open_task
from common.types import BadInput


@dataclass(frozen=True)
class OwnDistance:
    """The distance of the site's records from one mean.

    Attributes:
        mean: the mean.
        distance: the distance; its noise is the mean's alone.
    """

    mean: FeatureMean
    distance: MeanDistance


@dataclass(frozen=True)
class _PreparedUnits:
    """Training units with features of frozen backbones.

    Attributes:
        units: the units.
        digest_of: task -> digest of its backbone.
        model: folder of the model that the tasks are of; perhaps there is none.
    """

    units: Units = field(repr=False)
    digest_of: Mapping[str, str]
    model: Path


def measure_distances(
    site: Site, files: Sequence[Path], *, run_id: str | None = None, model: Path | None = None
) -> list[OwnDistance]:
    """Returns how far the site's training records are from the means in some files; nothing is sent, kept or spent.

    Args:
        site: the site.
        files: home files, and means that a run left; what the model holds of all its sites' classes is taken beside.
        run_id: id of a run that the site joined; by default the one whose final heads arrived last.
        model: a model's folder in place of a run; records are encoded with its backbones, and features are cached.

    Raises:
        BadInput: a file holds no means, or means of other backbones; the site has no such run, or no records.
        SiteDeclined: the site did not join the run.
        DigestMismatch: the model was changed.
    """
    opened = {file: read_means(file) for file in files}
    prepared = _open_run(site, run_id) if model is None else _encode_with_model(site, model)
    digests = set(prepared.digest_of.values())
    means = []
    for file, listed in opened.items():
        chosen = select_backbone(listed, digests, file)
        means += chosen
        for digest in sorted(digests):
            sites = [each for each in chosen if each.digest == digest and not each.is_home]
            means += [combine_means(sites, ALL)] if len(sites) > 1 else []
    means += _read_released(prepared)
    if not means:
        raise BadInput(
            "--to: expected a home file or a run's means, because the model holds no moments of classes "
            "(`moments.classes` of a run file)"
        )
    own = {digest: _compute_mean(prepared, digest) for digest in sorted(digests)}
    return [OwnDistance(each, compute_distance(own[each.digest], each)) for each in means]


def _compute_mean(prepared: _PreparedUnits, digest: str) -> FeatureMean:
    """Returns the exact mean of the site's units, as a release before the first round is one with noise."""
    tasks = [name for name in prepared.units.tasks if prepared.digest_of[name] == digest]
    records = [prepared.units.tasks[name] for name in tasks]
    count = len(torch.unique(torch.cat([each.unit_R for each in records])))
    if count == 0:
        raise BadInput(f"tasks.{tasks[0]}: expected records to train on, whose distance can be measured, got none")
    pooled = pool_features(records)
    sum_D = (pooled.weight_R.double()[:, None] * pooled.features_RD.double()).sum(0)
    return FeatureMean("here", digest, (sum_D / count).numpy(), 0.0, count, "training records, exact")


def _read_released(prepared: _PreparedUnits) -> list[FeatureMean]:
    """Returns for each task the mean over all sites of its run, where the model holds the sums of its classes."""
    if not (prepared.model / CONFIG).is_file():
        return []
    config, means = read_config(prepared.model), []
    for name in prepared.units.tasks:
        task = open_task(config.tasks[name].settings, f"tasks.{name}") if name in config.tasks else None
        if f"moments/{name}{CLASSES}.safetensors" in config.files and task is not None and has_classes(task):
            moments = read_moments(prepared.model, config, name)
            # A record is of one class: the sum over classes is that over records.
            deviation = moments.sums_deviation * math.sqrt(len(moments.counts_C)) / moments.units
            mean_D, digest = moments.sums_CD.sum(0) / moments.units, prepared.digest_of[name]
            source = f"all sites of the run, labelled for {name}, noised"
            means.append(FeatureMean(config.run, digest, mean_D, deviation, moments.units, source))
    return means


def _open_run(site: Site, run_id: str | None) -> _PreparedUnits:
    joined = joined_run(site, run_id or find_last_run(site))
    tasks = joined.tasks(site.config)
    units = open_units(joined.folder / "data", "train", list(tasks), torch.device("cpu"))
    trained = sorted({joined.run.backbone_of(name) for name in tasks} & set(joined.run.trainable))
    if trained:
        raise BadInput(
            f"run {joined.run_id}: expected frozen backbones, got {trained[0]}, of which a part trains: means of its "
            "features are never released"
        )
    digest_of = {name: joined.backbones[joined.run.backbone_of(name)] for name in tasks}
    return _PreparedUnits(units, digest_of, joined.folder / MODEL)


def _encode_with_model(site: Site, path: Path) -> _PreparedUnits:
    """Returns the site's training units with the features of a model's backbones: also of a site in no run."""
    model = open_model(path)
    tasks = {name: task for name, task in model.tasks.items() if name in site.config.tasks}
    if not tasks:
        raise BadInput(f"tasks: expected one of the model's, {', '.join(model.tasks)}, got none in the site file")
    of_task = {name: model.config.tasks[name].backbone for name in tasks}
    trained = sorted(name for name in set(of_task.values()) if model.config.backbones[name].trainable is not None)
    if trained:
        raise BadInput(f"{path}: expected frozen backbones, got {trained[0]}, of which a part was trained")
    backbones = {name: model.backbones[of_task[name]] for name in tasks}
    encoding = Encoding(site.features(), site.device(), site.progress)
    # Where a purge finds it, if this process is killed.
    place = private_folder(site.config.state_dir / MODELS)
    with TemporaryDirectory(dir=place) as folder:
        prepare(site.config, tasks, backbones, encoding, Path(folder) / "data")
        units = open_units(Path(folder) / "data", "train", list(tasks), torch.device("cpu"))
    with suppress(OSError):  # There may be others' folders.
        place.rmdir()
    return _PreparedUnits(units, {name: each.digest for name, each in backbones.items()}, find_model(path))
