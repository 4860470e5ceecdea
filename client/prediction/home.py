"""A site's own run as a model at this site: its personal heads where it has them, and its own sources' records.

Nothing is sent and nothing is spent. Who was excluded at the site is neither read nor named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from client.data.encoding.encode import EncodedRecords
from client.data.exclusions import Exclusions
from client.data.feature_store import Features, decode_rows
from client.data.records import SIDES, select_rows
from client.data.snapshot import open_snapshot, survey_sources
from client.data.sources import Source, open_source
from client.personal.adopt import locate_adopted
from client.personal.evaluate import find_last_run, load_final_request
from client.personal.personal_heads import AT_HOME, load_personal_heads, open_personal_head
from client.prediction.data import Records
from client.prediction.records import Chosen, Part, encode_now, resolve
from client.protocol.prepare import keep_model
from client.protocol.site import FINAL_HEADS, PERSONAL_HEADS, Site, SiteDeclined, joined_run
from common.model.backbones import Backbone
from common.serving.folder import CONFIG, MODEL
from common.serving.network import Model, ServedHead, open_model
from common.types import BadInput, DigestMismatch

Choice = Literal["test", "train", "all"]
"""A choice among a site's own records: those of a side of the split, or all."""

_ROWS = 1024
"""Cached features that are read at once."""


@dataclass(frozen=True)
class HomeModel:
    """A model at the site that it serves.

    Attributes:
        model: the model.
        folder: its folder.
        heads: whose its heads are, in words.
    """

    model: Model
    folder: Path
    heads: str


def open_home_model(site: Site, run_id: str | None, device: torch.device, *, federated: bool) -> HomeModel:
    """Returns the model of a run that ended at a site, with the site's personal heads where its file asks for them.

    Personal heads have no temperature: `prior` and `fit` are fitted by their probabilities to the site's own records,
    and of `tied` none is known.

    Args:
        site: the site.
        run_id: id of the run; None takes the one whose final heads arrived last.
        device: device that encodes.
        federated: takes the shared heads in any case.

    Raises:
        BadInput: no such run, or it has not ended here, or its personal heads are missing or were made in another way.
        DigestMismatch: a file changed since it was written.
    """
    chosen = run_id or find_last_run(site)
    try:
        joined = joined_run(site, chosen)
    except SiteDeclined as declined:
        raise BadInput(f"--run {chosen}: {declined.detail}") from declined
    folder = joined.folder / MODEL
    request = load_final_request(joined.folder)
    if not (folder / CONFIG).is_file():
        keep_model(site, joined, request)  # A run of an earlier version ended without it.
    model = open_model(folder, device)
    if site.config.precision != "float32":
        backbones = {name: backbone.at(site.config.precision) for name, backbone in model.backbones.items()}
        model = replace(model, backbones=backbones)
    mode = site.config.personal
    if federated or mode == "none":
        return HomeModel(model, folder, f"run {chosen}, federated heads")
    return HomeModel(_add_personal_heads(model, joined.folder, mode), folder, f"run {chosen}, personal heads ({mode})")


def find_adopted_heads(site: Site, model: Model, folder: Path) -> HomeModel | None:
    """Returns a model with the heads that a site which took part in no run adapted; None where it has adapted none.

    Args:
        site: the site.
        model: the model.
        folder: its folder.

    Raises:
        BadInput: the heads were made in another way than the site file says.
        DigestMismatch: they are damaged, or were made from other heads.
    """
    mode, own = site.config.personal, locate_adopted(site.config, model)
    if mode == "none" or not (own / PERSONAL_HEADS).exists():
        return None
    adapted = _add_personal_heads(model, own, mode, partly=True)
    return HomeModel(adapted, folder, f"personal heads ({mode}) of {', '.join(adapted.tasks)}")


def refuse_home_files(path: Path) -> None:
    """Raises BadInput where a path names what serves at its own site only, or a site's run without a model."""
    if path.name == PERSONAL_HEADS:
        raise BadInput(
            f"{path}: personal heads serve at their own site only: name the site's file with --site in place of MODEL"
        )
    if (path / FINAL_HEADS).is_file() and not (path / MODEL / CONFIG).is_file():
        raise BadInput(f"{path}: expected a model, got a site's run of an earlier version; --site and --run open it")


def _add_personal_heads(model: Model, folder: Path, mode: str, *, partly: bool = False) -> Model:
    """Returns a model with the personal heads of a site's folder; `partly`: the others of its tasks keep theirs."""
    remedy = "`headwater site adapt` makes them anew, and --federated takes the shared heads"
    try:
        personal = load_personal_heads(folder, purpose=AT_HOME)
    except BadInput as error:
        raise BadInput(f"{error}, and --federated takes the shared heads") from error
    if personal.mode != mode:
        raise BadInput(
            f"run {folder.name}: expected personal heads as the site file says, {mode}, got {personal.mode}; {remedy}"
        )
    fits = set(personal.heads) <= set(model.tasks) if partly else set(personal.heads) == set(model.tasks)
    if personal.final_heads != model.config.heads or not fits:
        raise DigestMismatch(f"run {folder.name}: the personal heads were made from other final heads; {remedy}")
    heads = dict(model.heads)
    for name, task in model.tasks.items():
        if name not in personal.heads:
            continue
        dim = model.backbones[model.config.tasks[name].backbone].feature_dim
        heads[name] = ServedHead(task, open_personal_head(personal.heads[name], task, dim), None)
    return replace(model, heads=heads)


