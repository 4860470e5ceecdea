"""Judges the text that a pre-trained model hears by itself, without a head or training, in held-out recordings.

Its text is brought into the form of the labels and judged as predictions are. Allowed nothing but pieces of the task's
own symbols, which are public, it is the fair one to compare a head with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from client.config import SiteConfig
from client.data.records import SIDES
from client.data.snapshot import open_snapshot, survey_sources
from client.data.sources.parts.boundary import try_record
from common.backbones import Hears
from common.events import Metrics
from common.plugins import resolve
from common.run import RunConfig
from common.tasks import HeardTexts, Task
from common.types import BadInput

Observe = Callable[[str, int, int], None]


def compute_untouched(
    run: RunConfig,
    tasks: Mapping[str, Task],
    sites: Sequence[SiteConfig],
    *,
    restricted: bool,
    observe: Observe,
) -> dict[str, Metrics]:
    """Returns task -> metrics of all sites' held-out recordings together.

    Args:
        run: the run, whose backbones' folders hold the whole models.
        tasks: task -> its definition; those that are no texts that are heard are left out.
        sites: sites whose held-out records are heard.
        restricted: allows nothing but pieces of the task's own symbols.
        observe: told how far it is.

    Raises:
        BadInput: there is no such task, or its backbone is no part of a model that writes what it hears.
    """
    found: dict[str, Metrics] = {}
    for name, task in tasks.items():
        if not isinstance(task, HeardTexts):
            continue
        key = run.backbone_of(name)
        kind = resolve("common.backbones", run.backbone_specs[key], f"run.backbones.{key}")
        if not isinstance(kind, Hears):
            raise BadInput(f"baselines: expected for `untouched` a backbone of kind transformers for task {name}")
        hear = kind.open_transcriber(task.allows_piece if restricted else None)
        pairs: list[tuple[str, str]] = []
        for number, site in enumerate(sites):
            observe(f"untouched model, {name}", number, len(sites))
            pairs += _hear_site(site, name, task, hear)
        observe(f"untouched model, {name}", len(sites), len(sites))
        found[name] = task.compare_heard(pairs)
    if not found:
        raise BadInput("baselines: expected for `untouched` a task of kind ctc, got none")
    return found


def _hear_site(site: SiteConfig, name: str, task: HeardTexts, hear: Callable[..., str]) -> list[tuple[str, str]]:
    """Returns what was heard and what was said in the held-out recordings of a site that have a usable transcript."""
    own = site.tasks.get(name)
    if own is None:
        return []
    config = site.model_copy(update={"sources": {own.source: site.sources[own.source]}})
    survey = survey_sources(config)
    placed, _ = open_snapshot(site, [own.source]).place(survey.placed, site.unit)
    pairs = []
    for each in placed:
        if SIDES[each.side] != "test":
            continue
        cell = each.record.cells[own.columns[0]].strip()
        said, _ = try_record(lambda cell=cell: task.read_text(own.read_cell(own.columns[0], cell)))  # type: ignore[misc]
        if said is None or (not cell and own.missing != "read"):
            continue
        heard, _ = try_record(lambda each=each: hear(survey.sources[each.source].load(each.position)))  # type: ignore[misc]
        pairs.append((heard or "", said))
    return pairs
