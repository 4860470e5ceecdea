"""A few pictures on which predictions about their places are drawn, for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from client.config import LabelColumns
from client.data.sources.parts.boundary import try_record
from client.personal.report import find_reported_run
from client.prediction.data import Records, open_records
from client.prediction.home import open_home_model, open_home_records
from client.prediction.places import make_legend, open_picture
from client.prediction.records import Part
from client.protocol.site import Site, SiteDeclined, joined_run
from common.inputs import spread
from common.report.figures import Figure
from common.report.overlays import draw_overlay, is_drawable, show_pictures
from common.report.page import Section, count_of
from common.serving.network import Model, open_model
from common.tasks import reads_places
from common.types import BadInput, DigestMismatch

if TYPE_CHECKING:
    from pathlib import Path


_MOST = 6
"""Pictures of each task that are shown."""


def show_home_gallery(site: Site, run_id: str | None) -> list[Section]:
    """Returns the section with held-out pictures of a site, as labelled and as the federated head predicts them.

    Args:
        site: the site.
        run_id: id of the run; by default the one that the site's report is about.

    Returns:
        The section; none where the run has not ended, or predicts neither masks nor boxes.
    """
    chosen = run_id or find_reported_run(site.config)
    if chosen is None:
        return []
    try:
        # Most runs have no such task: their backbones are not opened.
        if not any(reads_places(task) for task in joined_run(site, chosen).tasks(site.config).values()):
            return []
        model = open_home_model(site, chosen, torch.device("cpu"), federated=True).model
        tasks = [task for task in list_drawable(model) if task in site.config.tasks]
        if not tasks:
            return []
        records = open_home_records(site, model, tasks, "test")
    except (BadInput, DigestMismatch, SiteDeclined):
        return []  # The results say why there are none.
    lead = (
        "Held-out pictures of this site, evenly spread over all of them: left as they are labelled, right as the "
        "federated head predicts them. They show what a metric hides; few of them prove nothing."
    )
    return [_make_section(model, tasks, records, site.config.tasks, lead)]


def show_public_gallery(run: Path, pictures: Path) -> list[Section]:
    """Returns the section with public pictures, as a run's model predicts them.

    Args:
        run: the run's folder.
        pictures: a file or folder, as `headwater predict --data` takes it.

    Raises:
        BadInput: the run has no model, or it predicts neither masks nor boxes, or there is nothing that can be read.
    """
    model = open_model(run)
    tasks = list_drawable(model)
    if not tasks:
        raise BadInput(f"--pictures: expected a run that predicts masks or boxes, got {', '.join(model.tasks)}")
    lead = "Public pictures that whoever made this page named; no site's record is among them."
    return [_make_section(model, tasks, open_records(model, pictures, tasks=tasks), {}, lead)]


def list_drawable(model: Model) -> list[str]:
    """Returns the tasks whose predictions can be drawn on their picture."""
    return [task for task in model.tasks if is_drawable(model.make_any_cell(task))]


def _make_section(
    model: Model, tasks: Sequence[str], records: Records, labels: Mapping[str, LabelColumns], lead: str
) -> Section:
    """Returns a section with some of the pictures of each task.

    Args:
        model: the model.
        tasks: tasks whose predictions can be drawn.
        records: the pictures.
        labels: task -> its columns, where pictures are labelled.
        lead: what the section says first.
    """
    figures, lost = [], 0
    for part in records.parts:
        for task in part.tasks:
            if task not in tasks:
                continue
            for number, position in enumerate(spread(len(part.source.index()), _MOST), start=1):
                figure, _ = try_record(
                    lambda part=part, at=position, task=task, number=number: _draw(  # type: ignore[misc]
                        model, part, at, task, labels.get(task), f"Task {task}: picture {number}"
                    )
                )
                figures += [] if figure is None else [figure]
                lost += figure is None
    remarks = [f"{count_of(lost, 'picture')} could not be read."] if lost else []
    return Section("Pictures", lead, figures, remarks=remarks)


def _draw(model: Model, part: Part, position: int, task: str, own: LabelColumns | None, caption: str) -> Figure:
    """Returns a picture as it is labelled, where it is, beside what is predicted. Raises BadRecord."""
    item = part.source.load(position)
    picture, legend = open_picture(item), make_legend(model, task)
    drawn = [draw_overlay(picture, _predict(model, task, item), legend)]
    described = "as predicted"
    if own is not None:
        cell = own.read_cell(own.columns[0], part.source.index()[position].cells[own.columns[0]].strip())
        drawn = [draw_overlay(picture, cell, legend) if is_drawable(cell) else picture, *drawn]
        described = "as labelled (left) and as predicted (right)"
    return show_pictures(drawn, caption, f"{caption}, {described}")


def _predict(model: Model, task: str, item: Any) -> str:
    features_1GGD = model.encode(model.config.tasks[task].backbone, [item])
    with torch.inference_mode():
        ((cell,),) = model.tasks[task].codec.decode(model.heads[task].compute_outputs(features_1GGD))
    return cell
