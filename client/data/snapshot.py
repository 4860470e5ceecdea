"""A site's units when its staff last looked: who is there, and on which side. No record is opened.

`check`, `approve` and, where no approval is needed, `start` freeze them in the state folder. A run is prepared with
these units on these sides, so that a record that came later changes nothing for the others, and none stops a run. The
file holds keyed digests of the units' names; who reads it with its key can try ids.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from client.config import SiteConfig
from client.data.exclusions import Exclusions
from client.data.records import PlacedRecord, RejectedRecord, UsableRecord, find_usable, place_records, select_rows
from client.data.sources import Source, open_source
from common.errors import instead
from common.files import private_folder, write_atomic
from common.inputs import encode_text
from common.types import BadInput, Unit

SNAPSHOT = "snapshot.json"
_KEY_BYTES, _DIGEST_CHARS = 32, 32
_REMEDY = "run `headwater site check`"


@dataclass(frozen=True)
class Survey:
    """The records of all of a site's sources.

    Attributes:
        sources: name -> opened source, without excluded records.
        placed: records that have a unit, each on its side of the split.
        rejected: the others.
    """

    sources: Mapping[str, Source] = field(repr=False)
    placed: tuple[PlacedRecord, ...] = field(repr=False)
    rejected: tuple[RejectedRecord, ...] = field(repr=False)


def survey_sources(config: SiteConfig) -> Survey:
    """Opens every source and places its records; none of them is loaded.

    Raises:
        BadInput: a source cannot be opened, or lacks what the site file names.
    """
    exclusions = Exclusions.read(config.state_dir)
    sources: dict[str, Source] = {}
    usable: list[UsableRecord] = []
    rejected: list[RejectedRecord] = []
    for name, spec in config.sources.items():
        kind = open_source(spec, f"sources.{name}", config.plugins)
        sources[name] = exclusions.applied(kind.open())
        index = sources[name].index()
        sides, unlisted = select_rows(kind.rows, index, exclusions.positions(index))
        found, others = find_usable(name, index, sides, {}, config.unit)
        usable += found
        rejected += unlisted + others
    placed, others = place_records(usable, config.split, config.unit)
    return Survey(sources, tuple(placed), (*rejected, *others))


@dataclass(frozen=True)
class Snapshot:
    """The units that a site takes part with, and their sides, as they were when its staff last looked.

    Attributes:
        time: when that was, seconds since 1970.
        key: key of the digests.
        structure: source -> digest of what the site file says of it.
        sides: keyed digest of each unit's name (see `name_units`) -> index in SIDES.
    """

    time: float
    key: bytes = field(repr=False)
    structure: Mapping[str, str] = field(repr=False)
    sides: Mapping[str, int] = field(repr=False)

    def place(self, records: Sequence[PlacedRecord], unit: Unit) -> tuple[list[PlacedRecord], list[RejectedRecord]]:
        """Returns the records of known units, each on its unit's frozen side, and rejects those of new units.

        Args:
            records: usable records, placed as if there were no snapshot.
            unit: unit that the privacy budget protects.
        """
        reason = f"new since the check of {_format_date(self.time)}; run `headwater site check`"
        known, new = [], []
        for each, name in zip(records, name_units(records, unit), strict=True):
            side = self.sides.get(_digest_unit(self.key, name))
            if side is None:
                new.append(RejectedRecord(each.record.file, each.record.row, reason))
            else:
                known.append(replace(each, side=side))
        return known, new


def freeze_snapshot(config: SiteConfig, survey: Survey) -> Snapshot:
    """Keeps the units of a survey as those that the site takes part with until the next one, and returns them."""
    key = os.urandom(_KEY_BYTES)
    names = name_units(survey.placed, config.unit)
    snapshot = Snapshot(
        time=time.time(),
        key=key,
        structure={name: _digest_structure(config, name) for name in survey.sources},
        sides={_digest_unit(key, name): each.side for each, name in zip(survey.placed, names, strict=True)},
    )
    content = {**vars(snapshot), "key": key.hex()}
    write_atomic(private_folder(config.state_dir) / SNAPSHOT, json.dumps(content).encode())
    return snapshot


def open_snapshot(config: SiteConfig, sources: Iterable[str]) -> Snapshot:
    """Returns the site's snapshot; where nobody made one yet, it is made now.

    Args:
        config: settings of the site file.
        sources: names of the sources that are needed.

    Raises:
        BadInput: it is damaged, or the site file says something else of a source since; neither depends on a record.
    """
    try:
        content = json.loads((config.state_dir / SNAPSHOT).read_bytes())
        snapshot = Snapshot(**{**content, "key": bytes.fromhex(content["key"])})
    except FileNotFoundError:
        return freeze_snapshot(config, survey_sources(config))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{SNAPSHOT}: expected the units of the last check{instead(error)}; {_REMEDY}") from None
    for name in sources:
        if snapshot.structure.get(name) != _digest_structure(config, name):
            since = _format_date(snapshot.time)
            raise BadInput(f"sources.{name}: the site file was changed since the check of {since}; {_REMEDY}")
    return snapshot


def name_units(records: Sequence[PlacedRecord], unit: Unit) -> list[str]:
    """Returns, for each record, the name of its unit, which stays when records are added, moved or exported again.

    A patient has one name in all sources. Of equal records that are units of their own, each has another name.

    Args:
        records: records of all sources.
        unit: unit that the privacy budget protects.
    """
    if unit is Unit.PATIENT:
        return [each.unit_key for each in records]
    names, equal = [""] * len(records), Counter[str]()
    for at in sorted(range(len(records)), key=lambda at: (records[at].source, records[at].position)):
        key = f"record {records[at].source} {records[at].record.key}"
        equal[key] += 1
        names[at] = f"{key} {equal[key]}"
    return names


def _digest_unit(key: bytes, name: str) -> str:
    return hmac.new(key, encode_text(name), hashlib.sha256).hexdigest()[:_DIGEST_CHARS]


def _digest_structure(config: SiteConfig, source: str) -> str:
    said = [config.sources[source].model_dump(mode="json"), config.split.model_dump(mode="json"), config.unit.value]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _format_date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
