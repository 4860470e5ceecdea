"""A site's records as their sources list them: who is there, on which side, and what is wrong. None is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from client.config import SiteConfig
from client.data.exclusions import Exclusions
from client.data.records import PlacedRecord, RejectedRecord, UsableRecord, find_usable, place_records, select_rows
from client.data.sources import Source, open_source


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
