"""Tries some of a site's records with the backbones of an offered run, before anything is spent.

Labels, units and sides are those of all records. Whether a backbone takes a record is tried with a sample of each side,
from which the counts are extrapolated; with `on_bad_record: stop` every record is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from client.config import SiteConfig
from client.data.backbone_store import BackboneStore
from client.data.encoding.encode import explain_one, list_inputs
from client.data.records import SIDES, PlacedRecord, RejectedRecord, Side, encode_labels
from client.data.snapshot import Survey
from client.data.sources import Source
from client.data.sources.parts.boundary import try_record
from common.backbones import Kind, ReadsColumns, WeightedKind
from common.inputs import Text
from common.model.backbones import Backbone, open_pretrained
from common.plugins import resolve
from common.run import RunConfig
from common.tasks import Task
from common.types import BadInput, BadRecord, WeightsNeeded

SAMPLE = 64
"""Records of a task on one side that are tried, evenly spaced over those that have a label."""

_FEWEST_PAIRS, _SWAPPED = 8, 0.9
"""Pairs of texts, and the part of them, from which on they count as swapped."""


@dataclass(frozen=True)
class OfferedBackbone:
    """A backbone of an offered run, as far as the site has it.

    Attributes:
        kind: its settings.
        preprocess: source item -> input.
        opened: the backbone with its weights; None where they are still to come.
        has_trunk: whether a part of it trains.
    """

    kind: Kind
    preprocess: Callable[[Any], Tensor] = field(repr=False)
    opened: Backbone | None = field(repr=False)
    has_trunk: bool


@dataclass(frozen=True)
class SideTrial:
    """The records of one task on one side.

    Attributes:
        num_records: number of records of the task's source.
        num_labelled: number of them with a label of the task.
        num_tried: number of labelled records that were tried.
        num_usable: number of labelled records that the backbone takes, extrapolated where not all were tried.
        num_units: number of units of those.
    """

    num_records: int
    num_labelled: int
    num_tried: int
    num_usable: int
    num_units: int


@dataclass(frozen=True)
class TaskTrial:
    """The outcome of trying one task of an offered run.

    Attributes:
        task: name of the task.
        backbone: name of the backbone on which it was tried.
        min_units: the fewest units to train on with which the site takes part.
        sides: side of the split -> its records.
        has_weights: whether records were encoded, not only preprocessed.
        refused: records that cannot be used, of those that were looked at.
        clipped: column -> number of usable records that were tried whose number lies beyond the run's range.
        is_swapped: whether the sources, rather than the texts to write, are of the language that is written.
    """

    task: str
    backbone: str
    min_units: int
    sides: Mapping[Side, SideTrial] = field(repr=False)
    has_weights: bool
    refused: tuple[RejectedRecord, ...] = field(repr=False)
    clipped: Mapping[str, int] = field(repr=False)
    is_swapped: bool

    @property
    def has_enough(self) -> bool:
        """True where there are enough units to train on."""
        return self.sides["train"].num_units >= self.min_units


def open_at_hand(config: SiteConfig, run: RunConfig, digests: Mapping[str, str]) -> dict[str, OfferedBackbone]:
    """Returns a run's backbones by name: with weights where the site has them or they need none.

    Args:
        config: settings of the site file, for the backbones that were received and the site's own.
        run: the offered run.
        digests: digest of each of its backbones.

    Raises:
        BadInput: the settings of one are wrong.
    """
    limit = int(config.backbone_limit_gib * 2**30)
    store = BackboneStore(config.coordinator_dir / "backbones", max_bytes=limit)
    return {name: _open_one(config, run, name, digest, store) for name, digest in digests.items()}


def _open_one(config: SiteConfig, run: RunConfig, name: str, digest: str, store: BackboneStore) -> OfferedBackbone:
    spec, key, has_trunk = run.backbone_specs[name], run.backbone_key(name), name in run.trainable
    kind: Kind = resolve("common.backbones", spec, key)
    if not isinstance(kind, WeightedKind):
        opened = open_pretrained(spec, key)
        return OfferedBackbone(kind, opened.preprocess, opened, has_trunk)
    try:
        at_hand = store.adopt(digest, config.own_backbones)
    except BadInput:
        at_hand = False  # Said when the site joins; without it the weights come from the coordinator.
    if at_hand:
        opened = store.open(digest)
        return OfferedBackbone(kind, opened.preprocess, opened, has_trunk)
    return OfferedBackbone(kind, kind.preprocess, None, has_trunk)


def try_tasks(
    config: SiteConfig,
    run: RunConfig,
    tasks: Mapping[str, Task],
    backbones: Mapping[str, OfferedBackbone],
    survey: Survey,
) -> list[TaskTrial]:
    """Tries the records of some tasks.

    Args:
        config: settings of the site file.
        run: the offered run.
        tasks: the run's tasks at this site, by name.
        backbones: the run's backbones, by name.
        survey: the site's records.

    Raises:
        BadInput: a source lacks the column of a task.
    """

    @cache
    def find_fault(source: str, backbone: str, position: int, encode: bool) -> str | None:
        return _find_fault(survey, source, backbones[backbone], position, encode)

    trials = []
    for name, backbone in [(task, backbone) for task in tasks for backbone in run.backbones_of(task)]:
        own, task = config.tasks[name], tasks[name]
        records = [each for each in survey.placed if each.source == own.source]
        labels = encode_labels(name, task, own, records)
        labelled = [each for each, has_label in zip(records, labels.mask_R.tolist(), strict=True) if has_label]
        refused = [each for each in labels.rejected if not each.is_used]
        sides: dict[Side, SideTrial] = {}
        clipped = Counter[str]()
        swapped = list[bool]()
        for at, side in enumerate(SIDES):
            here = [each for each in labelled if each.side == at]
            sample = _spread(here)
            swapped += _compare_languages(backbones[backbone], survey.sources[own.source], sample)
            encoded = {each.position for each in sample}
            tried = here if config.on_bad_record == "stop" else sample
            usable = []
            for each in tried:
                fault = find_fault(own.source, backbone, each.position, each.position in encoded)
                if fault is None:
                    usable.append(each)
                    clipped.update(list_clipped(backbones[backbone].kind, survey.sources[own.source], each.position))
                else:
                    refused.append(RejectedRecord(each.record.file, each.record.row, fault))
            sides[side] = SideTrial(
                num_records=sum(each.side == at for each in records),
                num_labelled=len(here),
                num_tried=len(tried),
                num_usable=_extrapolate(len(usable), len(tried), len(here)),
                num_units=_extrapolate(*(len({each.unit_key for each in some}) for some in (usable, tried, here))),
            )
        trials.append(
            TaskTrial(
                name,
                backbone,
                own.min_units,
                sides,
                backbones[backbone].opened is not None,
                tuple(refused),
                clipped,
                is_swapped=len(swapped) >= _FEWEST_PAIRS and sum(swapped) >= _SWAPPED * len(swapped),
            ),
        )
    return trials


def list_clipped(kind: Kind, source: Source, position: int) -> list[str]:
    """Returns the columns of a record whose number lies beyond the range that a backbone declares for it.

    Args:
        kind: the backbone's settings.
        source: where the record is.
        position: its position in the source's index.

    Raises:
        BadRecord: the record cannot be read.
    """
    if not isinstance(kind, ReadsColumns) or not kind.list_columns():
        return []
    return kind.list_clipped(source.load(position))


def _compare_languages(backbone: OfferedBackbone, source: Source, records: Sequence[PlacedRecord]) -> list[bool]:
    """Returns for each pair of texts whether its source takes fewer tokens a character than what is to be written.

    A text of the language that is written takes few, because the vocabulary was made for it. Nothing is returned
    without the vocabulary, and for records that are no pairs or cannot be read.
    """
    language = None if backbone.opened is None else backbone.opened.language
    if language is None:
        return []

    def compare(position: int) -> bool | None:
        item = source.load(position)
        if not isinstance(item, Text) or not item.first or not item.second:
            return None
        first, second = (len(language.read(text)) / len(text) for text in (item.first, item.second))
        return first < second

    found = (try_record(lambda each=each: compare(each.position))[0] for each in records)  # type: ignore[misc]
    return [each for each in found if each is not None]


def _spread(records: Sequence[PlacedRecord]) -> list[PlacedRecord]:
    """Returns some of the records, evenly spaced."""
    count = min(SAMPLE, len(records))
    return [records[round(at)] for at in np.linspace(0, len(records) - 1, count)]


def _extrapolate(usable: int, tried: int, count: int) -> int:
    """Returns the number of usable ones among all, from a sample; zero only where the sample has none."""
    return math.ceil(count * usable / tried) if tried else 0


def _find_fault(survey: Survey, source: str, backbone: OfferedBackbone, position: int, encode: bool) -> str | None:
    """Returns why a record cannot be used; None where it can, or where that is not yet known without weights."""

    def try_one() -> None:
        item = survey.sources[source].load(position)
        try:
            bag = None if backbone.opened is None else backbone.opened.bag
            has_places = backbone.opened is not None and bool(backbone.opened.grid) and bag is None
            one = explain_one(has_trunk=backbone.has_trunk, has_places=has_places)
            inputs = list_inputs(item, backbone.preprocess, bag=bag, one=one)
        except WeightsNeeded:
            return
        if encode and backbone.opened is not None and not backbone.opened.encode_items(inputs).isfinite().all():
            raise BadRecord("features are not finite")

    return try_record(try_one)[1]