def open_home_records(
    site: Site, model: Model, tasks: Sequence[str], choice: Choice, source: str | None = None
) -> Records:
    """Returns a site's own records, as its file's sources say.

    Args:
        site: the site.
        model: the model.
        tasks: names of tasks.
        choice: held-out records, those that were trained on, or all: also what is new since the last check.
        source: name of one of the site's sources, for all tasks.

    Raises:
        BadInput: a source cannot be opened, there is none for a task, or the site file was changed since the check.
    """
    config = site.config
    if source is not None and source not in config.sources:
        raise BadInput(f"--source: expected one of {', '.join(config.sources)}, got {source!r}")
    of_task = {
        task: source or config.tasks[task].source for task in tasks if source is not None or task in config.tasks
    }
    if not of_task:
        raise BadInput(f"tasks: expected one of the site file's, got {', '.join(tasks)}; --source names their source")
    names = [name for name in config.sources if name in of_task.values()]
    exclusions = Exclusions.read(config.state_dir)
    survey = survey_sources(config.model_copy(update={"sources": {name: config.sources[name] for name in names}}))
    placed, _ = open_snapshot(config, names).place(survey.placed, config.unit)
    parts, notes, rejected = [], [], []
    for name in names:
        whole = survey.sources[name]
        side_of = {each.position: SIDES[each.side] for each in placed if each.source == name}
        if choice == "all":
            index = whole.index()
            rows = open_source(config.sources[name], f"sources.{name}", config.plugins).rows
            chosen, others = select_rows(rows, index, exclusions.positions(index))
            rejected += others
        else:
            chosen = {position: side for position, side in side_of.items() if side == choice}
        positions = sorted(chosen)
        own = [task for task in tasks if of_task.get(task) == name]
        sides = [side_of.get(position, "") for position in positions]
        parts.append(Part(name, Chosen(whole, positions), own, sides))
        notes.append(f"source {name}: {', '.join(own)}; {_describe(choice)}")
    if not any(part.sides for part in parts):
        raise BadInput(f"--split {choice}: expected records of the site, got none; --split all takes all")
    left_out = [f"task {task}: left out, it is not in the site file" for task in tasks if task not in of_task]
    return Records(parts, [*notes, *left_out], rejected)


def exclude_records(site: Site, records: Records) -> Records:
    """Returns records without those of whom the site was told to leave out."""
    exclusions = Exclusions.read(site.config.state_dir)
    return replace(records, parts=[_exclude(exclusions, part) for part in records.parts])


def _exclude(exclusions: Exclusions, part: Part) -> Part:
    index = part.source.index()
    left_out = exclusions.positions(index)
    if not left_out:
        return part
    return replace(part, source=Chosen(part.source, [at for at in range(len(index)) if at not in left_out]))


def _describe(choice: Choice) -> str:
    return {"test": "held-out records", "train": "records that were trained on", "all": "all records"}[choice]


@dataclass(frozen=True)
class StoredFeatures:
    """Reads the features of a site's own records from its cache; what is not there is encoded, and kept.

    Attributes:
        site: the site.
        model: the model, with its backbones on the device that encodes.
    """

    site: Site
    model: Model = field(repr=False)

    def encode(self, source: Source, name: str, backbone: Backbone) -> Iterator[EncodedRecords]:
        """Yields the features of a source's records; of a backbone with a trained part they are computed now.

        Args:
            source: the records.
            name: name of the backbone.
            backbone: the backbone.
        """
        if self.model.config.backbones[name].trainable is not None:
            yield from encode_now(source, name, backbone)
            return
        whole, positions = resolve(source)
        features = self.site.features().open_or_encode(
            whole,
            backbone,
            device=backbone.device,
            precision=self.site.config.precision,
            bits=self.site.config.cache_bits,
            progress=self.site.progress,
        )
        for first in range(0, len(positions), _ROWS):
            yield _read_rows(features, positions[first : first + _ROWS], first)


def _read_rows(features: Features, positions: Sequence[int], first: int) -> EncodedRecords:
    kept = [at for at, position in enumerate(positions) if position not in features.unusable]
    unusable = {
        first + at: features.unusable[position]
        for at, position in enumerate(positions)
        if position in features.unusable
    }
    rows_BD = decode_rows(np.array(features.rows_N[[positions[at] for at in kept]])).numpy()
    return EncodedRecords([first + at for at in kept], rows_BD, unusable, first + len(positions))
